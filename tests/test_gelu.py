"""GELU and its derivative as the kernels compute them: for half precision, every number of fp16 and bf16."""

import guards
import pytest
import torch
from parity import BF16, F16, F32, F64

triton = pytest.importorskip("triton", reason="triton is not installed: there are no kernels")
import triton.language as tl  # noqa: E402
from vitriton.kernels.gelu import gelu, gelu_derivative  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        not guards.interpreting() and not torch.cuda.is_available(), reason="kernels do not run here: no GPU"
    ),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy's, of NaN and Inf
]


@triton.jit
def gelu_kernel(z_ptr, y_ptr, dy_ptr, n, TANH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, gelu(z, TANH, HALF), mask=offs < n)
    tl.store(dy_ptr + offs, gelu_derivative(z, TANH, HALF), mask=offs < n)


def computed(z, tanh, half=True):
    """gelu and gelu' of z, in z's dtype and unrounded."""
    y, dy = torch.empty_like(z), torch.empty_like(z)
    gelu_kernel[(triton.cdiv(len(z), 8192),)](z, y, dy, len(z), tanh, half, 8192)
    return y, dy


def true(z, tanh):
    """gelu and gelu' in fp64, to a small relative error however far below zero z is."""
    z = z.double()
    if tanh:
        k, c = 2 * (2 / torch.pi) ** 0.5, 0.044715  # 1 + tanh(t) = 2 sigmoid(2 t)
        s, rest = (torch.sigmoid(sign * k * (z + c * z**3)) for sign in (1, -1))
        return z * s, s + z * s * rest * k * (1 + 3 * c * z**2)
    below = torch.special.erfc(-z / 2**0.5) / 2  # Φ(z)
    return z * below, below + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5


def numbers(dtype, most=40.0):
    """Every number of a half precision up to `most`, in fp32."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return z[z.isfinite() & (z.abs() <= most)].float()


def half_steps(result, truth, dtype, least):
    """How far result is from truth, in halves of dtype's step there, or at `least` if truth is smaller."""
    exponent = torch.frexp(truth.abs().clamp(min=least))[1].double() - 1
    return (result.double() - truth).abs() / (torch.finfo(dtype).eps / 2 * exponent.exp2())


# dtype, tanh, then for gelu and for gelu': the largest error in half steps, and the number below which it is absolute
LIMITS = [
    (F16, False, (0.29, 2.0**-14), (0.30, 2.0**-14)),
    (BF16, False, (0.036, 2.0**-14), (0.14, 2.0**-126)),
    (F16, True, (0.01, 2.0**-14), (0.44, 2.0**-14)),
    (BF16, True, (0.01, 2.0**-126), (0.02, 2.0**-126)),
]


@pytest.mark.parametrize("dtype, tanh, of_gelu, of_derivative", LIMITS)
def test_error(device, dtype, tanh, of_gelu, of_derivative):
    """A part of half a step, beside the whole one of rounding itself."""
    z = numbers(dtype)
    assert len(z) > 30_000
    pairs = zip(computed(z.to(device), tanh), true(z, tanh), (of_gelu, of_derivative), strict=True)
    for result, truth, (limit, least) in pairs:
        error = half_steps(result.cpu(), truth, dtype, least)
        # what a GPU may take for 0; the tanh form does, where its exponential overflows
        error[truth.abs() < (2.0**-118 if tanh else 2.0**-126)] *= 2.0**-20
        assert error.max() <= limit, f"{error.max():.3g} half steps at z = {z[error.argmax()]}"


def test_at_least_as_exact_as_the_formula_in_fp32(device):
    """Below -5 the formula loses what 1 + erf cancels; there the half-precision form is nearer by a factor of 10."""
    z = torch.linspace(-5.4, -5.0, 401)
    (truth, _), (result, _) = true(z, False), computed(z.to(device), False)
    plain = torch.nn.functional.gelu(z)
    assert (result.cpu() - truth).abs().max() * 10 <= (plain - truth).abs().max()


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_not_finite(device, tanh, half):
    inf, nan = torch.inf, torch.nan
    z = torch.tensor([nan, inf, -inf, 1e30, -1e30, 70000.0, -70000.0, 0.0], device=device)
    y, dy = computed(z, tanh, half)
    assert y[0].isnan() and dy[0].isnan()
    assert y[1] == inf and y[3] == 1e30 and y[5] == 70000.0
    assert (y[2] == 0 if half and not tanh else y[2].isnan()) and (y[[4, 6, 7]] == 0).all()
    assert dy[5] == 1 and dy[6].abs() < 1e-37 and dy[7] == pytest.approx(0.5, rel=1e-4)
    if half and not tanh:
        assert dy[1] == 1 and dy[3] == 1 and dy[2].abs() < 1e-37 and dy[4].abs() < 1e-37


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_fp32_and_fp64_have_the_formula(device, dtype, tanh):
    if dtype == F64 and not guards.interpreting():
        pytest.skip("fp64 is for the interpreter")
    z = torch.linspace(-9, 9, 4001, dtype=dtype, device=device)
    for result, truth in zip(computed(z, tanh, half=False), true(z.cpu(), tanh), strict=True):
        assert (result.cpu() - truth).abs().max() <= 64 * torch.finfo(dtype).eps
