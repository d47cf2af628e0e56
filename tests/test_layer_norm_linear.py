"""layer_norm_linear against the plain formula, on the kernels and on the native path: values and gradients.

The grid of sizes, ranks, activations and means is sampled always and walked in full behind `slow`.
"""

from itertools import combinations, product

import pytest
import torch
from guards import guarded
from parity import (
    BF16,
    DTYPES,
    F16,
    F32,
    assert_parity,
    assert_parity_of_draws,
    assert_same_bits,
    backends,
    copies,
    implementation,
    implementations,
    layer_norm_inputs,
    randn,
    run,
)
from strategies import LAYOUTS, place
from torch.profiler import profile, supported_activities
from vitriton.kernels import layer_norm_linear
from vitriton.kernels.launch import record

pytest_plugins = ["parity"]

KS, NS, ROWS = (1, 192, 768, 1023), (1, 10, 64, 577), (0, 1, 197, 1000)
ACTIVATIONS = (None, "gelu", "gelu_tanh")
MEANS = (0.0, 1.0, 1e2, 1e4)
SHAPES = {  # number of rows: x's dims but the last, at ranks 2, 3 and 4
    0: [(0,), (2, 0), (0, 2, 3)],
    1: [(1,), (1, 1), (1, 1, 1)],
    197: [(197,), (1, 197), (197, 1, 1)],
    1000: [(1000,), (5, 200), (2, 10, 50)],
}


# K, N, rows, then indices into the ranks, ACTIVATIONS and MEANS, then whether there is a bias: each value of each with
# most of the others, and no costly pair twice
QUICK = [
    (1, 1, 1, 0, 0, 0, True),
    (1, 64, 197, 1, 1, 3, False),
    (1, 577, 0, 2, 2, 1, True),
    (1, 10, 1000, 2, 0, 2, False),
    (192, 1, 1000, 2, 0, 2, True),
    (192, 10, 197, 0, 2, 3, True),
    (192, 64, 197, 1, 1, 0, False),
    (192, 577, 1, 2, 0, 1, True),
    (768, 1, 0, 1, 1, 0, True),
    (768, 10, 197, 0, 1, 3, False),
    (768, 64, 1, 2, 2, 2, True),
    (1023, 1, 197, 1, 2, 1, True),
    (1023, 10, 1, 2, 1, 3, False),
    (1023, 64, 0, 0, 0, 2, True),
    (1023, 64, 1, 1, 0, 0, True),
]


def grid():
    quick = [
        implementation(backend, dtypes[i % len(dtypes)], *case)
        for backend, dtypes in DTYPES.items()
        for i, case in enumerate(QUICK)
    ]
    sizes = list(enumerate(product(KS, NS, ROWS)))
    full = [
        # rank, activation and mean change from case to case, so that each meets each
        implementation(
            backend,
            dtype,
            k,
            n,
            rows,
            (i + j) % 3,
            (i // 3 + j) % 3,
            (i // 4 + i + j) % 4,
            i % 5 > 0,
            marks=pytest.mark.slow,
        )
        for backend, dtypes in DTYPES.items()
        for j, dtype in enumerate(dtypes)
        for i, (k, n, rows) in sizes
    ]
    return pytest.mark.parametrize("backend, dtype, k, n, rows, rank, activation, mean, bias", quick + full)


@grid()
def test_grid(where, dtype, k, n, rows, rank, activation, mean, bias):
    # fp16 holds 1e4 in steps of 8: with a std of 1 there would be nothing to normalise
    std = 16.0 if dtype in (F16, BF16) and MEANS[mean] > 1e3 else 1.0
    options = {"dtype": dtype, "device": where, "mean": MEANS[mean], "std": std, "bias": bias}
    few = min(n, k, rows) == 1  # rounding errors in dγ, dβ, db or the statistics
    draws = 16 if few else 1
    inputs = [layer_norm_inputs(SHAPES[rows][rank], n, k, **options) for _ in range(draws)]
    assert_parity_of_draws(layer_norm_linear, inputs, activation=ACTIVATIONS[activation])
    out = layer_norm_linear(*inputs[0].values(), activation=ACTIVATIONS[activation])
    assert out.dtype == dtype and out.is_contiguous()


@pytest.mark.parametrize("activation, bias", [(None, False), ("gelu", True), ("gelu_tanh", False)])
@implementations()
def test_activations(where, dtype, activation, bias):
    inputs = layer_norm_inputs((30,), 40, 24, dtype=dtype, device=where, bias=bias)
    assert_parity(layer_norm_linear, inputs, activation=activation, eps=1e-3)


EDGES = [(65, 63, 64), (64, 65, 127), (63, 129, 17), (128, 64, 33), (129, 16, 65)]


@pytest.mark.parametrize(
    "backend, dtype, m, n, k",
    [
        implementation(backend, dtypes[i % len(dtypes)], *sizes)
        for backend, dtypes in DTYPES.items()
        for i, sizes in enumerate(EDGES)
    ],
)
def test_edges_of_tiles(where, dtype, m, n, k):
    inputs = layer_norm_inputs((m,), n, k, dtype=dtype, device=where)
    assert_parity(layer_norm_linear, inputs, activation="gelu")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@implementations()
def test_activations_over_their_range(where, dtype, activation):
    """Pre-activations from -40 to 40, which the bias makes."""
    bias = torch.linspace(-40, 40, 121, device=where, dtype=dtype).requires_grad_()
    inputs = layer_norm_inputs((3,), 121, 16, dtype=dtype, device=where) | {"bias": bias}
    assert_parity(layer_norm_linear, inputs, activation=activation)


@implementations()
def test_one_feature(where, dtype):
    """K = 1: the normalised row is 0, and so are dx and the gradient of norm_weight."""
    inputs = layer_norm_inputs((33,), 24, 1, dtype=dtype, device=where, mean=3.0)
    result = assert_parity(layer_norm_linear, inputs, activation="gelu")
    assert (result["dx"] == 0).all() and (result["dnorm_weight"] == 0).all()


@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 7, 24), (2, 3, 4, 24), (0, 24), (2, 0, 24)])
@implementations()
def test_ranks(where, dtype, shape):
    inputs = layer_norm_inputs(shape[:-1], 10, 24, dtype=dtype, device=where)
    result = assert_parity(layer_norm_linear, inputs, activation="gelu")
    assert result["out"].shape == (*shape[:-1], 10) and result["dx"].shape == shape


@backends
def test_no_rows_and_no_columns(where, launch_log):
    """Nothing is launched; the parameters' gradients are zeros."""
    for rows, n in (((0,), 10), ((3, 0), 10), ((4,), 0)):
        inputs = layer_norm_inputs(rows, n, 24, device=where)
        result = run(layer_norm_linear, inputs, torch.zeros(*rows, n, device=where), activation="gelu")
        assert result["out"].shape == (*rows, n)
        assert all(
            (result[f"d{name}"] == 0).all() and result[f"d{name}"].shape == t.shape for name, t in inputs.items()
        )
    assert launch_log == []


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("half", [F16, BF16])
@pytest.mark.parametrize("x_dtype, norm_dtype", [("float32", "float32"), ("half", "float32")])
@backends
def test_mixed_precision(where, backend, half, x_dtype, norm_dtype, activation):
    """x or the LayerNorm's parameters in fp32 beside half weights: as autocast runs the plain formula."""
    if half not in DTYPES[backend]:
        pytest.skip(f"{backend} does not take {half} here")
    inputs = layer_norm_inputs((50,), 40, 48, dtype=half, device=where, mean=2.0)
    for name, dtype in (("x", x_dtype), ("norm_weight", norm_dtype), ("norm_bias", norm_dtype)):
        if dtype == "float32":
            inputs[name] = inputs[name].detach().float().requires_grad_()

    def plain(x, norm_weight, norm_bias, weight, bias, activation):
        normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], norm_weight, norm_bias).to(half)
        z = torch.nn.functional.linear(normed, weight, bias)
        return z if activation is None else torch.nn.functional.gelu(z)

    result = assert_parity(layer_norm_linear, inputs, base=plain, activation=activation)
    assert result["out"].dtype == half
    assert all(result[f"d{name}"].dtype == t.dtype for name, t in inputs.items())


# ---- how tensors lie in memory


def placed(values, layout):
    """strategies.place, and "transposed": the last dim before the others in memory."""
    if layout == "transposed":
        return guarded(values.transpose(-1, -2).contiguous().transpose(-1, -2))
    return guarded(place(values, layout))


ALL_LAYOUTS = [*LAYOUTS, "transposed"]


@pytest.mark.parametrize("i", range(len(ALL_LAYOUTS)), ids=ALL_LAYOUTS)
@implementations(F16)
def test_layouts(where, backend, dtype, i):
    """Layouts of x, weight and the output's gradient, each another one; they change no bit of the kernels' results.

    (On the native path they do: PyTorch's matrix products choose their algorithm by them.)
    """
    inputs = layer_norm_inputs((2, 9), 20, 24, dtype=dtype, device=where)
    of_x, of_weight, of_grad = (ALL_LAYOUTS[(i + j) % len(ALL_LAYOUTS)] for j in (0, 2, 5))
    if of_x == "constant":
        of_x = "contiguous"  # test_numerics.py has constant rows
    if of_weight == "permuted":
        of_weight = "transposed"  # its rank is 2
    inputs["x"] = placed(inputs["x"].detach(), of_x).requires_grad_()
    inputs["weight"] = placed(inputs["weight"].detach(), of_weight).requires_grad_()
    grad = placed(randn(2, 9, 20, dtype=dtype, device=where), of_grad)
    result = assert_parity(layer_norm_linear, inputs, grad, activation="gelu")
    if backend == "triton":
        assert_same_bits(result, run(layer_norm_linear, copies(inputs), grad.contiguous(), activation="gelu"))


@pytest.mark.parametrize("layout", ["strided", "constant", "offset"])
@pytest.mark.parametrize("name", ["norm_weight", "norm_bias", "bias"])
@backends
def test_layouts_of_parameters(where, name, layout):
    inputs = layer_norm_inputs((9,), 20, 24, device=where)
    inputs[name] = placed(inputs[name].detach(), layout).requires_grad_()
    assert_parity(layer_norm_linear, inputs, activation="gelu")


@implementations()
def test_gradients_from_sum_and_cat(where, dtype):
    inputs = list(layer_norm_inputs((2, 9), 20, 24, dtype=dtype, device=where).values())
    ones = torch.ones(2, 9, 20, dtype=dtype, device=where)
    for use, grad in (
        (lambda out: out.sum(), ones),
        (lambda out: torch.cat([out, 3 * out], 2).sum(), 4 * ones),
        (lambda out: out.transpose(0, 1).flatten(1).sum(), ones),
    ):
        expected = torch.autograd.grad(layer_norm_linear(*inputs), inputs, grad)
        grads = torch.autograd.grad(use(layer_norm_linear(*inputs)), inputs)
        assert_same_bits(dict(enumerate(grads)), dict(enumerate(expected)))


# ---- what is kept, made and launched

NAMES = ("x", "norm_weight", "norm_bias", "weight", "bias")


@pytest.mark.parametrize("activation", [None, "gelu"])
@backends
def test_frozen_inputs(where, activation):
    """Every subset of the inputs that requires gradients: the others get none, and no bit changes."""
    inputs = layer_norm_inputs((5,), 12, 16, device=where)
    grad = randn(5, 12, device=where)
    every = run(layer_norm_linear, inputs, grad, activation=activation)
    for asked in (s for i in range(1, 6) for s in combinations(NAMES, i)):
        some = {name: t.detach().requires_grad_(name in asked) for name, t in inputs.items()}
        result = run(layer_norm_linear, some, grad, activation=activation)
        assert result.keys() == {"out", *(f"d{name}" for name in asked)}
        assert_same_bits(result, {name: every[name] for name in result})


@pytest.mark.parametrize(
    "asked, kernel", [("x", "_layer_norm_linear_dw_kernel"), ("weight", "_layer_norm_linear_dx_kernel")]
)
def test_frozen_inputs_cost_nothing(device, launch_log, asked, kernel):
    inputs = layer_norm_inputs((5,), 12, 16, device=device)
    some = {name: t.detach().requires_grad_(name == asked) for name, t in inputs.items()}
    run(layer_norm_linear, some, randn(5, 12, device=device), activation="gelu")
    assert launch_log and kernel not in [launch.kernel for launch in launch_log]


@pytest.mark.parametrize("activation", [None, "gelu"])
@implementations()
def test_repeatable_and_independent_of_grad_mode(where, dtype, activation):
    inputs = layer_norm_inputs((70,), 40, 72, dtype=dtype, device=where)
    grad = randn(70, 40, dtype=dtype, device=where)
    first = run(layer_norm_linear, inputs, grad, activation=activation)
    for _ in range(2):
        assert_same_bits(run(layer_norm_linear, inputs, grad, activation=activation), first)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = layer_norm_linear(*inputs.values(), activation=activation)
        assert not out.requires_grad and torch.equal(out, first["out"])


@implementations(F32, F16)
def test_an_image_alone(where, backend, dtype):
    """One image gives the same bits alone as in a batch, though its rows fall into other tiles."""
    if backend == "native":
        pytest.skip("PyTorch's own matrix product picks another order of sums for another number of rows")
    inputs = layer_norm_inputs((3, 50), 40, 72, dtype=dtype, device=where)
    together = run(layer_norm_linear, inputs, randn(3, 50, 40, dtype=dtype, device=where))
    alone = layer_norm_linear(inputs["x"][1:2], *list(inputs.values())[1:])
    assert torch.equal(alone, together["out"][1:2])


@pytest.mark.parametrize("activation", [None, "gelu"])
@implementations()
def test_memory_kept_for_backward(where, dtype, activation):
    """Exactly the inputs, two statistics a row, and what the activation was applied to, or the output without one."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        inputs = layer_norm_inputs((2, 9), 20, 24, dtype=dtype, device=where)
        out = layer_norm_linear(*inputs.values(), activation=activation)
    pointers = {t.data_ptr() for t in inputs.values()}
    others = [t for t in kept if t.data_ptr() not in pointers]
    assert len(kept) == 8 and len(others) == 3
    statistics = [t for t in others if t.numel() == 18]
    assert len(statistics) == 2 and {t.dtype for t in statistics} == {torch.promote_types(dtype, F32)}
    (z,) = (t for t in others if t.shape == (2, 9, 20))
    assert z.dtype == dtype and (z.data_ptr() == out.data_ptr()) == (activation is None)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@backends
def test_no_pre_activation_without_gradients(where, backend, mode, unguarded):
    """Without a backward pass to come, what the activation is applied to is not stored beside the output."""
    inputs = layer_norm_inputs((20,), 100, 4, device=where)

    def allocations():
        with profile(activities=list(supported_activities()), profile_memory=True) as profiled:
            layer_norm_linear(*inputs.values(), activation="gelu")
        return [e.nbytes() for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]

    training = allocations()
    with mode():
        inference = allocations()
    of_output = 20 * 100 * 4
    assert (training.count(of_output), inference.count(of_output)) == (2, 1)


@pytest.mark.parametrize("activation, stored", [(None, 1), ("gelu", 2)])
def test_launches(device, launch_log, activation, stored):
    """Each output is stored once; nothing else of the size of x or of the output is."""
    m, n, k = 70, 40, 48
    inputs = layer_norm_inputs((m,), n, k, device=device)
    out = layer_norm_linear(*inputs.values(), activation=activation)
    if not launch_log:
        pytest.skip("launches are logged in the interpreter only")
    assert sum(launch.bytes_stored for launch in launch_log) == 4 * (stored * m * n + 2 * m + n * k + 2 * n)
    launch_log.clear()
    out.sum().backward()
    names = [launch.kernel for launch in launch_log]
    assert names.count("_layer_norm_linear_dx_kernel") == names.count("_layer_norm_linear_dw_kernel") == 1
    assert sum(launch.stored.get("dw_ptr", 0) for launch in launch_log) == 4 * n * k


def test_more_rows_than_a_grid_takes_in_its_second_dim(device):
    """Ten million rows: what counts rows is on axis 0."""
    from vitriton.kernels.prenorm import layer_norm_linear_forward
    from vitriton.kernels.prenorm_backward import layer_norm_linear_backward

    def meta(*shape):
        return torch.empty(*shape, device="meta", dtype=F16)

    x, weight, norm, bias = meta(10_000_000, 64), meta(64, 64), meta(64), meta(64)
    with record("sm_90") as launches:
        y, z, mean, rstd = layer_norm_linear_forward(x, norm, norm, weight, bias, 1e-5, "gelu", True)
        layer_norm_linear_backward(y, x, norm, norm, weight, bias, z, mean, rstd, 1e-5, "gelu", True, True)
    assert len(launches) >= 6
    assert all(dim <= 65535 for launch in launches for dim in launch.grid[1:])


@pytest.mark.parametrize("rows", [pytest.param(100_000, marks=pytest.mark.slow), 2500])
@implementations(F32, F16)
def test_sums_over_many_rows(where, dtype, rows):
    """dγ, dβ, dW and db, of which each program sums a part of the rows; their mean is not 0, so that sums grow."""
    inputs = layer_norm_inputs((rows,), 16, 32, dtype=dtype, device=where)
    grad = randn(rows, 16, dtype=dtype, device=where, mean=1.0, std=0.1)
    assert_parity(layer_norm_linear, inputs, grad)
