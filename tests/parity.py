"""What the tests of the functions share: where each implementation runs, and parity with the plain formula.

A pytest plugin, for its fixtures: `pytest_plugins = ["parity"]` in a test file. Its assertions carry their own
messages: PYTEST_DONT_REWRITE.
"""

from dataclasses import replace

import guards
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vitriton.kernels import compiled, reference, use_backend

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# bf16 is wrong in the interpreter, and fp64 is for the interpreter only
DTYPES = {
    "triton": (F32, F16, F64) if guards.interpreting() else (F32, F16, BF16),
    "native": (F32, F16, BF16, F64),
}


def implementation(backend, dtype, *values, marks=()):
    """A parameter set (backend, dtype, *values)."""
    name = "-".join([backend, str(dtype).removeprefix("torch."), *map(str, values)])
    return pytest.param(backend, dtype, *values, marks=marks, id=name)


def implementations(*dtypes):
    """Parametrise a test by `backend` and `dtype`: each implementation with each of its dtypes, or of `dtypes`."""
    return pytest.mark.parametrize(
        "backend, dtype", [implementation(b, d) for b in DTYPES for d in DTYPES[b] if not dtypes or d in dtypes]
    )


backends = pytest.mark.parametrize("backend", list(DTYPES))


@pytest.fixture
def where(backend, request):
    """The device that the parameter `backend` runs on here; this backend is chosen for the test."""
    device = torch.device("cpu") if backend == "native" else request.getfixturevalue("device")
    with use_backend(backend):
        yield device


# the dtypes of compiled.py, bf16 in both ways to multiply it: for tests that use the fixture `multiplied`
compiled_dtypes = pytest.mark.parametrize(
    "dtype, multiplied",
    [(F32, "auto"), (BF16, "pairs"), (BF16, "fp32"), (F16, "auto")],
    indirect=["multiplied"],
    ids=["fp32", "bf16", "bf16-as-fp32", "fp16"],
)


@pytest.fixture
def multiplied(request, monkeypatch):
    """How compiled.py multiplies bf16 in this test: as it is parametrised, else as is faster here."""
    how = getattr(request, "param", "auto")
    monkeypatch.setattr(compiled, "forced", how)
    dtype = request.node.callspec.params.get("dtype") if hasattr(request.node, "callspec") else None
    if dtype in compiled.DTYPES and (why_not := compiled.why_not(dtype)):
        pytest.skip(why_not)
    if how == "pairs":
        try:
            compiled.bf16()
        except RuntimeError as error:
            pytest.skip(str(error))


def randn(*shape, dtype=F32, device="cpu", mean=0.0, std=1.0):
    """Normal values, rounded to `dtype`."""
    return (torch.randn(shape, dtype=F64) * std + mean).to(device, dtype)


def attention_inputs(b, h, nq, nk, d, **options):
    """q (B,H,Nq,D), k and v (B,H,Nk,D), by name, that require gradients."""
    return {name: randn(b, h, n, d, **options).requires_grad_() for name, n in (("q", nq), ("k", nk), ("v", nk))}


def layer_norm_inputs(rows, n, k, *, dtype=F32, device="cpu", mean=0.0, std=1.0, bias=True):
    """x (*rows,K), norm_weight and norm_bias (K,), weight (N,K), bias (N,) or None, by name, that require gradients."""
    options = {"dtype": dtype, "device": device}
    inputs = {
        "x": randn(*rows, k, mean=mean, std=std, **options),
        "norm_weight": randn(k, **options),
        "norm_bias": randn(k, **options),
        "weight": randn(n, k, std=k**-0.5, **options),
        "bias": randn(n, **options),
    }
    for t in inputs.values():
        t.requires_grad_()
    return inputs if bias else inputs | {"bias": None}


def run(function, inputs, grad, **options):
    """{"out": function(*inputs), "d" + name: gradient of each input that requires one}, given that of the output."""
    out = function(*inputs.values(), **options)
    wanted = [name for name, t in inputs.items() if t is not None and t.requires_grad]
    grads = torch.autograd.grad(out, [inputs[name] for name in wanted], grad) if wanted else ()
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def copies(inputs, dtype=None):
    """Contiguous leaves of the same values and requires_grad."""
    return {
        name: None
        if t is None
        else t.detach()
        .to(dtype or t.dtype, copy=True, memory_format=torch.contiguous_format)
        .requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }


def assert_parity(function, inputs, grad=None, *, gold=None, base=None, spread=0.0, **options):
    """Hold function(*inputs) and its gradients to the plain formula of the same name; returns what `run` does.

    The golden value is the formula, or `gold`, in fp64; the measure of rounding is the formula in the inputs' dtype, or
    `base`.
    `grad`, that of the output, is drawn if there is none. `spread`: see assert_close.
    """
    result, base, gold = three_ways(function, inputs, grad, gold=gold, base=base, **options)
    assert_close(result, base, gold, spread)
    return result


def assert_parity_of_draws(function, draws, **options):
    """assert_parity of several inputs of the same shapes as one: the rms of a few rounding errors is chance."""
    ways = zip(*(three_ways(function, inputs, **options) for inputs in draws), strict=True)
    assert_close(*({name: torch.stack([draw[name] for draw in way]) for name in way[0]} for way in ways))


def three_ways(function, inputs, grad=None, *, gold=None, base=None, **options):
    """What `run` gives of the function, of the measure of rounding, and of the golden formula: see assert_parity."""
    plain = getattr(reference, function.__name__)
    if grad is None:
        shape = plain(*copies(inputs, F64).values(), **options).shape
        like = inputs.get("weight", next(iter(inputs.values())))
        grad = randn(*shape, dtype=like.dtype, device=like.device)
    result = run(function, inputs, grad, **options)
    gold = run(gold or plain, copies(inputs, F64), grad.to(F64), **options)
    return result, run(base or plain, copies(inputs), grad, **options), gold


def assert_close(result, base, gold, spread=0.0):
    """Hold each tensor of `result` to the rule of reference.compare.

    `spread` widens it for sharp attention in fp32 on the native path, by eps max |gold| times the largest |logit|:
    PyTorch's fused backward pass makes p = exp(logit - lse) again from one rounded lse a query, so that p has the
    relative error eps |logit|, where the formula keeps p, and that is exactly 0 or 1 in a saturated row.
    """
    for name, value in result.items():
        error = reference.compare(name, value, base[name], gold[name], k=2 if name == "out" else 3)
        if spread and name != "out":
            extra = spread * torch.finfo(value.dtype).eps * gold[name].abs().max().item()
            error = replace(error, max_allowed=error.max_allowed + extra, rms_allowed=error.rms_allowed + extra)
        assert error, str(error)


def assert_same_bits(one, other):
    """Two results of `run` are equal to the last bit."""
    assert one.keys() == other.keys()
    for name, a in one.items():
        b = other[name]
        assert a.shape == b.shape and a.dtype == b.dtype, name
        as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        unequal = a.contiguous().view(as_int) != b.contiguous().view(as_int)
        assert not unequal.any(), f"{name}: {unequal.sum()} of {a.numel()} differ, by up to {(a - b).abs().max():.3g}"


class OperatorLog(TorchDispatchMode):
    """Names of the operators of this library that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitriton":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
