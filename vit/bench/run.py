"""`vitriton bench`: whole ViTs and single functions beside other implementations: speed, memory, pictures."""

import time
from pathlib import Path
from types import SimpleNamespace

import torch

from ...kernels.launch import INTERPRET
from ..console import Console, Problem, check_writable, progress_bar
from ..measure import MEMORY, check_runs, pick_device
from . import charts
from .cost import cost
from .functions import QUESTIONS, missing
from .models import OTHER, PEERS, ModelCase, ModelRace, missing_peers, unknown_to_timm
from .race import Case, Race
from .report import HEADER, compare_runs, environment, load, records_of, table, write_csv
from .roofline import ceilings
from .sizes import SIZES, Shape, parse_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = (50, 197, 257, 577, 1025)
FOLDER = "vitriton-bench"


def bench(args):
    """Run the benchmarks with the arguments of cli.add_bench; returns the exit code."""
    started = time.perf_counter()
    if INTERPRET:
        raise Problem("TRITON_INTERPRET is set, and times of Triton's interpreter mean nothing: unset it")
    device = pick_device(args.device)
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    cells, rivals, earlier = plan(args, device)
    runs_as = check_runs(device)
    console = Console(args.json)
    folder = picture_folder(args, console)
    if args.csv is not None:
        check_writable(args.csv, "--csv")
    machine = environment(device)
    console.say(f"vitriton {machine['versions']['vitriton']}, PyTorch {torch.__version__}, on {machine['device']}")
    console.say(f"vitriton runs there as: {runs_as}")
    for rival, why in (missing_peers() | missing()).items():
        console.say(f"missing: {rival}: {why}")
    if args.cost:
        return costs(args, console, machine, started)

    records = run_cells(cells, rivals, device, args.seconds, console)
    console.say(f"\np20, p50, p80: of the calls, in turns in this process; peak: {MEMORY}")
    console.say("TFLOP/s and GB/s: by the plain formula's operations, and every tensor read or written once")

    roof = None
    if (folder is not None or args.json) and any(record["kind"] == "function" for record in records):
        roof = ceilings(device, sorted({record["dtype"] for record in records}))
    pictures = charts.draw_all(folder, records, machine, roof) if folder is not None else []
    if pictures:
        console.say(f"wrote {', '.join(map(str, pictures))}")
    if args.csv is not None:
        write_csv(args.csv, records, machine)
        console.say(f"wrote {args.csv}")

    failures = [f"{r['rival']}, {r['name']}: {r['why']}" for r in records if ours(r) and r["status"] != "timed"]
    comparisons = []
    for path, old in earlier.items():
        changes, doubts = compare_runs(records, machine, old)
        comparisons.append({"with": path, "changes": changes, "doubts": doubts})
        say_changes(console, path, changes, doubts)
        failures += [
            f"vitriton takes {change['ratio']:.2f} times as long as in {path}: {change['name']}, {change['what']}"
            for change in changes
            if ours(change) and change["verdict"] == "SLOWER"
        ]
    seconds = time.perf_counter() - started
    timed = sum(record["status"] == "timed" for record in records)
    verdict = f"FAILED: {'; '.join(failures)}" if failures else f"OK: {timed} rivals timed in {len(cells)} cases"
    console.say(f"\n{verdict}, in {seconds:.0f} s")
    return console.finish(
        "bench",
        not failures,
        seconds,
        machine=machine,
        records=records,
        ceilings=roof,
        failures=failures,
        comparisons=comparisons,
        pictures=[str(path) for path in pictures],
    )


def run_cells(cells, rivals, device, seconds, console):
    """The records of all cells; each cell's table is shown as soon as it is measured."""
    records = []
    with progress_bar(console, "measuring", transient=True) as show:
        for i, cell in enumerate(cells):

            def preparing(what, i=i, cell=cell):
                show(i / len(cells), f"{cell}: {what}")

            try:
                found = run_cell(cell, rivals, device, seconds, preparing)
            except torch.OutOfMemoryError as error:  # of the plain formula itself
                why = f"out of memory: {str(error).splitlines()[0]}"
                found = [params_of(cell, device) | {"rival": "plain", "status": "not run", "why": why}]
            records += found
            console.say(f"\n{cell}")
            rows, others = table(found)
            if rows:
                console.table(HEADER, rows)
            for sentence in others:
                console.say(f"  {sentence}")
            if any(record.get("disturbed") for record in found):
                console.say("  DO NOT TRUST these times: other programs kept the processors busy")
    return records


def ours(record):
    return record["rival"] == "vitriton"


def say_changes(console, path, changes, doubts):
    """The table of an earlier run beside this one."""
    console.say(f"\nBeside {path}: {len(changes)} cases that both timed")
    for doubt in doubts:
        console.say(f"  doubtful, {doubt}")
    if changes:
        rows = [
            (
                f"{change['rival']}: {change['name']} {change['batch']}x{change['tokens']} {change['dtype']} "
                f"{change['what']}",
                f"{1e3 * change['before']:.4g}",
                f"{1e3 * change['now']:.4g}",
                f"{change['ratio']:.2f}x",
                change["verdict"],
            )
            for change in sorted(changes, key=lambda change: -change["ratio"])
        ]
        console.table(("", "ms then", "ms now", "ratio", ""), rows)


# ---------------------------------------------------------------------------------------------------------------------
# What to run


def plan(args, device):
    """The cells, the rivals of models, and the earlier runs {path: run}. Raises Problem for what cannot be meant."""
    on_cpu = device.type == "cpu"
    both = not args.model and not args.function
    try:
        models = [parse_model(text) for text in listed(args.model) or (["ti"] if on_cpu else ["b"])]
    except ValueError as error:
        raise Problem(f"--model {error}") from error
    dtypes = listed(args.dtype) or (["fp32", "bf16"] if on_cpu else ["bf16"])
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise Problem(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    functions = listed(args.function) or (["attention"] if both else [])
    functions = list(QUESTIONS) if functions == ["all"] else functions
    for function in functions:
        if function not in QUESTIONS:
            raise Problem(f"--function {function} is none of {', '.join(QUESTIONS)}, all")
    directions = [False, True] if args.step == "both" else [args.step == "train"]
    batches = whole_numbers(args.batch, "--batch") or ([1] if on_cpu else [64])
    asked = listed(args.compare) or ["all"]
    earlier = {name: load(name) for name in asked if name.endswith(".json") or "/" in name}
    known = [*PEERS, *(rival for function in functions for rival in QUESTIONS[function].rivals)]
    names = [name if name.startswith(OTHER) else name.lower() for name in asked if name not in earlier]
    for name in names:
        if name != "all" and not name.startswith(OTHER) and name not in map(str.lower, known):
            raise Problem(f"--compare {name} is none of {', '.join(known)}, all, {OTHER}NAME, or the JSON of a run")
        if name.startswith(OTHER) and unknown_to_timm(name):
            raise Problem(f"--compare {name}: timm knows no such model; timm.list_models() names those it knows")
    rivals = SimpleNamespace(names=["vitriton", "plain", *names], all="all" in names or not names)

    cells = []
    if not args.function:
        for name, patch in models:
            if args.image_size % patch:
                raise Problem(f"--image-size {args.image_size} is no multiple of the patch size {patch} of {name}")
            cells += [
                ModelCase(name, patch, args.image_size, batch, DTYPES[dtype], device, training)
                for batch in batches
                for dtype in dtypes
                for training in directions
            ]
    tokens = whole_numbers(args.tokens, "--tokens") or list(TOKENS)
    where = "cpu" if on_cpu else "gpu"
    for function in functions:
        cells += [
            Case(QUESTIONS[function], Shape(name, batch, n), DTYPES[dtype], where, training)
            for name, _ in models
            for batch in batches
            for dtype in dtypes
            for training in directions
            for n in tokens
        ]
    return cells, rivals, earlier


def run_cell(cell, rivals, device, seconds, progress=lambda what: None):
    """The records of one cell; progress(what) is told what is being prepared or done."""
    progress("inputs")
    where = "cpu" if device.type == "cpu" else "gpu"
    if isinstance(cell, ModelCase):
        every = [n for n, peer in PEERS.items() if where in peer.devices] if rivals.all else []
        names = [n for n in dict.fromkeys(rivals.names + every) if n in PEERS or n.startswith(OTHER)]
        contest = ModelRace(cell, names, progress)
        own = {name: contest.flops(name) for name in names if name.startswith(OTHER)}
        flops, moved = contest.flops(), contest.traffic()
        counts = {name: (own[name], None) if name in own else (flops, moved) for name in names}
    else:
        names = [
            name
            for name in cell.question.rivals
            if (rivals.all or any(name.lower().startswith(asked) for asked in rivals.names)) and not cell.why_not(name)
        ]
        contest = Race(cell, tuple(names))
        counts = dict.fromkeys(names, (cell.flops(), contest.traffic()))
    progress("memory")
    # the profiler of a CPU sees what PyTorch allocates, and nothing of other runtimes
    peaks = {n: p for n, p in contest.peaks().items() if n not in ("onnxruntime", "openvino")}
    progress("timing, in turns")
    times = contest.times(seconds=seconds)
    return records_of(params_of(cell, device), contest, times, peaks, counts)


def params_of(cell, device):
    """What tells the records of this cell from others."""
    if isinstance(cell, ModelCase):
        return cell.params()
    shape = cell.shape
    return {
        "kind": "function",
        "name": f"{cell.question.name}, {shape.model}",
        "question": cell.question.name,
        "image_size": None,
        "tokens": shape.tokens,
        "batch": shape.batch,
        "dtype": str(cell.dtype)[6:],
        "device": device.type,
        "what": "forward+backward" if cell.backward else "forward",
        "head_dim": shape.dim_head,
    }


def listed(text):
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def whole_numbers(text, option):
    try:
        numbers = [int(part) for part in listed(text)]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise Problem(f"{option} {text} must be positive whole numbers, with commas between them")
    return numbers


def picture_folder(args, console):
    """The folder for pictures, made now and not after the measurements; None if there are to be none."""
    if args.plot == "":
        return None
    why_not = charts.why_not()
    if why_not:
        if args.plot is not None:
            raise Problem(why_not)
        console.say(f"no pictures: {why_not}")
        return None
    folder = Path(args.plot or FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"cannot make the folder --plot {folder}: {error.strerror}; give another one") from error
    check_writable(folder / "models.png", "--plot")
    return folder


def costs(args, console, machine, started):
    """`--cost`: parameters, operations and activation memory, counted and not measured."""
    records = []
    names = [parse_model(text)[0] for text in listed(args.model)] or list(SIZES)
    dtypes = listed(args.dtype) or ["fp32"]
    batch = (whole_numbers(args.batch, "--batch") or [1])[0]
    rows = []
    for name in names:
        for dtype in dtypes:
            record = cost(name, image_size=args.image_size, batch=batch, dtype=DTYPES[dtype])
            records.append(record)
            kept = [record[kind]["activation_bytes"] / 2**20 for kind in ("plain", "fused")]
            rows.append(
                (
                    f"ViT-{name.title()}/{SIZES[name].patch_size}, {dtype}",
                    f"{record['tokens']}",
                    f"{record['parameters'] / 1e6:.2f} M",
                    *(f"{record[kind]['flops'] / 2e9 / batch:.2f} G" for kind in ("plain", "fused")),
                    *(f"{mib:.1f} MiB" for mib in kept),
                    f"{kept[0] / kept[1]:.2f}x",
                )
            )
    console.say(f"\n{args.image_size} px, batch {batch}; multiply-adds of one image; kept for the backward pass:")
    header = ("", "tokens", "parameters", "multiply-adds: plain", "fused", "kept: plain", "fused", "less")
    console.table(header, rows)
    return console.finish("bench", True, time.perf_counter() - started, machine=machine, costs=records, records=[])
