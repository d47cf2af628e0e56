"""Does the suite notice? Plants each bug of planted_in_*.py in a copy of the package and demands that a test fails.

A few bugs are planted always, all with `-m slow`, some seven seconds each. A bug counts as noticed only if the copy
still imports and what fails is an assertion or a guard, not an error in passing.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import guards
import pytest
import vitriton.kernels
import vitriton.vit
from planted_bugs import Bug, Stale
from planted_in_attention import BACKWARD, BACKWARD_OF_A_HEAD, FORWARD
from planted_in_layer_norm_linear import LAYER_NORM_LINEAR
from planted_in_shared import SHARED

pytestmark = pytest.mark.skipif(not guards.interpreting(), reason="the tests that notice run in the interpreter")

BUGS = FORWARD + BACKWARD + BACKWARD_OF_A_HEAD + LAYER_NORM_LINEAR + SHARED
HERE = Path(__file__).parent
KERNELS = Path(vitriton.kernels.__file__).parent
VIT = Path(vitriton.vit.__file__).parent

# Runs pytest with the copy in sys.argv[1], and names the exceptions that tests raise.
RUN = """
import sys
import pytest
import vitriton.kernels.ops
assert vitriton.kernels.__file__.startswith(sys.argv[1]), vitriton.kernels.__file__
print("imported")

class Name:
    def pytest_exception_interact(self, call):
        print("\\nraised", *(t.__name__ for t in call.excinfo.type.__mro__))

sys.exit(pytest.main(sys.argv[2:], plugins=[Name()]))
"""


def run_tests(package, killed_by):
    """Run these tests with the package in this folder -> (exit code of pytest, exceptions' names, what it printed)."""
    tests = [str(HERE / name) for name in killed_by.split()]
    options = ["-x", "-q", "-k", "not native", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={HERE.parent}"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(package), *options, *tests],
        env=os.environ | {"PYTHONPATH": str(package), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("imported"), f"the copy cannot be imported:\n{done.stderr}"
    raised = [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("raised ")]
    return done.returncode, raised, done.stdout + done.stderr


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the package."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(KERNELS, tmp_path / "vitriton" / "kernels", ignore=ignore)
    shutil.copytree(VIT, tmp_path / "vitriton" / "vit", ignore=ignore)
    return tmp_path


def test_the_table_fits_the_source():
    """Every bug can still be planted, and changes what the file says."""
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 35
    for bug in BUGS:
        source = (KERNELS / bug.file).read_text()
        assert ast.dump(ast.parse(bug.plant(source))) != ast.dump(ast.parse(source)), bug.name
        assert bug.why and bug.killed_by, bug.name


def test_a_stale_table_is_noticed():
    bug = Bug("a", "a.py", text="x", instead="y", why="", killed_by="")
    assert bug.plant("def f():\n    x\n") == "def f():\n    y\n"
    inside = Bug("a", "a.py", text="x", instead="y", why="", killed_by="", within="def g(")
    assert inside.plant("x\n\n\ndef g():\n    x\n\n\nx") == "x\n\n\ndef g():\n    y\n\n\nx"
    assert inside.plant("x\n\n\ndef g():\n    x\n") == "x\n\n\ndef g():\n    y\n"
    for source in ("x x", "z"):
        with pytest.raises(Stale):
            bug.plant(source)
    for source in ("x", "def g(x, x)", "def g(): z\n\n\nx"):
        with pytest.raises(Stale):
            inside.plant(source)


@pytest.mark.slow
def test_the_tests_pass_without_a_bug(package):
    """Else they would notice nothing."""
    every = sorted({test for bug in BUGS for test in bug.killed_by.split()})
    code, raised, output = run_tests(package, " ".join(every))
    assert code == 0 and raised == [], output


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, id=bug.name, marks=[] if bug.quick else pytest.mark.slow) for bug in BUGS]
)
def test_planted(package, bug):
    file = package / "vitriton" / "kernels" / bug.file
    file.write_text(bug.plant(file.read_text()))
    code, raised, output = run_tests(package, bug.killed_by)
    assert code != 0, f"SURVIVED: {bug.killed_by} passes although {bug.why}"
    assert code == 1 and raised, output  # no error of collection or usage
    assert "AssertionError" in raised[0], f"not noticed by an assertion or a guard:\n{output}"
