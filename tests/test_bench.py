"""Races of `vitriton bench`: who is right is timed, who is wrong is reported, who cannot run says why.

Time is a stand-in that the rivals themselves advance; sizes are tiny.
"""

import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from stand_ins import CPU, taking
from vitriton.vit.bench import functions, models, peers, race, report
from vitriton.vit.bench.models import PEERS, ModelCase, ModelRace
from vitriton.vit.bench.race import Case, Contest, Question, Race, Rival
from vitriton.vit.bench.sizes import Shape, build

pytest_plugins = ["stand_ins"]
pytestmark = pytest.mark.usefixtures("unguarded", "tiny")


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
