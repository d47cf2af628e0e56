"""The harness of benchmarks/: wrong answers are reported and not timed, times reach the table, a missing GPU is named.

Time here is a stand-in that the rivals themselves advance, so nothing depends on how fast this machine is.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import race  # noqa: E402
from timing import GPUClock, measure  # noqa: E402


class StandInClock:
    """Each call takes the seconds that it returns; the first one after a pause, `cold` times as many."""

    def __init__(self, cold=1):
        self.cold, self.factor, self.pauses = cold, 1, 0

    def settle(self):
        self.factor, self.pauses = self.cold, self.pauses + 1

    def time(self, call, count):
        times = []
        for _ in range(count):
            times.append(self.factor * call())
            self.factor = 1
        return times


def test_a_slower_rival_is_slower_by_its_factor():
    times = measure({"fast": lambda: 0.001, "slow": lambda: 0.003}, StandInClock(), seconds=0.1, turns=5)
    assert set(times["fast"]) == {0.001} and set(times["slow"]) == {0.003}
    assert len(times["fast"]) == 100 and len(times["slow"]) == 30  # 5 turns of 0.02 s


def test_the_first_call_after_a_pause_is_not_counted():
    clock = StandInClock(cold=50)
    times = measure({"a": lambda: 0.01, "b": lambda: 0.01}, clock, seconds=0.1, turns=3)
    assert set(times["a"] + times["b"]) == {0.01}
    assert clock.pauses == 2 * (1 + 3)


def test_long_calls_are_not_made_more_often_than_they_count():
    calls = []
    times = measure({"long": lambda: calls.append(0) or 1.0}, StandInClock(), seconds=0.1, turns=3)
    assert times == {"long": [1.0] * 3} and len(calls) == 2 + 3  # 2 to find out how long


def test_rivals_take_turns_in_alternating_order():
    order = []
    calls = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    times = measure(calls, StandInClock(), seconds=0.1, turns=4)
    turns = [name for name, following in zip(order, [*order[1:], None], strict=True) if name != following]
    # calibration and the first turn, then backwards and forwards; the last of a round is the first of the next
    assert "".join(turns) == "abc" + "abc" + "ba" + "bc" + "ba"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4, "c": 4}


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
import pytest, race, torch
from race import Question, entries

seconds = 0.0

class Clock:
    def settle(self): pass

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
    for name in ("conftest.py", "race.py", "timing.py"):
        shutil.copy(BENCHMARKS / name, pytester.path)
    pytester.makeini("[pytest]\nmarkers =\n    gpu\n    slow\n")
    pytester.path.joinpath("bench_doubling.py").write_text(BENCH)
    result = pytester.runpytest_subprocess(
        *(".", "-m", "not slow", "-k", "ViT-S and bfloat16 and not backward", "-rs", "--benchmark-json", "out.json")
    )
    result.assert_outcomes(passed=2, failed=1, skipped=3)
    result.stdout.fnmatch_lines_random(
        [
            "GPU cases: skipped, no GPU here: *",
            "SKIPPED [[]3] *no GPU here: torch * sees no CUDA, ROCm or XPU device",
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
    for name in ("conftest.py", "race.py", "timing.py"):
        shutil.copy(BENCHMARKS / name, pytester.path)
    result = pytester.runpytest_subprocess(".")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*TRITON_INTERPRET is on*unset it"])
