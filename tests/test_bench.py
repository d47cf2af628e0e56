"""`vitriton bench`: who is right is timed, who is wrong is reported; counts and memory in closed form; its files.

Time is a stand-in that the rivals themselves advance; sizes are tiny.
"""

import csv
import itertools
import json
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vitriton.kernels import use_backend
from vitriton.vit import ViT, fuse, measure
from vitriton.vit.bench import charts, cost, functions, models, peers, race, report, roofline, run
from vitriton.vit.bench.models import PEERS, ModelCase, ModelRace, Peer
from vitriton.vit.bench.race import Case, Contest, Question, Race, Rival
from vitriton.vit.bench.sizes import SIZES, Shape, build, parse_model
from vitriton.vit.cli import main
from vitriton.vit.modules import FusedViT
from vitriton.vit.reference import PRESETS, Preset

CPU = torch.device("cpu")
TINY = Preset(patch_size=16, dim=64, depth=2, heads=2, mlp_dim=128, parameters=0)

pytestmark = pytest.mark.usefixtures("unguarded", "tiny")


@pytest.fixture
def tiny(monkeypatch):
    """A size "xs", everything on the native path, as in a process without TRITON_INTERPRET."""
    monkeypatch.setitem(SIZES, "xs", TINY)
    monkeypatch.setattr(run, "INTERPRET", False)
    with use_backend("native"):
        yield


class Clock:
    """A stand-in: seconds go by only where a rival says so."""

    now = 0.0

    def settle(self):
        pass

    def disturbed(self):
        return False

    def time(self, call, count):
        times = []
        for _ in range(count):
            start = Clock.now
            call()
            times.append(Clock.now - start)
        return times


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(Contest, "clock", lambda self: Clock())


def taking(seconds, answer):
    def rival(*args):
        Clock.now += seconds
        return answer(*args)

    return rival


class Slow(nn.Module):
    """A model that takes `seconds` more, and whose logits are `factor` times the right ones."""

    def __init__(self, model, seconds, factor=1.0):
        super().__init__()
        self.model, self.seconds, self.factor = model, seconds, factor

    def forward(self, images):
        Clock.now += self.seconds
        return self.factor * self.model(images)


def peer(seconds, factor=1.0):
    return Peer(lambda model, images: Slow(model, seconds, factor))


def raising(model, images):
    raise NotImplementedError("no kernel\nfor this")


@pytest.fixture
def rivals(monkeypatch, stand_in):
    """Every ViT takes 1 s, whether plain, ours or within another peer; that one takes what it adds."""
    planted = {
        "vitriton": PEERS["vitriton"],
        "plain": PEERS["plain"],
        "threefold": peer(2.0),
        "wrong": peer(-0.5, 1.01),
        "raises": Peer(raising),
        "absent": Peer(raising, ("no-such-package",)),
        "inference": Peer(PEERS["plain"].build, training=False),
    }
    for module in (models, run):
        monkeypatch.setattr(module, "PEERS", planted)
    for kind in (ViT, FusedViT):
        monkeypatch.setattr(kind, "forward", taking(1.0, kind.forward))


# ---------------------------------------------------------------------------------------------------------------------
# Races


def model_case(training=False, dtype=torch.float32, batch=2):
    return ModelCase("xs", 16, 64, batch, dtype, CPU, training)


@pytest.mark.parametrize("training", [False, True])
def test_models_show_their_factor_and_wrong_ones_are_not_timed(rivals, training):
    race = ModelRace(model_case(training), list(models.PEERS))
    right = {"vitriton", "plain", "threefold"} | ({"inference"} if not training else set())
    assert set(race.right()) == right
    assert "max error" in race.wrong["wrong"] and "wrong" not in race.raised
    assert race.wrong["raises"] == "NotImplementedError: no kernel"
    assert race.wrong["absent"] == "no-such-package is not installed"
    assert race.raised == {"raises", "absent"} | ({"inference"} if training else set())
    times = race.times(seconds=1.0, turns=2)
    assert set(times) == right
    assert set(times["plain"]) == set(times["vitriton"]) == {1.0} and set(times["threefold"]) == {3.0}
    records = report.records_of({"batch": 2}, race, times, {}, dict.fromkeys(times, (6e12, 3e9)))
    by_rival = {record["rival"]: record for record in records}
    assert by_rival["threefold"]["times_plain"] == pytest.approx(1 / 3)
    assert by_rival["threefold"]["images_per_s"] == pytest.approx(2 / 3)
    assert by_rival["threefold"]["tflops_per_s"] == pytest.approx(2)
    assert by_rival["threefold"]["gb_per_s"] == pytest.approx(1)
    assert by_rival["wrong"]["status"] == "WRONG" and by_rival["raises"]["status"] == "not run"
    assert not {"seconds", "p20", "images_per_s"} & (set(by_rival["wrong"]) | set(by_rival["raises"]))


def test_functions_show_their_factor_and_wrong_ones_are_not_timed(stand_in):
    question = Question(
        "doubling",
        lambda shape: {"x": torch.randn(100)},
        {
            "plain": taking(0.3, lambda x: 2 * x),
            "vitriton": taking(0.1, lambda x: x + x),
            "wrong": taking(0.1, lambda x: 2.1 * x),
            "absent": Rival(lambda x: x, package="no-such-package"),
            "no gradient": Rival(taking(0.2, lambda x: x + x), backward=("gpu",)),
        },
    )
    for backward in (False, True):
        case = Case(question, Shape("xs", 1, 5), torch.float32, "cpu", backward)
        race = Race(case, tuple(question.rivals))
        times = race.times(seconds=1.0, turns=2)
        assert {name: times[name][0] for name in times} == pytest.approx(
            {"plain": 0.3, "vitriton": 0.1} | ({} if backward else {"no gradient": 0.2})
        )
        assert "max error" in race.wrong["wrong"] and race.wrong["absent"] == "no-such-package is not installed"
        assert race.wrong["no gradient"] == ("has no gradient on a CPU" if backward else "")
        assert race.traffic() == (800 if not backward else 800 + 4 * 400)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_peers_answer_rightly(training, dtype):
    names = ["vitriton", "plain", "sdpa", *(["timm"] if peers.version("timm") else [])]
    race = ModelRace(model_case(training, dtype), names)
    assert race.wrong == dict.fromkeys(names, "")
    assert race.images.dtype == (torch.float32 if training else dtype)


@pytest.mark.parametrize("name, packages", [(n, p.packages) for n, p in PEERS.items() if not p.training])
def test_exported_models_answer_rightly_and_leave_the_weights_alone(name, packages):
    for package in packages:
        if not peers.version(package):
            pytest.skip(f"{package} is not installed")
    race = ModelRace(model_case(), ["plain", name])
    assert race.wrong[name] == ""
    if name == "openvino":
        race = ModelRace(model_case(dtype=torch.bfloat16), ["plain", name])
        assert race.wrong[name] == ""
        assert {p.dtype for p in race.model.parameters()} == {torch.bfloat16}
    race = ModelRace(model_case(training=True), ["plain", name])
    assert race.wrong[name] == "is for inference only" and name in race.raised


def test_timm_has_the_plain_weights_in_the_plain_order():
    if not peers.version("timm"):
        pytest.skip("timm is not installed")
    model = build("xs", image_size=64)
    vit = peers.timm(model, torch.randn(1, 3, 64, 64))
    assert [p.numel() for p in vit.in_plain_order] == [p.numel() for p in model.parameters()]
    shared = sum(p.data_ptr() == q.data_ptr() for p, q in zip(vit.in_plain_order, model.parameters(), strict=True))
    assert shared == len(vit.in_plain_order) - 1  # all but the patch embedding, which has another layout


def test_a_peer_for_another_device_says_so():
    gpu = ModelCase("xs", 16, 64, 1, torch.float32, torch.device("cuda"), False)
    race = Contest.__new__(ModelRace)
    race.case, race.device = gpu, torch.device("cuda")
    if peers.version("openvino") and peers.version("onnx"):
        assert race.why_not("openvino") == "is here for a CPU only"
    race.device = CPU
    assert race.why_not("compile-max") == "is here for a GPU only"


def test_every_question_is_answered_alike_by_who_needs_no_compiler():
    for question in functions.QUESTIONS.values():
        for backward in (False, True):
            case = Case(question, Shape("xs", 2, 5), torch.float32, "cpu", backward)
            names = [n for n in question.rivals if not case.why_not(n) and "ompile" not in n and n != "FlexAttention"]
            race = Race(case, tuple(names))
            assert len(names) >= 2 and race.wrong == dict.fromkeys(names, "")


@pytest.mark.parametrize("name", ["SDPA efficient", "SDPA cuDNN", "flash-attn", "xformers"])
def test_rivals_for_gpus_are_left_out_on_a_cpu(name):
    case = Case(functions.QUESTIONS["attention"], Shape("b", 1, 197), torch.bfloat16, "cpu", False)
    assert case.why_not(name) == "is for a GPU"
    case = Case(functions.QUESTIONS["attention"], Shape("b", 1, 197), torch.bfloat16, "gpu", True)
    assert case.why_not(name) == ""


class Package(ModuleType):
    """Stands in for a package that is not installed."""

    def __init__(self, monkeypatch, name, **functions):
        super().__init__(name)
        self.__dict__.update(functions)
        self.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, self)


def test_what_is_for_gpus_runs_there_or_says_why_not(monkeypatch):
    """With a CPU in place of the GPU, and packages whose functions want what the real ones do: (B,N,H,D)."""

    def inside(q, k, v):
        assert q.shape == (2, 5, 2, 32)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    def packed(qkv):
        assert qkv.shape == (2, 5, 3, 2, 32)
        return inside(*qkv.unbind(2))

    monkeypatch.setattr(race, "gpu", lambda: CPU)
    Package(monkeypatch, "flash_attn", flash_attn_func=inside, flash_attn_qkvpacked_func=packed)
    Package(monkeypatch, "xformers")
    Package(monkeypatch, "xformers.ops", memory_efficient_attention=inside)
    assert not {"flash-attn", "xformers"} & set(functions.missing())
    for name, backward in itertools.product(("attention", "qkv_attention"), (False, True)):
        question = functions.QUESTIONS[name]
        case = Case(question, Shape("xs", 2, 5), torch.bfloat16, "gpu", backward)
        names = [rival for rival in question.rivals if not question.rival(rival).compiled]
        contest = Race(case, tuple(names))
        cannot = {"SDPA efficient", "SDPA cuDNN"} & set(names)  # without a GPU
        assert contest.raised == cannot and all("kernel" in contest.wrong[rival] for rival in cannot)
        assert set(contest.right()) == set(names) - cannot
    case = Case(functions.QUESTIONS["attention"], Shape("xs", 2, 5), torch.float32, "gpu", False)
    assert case.why_not("flash-attn") == "takes float16 and bfloat16 only"


def test_without_memory_for_the_plain_model_the_rest_goes_on(monkeypatch, tmp_path, capsys, rivals):
    run_cell, cells = run.run_cell, []

    def first_fails(cell, *args):
        cells.append(cell)
        if len(cells) == 1:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB\nand so on")
        return run_cell(cell, *args)

    monkeypatch.setattr(run, "run_cell", first_fails)
    monkeypatch.chdir(tmp_path)
    assert bench("--batch", "1,2", "--plot", "", "--compare", "threefold") == 0
    out = capsys.readouterr().out
    assert "plain is not timed, as it does not run here: out of memory: tried to allocate 9 GiB" in out
    assert "OK: 3 rivals timed in 2 cases" in out


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


def test_vit_b_16_takes_17_6_billion_multiply_adds():
    record = cost.cost("b")
    assert round(record["multiply_adds"] / 1e9, 1) == 17.6
    assert record["parameters"] == PRESETS["b"].parameters
    # by hand: embedding, and in each block qkv, two products of attention, its output, and the MLP
    n, d = 197, 768
    by_hand = 196 * 768 * d + 12 * (n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d) + d * 1000
    assert record["multiply_adds"] == by_hand
    operators = record["fused"]["operators"]
    assert {"vitriton.qkv_attention", "vitriton.layer_norm_linear"} <= set(operators)
    assert operators["vitriton.qkv_attention"] == 12 * 4 * n * n * d
    # the last feed forward is of the CLS token alone
    assert operators["vitriton.layer_norm_linear"] == 2 * d * (12 * n * 3 * d + (11 * n + 1) * 4 * d)


@pytest.mark.parametrize("name", ["ti", "s", "l", "h", "so400m", "g"])
def test_fusing_changes_the_count_of_one_feed_forward_and_keeps_less(name):
    """The last, of which only the CLS token is made."""
    record, size = cost.cost(name), SIZES[name]
    assert record["plain"]["flops"] == 2 * record["multiply_adds"]
    assert record["fused"]["flops"] == record["plain"]["flops"] - last_feed_forward(record["tokens"], size)
    assert record["fused"]["activation_bytes"] < record["plain"]["activation_bytes"]
    assert record["parameters"] == size.parameters


def last_feed_forward(tokens, size):
    """Operations of the plain model that no logit depends on."""
    return 2 * 2 * (tokens - 1) * size.dim * size.mlp_dim


def test_a_training_step_counts_three_forward_passes_and_what_is_recomputed():
    images = torch.randn(1, 3, 64, 64)
    plain, fused = build("xs", image_size=64), build("xs", image_size=64)
    fuse(fused)
    forward = sum(cost.model_flops(plain, images).values())
    patches = 2 * 16 * 768 * 64  # whose input needs no gradient
    assert sum(cost.model_flops(plain, images, training=True).values()) == 3 * forward - patches
    recomputed = 2 * 2 * 17 * 17 * 64  # q kᵀ of two blocks, for the fused backward pass
    unread = 3 * last_feed_forward(17, SIZES["xs"])
    assert sum(cost.model_flops(fused, images, training=True).values()) == 3 * forward - patches + recomputed - unread


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_what_is_counted_of_fake_tensors_is_kept_of_real_ones(kind):
    counted = cost.cost("xs", image_size=64, batch=3)[kind]["activation_bytes"]
    model = build("xs", image_size=64)
    if kind == "fused":
        fuse(model)
    assert cost.activation_bytes(model, torch.randn(3, 3, 64, 64)) == counted


def test_the_plain_block_keeps_the_map_and_the_fused_one_does_not():
    """From 17 to 65 tokens, what grows with N² is one map of fp32 a head and block in plain, and nothing in fused."""
    kept = {
        kind: [cost.cost("xs", image_size=size)[kind]["activation_bytes"] for size in (64, 128, 192)]
        for kind in ("plain", "fused")
    }
    n = [17, 65, 145]
    quadratic = {}
    for kind, (a, b, c) in kept.items():
        slope = ((c - a) / (n[2] - n[0]) - (b - a) / (n[1] - n[0])) / (n[2] - n[1])  # of N²
        quadratic[kind] = slope
    maps = 2 * 2 * 4  # blocks, heads, bytes
    assert quadratic["plain"] == pytest.approx(maps, rel=0.01)
    assert quadratic["fused"] == pytest.approx(0, abs=0.01)


def test_peak_memory_agrees_with_the_closed_form_of_the_plain_map():
    """The plain formula holds two maps at once (scores before and after scaling; then scores and softmax)."""
    shape = Shape("xs", 2, 300)
    case = Case(functions.QUESTIONS["qkv_attention"], shape, torch.float32, "cpu", False)
    race = Race(case, ("SDPA", "plain"))
    peaks = race.peaks()
    one_map = 2 * 2 * 300 * 300 * 4
    activations = 2 * 300 * 64 * 4  # of q, k, v or the output
    assert 2 * one_map <= peaks["plain"] <= 2 * one_map + 4 * activations
    assert activations <= peaks["SDPA"] < one_map / 2  # which makes no map


def test_traffic_of_a_block_is_each_tensor_once():
    d, hidden, n = 64, 128, 17
    block = 4 * d * d + 2 * d * hidden + 9 * d + hidden
    block += n * (d + 3 * d + 3 * d + d + d + 2 * d + d + hidden + hidden + 2 * d)
    edge = 16 * (768 + d) + 768 * d + n * d + 1000 * d + 1000
    assert cost.model_traffic("xs", 1, n, 16, 4) == 4 * (2 * block + edge)


@pytest.mark.parametrize("text", ["b", "B", "vit_b", "vit_b16", "vit-b-16", "ViT-B/16", "base", "vit_base_patch16"])
def test_names_of_models(text):
    assert parse_model(text) == ("b", 16)


def test_other_names_of_models():
    assert parse_model("so400m14") == parse_model("so400m") == ("so400m", 14)
    assert parse_model("vit_b32") == ("b", 32)
    for text in ("resnet", "", "vit_x16", "16"):
        with pytest.raises(ValueError, match="is no size of ViT; allowed are ti, s, b"):
            parse_model(text)


def test_head_dims_of_no_power_of_two():
    assert (Shape("so400m", 1, 1).dim_head, Shape("g", 1, 1).dim_head, Shape("h", 1, 1).dim_head) == (72, 88, 80)


# ---------------------------------------------------------------------------------------------------------------------
# Ceilings, pictures, files


def test_ceilings_are_operations_over_the_fastest_time(monkeypatch):
    class Ticks(Clock):
        def time(self, call, count):
            call()
            return [0.5, *[0.25] * (count - 1)]

    monkeypatch.setattr(roofline, "CPUClock", Ticks)
    monkeypatch.setattr(roofline, "SIDES_CPU", (8, 16))
    monkeypatch.setattr(roofline, "COPY", 1024)
    found = roofline.ceilings(CPU, ["float32"])
    assert found["products"] == {"float32": 2 * 16**3 / 0.25} and found["by"]["float32"].endswith("16 x 16")
    assert found["copy"] == 2 * 1024 / 0.25


def a_record(rival, seconds=1.0, spread=0.1, **other):
    record = {"kind": "model", "name": "ViT-B/16", "image_size": 224, "tokens": 197, "batch": 8, "dtype": "float32"}
    record |= {"device": "cpu", "what": "forward", "rival": rival, "status": "timed", "seconds": seconds}
    record |= {"p20": seconds * (1 - spread), "p80": seconds * (1 + spread), "calls": 9, "disturbed": False}
    return record | {"images_per_s": 8 / seconds, "peak_bytes": 10**6, "flops": 10**9, "bytes": 10**7} | {
        "tflops_per_s": 0.1, "gb_per_s": 2.0, "times_plain": 1.0
    } | other  # fmt: skip


MACHINE = {"device": "A CPU, 2 threads", "cpu": "A CPU", "threads": 2, "versions": {"torch": "2.14", "vitriton": "1"}}


def test_what_became_slower_than_the_noise():
    old = {
        "machine": MACHINE,
        "records": [
            a_record("vitriton", 1.0, 0.02),
            a_record("plain", 1.0, 0.2),
            a_record("timm", 1.0, 0.02),
            a_record("sdpa", 1.0, 0.001),
            a_record("compile", 1.0, 0.02),
            a_record("gone", 1.0),
        ],
    }
    now = [
        a_record("vitriton", 1.1, 0.02),
        a_record("plain", 1.04, 0.2),  # within its spread
        a_record("timm", 0.9, 0.02),
        a_record("sdpa", 1.015, 0.001),  # outside its spread, but by less than 2%
        a_record("compile", 2.0, 0.02, disturbed=True),
        a_record("new", 1.0),
        {"rival": "wrong", "status": "WRONG", "why": "so"},
    ]
    changes, doubts = report.compare_runs(now, MACHINE, old)
    assert {change["rival"]: change["verdict"] for change in changes} == {
        "vitriton": "SLOWER", "plain": "as before", "timm": "faster", "sdpa": "as before", "compile": "not judged"
    }  # fmt: skip
    assert changes[0]["ratio"] == pytest.approx(1.1) and not doubts
    other = MACHINE | {"threads": 4, "versions": MACHINE["versions"] | {"torch": "2.15", "vitriton": "2"}}
    _, doubts = report.compare_runs([a_record("plain", 1.5)], other, old)
    assert [doubt.split(",")[0].split(" take")[0] for doubt in doubts] == [
        "another threads: 2 then", "another torch: 2.14 then", "the plain formulas"
    ]  # fmt: skip


def test_pictures_are_drawn_for_what_there_is(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, so there are no pictures")
    of_models = [a_record(rival, 1 + i / 7) for i, rival in enumerate(["vitriton", "plain", "timm:ghostnet_100"])]
    of_functions = [
        a_record(
            rival, 0.001 * n, kind="function", name=f"{question}, s", question=question, tokens=n, dtype=dtype,
            image_size=None, peak_bytes=None if rival == "odd" else n**2, flops=n**2, bytes=n,
        )
        for question in ("attention", "block")
        for dtype in ("float32", "bfloat16")
        for rival in ("vitriton", "plain", "SDPA", "odd")
        for n in (50, 197, 1025)
    ]  # fmt: skip
    roof = {"products": {"float32": 4e11, "bfloat16": 8e11}, "copy": 3e10, "cached copy": 1e11}
    wrong = [{"rival": "x", "status": "WRONG", "kind": "model", "why": ""}]
    assert charts.draw_all(tmp_path, wrong, MACHINE, None) == []
    paths = charts.draw_all(tmp_path, of_models + of_functions + wrong, MACHINE, roof)
    assert [path.name for path in paths] == ["models.png", "speed.png", "memory.png", "roofline.png"]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert [p.name for p in charts.draw_all(tmp_path, of_models, MACHINE, roof)] == ["models.png"]


def bench(*args):
    return main(["bench", "--model", "xs", "--image-size", "64", "--dtype", "fp32", "--seconds", "0.01", *args])


def test_a_run_writes_table_json_csv_and_pictures(tmp_path, monkeypatch, capsys, rivals):
    monkeypatch.chdir(tmp_path)
    args = ("--batch", "2,3", "--json", "a.json", "--csv", "a.csv", "--plot", "pictures")
    assert bench(*args) == 0
    out = capsys.readouterr().out
    assert "missing: absent: no-such-package is not installed" in out
    assert "wrong is not timed, its answer is WRONG: logits: max error" in out
    assert "raises is not timed, as it does not run here: NotImplementedError: no kernel" in out
    assert "OK: 8 rivals timed in 2 cases" in out
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["ok"] and result["machine"]["threads"] == torch.get_num_threads()
    assert result["machine"]["versions"]["torch"] == torch.__version__ or result["machine"]["versions"]["torch"]
    assert {r["batch"] for r in result["records"]} == {2, 3}
    with open("a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["records"]) == 14
    assert rows[0]["rival"] == "vitriton" and float(rows[0]["seconds"]) == 1.0 and rows[0]["version of torch"]
    assert (tmp_path / "pictures" / "models.png").exists()


def test_an_earlier_run_is_compared_and_a_slower_one_fails(tmp_path, monkeypatch, capsys, rivals):
    monkeypatch.chdir(tmp_path)
    assert bench("--json", "a.json", "--plot", "", "--compare", "threefold") == 0
    earlier = json.loads((tmp_path / "a.json").read_text())
    for record in earlier["records"]:
        for name in ("seconds", "p20", "p80") if record["rival"] == "vitriton" else ():
            record[name] /= 2
    (tmp_path / "old.json").write_text(json.dumps(earlier))
    capsys.readouterr()
    assert bench("--plot", "", "--compare", "threefold,a.json") == 0
    assert "Beside a.json: 3 cases that both timed" in capsys.readouterr().out
    assert bench("--plot", "", "--compare", "threefold,old.json") == 1
    out = capsys.readouterr().out
    assert "SLOWER" in out and "FAILED: vitriton takes 2.00 times as long as in old.json" in out


def test_a_wrong_answer_of_ours_fails(monkeypatch, tmp_path, capsys, rivals):
    monkeypatch.setitem(models.PEERS, "vitriton", peer(1.0, 1.01))
    monkeypatch.chdir(tmp_path)
    assert bench("--plot", "", "--compare", "threefold", "--json", "a.json") == 1
    assert "FAILED: vitriton, ViT-Xs/16: logits: max error" in capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    assert not result["ok"] and result["records"][0]["status"] == "WRONG" and "seconds" not in result["records"][0]


def test_functions_are_run_for_each_n(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    args = ("--function", "attention", "--tokens", "5,17", "--compare", "sdpa", "--step", "both", "--plot", "")
    assert bench(*args, "--json", "a.json") == 0
    assert time.perf_counter() - started < 60
    result = json.loads((tmp_path / "a.json").read_text())
    records, ceilings = result["records"], result["ceilings"]
    assert ceilings["products"]["float32"] > 0 and ceilings["copy"] > 0  # for a roofline drawn later
    assert {(r["tokens"], r["what"]) for r in records} == {
        (n, w) for n in (5, 17) for w in ("forward", "forward+backward")
    }
    assert {"vitriton", "plain", "SDPA", "SDPA math"} <= {r["rival"] for r in records}
    forward = next(r for r in records if r["tokens"] == 17 and r["what"] == "forward" and r["rival"] == "plain")
    assert forward["flops"] == 4 * 2 * 17 * 17 * 32 and forward["bytes"] == 4 * 4 * 17 * 64
    assert forward["peak_bytes"] > 0 and forward["p20"] <= forward["seconds"] <= forward["p80"]


def test_costs_are_counted(capsys):
    assert main(["bench", "--cost", "--model", "ti,b"]) == 0
    out = capsys.readouterr().out
    assert "17.56 G" in out and "86.54 M" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "resnet"], "--model 'resnet' is no size of ViT; allowed are ti, s, b"),
        (["--model", "vit_b0"], "--model 'vit_b0' is no size of ViT"),
        (["--dtype", "fp8"], "--dtype fp8 is none of fp32, bf16, fp16"),
        (["--function", "softmax"], "--function softmax is none of attention, "),
        (["--compare", "tensorflow"], "--compare tensorflow is none of vitriton, plain, sdpa, "),
        (["--compare", "no/such.json"], "cannot read --compare no/such.json: No such file"),
        (["--compare", "a.json"], "--compare a.json was not written by `vitriton bench --json`"),
        (["--batch", "1,x"], "--batch 1,x must be positive whole numbers"),
        (["--image-size", "100"], "--image-size 100 is no multiple of the patch size 16 of ti"),
        (["--csv", "no/such/a.csv"], "cannot write --csv no/such/a.csv"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--plot", "a.json/x"], "cannot make the folder --plot a.json/x"),
    ],
)
def test_bad_arguments_end_before_anything_runs(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(run, "run_cell", lambda *_: pytest.fail("it ran"))
    assert main(["bench", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_network_that_timm_does_not_know_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(run, "INTERPRET", False)
    if not peers.version("timm"):
        pytest.skip("timm is not installed")
    assert main(["bench", "--compare", "timm:no_such_net"]) == 2
    assert "--compare timm:no_such_net: timm knows no such model" in capsys.readouterr().err


def test_a_choice_that_cannot_run_is_said(monkeypatch, capsys):
    def explain(x):
        raise RuntimeError("VITRITON_CPU_LINEAR is 'compiled', which cannot run: there is no g++")

    monkeypatch.setattr(measure, "explain", explain)
    monkeypatch.setattr(run, "INTERPRET", False)
    monkeypatch.setattr(run, "run_cell", lambda *_: pytest.fail("it ran"))
    assert main(["bench", "--device", "cpu"]) == 2
    assert "which cannot run: there is no g++; unset it" in capsys.readouterr().err


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(run, "INTERPRET", True)
    assert main(["bench"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_another_network_is_timed_and_not_judged(stand_in):
    if not peers.version("timm"):
        pytest.skip("timm is not installed")
    case = ModelCase("xs", 16, 224, 1, torch.float32, CPU, False)
    race = ModelRace(case, ["plain", "timm:ghostnet_100", "timm:no_such_net"])
    assert race.wrong["timm:ghostnet_100"] == "" and "timm:ghostnet_100" in race.right()
    assert "no_such_net" in race.wrong["timm:no_such_net"] and "timm:no_such_net" in race.raised
    assert 0.13e9 < race.flops("timm:ghostnet_100") / 2 < 0.16e9  # Han et al. 2020: 141 million
