"""`vitriton tune` without a GPU: the search, by a stand-in clock; what is kept, for whom, and that launches take it."""

import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from vitriton.kernels import explain, launch, layer_norm_linear, tuned, use_backend
from vitriton.kernels.configs import TABLE, Tiles, tiles
from vitriton.kernels.launch import Chip, chip_of
from vitriton.kernels.tune import LEAST_GAIN, Asked, neighbours, search
from vitriton.vit import tune as vit_tune
from vitriton.vit.bench.functions import QUESTIONS
from vitriton.vit.bench.race import Case, Race
from vitriton.vit.bench.sizes import SIZES, Shape
from vitriton.vit.cli import build_parser, main
from vitriton.vit.console import Console, Problem
from vitriton.vit.reference import Preset

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
KEY = ("attention_fwd", torch.bfloat16, 64)
DEFAULT = tiles(KEY[0], "sm_90", *KEY[1:])
OTHER = replace(DEFAULT, BLOCK_N=32, num_stages=3)
WHO = {"format": 1, "card": "A Card, 80 GiB", "chip": "sm_90", "triton": "3.8.0", "table": "0123456789ab"}


# ---------------------------------------------------------------------------------------------------------------------
# The search


def towards(best):
    """A stand-in for measuring: the further from `best`, in steps of two, the longer, for each of two shapes."""

    def time(tiles):
        steps = abs(tiles.num_stages - best.num_stages) + sum(
            abs(getattr(tiles, name).bit_length() - getattr(best, name).bit_length())
            for name in ("BLOCK_M", "BLOCK_N", "num_warps")
        )
        return [0.001 * 1.2**steps, 0.004 * 1.2**steps]

    return time


def test_the_search_climbs_to_the_best_tiles():
    best = Tiles(32, 128, 8, 4)  # six steps from the table's
    found = search(KEY, DEFAULT, towards(best), most=100)
    assert found.best == best and found.default == DEFAULT
    steps = 2 + 1 + 1 + 2
    assert found.gain == pytest.approx(1.2**steps)
    assert found.seconds[best] == [0.001, 0.004]


def test_the_search_stays_where_nothing_gains_more_than_noise():
    found = search(KEY, DEFAULT, lambda t: [1.0 if t == DEFAULT else 1 / (1 + 0.9 * LEAST_GAIN)])
    assert found.best == DEFAULT and found.gain == 1.0


def test_the_search_ends_after_so_many_tiles_and_passes_over_what_does_not_run():
    called = []

    def time(tiles):
        called.append(tiles)
        if tiles.num_stages > DEFAULT.num_stages:
            raise RuntimeError("out of resource: shared memory\nand more")
        return towards(Tiles(32, 32, 2, 4))(tiles)

    found = search(KEY, DEFAULT, time, most=12)
    assert len(called) == len(set(called)) == 12
    assert found.best.num_stages <= DEFAULT.num_stages and found.best != DEFAULT
    assert set(found.unfit.values()) == {"RuntimeError: out of resource: shared memory"}
    assert not set(found.unfit) & set(found.seconds)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.kernel} {row.chips} {row.dtypes} {row.most}")
def test_the_table_and_all_neighbours_are_allowed(row):
    assert set(tuned.ALLOWED) == {row.kernel for row in TABLE}
    assert tuned.allowed(row.kernel, row.tiles)
    found = neighbours(row.kernel, row.tiles, torch.bfloat16, row.most)
    assert found and row.tiles not in found and len(set(found)) == len(found)
    assert all(tuned.allowed(row.kernel, t) for t in found)


@pytest.mark.parametrize(
    "kernel, wrong",
    [
        ("attention_fwd", {"BLOCK_M": 8}),
        ("attention_fwd", {"BLOCK_N": 48}),
        ("attention_fwd", {"num_warps": 3}),
        ("attention_fwd", {"num_stages": 0}),
        ("attention_fwd", {"BLOCK_K": 32}),
        ("attention_bwd_dq", {"BLOCK_M": 256}),
        ("attention_bwd", {"BLOCK_M": 128}),
        ("prenorm", {"BLOCK_N": 512}),
        ("nothing", {}),
        ("attention_fwd", {"BLOCK_M": 64.0}),
    ],
)
def test_what_no_kernel_can_run_is_not_allowed(kernel, wrong):
    assert not tuned.allowed(kernel, replace(DEFAULT, **wrong))


# ---------------------------------------------------------------------------------------------------------------------
# What launches take


def tiles_launched(chip):
    """Those of attention's forward kernel, as it would be launched on `chip`."""
    pytest.importorskip("triton", reason="triton is not installed, so there are no launches")
    from vitriton.kernels.attention import attention_forward

    q, k, v = torch.empty(3, 2, 4, 640, 64, dtype=torch.bfloat16, device="meta")
    with launch.record(chip) as recorded:
        attention_forward(q, k, v, 0.125)
    (one,) = recorded
    return Tiles(one.constexprs["BLOCK_M"], one.constexprs["BLOCK_N"], one.num_warps, one.num_stages)


def test_launches_take_what_won_on_the_card():
    chip = Chip("sm_90")
    assert tiles_launched(chip) == DEFAULT
    chip.winners = {KEY: OTHER}
    assert tiles_launched(chip) == OTHER
    assert tiles_launched("sm_90") == DEFAULT  # what a chip does that is not here, no card can say
    chip.winners = {(KEY[0], torch.float16, 64): OTHER, (KEY[0], torch.bfloat16, 128): OTHER}
    assert tiles_launched(chip) == DEFAULT


def test_the_backward_pass_in_one_kernel_takes_its_stages():
    pytest.importorskip("triton", reason="triton is not installed, so there are no launches")
    from vitriton.kernels.attention_backward import attention_backward

    key = ("attention_bwd", torch.bfloat16, 64)
    chip = Chip("sm_90")
    chip.winners = {key: replace(tiles(*key[:1], "sm_90", *key[1:]), num_stages=4)}
    q, k, v, out, grad, dq, dk, dv = torch.empty(8, 64, 12, 197, 64, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(64, 12, 197, device="meta")
    for where, stages in ((chip, 4), ("sm_90", 2)):
        with launch.record(where) as recorded:
            attention_backward(grad, q, k, v, out, lse, 0.125, dq, dk, dv)
        (one,) = recorded
        assert one.num_stages == stages


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU that is not there, with a folder of its own: the Chip that launches on it would get."""
    monkeypatch.setenv("VITRITON_CACHE_DIR", str(tmp_path / "cache"))
    name_of = launch._name_of
    monkeypatch.setattr(launch, "_name_of", lambda device: "sm_90" if device == CARD else name_of(device))
    monkeypatch.setattr(tuned, "identity", lambda device, chip: dict(WHO))
    launch._chip_of.cache_clear()
    yield lambda: chip_of(CARD)
    launch._chip_of.cache_clear()


WINNERS = {KEY: OTHER, ("split", torch.float16, (2304, 768)): True}


def test_what_was_kept_is_read_once_by_the_first_launch(card, monkeypatch):
    file = tuned.write(CARD, card(), WINNERS)
    assert file.parent == tuned.folder() and file.name == "tuned-A-Card-80-GiB-triton-3.8.0-0123456789ab.json"
    assert card().winners == {}  # this process had looked before
    launch._chip_of.cache_clear()
    assert card() == "sm_90" and card().winners == WINNERS
    monkeypatch.setattr(tuned, "read", lambda *_: pytest.fail("it read again"))
    assert card().winners == WINNERS


def test_without_a_file_the_table_holds_in_silence(card):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert card().winners == {}


@pytest.mark.parametrize("name, value", [("card", "Another"), ("triton", "3.9.0"), ("table", "f" * 12), ("format", 2)])
def test_another_card_or_version_has_another_file_or_is_foreign(card, monkeypatch, name, value):
    mine = tuned.write(CARD, card(), WINNERS)
    other = WHO | {name: value}
    monkeypatch.setattr(tuned, "identity", lambda device, chip: dict(other))
    if name != "format":
        assert tuned.path(other) != mine
        assert tuned.read(CARD, "sm_90") == {}
        tuned.path(other).write_bytes(mine.read_bytes())  # a file from elsewhere under this one's name
    with pytest.warns(UserWarning, match=f"passed over: ValueError: its {name} is .* tune again, or remove the file"):
        assert tuned.read(CARD, "sm_90") == {}


def test_the_identity_follows_table_and_triton(monkeypatch):
    properties = type("Properties", (), {"name": "A Card", "total_memory": 80 * 2**30})()
    module = type("Module", (), {"get_device_properties": lambda self, device: properties})()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(tuned, "triton", type("Triton", (), {"__version__": "3.8.0"}))
    first = tuned.identity(CARD, "sm_90")
    assert first["card"] == "A Card, 80 GiB" and first["triton"] == "3.8.0"
    monkeypatch.setattr(tuned.configs, "TABLE", TABLE[1:])
    assert tuned.identity(CARD, "sm_90")["table"] != first["table"]


def damaged(content, **entry):
    return json.dumps(content | {"winners": [content["winners"][0] | entry]})


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: json.dumps(content)[:-9],
        lambda content: "",
        lambda content: "[]",
        lambda content: json.dumps(WHO),
        lambda content: damaged(content, kernel="attention_bwd_dz"),
        lambda content: damaged(content, dtype="float64"),
        lambda content: damaged(content, head_dim=None),
        lambda content: damaged(content, tiles={"BLOCK_M": 64}),
        lambda content: damaged(content, tiles=content["winners"][0]["tiles"] | {"BLOCK_M": 100}),
        lambda content: damaged(content, tiles=content["winners"][0]["tiles"] | {"BLOCK_M": "64"}),
        lambda content: json.dumps(content | {"splits": [{"dtype": "float16", "weight": [1]}]}),
        lambda content: json.dumps(content | {"winners": None}),
    ],
)
def test_a_damaged_file_is_passed_over_with_a_warning(card, damage):
    file = tuned.write(CARD, card(), WINNERS)
    file.write_text(damage(json.loads(file.read_text())))
    launch._chip_of.cache_clear()
    with pytest.warns(UserWarning, match="what `vitriton tune` kept in .* is passed over"):
        assert card().winners == {}
    assert tiles_launched(card()) == DEFAULT


def test_a_file_that_cannot_be_decoded_is_passed_over(card):
    file = tuned.write(CARD, card(), WINNERS)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="UnicodeDecodeError"):
        assert tuned.read(CARD, card()) == {}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(card, monkeypatch):
    file = tuned.write(CARD, card(), WINNERS)

    def half(content, stream, **kwargs):
        stream.write("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(tuned.json, "dump", half)
    with pytest.raises(KeyboardInterrupt):
        tuned.write(CARD, card(), {})
    assert tuned.read(CARD, card()) == WINNERS and list(file.parent.iterdir()) == [file]


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm and Linear one by one


def test_the_split_form_is_taken_where_it_won(device, launch_log):
    if device.type != "cpu":
        pytest.skip("asks the interpreter's guards what was launched")
    x, gamma, beta = torch.randn(4, 32), torch.randn(32), torch.randn(32)
    weight, other = torch.randn(48, 32, requires_grad=True), torch.randn(32, 32)
    key = ("split", torch.float32, (48, 32))
    with tuned.trying(device, {key: True}):
        layer_norm_linear(x, gamma, beta, weight).sum().backward()
        assert not launch_log and weight.grad is not None
        assert "LayerNorm + Linear one by one, natively, for 32 to 48 features" in explain(x)
        layer_norm_linear(x, gamma, beta, other)  # another weight
        launched = len(launch_log)
        assert launched
        with use_backend("triton"):  # an explicit choice holds
            layer_norm_linear(x, gamma, beta, weight)
        assert len(launch_log) > launched
    launched = len(launch_log)
    layer_norm_linear(x, gamma, beta, weight)
    assert len(launch_log) > launched and "one by one" not in explain(x)


# ---------------------------------------------------------------------------------------------------------------------
# All of it, with the kernels in the interpreter and a stand-in clock


class StandInClock:
    """Takes the time that `seconds(winners in force, whether native)` says, whatever a call takes."""

    def __init__(self, seconds):
        self.seconds, self.timed = seconds, []

    def settle(self):
        pass

    def disturbed(self):
        return False

    def time(self, call, count):
        seen = {}

        class Spy(dict):
            def get(self, key, default=None):
                seen[key] = super().get(key, default)
                return seen[key]

        chip = chip_of(CPU)
        winners = chip.winners
        original = tuned.trying.__wrapped__

        def spying(device, tried):
            return original(device, Spy(tried))

        with pytest.MonkeyPatch.context() as patch:
            from contextlib import contextmanager

            patch.setattr(vit_tune.tuned, "trying", contextmanager(spying))
            chip.winners = Spy(winners)
            try:
                call()
            finally:
                chip.winners = winners
        self.timed.append(seen)
        return [self.seconds(seen)] * count


ATTENTION = ("attention_fwd", torch.float32, 32)
PRENORM = ("prenorm", torch.float32, 0)
BEST = Tiles(64, 32, 4, 1)


def cases(*names):
    return [Case(QUESTIONS[name], Shape("tiny", 1, 5), torch.float32, "cpu", False) for name in names]


@pytest.fixture
def interpreter(device, unguarded, monkeypatch):
    if device.type != "cpu":
        pytest.skip("stands in for a GPU with the interpreter")
    monkeypatch.setitem(SIZES, "tiny", Preset(patch_size=16, dim=32, depth=1, heads=1, mlp_dim=64, parameters=0))


def test_winners_are_found_confirmed_and_kept(interpreter, card, monkeypatch):
    def seconds(seen):
        if not seen:  # native
            return 0.5
        if ATTENTION in seen:
            return 0.7 if seen[ATTENTION] == BEST else 1.0
        return 1.0

    clock = StandInClock(seconds)
    found = vit_tune.tune_cases(cases("qkv_attention", "layer_norm_linear"), CPU, clock, most=7)
    assert found.searches[ATTENTION].best == BEST
    assert found.searches[ATTENTION].gain == pytest.approx(1 / 0.7)
    assert found.searches[PRENORM].best == found.searches[PRENORM].default
    split = ("split", torch.float32, (3 * 32, 32))
    assert found.splits == {split: pytest.approx(2.0)}
    assert found.winners == {ATTENTION: BEST, split: True}
    assert chip_of(CPU).winners == {}  # nothing lingers from trying
    # and kept, beside what was kept for other shapes, in place of what was kept for these
    card().winners = {KEY: OTHER, PRENORM: BEST}
    file = vit_tune.keep(CARD, found)
    assert tuned.read(CARD, card()) == card().winners == {KEY: OTHER, ATTENTION: BEST, split: True}
    assert str(file) == str(tuned.path(WHO))


def test_tiles_that_answer_wrongly_are_reported_and_never_timed(interpreter, monkeypatch):
    wrong = Tiles(32, 64, 4, 1)
    judge = Race.judge

    def planted(self, answers):
        return "output: max error 9" if dict.get(chip_of(CPU).winners, ATTENTION) == wrong else judge(self, answers)

    monkeypatch.setattr(Race, "judge", planted)
    clock = StandInClock(lambda seen: 0.001 if seen.get(ATTENTION) == wrong else 1.0)
    found = vit_tune.tune_cases(cases("qkv_attention"), CPU, clock, most=5)
    one = found.searches[ATTENTION]
    assert [vit_tune.is_wrong(why) for _, _, why in vit_tune.unfit(found)] == [True]
    assert one.unfit[wrong] == "WrongAnswer: output: max error 9"
    assert wrong not in one.seconds and all(seen.get(ATTENTION) != wrong for seen in clock.timed)
    assert not found.winners


def test_a_gain_that_does_not_repeat_is_not_kept(interpreter):
    times = {"search": True}

    def seconds(seen):
        return 0.5 if seen.get(ATTENTION) == BEST and times["search"] else 1.0

    def confirm(*args):
        times["search"] = False
        return confirmed(*args)

    confirmed = vit_tune.confirmed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_tune, "confirmed", confirm)
        found = vit_tune.tune_cases(cases("qkv_attention"), CPU, StandInClock(seconds), most=7)
    assert found.searches[ATTENTION].best == found.searches[ATTENTION].default and not found.winners


def test_a_table_that_answers_wrongly_is_not_tuned(interpreter, monkeypatch):
    monkeypatch.setattr(Race, "judge", lambda self, answers: "output: max error 9")
    with pytest.raises(Problem, match=r"with the tiles of its table: qkv_attention, .* max error 9"):
        vit_tune.tune_cases(cases("qkv_attention"), CPU, StandInClock(lambda seen: 1.0))


def test_a_run_says_what_it_gained_and_fails_if_tiles_are_wrong(interpreter, card, monkeypatch, tmp_path, capsys):
    written = {}
    monkeypatch.setattr(vit_tune.tuned, "write", lambda device, chip, winners: written.update(winners) or "the file")
    wrong, judge = Tiles(32, 64, 4, 1), Race.judge

    def planted(self, answers):
        return "output: max error 9" if dict.get(chip_of(CPU).winners, ATTENTION) == wrong else judge(self, answers)

    def seconds(seen):
        return 0.5 if seen.get(ATTENTION) == BEST or not seen else 1.0

    for plant, dry_run in ((False, True), (True, False)):
        monkeypatch.setattr(Race, "judge", planted if plant else judge)
        console = Console(str(tmp_path / "a.json"))
        some = cases("qkv_attention", "layer_norm_linear_gelu")
        code = vit_tune.run(some, CPU, StandInClock(seconds), console, 0.0, most=7, dry_run=dry_run)
        chip_of(CPU).winners = {}
        out = capsys.readouterr().out
        row = r"attention_fwd, float32, head dim 32 +64 x 64, 4 warps, 1 stage +64 x 32, 4 warps, 1 stage +2\.00x"
        assert re.search(row, out)
        assert re.search(r"32 to 64, float32 +0\.50x +one by one", out)
        assert code == int(plant) and ("WRONG: attention_fwd with 32 x 64, 4 warps" in out) == plant
        assert ("kept in the file" in out) != dry_run and bool(written) != dry_run
    result = json.loads((tmp_path / "a.json").read_text())
    assert not result["ok"] and result["file"] == "the file"
    assert {one["kernel"]: one["gain"] for one in result["searches"]} == {"attention_fwd": 2.0, "prenorm": 1.0}
    assert result["splits"] == [{"dtype": "float32", "weight": [64, 32], "gain_of_split": 2.0, "split": True}]
    assert written == {ATTENTION: BEST, ("split", torch.float32, (64, 32)): True}


def test_the_plan_of_the_command():
    args = build_parser().parse_args(["tune", "--model", "s,h", "--tokens", "50", "--dtype", "fp16", "--step", "train"])
    found = vit_tune.plan(args)
    assert {(c.question.name, *c.shape) for c in found} == {
        (name, model, 64, 50) for name in vit_tune.FUNCTIONS for model in ("s", "h")
    }
    assert all(c.dtype == torch.float16 and c.backward and c.device == "gpu" for c in found)
    for bad in (["--model", "x"], ["--dtype", "int8"], ["--batch", "0"]):
        with pytest.raises(Problem, match=bad[0]):
            vit_tune.plan(build_parser().parse_args(["tune", *bad]))


def test_asked_remembers_the_keys_in_their_order():
    asked = Asked({KEY: OTHER})
    assert asked.get(KEY) == OTHER and asked.get("other") is None
    assert list(asked.keys_asked) == [KEY, "other"]


def test_the_command_without_a_gpu(capsys):
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("there is a GPU here")
    assert main(["tune"]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err
