"""`vitriton check` and `vitriton doctor`: what is right passes, and what is planted or missing is found and named."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from commands import vitriton
from vitriton.kernels import native
from vitriton.vit import check, doctor
from vitriton.vit.cli import main

pytest_plugins = ["commands"]
# the guards on allocations would be counted, and slow everything down
pytestmark = pytest.mark.usefixtures("unguarded")


def test_check_native(capsys):
    assert main(["check", "--only", "native", "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert found["ok"] and not found["not_checked"]
    on_cpu = [record for record in found["results"] if "GPU" not in record["where"]]
    names = {record["case"] for record in on_cpu}
    assert len(names) == 10 and {"attention", "qkv_attention", "layer_norm_linear with gelu"} <= names
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        assert {record["case"] for record in on_cpu if record["dtype"] == dtype} == names
    gradients = {error["name"] for record in on_cpu if record["case"] == "attention" for error in record["compared"]}
    assert gradients == {"output", "gradient of q", "gradient of k", "gradient of v"}
    for record in found["results"]:
        line = next(line for line in streams.err.splitlines() if f"{record['case']}, {record['dtype']}: " in line)
        assert line.startswith("  ok ") and "allowed" in line


def plant(monkeypatch, function, change):
    """Let native.`function` return what `change` makes of what it returns."""
    right = getattr(native, function)
    monkeypatch.setattr(native, function, lambda *args, **options: change(*right(*args, **options)))


@pytest.mark.parametrize(
    "function, change, wrong, right",
    [
        (
            "attention_forward",
            lambda out, lse: (out * 1.01, lse),
            ("attention", "output"),
            "layer_norm_linear with gelu",
        ),
        (
            "layer_norm_linear_backward",
            lambda dx, dw: (dx, (dw[0] * 1.5, *dw[1:])),
            ("layer_norm_linear with gelu", "gradient of norm_weight"),
            "attention",
        ),
        (
            "layer_norm_linear_forward",
            lambda y, *others: (y.masked_fill(y == y.max(), torch.nan), *others),
            ("layer_norm_linear with gelu", "NaN or Inf in the wrong places"),
            "attention",
        ),
    ],
)
def test_check_fails_on_a_planted_error(function, change, wrong, right, monkeypatch, capsys):
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    plant(monkeypatch, function, change)
    assert main(["check", "--only", "native"]) == 1
    text = capsys.readouterr().out
    case, what = wrong
    assert re.search(
        rf"^  FAIL  {re.escape(case)}, float32: .*\n(        wrong: .*\n)*        wrong: .*{what}", text, re.M
    )
    assert re.search(rf"^  ok    {re.escape(right)}, float32: ", text, re.M)
    assert re.search(r"^FAILED: \d+ of \d+ cases are wrong", text, re.M)


def test_check_goes_on_after_an_exception(monkeypatch, capsys):
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))

    def fail(*args, **options):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(native, "attention_forward", fail)
    assert main(["check", "--only", "native"]) == 1
    text = capsys.readouterr().out
    assert "  FAIL  attention, float32: raised RuntimeError: no such operator\n" in text
    assert "  ok    layer_norm_linear with gelu, float32: " in text


def test_check_runs_the_interpreter_in_a_process_of_its_own():
    pytest.importorskip("triton", reason="triton is not installed, so there is no interpreter")
    records = check.run_interpreter(0)
    first = next(records)
    records.close()  # the rest takes a minute; test_attention.py and others have it all
    assert first["case"] == "attention" and first["ok"] and len(first["compared"]) == 4, first


def test_check_fails_if_the_interpreter_dies(monkeypatch):
    monkeypatch.setattr(check, "__name__", "vitriton.vit.no_such_module")
    (record,) = check.run_interpreter(0)
    assert not record["ok"] and "no_such_module" in record["raised"]
    assert check.sentence(record).startswith("  FAIL  the process of the interpreter: raised ")


def test_check_says_why_nothing_was_checked(monkeypatch, capsys):
    monkeypatch.setattr(check, "gpu", lambda: None)
    assert main(["check", "--only", "gpu"]) == 2
    streams = capsys.readouterr()
    assert "no GPU" in streams.err and "no GPU" in streams.out


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert found["ok"] and found["broken"] == [] and "OK: nothing is broken" in streams.err
    assert found["versions"]["torch"] and set(found["extras"]) == {"demo", "bench", "test", "integrations", "dev"}
    assert "scikit-learn" in found["extras"]["demo"]
    assert found["cpu"]["gflops"]["float32"] > 0 and found["cpu"]["threads"] == torch.get_num_threads()
    on_cpu = [answer for answer in found["implementations"] if answer["device"] == "cpu"]
    assert sorted(dtype for answer in on_cpu for dtype in answer["dtypes"]) == [
        "bfloat16",
        "float16",
        "float32",
        "float64",
    ]
    assert all("passed over" in answer["answer"] for answer in on_cpu)
    assert found["imported_from"]["vitriton.kernels"] == str(Path(native.__file__).parent)
    assert "torch.compile" in found["caches"]


@pytest.mark.parametrize("file", ["vitriton/__init__.py", "vitriton.py", "vitriton/kernels/__init__.py"])
def test_doctor_finds_what_hides_vitriton(file, capsys, monkeypatch, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert re.search(rf"BROKEN: .*{re.escape(str(tmp_path / file).removesuffix('/__init__.py'))}.*rename", text)


def test_doctor_lets_other_packages_called_kernels_be(capsys, monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert main(["doctor"]) == 0
    assert re.search(
        rf"a top-level kernels is at {re.escape(str(tmp_path))}.*another package; no clash", capsys.readouterr().out
    )


def test_doctor_finds_a_package_that_is_too_old_or_missing(capsys, monkeypatch):
    versions = {"torch": "2.8.1+cpu", "einops": None}
    installed_version = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name, installed_version(name)))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "BROKEN: torch 2.8.1+cpu is too old: pip install 'torch>=2.9'" in text
    assert "BROKEN: einops is missing: pip install" in text


def test_doctor_finds_a_backend_that_cannot_run(tmp_path):
    run = vitriton("doctor", "--json", VITRITON_BACKEND="triton", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "the backend 'triton' can run on no device here" in json.loads(run.stdout)["broken"][0]


def test_doctor_finds_a_choice_that_cannot_run(no_compiler, capsys):
    assert main(["doctor"]) == 1
    assert "BROKEN: VITRITON_CPU_ATTENTION is 'compiled', which cannot run: no compiler; unset it" in (
        capsys.readouterr().out
    )


def test_doctor_finds_a_cache_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert main(["doctor"]) == 0
    assert f"torch.compile: {tmp_path / 'file' / 'cache'}, not made yet, NOT writable" in capsys.readouterr().out
