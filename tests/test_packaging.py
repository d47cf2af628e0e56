"""Packaging: metadata, what can be imported without Triton and without extras, and which way imports point."""

import ast
import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
EXTRAS = ["sklearn", "matplotlib", "PIL", "rich", "pytest", "hypothesis"]
EXTRAS += ["timm", "transformers", "torchvision", "vit_pytorch", "open_clip", "onnx", "onnxruntime", "openvino"]
# of kernels, without kernels inside
PLAIN_MODULES = ["functions", "ops", "direct", "native", "launch", "configs", "reference"]


def files(*folders):
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def python(code, **environment):
    """Run `code` in a process of its own, with this environment and no TRITON_INTERPRET; returns what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- what an import needs, and does

WITHOUT = """
import importlib, sys
for name in {blocked!r}:
    sys.modules[name] = None  # `import name` raises ImportError
for name in {modules!r}:
    importlib.import_module(name)
"""
MODULES = [f"vitriton.kernels.{name}" for name in PLAIN_MODULES] + [
    f"vitriton.vit.{file.stem}" for file in files("vit") if file.parent.name == "vit" and file.stem != "__init__"
]
MODULES += [f"vitriton.vit.bench.{file.stem}" for file in files("vit/bench") if file.stem != "__init__"]


def test_without_triton_and_extras():
    """Everything but the kernels themselves imports, and the functions run on the native path."""
    code = WITHOUT.format(blocked=["triton", *EXTRAS], modules=MODULES)
    code += """
import torch
from vitriton.kernels import attention, explain, layer_norm_linear, qkv_attention, use_backend
from vitriton.vit import ViT, fuse
x = torch.randn(2, 5, 48, requires_grad=True)
qkv_attention(x, 2).sum().backward()
model = ViT(image_size=16, patch_size=8, num_classes=3, dim=16, depth=1, heads=2, dim_head=8, mlp_dim=32)
images = torch.randn(2, 3, 16, 16)
before = model(images)
fuse(model)
torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
assert "not installed" in explain(x)
with use_backend("triton"):
    try:
        qkv_attention(x, 2)
    except RuntimeError as error:
        print(error)
"""
    assert "triton is not installed" in python(code)


def test_importing_touches_no_gpu():
    """No function of torch.cuda is called, and no driver of Triton's is started."""
    code = """
import torch
called = []
def watch(module, names):
    for name in names:
        def spy(*args, name=f"{module.__name__}.{name}", **kwargs):
            called.append(name)
            raise RuntimeError(name)
        setattr(module, name, spy)
watch(torch.cuda, [n for n, f in vars(torch.cuda).items() if callable(f) and not isinstance(f, type) and n[0] != "_"])
watch(torch.cuda, ["_lazy_init"])
if hasattr(torch, "xpu"):
    watch(torch.xpu, [n for n in ("is_available", "device_count", "_lazy_init") if hasattr(torch.xpu, n)])
try:
    from triton.runtime import driver
    type(driver).active = property(lambda self: called.append("triton.runtime.driver.active"))
except ImportError:
    pass
"""
    code += WITHOUT.format(blocked=[], modules=["vitriton.kernels", "vitriton.vit", *MODULES])
    code += "assert called == [], called"
    python(code)


def test_the_backend_of_the_environment():
    code = "from vitriton.kernels import explain; import torch; print(explain(torch.zeros(1)))"
    assert "'native' was chosen" in python(code, VITRITON_BACKEND="native", TRITON_INTERPRET="1")
    with pytest.raises(AssertionError, match="VITRITON_BACKEND is 'cuda'; allowed are 'auto', 'triton', 'native'"):
        python(code, VITRITON_BACKEND="cuda")


# ---- which way imports point


def imports(file, *, everywhere=True):
    """The absolute names of the modules that a file imports, at its top level or everywhere."""
    package = ("vitriton", *file.relative_to(ROOT).parent.parts)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def outside(names):
    """Top-level packages that are neither ours nor the standard library's."""
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"vitriton"}


@pytest.mark.parametrize("file", files("kernels"), ids=lambda file: file.name)
def test_kernels_know_no_module(file):
    names = set(imports(file))
    assert not any(name.startswith("vitriton.vit") for name in names)
    assert outside(names) <= {"torch", "triton", "einops", "numpy"}
    if file.stem not in ("ops", "reference", "__init__"):  # ops.py: double backward
        assert not any(name.startswith("vitriton.kernels.reference") for name in names)


@pytest.mark.parametrize("file", files("vit"), ids=lambda file: file.name)
def test_vit_imports_extras_inside_functions_only(file):
    assert outside(imports(file, everywhere=False)) <= {"torch", "einops"}
    if file == ROOT / "vit" / "reference.py":
        assert not any(name.startswith("vitriton.kernels") for name in imports(file))


@pytest.mark.parametrize("file", files("benchmarks", "tests"), ids=lambda file: file.name)
def test_tests_and_benchmarks_import_vitriton_by_its_name(file):
    assert not {"kernels", "vit"} & outside(imports(file))


@pytest.mark.parametrize("file", files("kernels", "vit", "benchmarks", "tests"), ids=lambda file: file.name)
def test_every_file_says_what_it_is_for(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


# ---- setup.py


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py passes to setuptools.setup, run where torch and triton cannot be imported."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    for name in ("torch", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_setup_is_static():
    """It imports two modules, calls setup() once, and reads nothing but README.md."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assert outside(imports(ROOT / "setup.py")) == {"setuptools"}
    assert {name.split(".")[0] for name in imports(ROOT / "setup.py")} == {"pathlib", "setuptools"}
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert sorted(calls) == sorted(
        ["setup", "Path", "Path(__file__).with_name", "Path(__file__).with_name('README.md').read_text"]
    )
    assert not any(isinstance(node, (ast.If, ast.Try, ast.FunctionDef)) for node in ast.walk(tree))


def test_every_package_is_listed(setup_arguments):
    folders = {file.parent for file in files("kernels", "vit") if file.name == "__init__.py"}
    names = {"vitriton." + ".".join(folder.relative_to(ROOT).parts): folder for folder in folders}
    assert set(setup_arguments["packages"]) == set(names)
    for name in ("vitriton.kernels", "vitriton.vit"):
        assert ROOT / setup_arguments["package_dir"][name] == names[name]
        others = {file.name for file in names[name].iterdir() if file.suffix in (".typed", ".cpp", ".h")}
        packaged = {file.name for glob in setup_arguments["package_data"][name] for file in names[name].glob(glob)}
        assert packaged == others and "py.typed" in others
    assert setup_arguments["license"] == "MIT" and "MIT License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_requirements(setup_arguments):
    required, extras = setup_arguments["install_requires"], setup_arguments["extras_require"]
    assert [r for r in required if r.startswith("triton")] == ['triton>=3.5; sys_platform == "linux"']
    assert {r.split(">")[0] for r in required} == {"torch", "einops", "triton"}
    assert setup_arguments["python_requires"] == ">=3.10"
    assert set(extras) == {"demo", "bench", "test", "integrations", "dev"}
    assert set(extras["demo"]) == {"scikit-learn", "matplotlib", "Pillow", "rich"}
    assert set(extras["demo"]) | set(extras["test"]) < set(extras["dev"])


def test_installed_metadata(setup_arguments):
    """What is installed is this version, with its command."""
    installed = metadata.distribution("vitriton")
    assert installed.version == setup_arguments["version"]
    (command,) = (entry for entry in installed.entry_points if entry.name == "vitriton")
    assert command.group == "console_scripts" and command.value == "vitriton.vit.cli:command"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in changes or f"## {installed.version}" in changes
