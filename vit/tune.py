"""`vitriton tune`: the fastest tiles of each kernel on the user's card, for the user's shapes, kept for later runs.

Tiles: for each kernel that the shapes launch, uphill from those of configs.py (kernels/tune.py). Every candidate's
answers are held to the plain formula before it is timed. Then LayerNorm + Linear in one kernel is set beside PyTorch's
LayerNorm and Linear one by one. What wins by more than the noise is kept (kernels/tuned.py), and every later launch on
this card takes it.
"""

import time
from dataclasses import asdict, dataclass, field

import torch

from ..kernels import explain, tuned, use_backend
from ..kernels.configs import tiles as tiles_of
from ..kernels.launch import chip_of, triton
from ..kernels.tune import LEAST_GAIN, Asked, gain_over, search
from .bench.functions import QUESTIONS
from .bench.race import Case, Race
from .bench.run import DTYPES, listed, whole_numbers
from .bench.sizes import Shape, parse_model
from .console import Console, Problem, progress_bar
from .measure import describe, pick_device, quantiles
from .timing import GPUClock, measure

FUNCTIONS = ("qkv_attention", "layer_norm_linear", "layer_norm_linear_gelu")


@dataclass
class Tuning:
    """What was found: `searches` {key: Search}, `splits` {key: gain of the split form}, `winners` as tuned.py keeps."""

    searches: dict = field(default_factory=dict)
    splits: dict = field(default_factory=dict)
    winners: dict = field(default_factory=dict)


def tune(args):
    """Tune with the arguments of cli.add_tune; returns the exit code."""
    started = time.perf_counter()
    device = pick_device(args.device)
    if triton is None:
        raise Problem("needs Triton, which cannot be imported here: pip install triton (Linux)")
    if device.type == "cpu":
        raise Problem(
            "PyTorch finds no GPU here, and only the kernels on a GPU have tiles to tune; on a CPU nothing is to do"
        )
    torch.get_device_module(device).set_device(device)
    device = torch.empty(0, device=device).device  # with its index, as launches see it
    cases = plan(args)
    console = Console(args.json)
    console.say(f"on {describe(device)}, Triton {triton.__version__}")
    console.say(f"vitriton runs there as: {explain(torch.empty(0, device=device, dtype=cases[0].dtype))}")
    return run(cases, device, GPUClock(device), console, started, most=args.most, dry_run=args.dry_run)


def run(cases, device, clock, console, started, *, most, dry_run):
    """Tune for `cases`, say what was found, keep it, and return the exit code."""
    with progress_bar(console, "tuning", transient=True) as show:
        found = tune_cases(cases, device, clock, most=most, show=show)
    say(console, found)
    file = None
    if not dry_run:
        file = keep(device, found)
        console.say(f"\nkept in {file}: launches on this card take it from now on")
    wrong = [f"{key[0]} with {in_words(tiles)}: {why}" for key, tiles, why in unfit(found) if is_wrong(why)]
    for sentence in wrong:
        console.say(f"WRONG: {sentence}")
    seconds = time.perf_counter() - started
    found = {"device": str(device), "file": file and str(file), "wrong": wrong} | as_json(found)
    return console.finish("tune", not wrong, seconds, **found)


def plan(args):
    """The cases to tune for. Raises Problem."""
    try:
        models = [parse_model(text)[0] for text in listed(args.model)]
    except ValueError as error:
        raise Problem(f"--model {error}") from error
    dtypes = listed(args.dtype)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise Problem(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    batches, tokens = whole_numbers(args.batch, "--batch"), whole_numbers(args.tokens, "--tokens")
    return [
        Case(QUESTIONS[name], Shape(model, batch, n), DTYPES[dtype], "gpu", args.step == "train")
        for dtype in dtypes
        for name in FUNCTIONS
        for model in models
        for batch in batches
        for n in tokens
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is fastest


class WrongAnswer(Exception):
    """A candidate's answers break the tolerance rule."""


def tune_cases(cases, device, clock, *, most=40, show=lambda done, what: None):
    """Search the tiles of every kernel that `cases` launch on `device`, then the form of LayerNorm + Linear -> Tuning.

    The search starts from the table, whatever was kept before. Raises Problem if the kernels answer wrongly with the
    tiles of the table: `vitriton check` then says more.
    """
    found = Tuning()
    races = {}
    keys = {}  # key: the cases that ask for it
    for case in cases:
        asked = Asked()
        with tuned.trying(device, asked), use_backend("triton"):
            races[case] = Race(case, ("vitriton",))
        if why := races[case].wrong["vitriton"]:
            raise Problem(f"vitriton is wrong, or does not run, with the tiles of its table: {case}: {why}")
        for key in asked.keys_asked:
            keys.setdefault(key, []).append(case)

    for i, (key, mine) in enumerate(keys.items()):
        kernel, dtype, head_dim = key
        default = tiles_of(kernel, str(chip_of(device)), dtype, head_dim)

        def seconds(tiles, key=key, mine=mine):
            """The time of each of the cases with these tiles, once their answers were found right."""
            times = []
            with tuned.trying(device, found.winners | {key: tiles}), use_backend("triton"):
                for case in mine:
                    call = races[case].calls["vitriton"]
                    if why := races[case].judge(call()):
                        raise WrongAnswer(why.splitlines()[0])
                    clock.settle()
                    times.append(quantiles(clock.time(call, 10), [0.5])[0])
            return times

        show(i / (len(keys) + 1), f"{kernel} {str(dtype)[6:]}")
        one = search(key, default, seconds, most=most)
        if one.best != one.default:
            one.gain = confirmed(one, lambda tiles, key=key: found.winners | {key: tiles}, races, mine, device, clock)
            if one.gain < 1 + LEAST_GAIN:
                one.best, one.gain = one.default, 1.0
            else:
                found.winners[key] = one.best
        found.searches[key] = one

    show(len(keys) / (len(keys) + 1), "LayerNorm + Linear, in one kernel or in two")
    forms = {}
    for case, race in races.items():
        if case.question.name.startswith("layer_norm_linear"):
            rows = 4 * case.shape.dim if case.question.name.endswith("gelu") else 3 * case.shape.dim
            rows = case.shape.mlp_dim if case.question.name.endswith("gelu") else rows
            forms.setdefault(("split", case.dtype, (rows, case.shape.dim)), []).append(race)
    for key, mine in forms.items():
        found.splits[key] = split_gain(mine, found.winners, device, clock)
        if found.splits[key] > 1 + LEAST_GAIN:
            found.winners[key] = True
    return found


def confirmed(one, winners, races, cases, device, clock):
    """The gain of the best tiles over the default's, both timed again, in turns."""
    before, now = [], []
    for case in cases:

        def with_tiles(tiles, call=races[case].calls["vitriton"]):
            def run():
                with tuned.trying(device, winners(tiles)), use_backend("triton"):
                    return call()

            return run

        times, _ = measure({"default": with_tiles(one.default), "best": with_tiles(one.best)}, clock, seconds=0.1)
        before += quantiles(times["default"], [0.5])
        now += quantiles(times["best"], [0.5])
    return gain_over(before, now)


def split_gain(races, winners, device, clock):
    """How many times faster LayerNorm and Linear are one by one, by PyTorch's own operators, than in one kernel."""
    before, now = [], []
    for race in races:
        call = race.calls["vitriton"]

        def fused(call=call):
            with tuned.trying(device, winners), use_backend("triton"):
                return call()

        def split(call=call):
            with use_backend("native"):
                return call()

        if why := race.judge(split()):
            raise Problem(f"LayerNorm and Linear one by one answer wrongly: {race.case}: {why}")
        times, _ = measure({"fused": fused, "split": split}, clock, seconds=0.1)
        before += quantiles(times["fused"], [0.5])
        now += quantiles(times["split"], [0.5])
    return gain_over(before, now)


def keep(device, found):
    """Write what was found, in place of what was kept for the same keys -> the file. Raises Problem."""
    chip = chip_of(device)
    decided = {*found.searches, *found.splits}
    winners = {key: value for key, value in chip.winners.items() if key not in decided} | found.winners
    try:
        file = tuned.write(device, chip, winners)
    except OSError as error:
        raise Problem(f"cannot write into {tuned.folder()}: {error.strerror}; set VITRITON_CACHE_DIR") from error
    chip.winners = winners
    return file


# ---------------------------------------------------------------------------------------------------------------------
# In words


def is_wrong(why):
    return why.startswith(WrongAnswer.__name__)


def unfit(found):
    return [(key, tiles, why) for key, one in found.searches.items() for tiles, why in one.unfit.items()]


def say(console, found):
    console.say("\nTiles; gain: the geometric mean over the shapes")
    rows = []
    for (kernel, dtype, head_dim), one in found.searches.items():
        what = f"{kernel}, {str(dtype)[6:]}" + (f", head dim {head_dim}" if head_dim else "")
        best = "the same" if one.best == one.default else in_words(one.best)
        tried = f"{len(one.seconds)} of {len(one.seconds) + len(one.unfit)}"
        rows.append((what, in_words(one.default), best, f"{one.gain:.2f}x", tried))
    console.table(("kernel", "the table's", "best here", "gain", "ran, of those tried"), rows)
    if found.splits:
        console.say("\nLayerNorm + Linear: in one kernel, or one by one by PyTorch's own operators")
        rows = [
            (
                f"{k} to {n}, {str(dtype)[6:]}",
                f"{1 / gain:.2f}x",
                "one by one" if key in found.winners else "one kernel",
            )
            for key, gain in found.splits.items()
            for _, dtype, (n, k) in [key]
        ]
        console.table(("features", "gain of one kernel", "taken"), rows)


def in_words(tiles):
    """128 x 64 (x 32), 4 warps, 2 stages."""
    sides = [tiles.BLOCK_M, tiles.BLOCK_N, *([tiles.BLOCK_K] if tiles.BLOCK_K else [])]
    stages = f"{tiles.num_stages} stage{'s' * (tiles.num_stages > 1)}"
    return f"{' x '.join(map(str, sides))}, {tiles.num_warps} warps, {stages}"


def as_json(found):
    searches = []
    for (kernel, dtype, head_dim), one in found.searches.items():
        record = {"kernel": kernel, "dtype": str(dtype)[6:], "head_dim": head_dim, "gain": one.gain}
        record |= {"default": asdict(one.default), "best": asdict(one.best)}
        record["timed"] = [asdict(tiles) | {"seconds": seconds} for tiles, seconds in one.seconds.items()]
        record["unfit"] = [asdict(tiles) | {"why": why} for tiles, why in one.unfit.items()]
        searches.append(record)
    splits = [
        {"dtype": str(dtype)[6:], "weight": list(shape), "gain_of_split": gain, "split": key in found.winners}
        for key, gain in found.splits.items()
        for _, dtype, shape in [key]
    ]
    return {"searches": searches, "splits": splits}
