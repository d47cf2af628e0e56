"""The `vitriton` command: its help, what it says of bad arguments and variables, a closed pipe, and its pieces.

Commands run in this process where something is planted in it, and as `python -m vitriton.vit.cli` where they are judged
from outside; so in test_demo.py and test_doctor.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import command, vitriton
from vitriton.vit import check, console, demo, fuse
from vitriton.vit.cli import main
from vitriton.vit.measure import peak_memory, pick_device, quartiles
from vitriton.vit.reference import ViT
from vitriton.vit.rollout import patch_rollout

pytest_plugins = ["commands"]
# the guards on allocations would be counted, and slow everything down
pytestmark = pytest.mark.usefixtures("unguarded")

SUBCOMMANDS = ("demo", "train", "look", "check", "doctor", "bench", "tune", "compile")
CPU = torch.device("cpu")


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


def test_a_closed_pipe_is_no_error():
    run = command("doctor", "--json")
    with subprocess.Popen(**run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `vitriton doctor --json | true` does
        error = process.stderr.read()
    assert process.returncode == 141 and error.rstrip().endswith("OK: nothing is broken")


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
