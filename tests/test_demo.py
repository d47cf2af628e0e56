"""`vitriton demo`: a real run, its JSON and exit codes, what it says when answers change or times are disturbed."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from commands import command, vitriton
from vitriton.kernels import native, packed, use_backend
from vitriton.vit import at_once, console, costs, demo, timing
from vitriton.vit.cli import build_parser, main

pytest_plugins = ["commands"]
# the guards on allocations would be counted, and slow everything down
pytestmark = pytest.mark.usefixtures("unguarded")

CPU = torch.device("cpu")


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
    forward = at_once.layer_norm_linear_inference

    def wrong(*args):
        return forward(*args) * 1.001

    monkeypatch.setattr(packed, "forced", "pytorch")
    with use_backend("native"):
        right = costs.cost("ti", "forward", 1, CPU, seconds=0)
        monkeypatch.setattr(at_once, "layer_norm_linear_inference", wrong)
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
    # it trains for long, or it would be over, with an exit code of its own, where this process is kept from going on
    run = command("demo", "--epochs", "40", "--device", "cpu", "--out", str(tmp_path / "a.png"))
    with subprocess.Popen(**run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while "10%" not in process.stdout.readline():  # it trains
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip() == "vitriton demo: stopped"
