"""The `vitriton` command: real runs, its JSON and exit codes, what it says when something is wrong, and its pieces.

Commands run in this process where something is planted in it, and as `python -m vitriton.vit.cli` where they are judged
from outside.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vitriton.kernels import compiled, native, native_attention, packed, use_backend
from vitriton.vit import check, console, costs, demo, doctor, fuse, modules, timing
from vitriton.vit.cli import build_parser, main
from vitriton.vit.measure import peak_memory, pick_device, quartiles
from vitriton.vit.reference import ViT
from vitriton.vit.rollout import patch_rollout

# the guards on allocations would be counted, and slow everything down
pytestmark = pytest.mark.usefixtures("unguarded")

SUBCOMMANDS = ("demo", "train", "look", "check", "doctor", "bench", "tune", "compile")
CPU = torch.device("cpu")


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


# ---------------------------------------------------------------------------------------------------------------------
# Help and bad arguments


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_help_suffices(subcommand, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([subcommand, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for part in ("examples:", f"vitriton {subcommand}", "exit codes:", "--json", "130"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_names_every_subcommand(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{subcommand} +\w+", text, re.MULTILINE) for subcommand in SUBCOMMANDS)


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "SUBCOMMAND"),
        (["dance"], "dance"),
        (["demo", "--epochs", "0"], "0 is not positive"),
        (["demo", "--seconds", "x"], "invalid float value"),
        (["demo", "--seconds", "inf"], "inf is not positive, or not finite"),
        (["check", "--only", "cpu"], "native"),
        (["compile", "--rows", "-1"], "-1 is less than 0"),
        (["check", "--seed", str(2**63)], f"{2**63} does not fit into 64 bits"),
    ],
)
def test_bad_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["--out", "no/such/folder/a.png"], "cannot write --out no/such/folder/a.png: No such file"),
        (["--out", "a.doc"], "--out a.doc must end in one of"),
        (["--out", "."], "--out . must end in one of"),
        (["--json", "no/such/folder/a.json"], "cannot write --json no/such/folder/a.json: No such file"),
        (["--device", "gpu"], "--device gpu is none of auto, cpu, cuda and xpu"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used: "),
    ],
)
def test_demo_finds_what_is_wrong_before_it_trains(args, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("it trained"))
    assert main(["demo", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vitriton demo: error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dump", "file/folder"], "cannot make the folder --dump file/folder: Not a directory"),
        (["--kernel", "fold", "--head-dim", "64"], "nothing to compile"),
        (["--arch", "sm_70"], "--arch is 'sm_70'; allowed are sm_80, "),
        (["--accept", "file"], "--accept file is no file of costs"),
        (["--accept", "list.json"], "--accept list.json is no file of costs"),
    ],
)
def test_compile_finds_what_is_wrong_before_it_compiles(args, message, capsys, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed, so nothing can be compiled")
    from vitriton.kernels import survey

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(survey, "survey", lambda *_, **__: pytest.fail("it compiled"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("list.json").write_text("[]")
    assert main(["compile", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vitriton compile: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "variable, allowed",
    [
        ("VITRITON_BACKEND", "'auto', 'triton', 'native'"),
        ("VITRITON_CPU_LINEAR", "'auto', 'pytorch', 'onednn', 'packed', 'trusted', 'compiled'"),
        ("VITRITON_CPU_BF16", "'auto', 'pairs', 'fp32'"),
    ],
)
def test_a_wrong_environment_variable(variable, allowed):
    run = vitriton("doctor", **{variable: "fast"})
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == (
        f"vitriton doctor: error: the environment variable {variable} is 'fast'; allowed are {allowed}: "
        "set it to one of these, or unset it\n"
    )


@pytest.mark.parametrize(
    "args",
    [
        ["check", "--model", "vitriton:ti"],
        ["demo", "--quick", "--device", "cpu"],
        ["look", "sample:china", "--model", "ti", "--random-weights", "--device", "cpu"],
    ],
)
def test_a_choice_that_cannot_run(args, no_compiler, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    why = "VITRITON_CPU_ATTENTION is 'compiled', which cannot run: no compiler"
    assert error == f"vitriton {args[0]}: error: {why}; unset it\n"


@pytest.mark.parametrize("module, name", [("sklearn", "scikit-learn"), ("rich", "rich"), ("matplotlib", "matplotlib")])
def test_demo_says_which_extra_to_install(module, name, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert name in error and "pip install 'vitriton[demo]'" in error


def test_other_subcommands_need_no_extra(monkeypatch, capsys):
    for module, _ in demo.EXTRAS:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(check, "cases", lambda seed: [])
    assert main(["doctor"]) == 0
    assert main(["check", "--only", "native"]) == 2  # no case
    assert "pip install 'vitriton[demo]'" not in capsys.readouterr().err


def test_writability_is_found_without_touching_the_file(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("content")
    console.check_writable(old, "--json")
    console.check_writable(new, "--json")
    assert old.read_text() == "content" and not new.exists()
    with pytest.raises(console.Problem, match="--json"):
        console.check_writable(tmp_path, "--json")


# ---------------------------------------------------------------------------------------------------------------------
# demo


def test_demo_quick(tmp_path):
    picture, record = tmp_path / "digits.png", tmp_path / "demo.json"
    run = vitriton("demo", "--quick", "--device", "cpu", "--out", str(picture), "--json", str(record))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    for part in (
        "epoch 2 of 2",
        "360 of 360 the same",
        "ViT-Ti, training step",
        "bit for bit",
        "accuracy was not judged",
    ):
        assert part in run.stdout
    # what it says of times on a busy machine is no verdict
    assert "WRONG" not in run.stdout and "NOT" not in run.stdout.replace("DO NOT TRUST the times", "")

    found = json.loads(record.read_text())
    assert found["command"] == "demo" and found["ok"] and found["failures"] == []
    assert found["training"]["epochs"] == 2 and found["training"]["held_out"] == 360
    same = found["sameness"]
    assert same["predictions_same"] == 360 and same["restored_by_unfuse"]
    for name in ("logits", "gradients"):
        # not zero: the two models take different ways
        assert 0 < same[name]["fused_from_plain"] <= 1e-4 * same[name]["largest_value"]
        assert 0 < same[name]["fused_from_float64"] <= same[name]["allowed_from_float64"]
    assert [row["what"] for row in found["costs"]] == ["forward", "training step"]
    for row in found["costs"]:
        assert row["plain"]["calls"] > 0 and row["fused"]["calls"] > 0
        assert row["plain"]["seconds"] > 0 and row["fused"]["seconds"] > 0
        assert 0 < row["fused"]["peak_bytes"] < row["plain"]["peak_bytes"]

    from PIL import Image

    with Image.open(picture) as image:
        assert min(image.size) > 500 and len(image.convert("RGB").getcolors(2**24)) > 100


@pytest.mark.usefixtures("no_benchmark")
def test_demo_fails_if_answers_change(monkeypatch, capsys, tmp_path):
    forward = native.attention_forward

    def wrong(*args, **options):
        out, lse = forward(*args, **options)
        return out * 1.001, lse

    monkeypatch.setattr(native, "attention_forward", wrong)
    args = ["demo", "--quick", "--device", "cpu", "--out", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    assert main(args) == 1
    text = capsys.readouterr().out
    assert re.search(r"logits .* WRONG", text) and "FAILED" in text
    found = json.loads((tmp_path / "a.json").read_text())
    assert not found["ok"] and not found["sameness"]["logits"]["ok"] and "answers" in found["failures"][0]


@pytest.mark.usefixtures("no_benchmark")
def test_demo_fails_if_it_has_not_learnt(capsys, tmp_path):
    assert main(["demo", "--seconds", "0.2", "--device", "cpu", "--out", str(tmp_path / "a.png"), "--json"]) == 1
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert found["training"]["epochs"] < demo.EPOCHS and found["training"]["accuracy"] < demo.TARGET
    assert len(found["failures"]) == 1 and "not 97%" in found["failures"][0]
    assert "FAILED" in streams.err


def test_costs_judge_answers(monkeypatch):
    forward = modules.layer_norm_linear_inference

    def wrong(*args):
        return forward(*args) * 1.001

    monkeypatch.setattr(packed, "forced", "pytorch")
    with use_backend("native"):
        right = costs.cost("ti", "forward", 1, CPU, seconds=0)
        monkeypatch.setattr(modules, "layer_norm_linear_inference", wrong)
        record = costs.cost("ti", "forward", 1, CPU, seconds=0)
    assert right["ok"] and costs._cells(right)[-1] == "same"
    assert not record["ok"] and costs._cells(record)[-1] == "WRONG"


@pytest.mark.parametrize("disturbed", [False, True])
def test_demo_says_which_times_others_disturbed(disturbed, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(costs, "ROWS_QUICK", (("ti", "forward", 1),))
    monkeypatch.setattr(timing.CPUClock, "disturbed", lambda self: disturbed)
    args = ["demo", "--quick", "--seconds", "0.2", "--device", "cpu", "--out", str(tmp_path / "a.png"), "--json"]
    assert main(args) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["costs"][0]["disturbed"] == disturbed
    assert ("DO NOT TRUST the times of ViT-Ti, forward: other programs" in streams.err) == disturbed


def test_training_learns_and_repeats_itself():
    images, labels, held_out, held_out_labels = demo.digits(CPU)
    assert len(images) + len(held_out) == 1797
    assert not (images[:, None] == held_out[None, :]).flatten(2).all(dim=2).any(), "a held-out image is trained on"
    args = build_parser().parse_args(["demo", "--epochs", "3", "--seed", "3"])
    models = []
    for _ in range(2):
        models.append(demo.small_vit(3))
        demo.train(models[-1], images, labels, args, console.Console("-"))
    with torch.no_grad():
        logits, again = (model(held_out) for model in models)
    assert torch.equal(logits, again)
    assert (logits.argmax(dim=1) == held_out_labels).float().mean() > 0.5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_cleanly(tmp_path):
    run = command("demo", "--epochs", "20", "--device", "cpu", "--out", str(tmp_path / "a.png"))
    with subprocess.Popen(**run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while "10%" not in process.stdout.readline():  # it trains
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "vitriton demo: stopped"


# ---------------------------------------------------------------------------------------------------------------------
# check


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


# ---------------------------------------------------------------------------------------------------------------------
# doctor


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


def test_a_closed_pipe_is_no_error():
    run = command("doctor", "--json")
    with subprocess.Popen(**run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `vitriton doctor --json | true` does
        error = process.stderr.read()
    assert process.returncode == 141 and error.rstrip().endswith("OK: nothing is broken")


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def test_peak_memory_counts_what_is_held_at_a_time():
    size = 1000 * 1000 * 4

    def step():
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        c = b + 1  # three have been made, two are held
        return b, c

    assert 2 * size <= peak_memory(step, CPU) < 2 * size + 1000  # and a few scalars


def test_quartiles():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]


def test_pick_device():
    assert pick_device("cpu") == CPU
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        assert pick_device("auto") == CPU


def test_cls_attention_of_one_layer_is_its_softmax():
    vit = ViT(image_size=8, patch_size=2, num_classes=3, dim=16, depth=1, heads=2, dim_head=8, mlp_dim=16)
    images = torch.randn(5, 3, 8, 8)
    tokens = torch.cat([vit.cls_token.expand(5, 1, 16), vit.to_patch_embedding(images)], dim=1) + vit.pos_embedding
    block = vit.transformer.layers[0][0]
    q, k, _ = block.fn.to_qkv(block.norm(tokens)).view(5, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = (q[:, :, :1] @ k.transpose(-1, -2) * 8**-0.5).softmax(dim=-1).mean(dim=1)[:, 0, 1:]
    expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(patch_rollout(vit, images), expected)
    fuse(vit)  # which makes no map, but for those who look
    torch.testing.assert_close(patch_rollout(vit, images), expected)
    assert not block.fn.attend._forward_hooks


def test_cls_attention_goes_back_through_the_layers():
    vit = ViT(image_size=8, patch_size=2, num_classes=3, dim=16, depth=3, heads=2, dim_head=8, mlp_dim=16)
    images, maps = torch.randn(1, 3, 8, 8), []
    for attention, _ in vit.transformer.layers:
        attention.fn.attend.register_forward_hook(lambda module, args, out: maps.append(out[0].mean(dim=0)))
    with torch.no_grad():
        vit(images)
    share = torch.eye(17)[0]  # all of the last CLS token is itself
    for attention in reversed(maps):
        share = share / 2 + share @ attention / 2
    torch.testing.assert_close(patch_rollout(vit, images)[0], share[1:] / share[1:].sum())
