"""verify, explain and `vitriton check --model`: that they say yes to a right model and no to a wrong one, and why."""

import json
import re

import pytest
import torch
from library_models import FAMILIES, build
from torch import nn
from vitriton.vit import Attention, cli, explain, fuse, verify
from vitriton.vit.integrations import timm as timm_blocks

X = torch.linspace(-1, 1, 8 * 3 * 16 * 16).view(8, 3, 16, 16)

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["timm", "transformers DINOv3", "torchvision", "open_clip", "vit-pytorch"])
def test_right(family, dtype):
    model = build(family).to(dtype)
    before = {name: type(module) for name, module in model.named_modules()}
    verdict = verify(model, X)
    assert verdict, str(verdict)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    text = str(verdict)
    assert text.endswith("unfuse restores it bit for bit\nverdict: the same model, up to rounding")
    assert len(verdict.layers) == (4 if family == "vit-pytorch" else 2)
    names = [error.name for error in verdict.whole]
    assert names[0] == "output" and len(names) > 10 and len(set(names)) == len(names)


def test_of_a_model_that_is_fused():
    model = build("timm").train()
    fuse(model)
    assert verify(model, X)
    assert model.training and isinstance(model.blocks[0], timm_blocks.FusedBlock)


WRONG = {
    "scale": lambda x, *others: 1.0001 * right_attention(x, *others),
    "no gradient": lambda x, *others: right_attention(x.detach(), *others),
    "another norm": lambda x, norm, *others: right_attention(x, nn.LayerNorm(x.shape[-1]), *others),
}
right_attention = timm_blocks.attend_at_once


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong(wrong, monkeypatch):
    monkeypatch.setattr(timm_blocks, "attend_at_once", WRONG[wrong])
    verdict = verify(build("timm"), X)
    assert not verdict
    assert re.search(r"  WRONG blocks.0: (output|gradient)", str(verdict))
    assert "verdict: NOT the same model: blocks.0, blocks.1" in str(verdict)


def test_explain_names_who_stands_in_the_way():
    model = build("timm")
    with pytest.raises(ValueError, match="has no fused block"):
        explain(model, X)
    fuse(model)
    model.blocks[1].norm1.register_forward_hook(lambda *_: None)
    model.blocks[0].attn.attn_drop.p = 0.1
    model.blocks[0].attn.attn_drop.train()
    explanation = explain(model, X)
    assert {block.name: block.reason for block in explanation.plain} == {
        "blocks.0.attn": "attn_drop drops, or has a hook",
        "blocks.1.attn": "its LayerNorm and its first Linear are not both plain and without a hook, so they are called "
        "one by one",
    }
    assert len(explanation.fused) == 4
    assert "implementation: native; Triton is passed over because the backend 'native' was chosen" in str(explanation)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        explain({}, X)


def test_explain_of_the_plain_blocks():
    block = Attention(24, 3, 8)
    fuse(block)
    assert not explain(block, torch.randn(2, 5, 24)).plain
    block.attend.register_forward_hook(lambda *_: None)
    assert [b.reason for b in explain(block, torch.randn(2, 5, 24)).plain] == [
        "something looks at the attention weights, or changes them"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# vitriton check --model


def test_check_model(capsys):
    pytest.importorskip("timm", reason="timm is not installed")
    assert cli.main(["check", "--model", "timm:test_vit", "--only", "native", "--json"]) == 0
    out, text = capsys.readouterr()
    record = json.loads(out)
    assert record["ok"] and [result["dtype"] for result in record["results"]] == ["float32", "bfloat16"]
    assert all(error["ok"] for result in record["results"] for error in result["whole"])
    assert text.count("verdict: the same model, up to rounding") == 2


def test_check_model_that_is_wrong(capsys, monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.setattr(timm_blocks, "attend_at_once", WRONG["scale"])
    assert cli.main(["check", "--model", "timm:test_vit", "--only", "native"]) == 1
    assert "FAILED: timm:test_vit, 2 verdicts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet", "--model 'resnet' is none of timm:NAME, torchvision:NAME"),
        ("timm:no_such_model", "timm cannot build it: .*no_such_model"),
        ("timm:test_resnet", "found nothing to fuse in timm.models.resnet.ResNet"),
        ("vitriton:xl", "vitriton cannot build it: the presets are ti, s, b, l, h"),
    ],
)
def test_check_model_that_cannot_be_checked(name, says, capsys):
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    assert cli.main(["check", "--model", name, "--only", "native"]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_every_family_is_verified_somewhere():
    assert {name.split()[0].rstrip(",") for name in FAMILIES} == {
        "timm", "transformers", "torchvision", "open_clip", "vit-pytorch"
    }  # fmt: skip
