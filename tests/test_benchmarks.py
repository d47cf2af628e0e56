"""The harness of benchmarks/: wrong answers are reported and not timed, times reach the table, a missing GPU is named.

Time here is a stand-in that the rivals themselves advance, so nothing depends on how fast this machine is.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest_plugins = ["pytester"]

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
from vitriton.vit import timing  # noqa: E402
from vitriton.vit.bench import race  # noqa: E402
from vitriton.vit.timing import CPUClock, GPUClock, measure  # noqa: E402


class StandInClock:
    """Each call takes the seconds that it returns; the first one after a pause, `cold` times as many.

    `disturbances` tells of each round of turns whether it was disturbed; those that follow were not.
    """

    def __init__(self, cold=1, disturbances=()):
        self.cold, self.factor, self.pauses = cold, 1, 0
        self.disturbances = iter([False, *disturbances])  # the first: since before the rounds

    def settle(self):
        self.factor, self.pauses = self.cold, self.pauses + 1

    def time(self, call, count):
        times = []
        for _ in range(count):
            times.append(self.factor * call())
            self.factor = 1
        return times

    def disturbed(self):
        return next(self.disturbances, False)


def test_a_slower_rival_is_slower_by_its_factor():
    calls = {"fast": lambda: 0.001, "slow": lambda: 0.003}
    times, undisturbed = measure(calls, StandInClock(), seconds=0.1, turns=5)
    assert undisturbed
    assert set(times["fast"]) == {0.001} and set(times["slow"]) == {0.003}
    assert len(times["fast"]) == 100 and len(times["slow"]) == 30  # 5 turns of 0.02 s


def test_the_first_call_after_a_pause_is_not_counted():
    clock = StandInClock(cold=50)
    times, _ = measure({"a": lambda: 0.01, "b": lambda: 0.01}, clock, seconds=0.1, turns=3)
    assert set(times["a"] + times["b"]) == {0.01}
    assert clock.pauses == 2 * (1 + 3)


def test_long_calls_are_not_made_more_often_than_they_count():
    calls = []
    times, _ = measure({"long": lambda: calls.append(0) or 1.0}, StandInClock(), seconds=0.1, turns=3)
    assert times == {"long": [1.0] * 3} and len(calls) == 2 + 3  # 2 to find out how long


def test_rivals_take_turns_in_alternating_order():
    order = []
    calls = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    times, _ = measure(calls, StandInClock(), seconds=0.1, turns=4)
    turns = [name for name, following in zip(order, [*order[1:], None], strict=True) if name != following]
    # calibration and the first turn, then backwards and forwards; the last of a round is the first of the next
    assert "".join(turns) == "abc" + "abc" + "ba" + "bc" + "ba"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize(
    "disturbances, counted, undisturbed",
    [
        ([], [1.0, 1.1, 1.2], True),
        ([True, False, True, False, False], [1.1, 1.3, 1.4], True),
        ([True] * 6, [1.6], True),  # the seventh exhausts the patience
        ([True] * 9, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6], False),
    ],
)
def test_disturbed_rounds_are_made_again(disturbances, counted, undisturbed):
    took = iter([1.0, 1.0] + [1 + i / 10 for i in range(10)])  # 2 to find out how long, then one a round
    clock = StandInClock(disturbances=disturbances)
    assert measure({"a": lambda: next(took)}, clock, seconds=3.0, turns=3) == ({"a": counted}, undisturbed)


def test_long_calls_that_are_disturbed_are_given_up_soon():
    for disturbances, count in [([False] * 3, 3), ([True] * 3, 1)]:
        times, undisturbed = measure({"a": lambda: 9.0}, StandInClock(disturbances=disturbances), seconds=3.0, turns=3)
        assert times == {"a": [9.0] * count} and undisturbed == (count == 3)


@pytest.mark.parametrize(
    "threads, others, disturbed", [(2, 0.1, False), (2, 0.2, True), (1, 1.1, False), (1, 1.2, True)]
)
def test_others_on_the_processors_are_noticed(threads, others, disturbed, tmp_path, monkeypatch):
    """This process may use two of three processors; it has them for 0.7 s of a second, and others for `others`."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(timing, "Path", lambda path: stat)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(timing.os, "sysconf", lambda name: 100, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def at(second, own, others):
        user, stolen = round(100 * own), round(100 * others)
        idle = 1000 * second  # which must not be counted, as waiting for a disk and cpu2 must not
        lines = ["cpu", f"cpu0 {user} 0 0 {idle} {idle} 0 0 0 0 0", f"cpu1 1 2 3 0 0 4 5 {stolen} 0 0", f"cpu2 {idle}"]
        stat.write_text("\n".join([*lines, "intr 1 2 3"]))
        clock = SimpleNamespace(perf_counter=lambda: second, process_time=lambda: own)
        monkeypatch.setattr(timing, "time", clock)

    at(5, 3.0, 40.0)
    clock = CPUClock()
    at(6, 3.7, 40.0 + others)
    assert clock.disturbed() == disturbed
    at(7, 4.4, 40.0 + others)
    assert not clock.disturbed()  # since it was last asked
    stat.unlink()
    assert not CPUClock().disturbed()  # where the system does not tell


def test_gpu_calls_are_timed_between_events_on_a_cleared_cache(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.calls = log.count("call")

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"
            return 2.0 * (end.calls - self.calls)  # ms

    class Module:
        def synchronize(self):
            log.append("synchronize")

    Module.Event = Event
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module())
    monkeypatch.setattr(GPUClock, "CACHE_BYTES", 8)
    clock = GPUClock("cpu")
    monkeypatch.setattr(clock, "cache", type("Cache", (), {"zero_": lambda self: log.append("clear")})())
    assert clock.time(lambda: log.append("call"), 3) == [0.002] * 3
    assert log == ["clear", "record", "call", "record"] * 3 + ["synchronize"]


class NoGradient(torch.autograd.Function):
    """2 x, with the gradient of 3 x."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def raises(x):
    raise RuntimeError("not on this machine")


RIVALS = {
    "plain": lambda x: 2 * x,
    "right": lambda x: x + x,
    "off by 1%": lambda x: 2.02 * x,
    "one element": lambda x: torch.cat([2 * x[:-1], 3 * x[-1:]]),
    "NaN": lambda x: torch.cat([2 * x[:-1], torch.full_like(x[-1:], torch.nan)]),
    "fewer": lambda x: 2 * x[:-1],
    "in half": lambda x: (2 * x).half(),
    "raises": raises,
    "gradient": NoGradient.apply,
}


@pytest.mark.parametrize("backward", [False, True])
def test_only_right_answers_are_timed(monkeypatch, backward):
    doubling = race.Question("doubling", lambda shape: {"x": torch.randn(100)}, RIVALS)
    case = race.Case(doubling, race.Shape("ti", 1, 197), torch.float32, "cpu", backward)
    result = race.Race(case, tuple(RIVALS))
    reasons = {
        "off by 1%": "output: max error",
        "one element": "output: max error",
        "NaN": "NaN or Inf stand in other places",
        "fewer": "the result has shape (99,), the golden value (100,)",
        "in half": "output: has dtype torch.float16, asked was torch.float32",
        "raises": "RuntimeError: not on this machine",
    }
    if backward:
        reasons |= {
            "gradient": "gradient of x: max error",
            "fewer": "Mismatch in shape",  # autograd finds it first
        }
    right = set(RIVALS) - set(reasons)
    assert {name for name, wrong in result.wrong.items() if not wrong} == right
    for name, reason in reasons.items():
        assert reason in result.wrong[name], name
    monkeypatch.setattr(race, "CPUClock", lambda: StandInClock())
    result.calls = {name: lambda: 1.0 for name in RIVALS}
    assert set(result.times(seconds=1.0, turns=2)) == right


BENCH = """
import cases, pytest, torch
from cases import entries
from vitriton.vit.bench import race
from vitriton.vit.bench.race import Question, Rival

seconds = 0.0

class Clock:
    def settle(self): pass

    def disturbed(self): return False

    def time(self, call, count):
        times = []
        for _ in range(count):
            start = seconds
            call()
            times.append(seconds - start)
        return times

race.CPUClock = Clock

def taking(cost, function):
    def rival(x):
        global seconds
        seconds += cost
        return function(x)
    return rival

RIVALS = {
    "plain": taking(0.5, lambda x: 2 * x),
    "slow": taking(1.5, lambda x: x + x),
    "wrong": taking(0.25, lambda x: 2.1 * x),
    "not here": Rival(taking(0.25, lambda x: 2 * x), package="no-such-package"),
    "for GPUs": Rival(taking(0.25, lambda x: 2 * x), devices=("gpu",)),
}
DOUBLING = Question("doubling", lambda shape: {"x": torch.randn(100)}, RIVALS)

@pytest.mark.parametrize("case, rival", entries(DOUBLING))
def test_doubling(case, rival, compete):
    compete(case, rival)
"""


def test_a_run_shows_the_right_and_fails_the_wrong_and_says_why_the_gpu_is_skipped(pytester, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("CUDA", "HIP"):
        monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", "")
    for name in ("conftest.py", "cases.py"):
        shutil.copy(BENCHMARKS / name, pytester.path)
    pytester.makeini("[pytest]\nmarkers =\n    gpu\n    slow\n")
    pytester.path.joinpath("bench_doubling.py").write_text(BENCH)
    chosen = ("-m", "not slow", "-k", "ViT-S and 197 and bfloat16 and not backward")
    result = pytester.runpytest_subprocess(".", *chosen, "-rs", "--benchmark-json", "out.json")
    result.assert_outcomes(passed=2, failed=1, skipped=1 + 5)
    result.stdout.fnmatch_lines_random(
        [
            "GPU cases: skipped, no GPU here: *",
            "SKIPPED [[]5] *no GPU here: torch * sees no CUDA, ROCm or XPU device",
            "SKIPPED [[]1] *not here does not run here: no-such-package is not installed",
            "wrong answers wrongly and is not timed: doubling, ViT-S 4x197, bfloat16, CPU, forward",
            "output: max error *",
            "*benchmark 'doubling, ViT-S 4x197, bfloat16, CPU, forward': 2 tests*",
        ]
    )
    table = json.loads(pytester.path.joinpath("out.json").read_text())["benchmarks"]
    assert {row["name"]: set(row["stats"]["data"]) for row in table} == {"plain": {0.5}, "slow": {1.5}}
    sizes = {"model": "s", "batch": 4, "tokens": 197, "dtype": "bfloat16", "device": "cpu", "direction": "forward"}
    assert table[0]["params"] == {"question": "doubling", **sizes, "rival": table[0]["name"]}


def test_the_interpreter_is_refused(pytester, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("conftest.py", "cases.py"):
        shutil.copy(BENCHMARKS / name, pytester.path)
    result = pytester.runpytest_subprocess(".")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*TRITON_INTERPRET is on*unset it"])
