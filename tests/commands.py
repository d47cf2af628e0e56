"""What the tests of the `vitriton` command share: how it is run in a process of its own, and what is missing there.

A pytest plugin, for its fixtures: `pytest_plugins = ["commands"]` in a test file. PYTEST_DONT_REWRITE.
"""

import os
import subprocess
import sys

import pytest
from vitriton.kernels import compiled, native_attention, use_backend
from vitriton.vit import costs


def command(*args, **environment):
    """The command line of `vitriton` and the environment to run it in: not the interpreter, one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VITRITON_BACKEND")}
    return {
        "args": [sys.executable, "-m", "vitriton.vit.cli", *args],
        "env": kept | {"OMP_NUM_THREADS": "1"} | environment,
        "text": True,
    }


def vitriton(*args, **environment):
    """Run `vitriton` in a process of its own."""
    return subprocess.run(**command(*args, **environment), capture_output=True, timeout=300)


@pytest.fixture
def no_benchmark(monkeypatch):
    """The demo without its ViTs at 224 px."""
    monkeypatch.setattr(costs, "ROWS_QUICK", ())
    monkeypatch.setattr(costs, "ROWS_CPU", ())


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """VITRITON_CPU_ATTENTION=compiled where nothing can be compiled, in a folder that may be filled."""
    monkeypatch.setattr(compiled, "why_not", lambda dtype: "no compiler")
    monkeypatch.setattr(native_attention, "forced", "compiled")
    monkeypatch.chdir(tmp_path)
    native_attention._choice.cache_clear()
    with use_backend("native"):
        yield
    native_attention._choice.cache_clear()
