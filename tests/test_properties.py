"""Whatever hypothesis draws: shapes, head dims, scales, strides and dtypes; a few always, hundreds behind `slow`.

Values are held to the rule in fp64, where it is 1e-12 whatever the shape (and the mean: see `of_the_stored_mean`), and
in half precision; how far two fp32 computations of a few numbers lie apart is chance, so there it is the bits of two
layouts that are compared.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from parity import DTYPES, F16, F32, F64, assert_parity, assert_parity_of_draws, assert_same_bits, copies, run
from strategies import LayerNormCase, attention_cases, layer_norm_cases, place
from vitriton.kernels import attention, layer_norm_linear, qkv_attention, use_backend
from vitriton.kernels.launch import alignment

JUDGED = [d for d in (F64, F16) if d in DTYPES["triton"]]


@pytest.fixture(scope="module", params=["triton", "native"])
def somewhere(request):
    """A backend and its device."""
    return request.param, torch.device("cpu") if request.param == "native" else request.getfixturevalue("device")


budget = pytest.mark.parametrize("budget", ["few", pytest.param("hundreds", marks=pytest.mark.slow)])


def attention_inputs(case, device):
    """By name; with a scale of 4, head dim and length would decide whether there is any gradient to compare."""
    inputs = dict(zip("qkv", case.tensors(device), strict=True))
    scale = 0.25 if case.scale == 4.0 else case.scale
    return {name: t.requires_grad_() for name, t in inputs.items()}, scale


def layer_norm_inputs(case, device):
    names = ("x", "norm_weight", "norm_bias", "weight", "bias")
    inputs = dict(zip(names, case.tensors(device), strict=True))
    return {name: t if t is None else t.requires_grad_() for name, t in inputs.items()}


@budget
# of the same k or v for all keys, dq is 0, and the rule, which is relative to it, allows no rounding at all
@given(case=attention_cases(dtypes=JUDGED).filter(lambda case: "constant" not in case.layouts[1:3]))
def test_attention(somewhere, budget, case):
    backend, device = somewhere
    inputs, scale = attention_inputs(case, device)
    with use_backend(backend):
        assert_parity(attention, inputs, case.grad(device), scale=scale)


@budget
@given(case=attention_cases(dtypes=[F32, F16]))
def test_layouts_of_attention(somewhere, budget, case):
    backend, device = somewhere
    inputs, scale = attention_inputs(case, device)
    grad = case.grad(device)
    contiguous = copies(inputs)
    contiguous_grad = grad.contiguous()
    if alignment(*inputs.values()) < alignment(*contiguous.values()):  # which takes other tiles
        contiguous["q"] = place(contiguous["q"].detach(), "gaps").requires_grad_()
    if alignment(grad) < alignment(contiguous_grad):
        contiguous_grad = place(contiguous_grad, "gaps")
    with use_backend(backend):
        result = run(attention, inputs, grad, scale=scale)
        assert_same_bits(result, run(attention, contiguous, contiguous_grad, scale=scale))
        assert result["out"].transpose(1, 2).is_contiguous()


@budget
@given(case=attention_cases(dtypes=[F32, F16]).filter(lambda case: case.packed))
def test_qkv_attention_is_attention_of_its_parts(somewhere, budget, case):
    backend, device = somewhere
    inputs, scale = attention_inputs(case, device)
    grad = case.grad(device)
    qkv = case.qkv(device).requires_grad_()
    packed_grad = grad.transpose(1, 2).flatten(2)
    grad = packed_grad.unflatten(2, (case.heads, -1)).transpose(1, 2)  # as aligned: others take other tiles
    with use_backend(backend):
        parts = run(attention, inputs, grad, scale=scale)
        packed = run(lambda qkv: qkv_attention(qkv, case.heads, scale=scale), {"qkv": qkv}, packed_grad)
    expected = torch.cat([parts[name].transpose(1, 2).flatten(2) for name in ("dq", "dk", "dv")], 2)
    assert_same_bits(packed, {"out": parts["out"].transpose(1, 2).flatten(2), "dqkv": expected})


class Normalised(torch.autograd.Function):
    """(x - mean) rstd of the mean rounded to x's dtype, and LayerNorm's gradient of this x̂."""

    @staticmethod
    def forward(ctx, x, eps):
        shift = x.mean(-1, keepdim=True)
        rest = (x - shift).mean(-1, keepdim=True)
        mean = shift + rest
        rstd = ((x - shift - rest).square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = (x - mean) * rstd
        ctx.save_for_backward(normed, rstd)
        return normed

    @staticmethod
    def backward(ctx, grad):
        normed, rstd = ctx.saved_tensors
        grad = grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True)
        return rstd * grad, None


def of_the_stored_mean(x, norm_weight, norm_bias, weight, bias=None, *, eps=1e-5, activation=None):
    """The golden value of layer_norm_linear's kernels in fp64.

    They keep one number for the mean of a row, in the dtype of sums. Where |mean| is large, x - mean is exact, and x̂ is
    off by what rounding left of the mean, up to |mean| eps / 2 times rstd, in all of the row: 1e-12 at a mean of 1e4. A
    column of dnorm_weight sums it over all rows, each times (dz W), and that may exceed 1e-12 of the largest column.
    (On the native path x̂ is centred twice.) No bound is needed for it, as the number is known: rounding is to nearest.
    Beside the formula of this very number the kernels are held to 1e-12 all the same, and a mean one ulp off fails.
    """
    z = F.linear(Normalised.apply(x, eps) * norm_weight + norm_bias, weight, bias)
    if activation is None:
        return z
    return F.gelu(z, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])


@budget
@given(case=layer_norm_cases(dtypes=JUDGED))
@example(case=LayerNormCase((11, 11), 16, 16, JUDGED[0], -1e4, False, None, ("contiguous",) * 3, seed=3))  # see above
def test_layer_norm_linear(somewhere, budget, case):
    backend, device = somewhere
    gold = of_the_stored_mean if backend == "triton" and case.dtype == F64 else None
    with use_backend(backend):
        if 1 not in (case.n, case.k) or 0 in case.rows:
            inputs = layer_norm_inputs(case, device)
            assert_parity(layer_norm_linear, inputs, case.grad(device), gold=gold, activation=case.activation)
        else:  # dnorm_bias or dbias is one number, whose error, and size, which the rule is relative to, are chance
            draws = [layer_norm_inputs(replace(case, seed=case.seed + 10 * i), device) for i in range(16)]
            assert_parity_of_draws(layer_norm_linear, draws, gold=gold, activation=case.activation)


@budget
@given(case=layer_norm_cases(dtypes=[F32, F16]))
def test_layouts_of_layer_norm_linear(somewhere, budget, case):
    backend, device = somewhere
    inputs, grad = layer_norm_inputs(case, device), case.grad(device)
    with use_backend(backend):
        result = run(layer_norm_linear, inputs, grad, activation=case.activation)
        contiguous = run(layer_norm_linear, copies(inputs), grad.contiguous(), activation=case.activation)
    if backend == "triton":
        assert_same_bits(result, contiguous)
    assert {name: t.shape for name, t in result.items()} == {name: t.shape for name, t in contiguous.items()}
