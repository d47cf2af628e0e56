"""`pytest benchmarks`: what runs where, the table's form, and the fixture that checks an answer and then times it."""

import os
import warnings
from functools import lru_cache

import pytest
import torch
from cases import GPU, NO_GPU, replay
from vitriton.kernels import explain
from vitriton.vit.bench.functions import missing
from vitriton.vit.bench.models import ModelCase, ModelRace, missing_peers
from vitriton.vit.bench.race import Race

DEFAULTS = {  # of pytest-benchmark's options, where the command line does not say otherwise
    "benchmark_columns": ["median", "iqr", "min", "rounds"],
    "benchmark_sort": "median",
    "benchmark_max_time": 0.5,
}


@lru_cache(maxsize=1)  # the rivals of a case are neighbours: one race in memory at a time
def race_of(case, rivals):
    return ModelRace(case, rivals) if isinstance(case, ModelCase) else Race(case, rivals)


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("TRITON_INTERPRET is on, and times of Triton's interpreter mean nothing: unset it")
    config.addinivalue_line("python_files", "bench_*.py")
    given = " ".join(config.invocation_params.args)
    for name, value in DEFAULTS.items():
        if f"--{name.replace('_', '-')}" not in given:
            setattr(config.option, name, value)


def implementation(device, dtype):
    try:
        return f"    vitriton there: {explain(torch.empty(0, device=device, dtype=dtype))}"
    except RuntimeError as error:  # of VITRITON_BACKEND; the tests will fail with it
        return f"    vitriton there: {error}"


def pytest_report_header():
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = "; something else runs here, or did just now: do not trust the times" if load > 0.5 else ""
    lines = [
        f"CPU cases: {torch.get_num_threads()} threads on {os.cpu_count()} cores, load average {load:.1f}{busy}",
        implementation("cpu", torch.float32),
    ]
    lines += [f"missing: {rival}: {why}" for rival, why in (missing() | missing_peers()).items()]
    if GPU is None:
        return [*lines, f"GPU cases: skipped, {NO_GPU}"]
    name = torch.get_device_module(GPU).get_device_name()
    return [*lines, f"GPU cases: {name}", implementation(GPU, torch.float16)]


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = GPU and torch.get_device_module(GPU).get_device_name()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and GPU is None:
        pytest.skip(NO_GPU)


@pytest.fixture
def compete(request, benchmark):
    """compete(case, rival): fail if the rival's answer is wrong, else give its times to the table. A peer that is not
    installed, or raises, is skipped with the reason.

    They are measured at the case's first test, in turns among those of its rivals that were selected.
    """

    def compete(case, rival):
        params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        race = race_of(case, tuple(p["rival"] for p in params if p.get("case") is case))
        if rival in race.raised and rival != "vitriton":
            pytest.skip(f"{rival} does not run here: {race.wrong[rival]}")
        if race.wrong[rival]:
            pytest.fail(f"{rival} answers wrongly and is not timed: {case}\n{race.wrong[rival]}", pytrace=False)
        benchmark.group, benchmark.name, benchmark.params = str(case), rival, {**case.params(), "rival": rival}
        if benchmark.disabled:
            return benchmark.pedantic(race.calls[rival])
        seconds, turns = (request.config.getoption(f"benchmark_{name}") for name in ("max_time", "min_rounds"))
        times = race.times(seconds=float(seconds), turns=turns)[rival]
        if not race.undisturbed:
            warnings.warn(f"other programs kept the processors busy: do not trust the times of {case}", stacklevel=2)
        replay.load(times)
        return benchmark.pedantic(lambda: None, rounds=len(times))

    return compete
