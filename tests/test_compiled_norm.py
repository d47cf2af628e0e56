"""GELU's backward pass as compiled on this machine, and the sums that it makes; LayerNorm's by numbers of threads."""

import pytest
import torch
from parity import BF16, F32, randn
from vitriton.kernels import compiled

GELUS = pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
SIZES = pytest.mark.parametrize("rows, n", [(1, 1), (3, 7), (13, 65), (197, 192), (8500, 33)])


@pytest.fixture(autouse=True)
def use_compiled():
    if why_not := compiled.why_not(F32):
        pytest.skip(f"nothing can be compiled here: {why_not}")


def true_derivative(z, activation):
    """In fp64, to a small relative error however far below zero z is."""
    z = z.double()
    if activation == "gelu_tanh":
        k, c = 2 * (2 / torch.pi) ** 0.5, 0.044715  # 1 + tanh(t) = 2 sigmoid(2 t)
        s, rest = (torch.sigmoid(sign * k * (z + c * z**3)) for sign in (1, -1))
        return s + z * s * rest * k * (1 + 3 * c * z**2)
    return torch.special.erfc(-z / 2**0.5) / 2 + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5


@GELUS
def test_every_number_of_bf16(activation):
    """Within the rounding of the result, and a seventh of it: see kernels/gelu.py."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    z = z[z.isfinite() & (z.abs() < 1e10)].view(1, -1)
    truth = true_derivative(z, activation)
    result, _ = compiled.gelu_backward(torch.ones_like(z), z, activation, None)
    step = torch.finfo(BF16).eps * torch.frexp(truth.abs().clamp(min=2.0**-126))[1].sub(1).double().exp2()
    error = (result.double() - truth).abs() / step
    error[truth.abs() < 2.0**-110] = 0  # which become 0
    assert error.max() <= 0.5 * 1.15, (error.max(), z[0, error.argmax()])
    assert (result[truth.abs() < 2.0**-110].abs() < 2.0**-109).all()


@GELUS
@SIZES
@pytest.mark.parametrize("dtype", [None, F32, BF16], ids=str)
def test_sums(rows, n, dtype, activation):
    z, grad = randn(rows, n, dtype=BF16) * 2, randn(rows, n, dtype=BF16)
    truth = grad.double() * true_derivative(z, activation)
    dz, sums = compiled.gelu_backward(grad, z, activation, dtype)
    assert dz is grad
    torch.testing.assert_close(dz.double(), truth, rtol=0.0046, atol=1e-30)
    if dtype is None:
        assert sums is None
        return
    assert sums.dtype == dtype and sums.shape == (n,)
    # the derivative's own error is relative; what is summed is not rounded to bf16
    error, size = (sums.double() - truth.sum(0)).abs(), truth.abs().sum(0)
    rounding = torch.finfo(BF16).eps / 2 * truth.sum(0).abs() if dtype == BF16 else 0
    assert (error <= rounding + 6e-4 * size).all() and (error - rounding).max() < 3e-4 * size.max()


@SIZES
def test_the_same_bits_in_any_number_of_threads(rows, n):
    x, z, grad, weight, bias = (randn(*size, dtype=BF16) for size in ((rows, n),) * 3 + ((n,),) * 2)

    def computed():
        normed = compiled.norm_backward(grad, x, weight, bias, 1e-5, True, True, True)
        return *normed, *compiled.gelu_backward(grad.clone(), z, "gelu", F32)

    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        try:
            results.append(computed())
        finally:
            torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@GELUS
def test_what_is_not_finite(activation):
    z = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0]], dtype=BF16)
    dz, sums = compiled.gelu_backward(torch.ones_like(z), z, activation, F32)
    assert dz[0, 0].isnan() and dz[0, 3:].tolist() == [1, 0, 0.5] and sums[3:].isfinite().all()
    if activation == "gelu":
        assert dz[0, 1] == 1 and dz[0, 2] == 0
    else:  # as PyTorch says
        assert dz[0, 1:3].isnan().all()


@GELUS
def test_a_nan_stays_where_it_is(activation):
    z, grad = randn(20, 40, dtype=BF16), randn(20, 40, dtype=BF16)
    grad[7, 33] = torch.nan
    dz, sums = compiled.gelu_backward(grad, z, activation, F32)
    assert dz.isnan().nonzero().tolist() == [[7, 33]] and sums.isnan().nonzero().tolist() == [[33]]
