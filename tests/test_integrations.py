"""fuse on the models of timm, transformers, torchvision, open_clip and vit-pytorch: the same numbers, forward and
backward, in eval and in training mode, natively and in the interpreter, and bit for bit the old model after unfuse.
"""

import copy

import pytest
import torch
from fused_blocks import assert_within_rounding, called
from library_models import DROPOUTS, FAMILIES, build, run
from torch import nn
from vitriton.kernels import use_backend
from vitriton.vit import fuse, unfuse

BATCH, DRAWS = 4, 16  # of images: of 3 draws, chance makes the rms error of a small gradient up to twice as large
LIBRARIES = ("timm", "transformers ViT", "torchvision", "open_clip", "vit-pytorch")


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def images(batch=BATCH):
    return torch.randn(batch, 3, 16, 16)


def exact(model):
    """A copy in fp64."""
    model = copy.deepcopy(model)
    for norm in model.modules():
        if type(norm).__name__ == "LayerNormFp32":  # which cannot compute in fp64
            norm.__class__ = nn.LayerNorm
    return model.double()


def draws(model, inputs):
    """What `run` gives for each (images, gradient of the output), stacked."""
    results = [run(model, x, grad) for x, grad in inputs]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def double(inputs):
    return [tuple(t.double() for t in pair) for pair in inputs]


def inputs_for(model, batch=BATCH, count=DRAWS):
    shape = model(images(batch)).shape
    return [(images(batch), torch.randn(shape)) for _ in range(count)]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("family", FAMILIES)
def test_native(family):
    model, expected = build(family), FAMILIES[family][2]
    inputs = inputs_for(model)
    gold, base, plain = draws(exact(model), double(inputs)), draws(model, inputs), classes(model)

    fuse(model)
    calls = called(model, inputs[0][0])
    assert {name: calls.get(name, 0) for name in expected} == expected
    assert "_softmax" not in calls
    assert_within_rounding(draws(model, inputs), base, gold)
    with torch.inference_mode():  # which has ways of its own on a CPU
        output = torch.stack([model(x) for x, _ in inputs])
    assert_within_rounding(*({"output": t} for t in (output, base["output"], gold["output"])))
    assert called(model.train(), inputs[0][0]) == calls

    unfuse(model.eval())
    assert classes(model) == plain
    again = draws(model, inputs)
    assert all(torch.equal(again[name], base[name]) for name in base)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("family", LIBRARIES)
def test_in_training_a_block_is_one_function(family):
    model = build(family).train()
    fuse(model)
    attention = 0 if "transformers" in family else 2  # q, k and v come from Linears of their own there
    assert functions(model(images())) == {"_AttentionBlockBackward": attention, "_FeedForwardBlockBackward": 2}
    for linear in model.modules():
        if type(linear) is nn.Linear:
            linear.register_forward_hook(lambda *_: None)
    attention = 2 if family in ("torchvision", "open_clip") else 0  # nn.MultiheadAttention calls no Linear
    assert functions(model(images())) == {"_AttentionBlockBackward": attention, "_FeedForwardBlockBackward": 0}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("names", [("weight", "bias"), ("bias",)], ids=" and ".join)
@pytest.mark.parametrize("family", ["timm", "vit-pytorch", "transformers ViT"])
def test_linears_whose_tensors_are_no_parameters(family, names):
    """As FSDP1 leaves them, which puts views of one long parameter in their place."""
    model, x = build(family), images()
    expected = model(x).detach()
    fuse(model)
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for one in (*linears, None):  # each by itself, and then all
        changed = [one] if one else linears
        kept = [dict(linear._parameters) for linear in changed]
        for linear in changed:
            for name in names:
                if (parameter := linear._parameters.pop(name)) is not None:
                    setattr(linear, name, parameter.detach() + 0)
                else:
                    linear._parameters[name] = None
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(model(x).detach(), expected)
        for linear, parameters in zip(changed, kept, strict=True):
            for name in names:
                linear.__dict__.pop(name, None)
            linear._parameters.update(parameters)


def functions(output):
    """How many functions of kernels/blocks.py autograd has kept for an output."""
    nodes, found = {output.grad_fn}, set()
    while nodes:
        node = nodes.pop()
        found.add(node)
        nodes |= {function for function, _ in node.next_functions if function is not None} - found
    names = [node.name() for node in found]
    return {name: names.count(name) for name in ("_AttentionBlockBackward", "_FeedForwardBlockBackward")}


@pytest.mark.parametrize("family", LIBRARIES)
def test_kernels(family, device):
    model = build(family).to(device)
    x = images(1).to(device)
    grad = torch.randn_like(model(x))
    fuse(model)
    with use_backend("native"):
        expected = run(model, x, grad)
    with use_backend("triton"):
        result = run(model, x, grad)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_within_the_tolerance(family, device):
    model = build(family)
    inputs = inputs_for(model, batch=2)
    gold, base = draws(exact(model), double(inputs)), draws(model, inputs)
    fuse(model.to(device))
    with use_backend("triton"):
        assert_within_rounding(draws(model, [tuple(t.to(device) for t in pair) for pair in inputs]), base, gold)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("family", DROPOUTS)
def test_training_draws_the_same_random_numbers(family):
    model, fused_attention = build(family).train(), DROPOUTS[family][2]
    (x, grad), *_ = inputs_for(model, count=1)
    torch.manual_seed(1)
    expected = run(model, x, grad)
    report = fuse(model)
    torch.manual_seed(1)
    result = run(model, x, grad)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-3, atol=1e-4)
    attention = {"attention", "qkv_attention"}
    assert (not attention & called(model, x).keys()) is not fused_attention
    assert attention & called(model.eval(), x).keys()
    assert ("it drops attention weights (p=0.3)" in str(report)) is not fused_attention
    unfuse(model.train())
    torch.manual_seed(1)
    again = run(model, x, grad)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
