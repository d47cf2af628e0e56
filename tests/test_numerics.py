"""Hostile numbers: huge logits and means, constant rows, NaN and Inf, sums beyond half precision, NaN as padding."""

import pytest
import torch
from parity import (
    BF16,
    F16,
    F32,
    F64,
    assert_close,
    assert_parity,
    assert_same_bits,
    attention_inputs,
    backends,
    copies,
    implementations,
    layer_norm_inputs,
    randn,
    run,
)
from vitriton.kernels import attention, layer_norm_linear, native_attention, reference, use_backend

pytest_plugins = ["parity"]
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, of NaN and Inf

HALF = (F16, BF16)


def scaled(inputs, **factors):
    """The inputs with some multiplied, rounded again to their dtype."""
    return {name: (t.detach() * factors.get(name, 1)).requires_grad_() for name, t in inputs.items()}


# ---- attention: logits


@implementations()
def test_sharp_attention(where, backend, dtype):
    """q x 5 and k x 3: most rows give nearly all weight to one key."""
    inputs = scaled(attention_inputs(1, 3, 40, 70, 32, dtype=dtype, device=where), q=5, k=3)
    logits = (inputs["q"] @ inputs["k"].transpose(-1, -2)).abs().max().item() / 32**0.5
    assert_parity(attention, inputs, spread=logits if dtype == F32 and backend == "native" else 0.0)


@implementations()
def test_logits_of_1e5(where, dtype):
    """Each query's own key is ahead by 4e4: the output is its value, and q and k have no gradient.

    Not to the last bit: p = exp2(s - max) of that key is 1 but for the rounding of max, and is divided by its sum.
    """
    x = torch.eye(40, dtype=dtype, device=where)[None, None] * 2 - 0.5  # dots: 12 with itself, 8 with another
    inputs = {"q": x, "k": x.clone(), "v": randn(1, 1, 40, 40, dtype=dtype, device=where)}
    inputs = {name: t.requires_grad_() for name, t in inputs.items()}
    grad = randn(1, 1, 40, 40, dtype=dtype, device=where)
    result = run(attention, inputs, grad, scale=1e4)
    eps = torch.finfo(torch.promote_types(dtype, F32)).eps
    torch.testing.assert_close(result["out"], inputs["v"].detach(), rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(result["dv"].double(), grad.double(), rtol=torch.finfo(dtype).eps + 1.2e5 * eps, atol=0)
    # ds = p (dp - delta) is rounding of two sums over the head dim
    rounding = 4 * eps * (grad.abs() * inputs["v"].abs()).sum(-1).max().item() * 1e4 * 1.5
    assert result["dq"].abs().max() <= rounding and result["dk"].abs().max() <= rounding


@pytest.mark.parametrize("level", [-1e5, 1e5])
@implementations()
def test_all_logits_far_from_zero(where, dtype, level):
    """A softmax does not change when all logits of a row move together, however far below zero: by a column that is
    level in q and 1 in k (scale 1)."""
    inputs = attention_inputs(1, 2, 20, 70, 16, dtype=F64, device=where)
    inputs["q"].detach()[..., 0] = level if dtype not in HALF else level / 4
    inputs["k"].detach()[..., 0] = 1.0 if dtype not in HALF else 4.0
    inputs = copies(inputs, dtype)
    with torch.no_grad():
        out = attention(*inputs.values(), scale=1.0)
        gold = reference.attention(*copies(inputs, F64).values(), scale=1.0)
    # fp32 holds a logit of 1e5 in steps of 1/128
    step = torch.finfo(torch.promote_types(dtype, F32)).eps * abs(level)
    assert (out - gold).abs().max() <= (4 * step + 4 * torch.finfo(dtype).eps) * gold.abs().max()


@implementations(*HALF)
def test_scores_beyond_half(where, dtype):
    """Dots of up to 1e6, which fp16 cannot hold; the scale brings them back."""
    inputs = scaled(attention_inputs(1, 2, 33, 40, 64, dtype=dtype, device=where), q=300, k=300)
    gold = run(reference.attention, copies(inputs, F64), torch.ones(1, 2, 33, 64, device=where, dtype=F64), scale=1e-5)
    result = run(attention, inputs, torch.ones(1, 2, 33, 64, device=where, dtype=dtype), scale=1e-5)
    eps = torch.finfo(dtype).eps
    assert (result["out"] - gold["out"]).abs().max() <= 2 * eps * gold["out"].abs().max()
    assert (result["dv"] - gold["dv"]).abs().max() <= 4 * eps * gold["dv"].abs().max()


@implementations()
def test_equal_keys_give_the_mean(where, dtype):
    inputs = attention_inputs(1, 1, 5, 67, 16, dtype=dtype, device=where)
    with torch.no_grad():
        out = attention(inputs["q"], inputs["k"][:, :, :1].expand(1, 1, 67, 16), inputs["v"])
    mean = inputs["v"].double().mean(2, keepdim=True).expand(out.shape)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), mean, rtol=2 * eps, atol=2 * eps)


# ---- attention: NaN and Inf


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@implementations()
def test_bad_query_touches_its_row_only(where, backend, dtype, bad):
    inputs = attention_inputs(1, 2, 40, 70, 16, dtype=dtype, device=where)
    grad = randn(1, 2, 40, 16, dtype=dtype, device=where)
    clean = run(attention, inputs, grad)
    inputs["q"].detach()[0, 1, 17, 3] = bad
    result = run(attention, inputs, grad)
    assert result["out"][0, 1, 17].isnan().all() and result["dq"][0, 1, 17].isnan().all()
    assert result["dk"][0, 1].isnan().all()  # every key of this head meets the query
    for name in ("out", "dq"):
        if (backend, dtype, name) == ("native", BF16, "dq"):
            continue  # PyTorch's bf16 product lets a NaN into the row before
        rest = [torch.cat([r[name][0, 0], r[name][0, 1, :17], r[name][0, 1, 18:]]) for r in (result, clean)]
        assert torch.equal(*rest)
    assert torch.equal(result["dk"][0, 0], clean["dk"][0, 0]) and torch.equal(result["dv"][0, 0], clean["dv"][0, 0])


@pytest.mark.parametrize("name", ["k", "v", "grad"])
@implementations(F32, F16)
def test_non_finite_values_stand_where_the_formula_has_them(where, dtype, name):
    inputs = attention_inputs(1, 2, 40, 70, 16, dtype=dtype, device=where)
    grad = randn(1, 2, 40, 16, dtype=dtype, device=where)
    (grad if name == "grad" else inputs[name].detach())[0, 1, 17, 3] = torch.nan
    result = run(attention, inputs, grad)
    gold = run(reference.attention, copies(inputs, F64), grad.double())
    for key, value in result.items():
        assert torch.equal(value.isfinite(), gold[key].isfinite()), key


@implementations()
def test_masked_and_padded_keys_are_never_read(where, dtype):
    """What lies behind the last key, the last query and the last feature is NaN: results are those without it."""
    values = {name: t.detach() for name, t in attention_inputs(2, 2, 35, 37, 24, dtype=dtype, device=where).items()}
    padded = {}
    for name, t in values.items():
        home = t.new_full((2, 2, 128, 128), torch.nan)
        home[:, :, : t.shape[2], :24] = t
        padded[name] = home[:, :, : t.shape[2], :24].requires_grad_()
    grad = values["q"].new_full((2, 2, 128, 128), torch.nan)[:, :, :35, :24].copy_(values["q"])
    assert_same_bits(run(attention, padded, grad), run(attention, copies(padded), grad.contiguous()))


@implementations(F32, F16)
def test_rows_of_minus_infinity(where, backend, dtype):
    """All logits of a row are -inf: NaN, as the formula gives (PyTorch's fused operator: 0), in this row only."""
    inputs = attention_inputs(1, 1, 20, 70, 8, dtype=dtype, device=where)
    with torch.no_grad():
        inputs["k"][..., 0] = 1
        inputs["q"][0, 0, 7, 0] = -torch.inf
        out, plain = attention(*inputs.values()), reference.attention(*inputs.values())
    assert plain[0, 0, 7].isnan().all()
    pytorchs = backend == "native" and native_attention.form(inputs["q"], inputs["k"]) == "flash"
    assert (out[0, 0, 7] == 0).all() if pytorchs else out[0, 0, 7].isnan().all()
    assert out[0, 0, :7].isfinite().all() and out[0, 0, 8:].isfinite().all()


# ---- layer_norm_linear: means and spreads


@pytest.mark.parametrize("mean", [2e3, -1e4, 1e5, 1e6])
@implementations(F32, F64)
def test_large_mean(where, dtype, mean):
    if dtype == F64 and abs(mean) > 1e4:
        mean /= 100  # 1e-12 is less than what rounding a mean of 1e5 leaves
    assert_parity(layer_norm_linear, layer_norm_inputs((33,), 24, 192, dtype=dtype, device=where, mean=mean))


@pytest.mark.parametrize("mean, std", [(60.0, 1.0), (1e3, 1.0), (3e4, 30.0), (0.0, 1e-3), (1e-2, 1e-4), (0.0, 5e3)])
@implementations(*HALF)
def test_means_in_half_precision(where, dtype, mean, std):
    assert_parity(layer_norm_linear, layer_norm_inputs((33,), 24, 192, dtype=dtype, device=where, mean=mean, std=std))


@pytest.mark.parametrize("half", HALF)
@backends
def test_large_mean_of_fp32_beside_half_weights(where, backend, half):
    """x in fp32 is normalised before it is rounded."""
    if backend == "triton" and half == BF16 and where.type == "cpu":
        pytest.skip("the interpreter computes bf16 wrongly")
    inputs = layer_norm_inputs((33,), 24, 192, dtype=half, device=where)
    inputs["x"] = randn(33, 192, device=where, mean=1e4).requires_grad_()
    inputs |= {name: inputs[name].detach().float().requires_grad_() for name in ("norm_weight", "norm_bias")}

    def plain(x, norm_weight, norm_bias, weight, bias):
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias).to(half)
        return torch.nn.functional.linear(normed, weight, bias)

    assert_parity(layer_norm_linear, inputs, base=plain)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
@implementations()
def test_eps(where, dtype, eps):
    """With rows so small that eps is most of the variance, or nothing."""
    for std in (1e-3, 1.0):
        inputs = layer_norm_inputs((17,), 24, 48, dtype=dtype, device=where, std=std)
        assert_parity(layer_norm_linear, inputs, eps=eps)


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@implementations()
def test_constant_rows_and_zero_rows(where, dtype, eps):
    """Among others: they give norm_bias's row, and finite gradients."""
    inputs = layer_norm_inputs((20,), 24, 48, dtype=dtype, device=where)
    with torch.no_grad():
        inputs["x"][3] = 0.0
        inputs["x"][7] = 2.0
        inputs["x"][11] = -512.0
    grad = randn(20, 24, dtype=dtype, device=where)
    grad[[3, 7, 11]] *= 1e-3  # 1/std is up to 1e6 in these rows
    result = assert_parity(layer_norm_linear, inputs, grad, eps=eps)
    beta_row = torch.nn.functional.linear(
        inputs["norm_bias"].double(), inputs["weight"].double(), inputs["bias"].double()
    )
    for row in (3, 7, 11):
        torch.testing.assert_close(
            result["out"][row].double(), beta_row, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )


def test_sums_beyond_half(device):
    """dz W passes 65504 in fp16 on the way to a dx that does not. (The plain formula and the native path give NaN.)"""
    inputs = layer_norm_inputs((100,), 200, 24, dtype=F16, device=device, std=1e3)
    inputs["norm_weight"] = (inputs["norm_weight"].detach() * 1e-2).requires_grad_()
    inputs["weight"] = randn(200, 24, dtype=F16, device=device, mean=10.0).requires_grad_()
    inputs = {name: t if name in ("x", "weight", "bias") else t.detach() for name, t in inputs.items()}
    grad = randn(100, 200, dtype=F16, device=device, mean=100.0)
    assert (grad.double() @ inputs["weight"].double()).abs().max() > 65504
    gold = run(reference.layer_norm_linear, copies(inputs, F64), grad.double())
    with use_backend("triton"):
        result = run(layer_norm_linear, inputs, grad)
    for name, value in result.items():
        assert gold[name].abs().max() < 65504
        assert (value - gold[name]).abs().max() <= 4 * torch.finfo(F16).eps * gold[name].abs().max(), name


# ---- layer_norm_linear: NaN and Inf


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@implementations(F32, F16)
def test_bad_row_touches_itself_only(where, dtype, bad, mean):
    """Also among rows whose mean is large, which are computed in another way."""
    inputs = layer_norm_inputs((40,), 24, 48, dtype=dtype, device=where)
    with torch.no_grad():
        inputs["x"][30] += mean
    grad = randn(40, 24, dtype=dtype, device=where)
    clean = run(layer_norm_linear, inputs, grad)
    inputs["x"].detach()[17, 3] = bad
    result = run(layer_norm_linear, inputs, grad)
    others = [i for i in range(40) if i != 17]
    assert result["out"][17].isnan().all() and result["dx"][17].isnan().all()
    for name in ("out", "dx"):
        assert torch.equal(result[name][others], clean[name][others]), name
    assert result["dweight"].isnan().all() and torch.equal(result["dbias"], clean["dbias"])


@implementations(F32, *HALF)
def test_rows_beside_a_large_mean(where, dtype):
    """In half precision one row with a large mean changes how its tile is computed; every row stays within the rule."""
    inputs = layer_norm_inputs((40,), 24, 48, dtype=dtype, device=where)
    with torch.no_grad():
        inputs["x"][30] += 500.0
    result = assert_parity(layer_norm_linear, inputs)
    others = {n: t.detach()[[i for i in range(40) if i != 30]] if n == "x" else t for n, t in inputs.items()}
    gold = reference.layer_norm_linear(*copies(others, F64).values())
    plain = reference.layer_norm_linear(*copies(others).values())
    rest = torch.cat([result["out"][:30], result["out"][31:]])
    assert_close({"out": rest}, {"out": plain}, {"out": gold})


@implementations()
def test_padding_is_never_read(where, dtype):
    """Beyond the last row and the last feature of x, weight and gradient lies NaN."""
    inputs = layer_norm_inputs((35,), 21, 37, dtype=dtype, device=where)

    def padded(t):
        home = t.new_full((128, 128), torch.nan)[: t.shape[0], : t.shape[1]]
        return home.copy_(t)

    grad = padded(randn(35, 21, dtype=dtype, device=where))
    case = {n: padded(t.detach()).requires_grad_() if t.dim() == 2 else t for n, t in inputs.items()}
    result = assert_parity(layer_norm_linear, case, grad, activation="gelu")
    assert all(t.isfinite().all() for t in result.values())
