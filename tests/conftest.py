"""What holds for every test: where kernels run, the guards, the seed, and how many examples hypothesis draws.

Without a GPU, TRITON_INTERPRET=1 is set here, before anything imports triton, and the kernels run in Triton's
interpreter; with one, and the variable unset, the same tests run on the GPU. Either way they take the fixture `device`.
"""

import atexit
import os
import shutil
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

GPU = next((name for name in ("cuda", "xpu") if getattr(torch, name).is_available()), None)  # cuda: ROCm too

if GPU is None and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise pytest.UsageError("triton was imported before tests/conftest.py: set TRITON_INTERPRET=1 to run the tests")
    os.environ["TRITON_INTERPRET"] = "1"

if "VITRITON_CACHE_DIR" not in os.environ:  # nothing is left in the user's, and nothing found there
    os.environ["VITRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="vitriton-tests-")
    atexit.register(shutil.rmtree, os.environ["VITRITON_CACHE_DIR"], ignore_errors=True)

# `python -m pytest` puts it there, and then transformers takes kernels/ for Hugging Face's package of that name
TOP = Path(__file__).parent.parent
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != TOP]

# imports triton
import guards  # noqa: E402

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count()))

COMMON = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=12, **COMMON)
settings.register_profile("thorough", max_examples=300, **COMMON)


def pytest_configure(config):
    """`quick`, or `thorough` with `-m slow`; HYPOTHESIS_PROFILE or --hypothesis-profile overrides."""
    if config.getoption("--hypothesis-profile", None) is None:
        slow = config.getoption("-m").strip() == "slow"
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "thorough" if slow else "quick"))


def pytest_report_header():
    if guards.triton is None:
        return "kernels: not run, triton is not installed; only allocations are guarded"
    if guards.interpreting():
        return "kernels: in Triton's interpreter, guarded"
    return f"kernels: on {GPU}; only allocations are guarded" if GPU else "kernels: not run, TRITON_INTERPRET is off"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        if GPU is None:
            pytest.skip("no GPU here")
        if guards.interpreting():
            pytest.skip("TRITON_INTERPRET is on: kernels do not run on the GPU")


@pytest.fixture(scope="session")
def device():
    """Where kernels run: the CPU in the interpreter, else the GPU. Skips where they run nowhere."""
    if guards.triton is None:
        pytest.skip("triton is not installed")
    if guards.interpreting():
        return torch.device("cpu")
    if GPU is None:
        pytest.skip("no GPU here, and TRITON_INTERPRET is off")
    return torch.device(GPU)


@pytest.fixture
def native():
    """The native path, for a test of what is the same in every implementation, or of the CPU's."""
    from vitriton.kernels import use_backend

    with use_backend("native"):
        yield


@pytest.fixture
def unguarded():
    """Turns the guards off for a test: for peak memory, or memory too sparse for their ledgers."""


@pytest.fixture
def as_library(request):
    """Allocations of the test's file are guarded as the library's are."""
    guards.LIBRARY.add(request.module.__name__)
    yield
    guards.LIBRARY.remove(request.module.__name__)


@pytest.fixture(autouse=True)
def launch_log(request):
    """The kernel launches of this test so far, each a guards.Launch; empty on a GPU. Turns the guards on."""
    with nullcontext([]) if "unguarded" in request.fixturenames else guards.guard() as log:
        yield log


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
