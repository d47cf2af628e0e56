"""Attacks on the kernels, each the case in which libraries like this one have failed, or in which a planted bug hid.

Rows of more than one chunk, an incomplete group of tiles, logits far apart and far from zero, offsets beyond 2³¹ (run
on memory that is only an address range), and the tiles of every chip, which the other tests do not run.
"""

import inspect
import os
import subprocess
import sys
from itertools import product

import guards
import pytest
import torch
from parity import (
    DTYPES,
    F16,
    F32,
    assert_parity,
    attention_inputs,
    copies,
    implementations,
    layer_norm_inputs,
    randn,
    run,
)
from vitriton.kernels import attention, configs, layer_norm_linear, qkv_attention, reference, use_backend

pytest_plugins = ["parity"]
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, of what is not stored


# ---- attention


@implementations()
def test_later_keys_far_lower(where, dtype):
    """The first 64 keys are ahead of all later ones by more than exp of half precision's, and fp32's, range."""
    inputs = attention_inputs(1, 2, 20, 150, 16, dtype=dtype, device=where)
    with torch.no_grad():
        inputs["q"][..., 0] = 20
        inputs["k"][..., 0] = -20
        inputs["k"][:, :, :64, 0] = 20
    result = run(attention, inputs, randn(1, 2, 20, 16, dtype=dtype, device=where), scale=1.0)
    first = {n: t if n == "q" else t[:, :, :64] for n, t in inputs.items()}
    gold = reference.attention(*copies(first, torch.float64).values(), scale=1.0)
    # logits of 400 in fp32 have steps of 3e-5
    eps = torch.finfo(dtype).eps + 500 * torch.finfo(torch.promote_types(dtype, F32)).eps
    assert (result["out"] - gold).abs().max() <= 4 * eps * gold.abs().max()
    assert all((result[name][:, :, 64:] == 0).all() for name in ("dk", "dv"))
    assert all(t.isfinite().all() for t in result.values())


@pytest.mark.parametrize("level", [-300.0, 300.0])
@implementations()
def test_gradients_of_logits_far_from_zero(where, backend, dtype, level):
    """exp of minus the log-sum-exp, which is what keys and queries that are not there come to, passes every range."""
    inputs = attention_inputs(1, 2, 37, 70, 16, dtype=dtype, device=where)
    with torch.no_grad():
        inputs["q"][..., 0] = level
        inputs["k"][..., 0] = 1.0
    assert_parity(attention, inputs, scale=1.0, spread=320.0 if dtype == F32 and backend == "native" else 0.0)


@implementations()
def test_several_images_heads_and_tiles(where, dtype):
    """No two strides are alike, and each dim has more than one program."""
    assert_parity(attention, attention_inputs(2, 3, 150, 130, 16, dtype=dtype, device=where))
    qkv = randn(2, 130, 3 * 3 * 16, dtype=dtype, device=where).requires_grad_()
    assert_parity(qkv_attention, {"qkv": qkv}, heads=3)


# ---- layer_norm_linear


@pytest.mark.parametrize("k", [1025, 1536, 2500])
@implementations()
def test_wide_rows(where, dtype, k):
    """More features than the statistics read at once, and a mean that changes along the row."""
    inputs = layer_norm_inputs((7,), 24, k, dtype=dtype, device=where)
    with torch.no_grad():
        inputs["x"] += torch.linspace(-3, 5, k, device=where).to(dtype)
    assert_parity(layer_norm_linear, inputs, activation="gelu")


@pytest.mark.parametrize("mean", [25.0, 1e3])
@implementations()
def test_mean_against_weights_of_one_sign(where, dtype, mean):
    """Where all of W' has one sign, x W' and mean c are mean sqrt(K) times what their difference is."""
    if dtype == torch.float64:
        mean /= 100  # 1e-12 is less than what rounding a mean of 1e3 leaves
    inputs = layer_norm_inputs((33,), 24, 1024, dtype=dtype, device=where, mean=mean)
    options = {"dtype": dtype, "device": where, "mean": 1.0, "std": 0.1}
    inputs["norm_weight"] = randn(1024, **options).requires_grad_()
    inputs["weight"] = randn(24, 1024, **options).requires_grad_()
    assert_parity(layer_norm_linear, inputs)


@implementations(F16)
def test_tiles_of_an_incomplete_group(where, dtype):
    """Nine rows of tiles, walked eight and one, and three columns."""
    inputs = layer_norm_inputs((1100,), 130, 16, dtype=dtype, device=where)
    assert_parity(layer_norm_linear, inputs)


# ---- the tiles of every chip


def attention_tiles():
    """(chip, dtype, head dim) for each set of tiles that some chip runs."""
    kernels = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv")
    found = {}
    for chip, dtype, d in product(configs.SM_COUNT, (F16, F32), (64, 32, 80, 96, 128, 256)):
        tiles = tuple(configs.tiles(kernel, chip, dtype, d) for kernel in kernels)
        found.setdefault((dtype, tiles, d > 64 and configs.head_dim_parts(d, 0)), (chip, dtype, d))
    return list(found.values())


def named(case):
    return "-".join(str(value).removeprefix("torch.") for value in case)


@pytest.fixture
def as_on(monkeypatch, device):
    """Lets the launchers choose tiles as on a chip, where kernels run in the interpreter."""
    if not guards.interpreting():
        pytest.skip("on a GPU the other tests run this GPU's tiles")

    def choose(chip):
        for name, function in list(vars(configs).items()):
            if inspect.isfunction(function) and "chip" in inspect.signature(function).parameters:
                monkeypatch.setattr(configs, name, told(function, chip))

    def told(function, chip):
        def wrapper(*args, **options):
            bound = inspect.signature(function).bind(*args, **options)
            bound.arguments["chip"] = chip
            return function(*bound.args, **bound.kwargs)

        return wrapper

    return choose


@pytest.mark.parametrize(
    "n", [197, pytest.param(257, marks=pytest.mark.slow), pytest.param(600, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", attention_tiles(), ids=named)
def test_attention_with_the_tiles_of(as_on, device, case, n):
    chip, dtype, d = case
    as_on(chip)
    with use_backend("triton"):
        assert_parity(attention, attention_inputs(1, 1, n, n, d, dtype=dtype, device=device))


@pytest.mark.parametrize("d", [41, 75])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_unaligned_attention_with_the_tiles_of(as_on, device, chip, d):
    as_on(chip)
    with use_backend("triton"):
        assert_parity(attention, attention_inputs(1, 1, 197, 197, d, dtype=F16, device=device))


@pytest.mark.parametrize("d", [64, 40])
def test_one_backward_kernel_with_the_tiles_of_a_gpu(as_on, device, monkeypatch, launch_log, d):
    as_on("sm_90")
    monkeypatch.setattr(configs, "SM_COUNT", {})  # two heads fill it
    with use_backend("triton"):
        assert_parity(attention, attention_inputs(2, 1, 197, 197, d, dtype=F16, device=device))
    assert launch_log[-1].kernel == "_attention_bwd_kernel"


@pytest.mark.parametrize("chip, dtype", [("sm_90", F16), ("sm_80", F16), ("sm_80", F32)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_layer_norm_linear_with_the_tiles_of(as_on, device, chip, dtype, activation):
    as_on(chip)
    inputs = layer_norm_inputs((290,), 140, 200, dtype=dtype, device=device, mean=3.0)
    with use_backend("triton"):
        assert_parity(layer_norm_linear, inputs, activation=activation)


# ---- offsets beyond 2^31

SPARSE = """
import mmap
import torch
from vitriton.kernels import layer_norm_linear, use_backend
from vitriton.kernels.attention import attention_forward
from vitriton.kernels.attention_backward import attention_backward

torch.manual_seed(0)


def far(values, dim, stride):
    # the values in a range of addresses so large that only the pages which are touched can be memory
    strides = list(values.stride())
    strides[dim] = stride
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    assert span > 2**31
    memory = mmap.mmap(-1, span * values.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    return torch.frombuffer(memory, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


def same(what, ones, others):
    for name, a, b in zip(("out", "first", "second", "third"), ones, others, strict=True):
        assert torch.equal(a, b), f"{what}: {name} differs by up to {(a - b).abs().max()}"
    print(what)


# The products pass 2^31 and most strides do not: that of a head or an image does by its index, that of a token within
# a tile of 64, that of a feature within a row.
for name, dim, stride, shape in (
    ("image", 0, 2**30 + 64, (3, 1, 20, 16)),
    ("head", 1, 2**30 + 64, (1, 3, 20, 16)),
    ("token", 2, 2**25 + 2**20, (1, 1, 70, 16)),
    ("token", 2, 2**24 + 64, (1, 1, 130, 16)),
    ("feature", 3, 2**28, (1, 1, 20, 16)),
):
    q, k, v, grad = torch.randn(4, *shape, dtype=torch.float16)
    out, lse = attention_forward(q, k, v, 0.25)
    grads = [torch.empty_like(q) for _ in range(3)]
    attention_backward(grad, q, k, v, out, lse, 0.25, *grads)
    near = out, *grads
    q, k, v, grad = (far(t, dim, stride) for t in (q, k, v, grad))
    out, lse = attention_forward(q, k, v, 0.25)
    grads = [far(torch.full_like(g, torch.nan), dim, stride) for g in grads]
    attention_backward(grad, q, k, v, out, lse, 0.25, *grads)
    same(f"attention, {name}", (out, *grads), near)

for name, index, dim, stride, rows, n in (
    ("rows of x", 0, 0, 2**24 + 2**20, 130, 24),
    ("features of x", 0, 1, 2**27, 20, 24),
    ("rows of weight", 3, 0, 2**30, 20, 5),
    ("features of weight", 3, 1, 2**27, 20, 24),
    ("rows of the gradient", 5, 0, 2**24 + 2**20, 130, 24),
    ("features of the gradient", 5, 1, 2**27, 20, 24),
):
    shapes = (rows, 24), (24,), (24,), (n, 24), (n,), (rows, n)
    tensors = [torch.randn(shape, dtype=torch.float16) for shape in shapes]

    def results(*inputs, grad):
        inputs = [t.detach().requires_grad_() for t in inputs]
        with use_backend("triton"):
            out = layer_norm_linear(*inputs)
        dx, dgamma, _, dw, _ = torch.autograd.grad(out, inputs, grad)
        return out, dx, dgamma, dw

    near = results(*tensors[:5], grad=tensors[5])
    tensors[index] = far(tensors[index], dim, stride)
    same(f"layer_norm_linear, {name}", results(*tensors[:5], grad=tensors[5]), near)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux gives out addresses without memory behind them")
@pytest.mark.skipif("triton" not in DTYPES or guards.triton is None, reason="triton is not installed")
def test_offsets_beyond_2_to_31():
    """In a process of its own, which a wrong address ends. The same bits come as from memory that lies close."""
    done = subprocess.run(
        [sys.executable, "-c", SPARSE], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"ended with {done.returncode} after: {done.stdout}\n{done.stderr}"
    assert len(done.stdout.splitlines()) == 11
