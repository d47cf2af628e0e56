"""attention and qkv_attention against the plain formula, on the kernels and on the native path: values and gradients.

Every N and every head dim are tested always, all of them with every dtype and several images and heads behind `slow`.
"""

import math
from itertools import combinations, product

import guards
import pytest
import torch
from guards import guarded
from parity import (
    DTYPES,
    F32,
    assert_parity,
    assert_parity_of_draws,
    assert_same_bits,
    attention_inputs,
    backends,
    copies,
    implementation,
    implementations,
    randn,
    run,
)
from strategies import LAYOUTS, place
from torch.profiler import profile, supported_activities
from vitriton.kernels import attention, configs, qkv_attention, reference, use_backend
from vitriton.kernels.launch import record

pytest_plugins = ["parity"]

TOKENS = (1, 2, 17, 50, 197, 257)
HEAD_DIMS = (8, 40, 59, 64, 72, 80, 111, 128)


def grid(pairs):
    """`pairs` of (tokens, head dim), with each dtype in turn; behind `slow` all pairs with all dtypes.

    Short sequences get more heads: the rms of a few rounding errors is chance.
    """

    def case(backend, dtype, n, d, images, heads, marks=()):
        few = 12 if n <= 2 else 6 if n <= 17 else 1
        return implementation(backend, dtype, images, heads * few, n, d, marks=marks)

    quick = [
        case(backend, dtypes[i % len(dtypes)], n, d, 1 + i % 2, 1)
        for backend, dtypes in DTYPES.items()
        for i, (n, d) in enumerate(pairs)
    ]
    full = [
        case(backend, dtype, n, d, 2, 3, marks=pytest.mark.slow)
        for backend, dtypes in DTYPES.items()
        for dtype, n, d in product(dtypes, TOKENS, HEAD_DIMS)
    ]
    return pytest.mark.parametrize("backend, dtype, b, h, n, d", quick + full)


@grid([(TOKENS[(i + i // 8 * 3) % 6], HEAD_DIMS[i % 8]) for i in range(16)] + [(197, 64), (257, 80)])
def test_attention(where, dtype, b, h, n, d):
    assert_parity(attention, attention_inputs(b, h, n, n, d, dtype=dtype, device=where))


@grid([(n, HEAD_DIMS[(5 * i) % 8]) for i, n in enumerate(TOKENS)] + [(33, d) for d in HEAD_DIMS])
def test_qkv_attention(where, dtype, b, h, n, d):
    qkv = randn(b, n, 3 * h * d, dtype=dtype, device=where).requires_grad_()
    result = assert_parity(qkv_attention, {"qkv": qkv}, heads=h)
    assert result["out"].is_contiguous() and result["dqkv"].is_contiguous()


LENGTHS = [(1, 130), (130, 1), (17, 50), (63, 64), (64, 65), (65, 63), (128, 127), (129, 191), (192, 193), (197, 10)]


@pytest.mark.parametrize(
    "backend, dtype, nq, nk",
    [
        implementation(backend, dtypes[(i + j) % len(dtypes)], *lengths)
        for backend, dtypes in DTYPES.items()
        for i, lengths in enumerate(LENGTHS)
        for j in range(2)
    ],
)
def test_more_or_fewer_keys_than_queries(where, dtype, nq, nk):
    heads, draws = (12, 16 if dtype == F32 else 4) if nq == 1 or nk == 1 else (1, 1)
    inputs = [attention_inputs(1, heads, nq, nk, 16, dtype=dtype, device=where) for _ in range(draws)]
    assert_parity_of_draws(attention, inputs)


@pytest.mark.parametrize("nq, nk", [(1, 1), *LENGTHS])
@pytest.mark.parametrize("d, kernels", [(64, ["bwd"]), (40, ["bwd"]), (64, ["bwd_dq", "bwd_dkdv"])])
def test_one_and_two_backward_kernels(device, monkeypatch, launch_log, d, kernels, nq, nk):
    """Half precision, which has both: many short heads take one kernel."""
    if len(kernels) == 2:
        monkeypatch.setattr(configs, "one_backward_kernel", lambda *call: None)
    with use_backend("triton"):
        assert_parity(attention, attention_inputs(2, 2, nq, nk, d, dtype=torch.float16, device=device))
    if guards.interpreting():
        assert [launch.kernel for launch in launch_log[1:]] == [f"_attention_{name}_kernel" for name in kernels]


# (Nq, Nk)
ALL_KEYS = [(197, 197), (1, 65), (130, 257), (129, 96), (72, 208), (72, 250), (64, 64), (257, 145), (65, 99), (66, 257)]


@pytest.mark.parametrize("nq, nk, d", [(*n, (64, 64, 80, 40, 88)[i % 5]) for i, n in enumerate(ALL_KEYS)])
def test_all_keys_at_once(device, launch_log, nq, nk, d):
    """Half precision and short sequences: one, two and three tiles of keys; the last queries with a mask or apart."""
    with use_backend("triton"):
        assert_parity(attention, attention_inputs(1, 2, nq, nk, d, dtype=torch.float16, device=device))
        if nq > 1:  # one query's gradients would all vanish
            inputs = attention_inputs(1, 1, nq, nk, d, dtype=torch.float16, device=device)
            inputs["k"].data[:, :, nk // 2 :] *= 40  # later keys have far higher and far lower scores
            assert_parity(attention, inputs, scale=-0.3)
    if guards.interpreting():
        _, programs, *_ = configs.short_tiles("interpreter", torch.float16, d, nq, nk, 8)
        assert launch_log[0].grid == (1, programs, 2)


@pytest.mark.parametrize("nq, nk, d", [(5, 300, 88), (70, 270, 84), (33, 20, 88)])
def test_values_in_three_parts(device, nq, nk, d):
    """64 + 16 + 8 columns, in half precision; aligned, and more keys than are taken at once, or fewer."""
    with use_backend("triton"):
        assert_parity(attention, attention_inputs(1, 2, nq, nk, d, dtype=torch.float16, device=device))


@pytest.mark.parametrize("d", [9, 16, 24, 32, 88, 96, 127, 160, 192, 255, 256])
@implementations()
def test_other_head_dims(where, dtype, d):
    assert_parity(attention, attention_inputs(1, 1, 33, 20, d, dtype=dtype, device=where))


@pytest.mark.slow
@pytest.mark.parametrize("n", [577, 1025])
@implementations()
def test_long_sequences(where, dtype, n):
    assert_parity(attention, attention_inputs(1, 2, n, n, 64, dtype=dtype, device=where))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (1, 1, 0, 0)])
@implementations()
def test_empty(where, dtype, shape, launch_log):
    inputs = attention_inputs(*shape, 16, dtype=dtype, device=where)
    result = run(attention, inputs, randn(*shape[:3], 16, dtype=dtype, device=where))
    assert {name: t.shape for name, t in result.items() if name != "out"} == {
        f"d{n}": t.shape for n, t in inputs.items()
    }
    assert result["out"].shape == inputs["q"].shape
    assert all((t == 0).all() for t in result.values())  # no keys give zeros
    assert launch_log == []


@pytest.mark.parametrize("shape", [(0, 5, 48), (2, 0, 48)])
@implementations()
def test_empty_qkv(where, dtype, shape):
    qkv = torch.zeros(shape, dtype=dtype, device=where, requires_grad=True)
    result = run(
        lambda qkv: qkv_attention(qkv, 2), {"qkv": qkv}, torch.zeros(*shape[:2], 16, dtype=dtype, device=where)
    )
    assert result["out"].shape == (*shape[:2], 16) and result["dqkv"].shape == shape


@pytest.mark.parametrize("scale", [0.0, -0.3, 1, 11.5, -1e-3])
@implementations()
def test_scale(where, backend, dtype, scale):
    inputs = attention_inputs(1, 2, 19, 70, 16, dtype=dtype, device=where)
    logits = (inputs["q"] @ inputs["k"].transpose(-1, -2)).abs().max().item() * scale
    sharp = scale > 10 and dtype == F32 and backend == "native"
    assert_parity(attention, inputs, scale=scale, spread=logits if sharp else 0.0)
    qkv = randn(1, 19, 96, dtype=dtype, device=where).requires_grad_()
    negative = -0.5 if scale > 10 else scale
    assert_parity(qkv_attention, {"qkv": qkv}, heads=2, scale=negative)


# ---- how tensors lie in memory


@implementations()
def test_output_lies_as_the_next_projection_reads_it(where, dtype):
    q, k, v = attention_inputs(2, 3, 9, 11, 8, dtype=dtype, device=where).values()
    out = attention(q, k, v)
    assert out.dtype == dtype and out.shape == (2, 3, 9, 8) and out.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def placed(values, layout):
    """strategies.place, and "transposed": the last dim before the others in memory."""
    if layout == "transposed":
        return guarded(values.transpose(-1, -2).contiguous().transpose(-1, -2))
    return guarded(place(values, layout))


ALL_LAYOUTS = [*LAYOUTS, "transposed"]


@pytest.mark.parametrize("i", range(len(ALL_LAYOUTS)), ids=ALL_LAYOUTS)
@backends
def test_layouts(where, i):
    """The layouts of q, k, v and of the output's gradient, each another one, change no bit of the results."""
    inputs = attention_inputs(2, 2, 19, 19, 24, device=where)
    of_q, of_k, of_v, of_grad = (ALL_LAYOUTS[(i + j) % len(ALL_LAYOUTS)] for j in (0, 2, 4, 6))
    for name, layout in zip(inputs, (of_q, of_k, of_v), strict=True):
        inputs[name] = placed(inputs[name].detach(), layout).requires_grad_()
    grad = placed(randn(2, 2, 19, 24, device=where), of_grad)
    assert_same_bits(run(attention, inputs, grad), run(attention, copies(inputs), grad.contiguous()))


@implementations()
def test_gradients_from_sum_cat_and_transpose(where, dtype):
    q, k, v = attention_inputs(2, 2, 18, 18, 16, dtype=dtype, device=where).values()
    weight = randn(2, 18, 2, 16, dtype=dtype, device=where)
    uses = {
        "sum": (lambda out: out.sum(), torch.ones_like(q)),
        "cat": (lambda out: (torch.cat([out, out], 3) * torch.cat([weight, weight], 3).transpose(1, 2)).sum(), None),
        "transpose": (lambda out: (out.transpose(1, 2) * weight).sum(), weight.transpose(1, 2)),
    }
    for use, grad in uses.values():
        grad = 2 * weight.transpose(1, 2) if grad is None else grad
        expected = torch.autograd.grad(attention(q, k, v), (q, k, v), grad.contiguous())
        grads = torch.autograd.grad(use(attention(q, k, v)), (q, k, v))
        assert_same_bits(dict(enumerate(grads)), dict(enumerate(expected)))


@implementations()
def test_views_of_a_projection(where, dtype):
    """q, k and v as views of one tensor: its gradient is that of qkv_attention."""
    qkv = randn(2, 21, 3 * 2 * 16, dtype=dtype, device=where).requires_grad_()
    grad = randn(2, 21, 32, dtype=dtype, device=where)

    def unpacked(qkv):
        q, k, v = (t.unflatten(2, (2, 16)).transpose(1, 2) for t in qkv.chunk(3, -1))
        return attention(q, k, v).transpose(1, 2).flatten(2)

    packed = run(lambda qkv: qkv_attention(qkv, 2), {"qkv": qkv}, grad)
    assert_same_bits(run(unpacked, {"qkv": qkv}, grad), packed)


@pytest.mark.parametrize("layout", [*LAYOUTS, "transposed"])
@backends
def test_layouts_of_qkv(where, layout):
    qkv = placed(randn(2, 19, 72, device=where), layout).requires_grad_()
    grad = placed(randn(2, 19, 24, device=where), layout)

    def function(qkv):
        return qkv_attention(qkv, 3)

    contiguous = run(function, copies({"qkv": qkv}), grad.contiguous())
    assert_same_bits(run(function, {"qkv": qkv}, grad), contiguous)


@implementations()
def test_one_tensor_as_queries_keys_and_values(where, dtype):
    x = randn(1, 2, 30, 16, dtype=dtype, device=where).requires_grad_()
    grad = randn(1, 2, 30, 16, dtype=dtype, device=where)
    out = attention(x, x, x)
    (dx,) = torch.autograd.grad(out, x, grad)
    apart = run(attention, {"q": x.detach().clone().requires_grad_(), "k": x.detach().clone().requires_grad_(),
                            "v": x.detach().clone().requires_grad_()}, grad)  # fmt: skip
    assert torch.equal(out, apart["out"])
    torch.testing.assert_close(dx, apart["dq"] + apart["dk"] + apart["dv"], rtol=4 * torch.finfo(dtype).eps, atol=0.01)


# ---- what is kept, made and launched


@pytest.mark.parametrize("asked", [s for i in (1, 2, 3) for s in combinations("qkv", i)], ids="".join)
@backends
def test_frozen_inputs(where, asked):
    """Only what requires a gradient gets one, the same to the last bit as beside the others."""
    inputs = attention_inputs(1, 2, 20, 35, 16, device=where)
    grad = randn(1, 2, 20, 16, device=where)
    every = run(attention, inputs, grad)
    some = {name: t.detach().requires_grad_(name in asked) for name, t in inputs.items()}
    result = run(attention, some, grad)
    assert result.keys() == {"out", *(f"d{name}" for name in asked)}
    assert_same_bits(result, {name: every[name] for name in result})


@implementations()
def test_repeatable_and_independent_of_grad_mode(where, dtype):
    inputs = attention_inputs(1, 2, 67, 70, 24, dtype=dtype, device=where)
    grad = randn(1, 2, 67, 24, dtype=dtype, device=where)
    first = run(attention, inputs, grad)
    for _ in range(2):
        assert_same_bits(run(attention, inputs, grad), first)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = attention(*inputs.values())
        assert not out.requires_grad and torch.equal(out, first["out"])


@implementations()
def test_an_image_and_a_head_alone(where, dtype, one_thread):
    """On one thread, as PyTorch's own products in fp16 differ in their last bits by how threads share them."""
    inputs = attention_inputs(3, 2, 50, 50, 24, dtype=dtype, device=where)
    grad = randn(3, 2, 50, 24, dtype=dtype, device=where)
    together = run(attention, inputs, grad)
    for part in (slice(1, 2), slice(0, 3)), (slice(0, 1), slice(1, 2)):
        index = part if part[0] == slice(0, 1) else (part[0],)
        alone = run(attention, {n: t.detach()[index].requires_grad_() for n, t in inputs.items()}, grad[index])
        assert_same_bits(alone, {name: t[index] for name, t in together.items()})


@pytest.mark.parametrize("packed", [False, True])
@implementations()
def test_memory_kept_for_backward(where, dtype, packed):
    """Exactly the inputs, the output and one statistic a query."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if packed:
            inputs = [randn(2, 33, 96, dtype=dtype, device=where).requires_grad_()]
            out = qkv_attention(*inputs, 2)
        else:
            inputs = list(attention_inputs(2, 2, 33, 40, 16, dtype=dtype, device=where).values())
            out = attention(*inputs)
    (statistic,) = (t for t in kept if t.shape == (2, 2, 33))
    assert statistic.dtype == torch.promote_types(dtype, torch.float32)
    pointers = [t.data_ptr() for t in kept]
    assert len(kept) == len(inputs) + 2 and set(pointers) == {t.data_ptr() for t in (*inputs, out, statistic)}


def largest_allocation(function, inputs, grad):
    """In bytes, of a forward and a backward pass."""
    with profile(activities=list(supported_activities()), profile_memory=True) as profiled:
        run(function, inputs, grad)
    return max(e.nbytes() for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]")


@backends
def test_no_map_of_queries_and_keys(where, backend, unguarded):
    n = 320 if backend == "triton" else 2048  # PyTorch's fused operator has buffers of its own, some for each thread
    inputs = attention_inputs(1, 1, n, n, 8, device=where)
    grad = randn(1, 1, n, 8, device=where)
    assert largest_allocation(reference.attention, inputs, grad) >= n * n * 4
    assert largest_allocation(attention, inputs, grad) < n * n * 4 / 2


@pytest.mark.parametrize("d, backward", [(16, ["bwd"]), (72, ["bwd_dq", "bwd_dkdv"])])
@backends
def test_launches(where, launch_log, backend, d, backward):
    """One kernel forward, one or two backward; the gradient of qkv is written where it belongs."""
    qkv = randn(1, 70, 6 * d, dtype=torch.float16, device=where).requires_grad_()
    qkv_attention(qkv, 2).sum().backward()
    names = [launch.kernel for launch in launch_log]
    expected = [f"_attention_{name}_kernel" for name in ["fwd", *backward]]
    assert names == (expected if backend == "triton" else [])


def recorded(chip, b, h, n, d, dtype=torch.bfloat16, odd=0):
    """The launches of a forward and a backward pass there; rows of q, k and v are `odd` elements too long."""
    from vitriton.kernels.attention import attention_forward
    from vitriton.kernels.attention_backward import attention_backward

    q = torch.empty(b, n, h * d + odd, dtype=dtype, device="meta")[..., : h * d].unflatten(2, (h, d)).transpose(1, 2)
    with record(chip) as launches:
        out, lse = attention_forward(q, q, q, 1.0)
        attention_backward(out, q, q, q, out, lse, 1.0, q, q, q)
    return launches


def test_values_are_found_from_keys_only_in_rows_of_one_tensor():
    """A constant of the model, never of where tensors happen to lie."""
    pytest.importorskip("triton", reason="the launchers are Triton's")
    from vitriton.kernels.attention import keys_and_values

    rows = torch.arange(2.0 * 5 * 96).reshape(2, 5, 96)  # 3 parts, 2 heads, head dim 16
    _, k, v = rows.unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    both, offset = keys_and_values(k, v)
    assert offset == 32 and torch.equal(both, torch.stack([k, v])) and both.data_ptr() == k.data_ptr()
    heads_first = rows.reshape(2, 3, 2, 5, 16).unbind(1)
    apart = {
        "the same": (k, k), "values first": (v, k), "not in the keys' rows": heads_first[1:],
        "another tensor": (k, v.clone()),
        "every other column": (k[:, :1], rows.unflatten(2, (3, 32))[:, :, 2, ::2][:, None]),
    }  # fmt: skip
    for k, v in apart.values():
        assert keys_and_values(k, v)[0] is k and keys_and_values(k, v)[1] == 0


@pytest.mark.parametrize(
    "call, kernels",
    [
        ({}, 1),
        ({"n": 1}, 1),
        ({"n": 320}, 1),
        ({"n": 321}, 2),  # the sums would not stay in the L2 cache
        ({"d": 65}, 2),  # registers
        ({"odd": 1}, 2),
        ({"dtype": F32}, 2),
        ({"chip": "sm_86"}, 2),
        ({"chip": "sm_100"}, 2),
        ({"chip": "gfx942"}, 2),
        ({"b": 1}, 2),  # 12 heads for 132 multiprocessors
        ({"b": 1, "n": 64}, 1),  # but they are 12 programs anyway
        ({"b": 15}, 2),  # 180 of 264 places
        ({"b": 16}, 1),  # 192
        ({"b": 23}, 2),  # 276: a second round, for 12
        ({"b": 16, "chip": "sm_80"}, 1),
    ],
)
def test_which_backward_kernels(device, call, kernels):
    launches = recorded(**{"chip": "sm_90", "b": 64, "h": 12, "n": 197, "d": 64} | call)
    assert len(launches) == 1 + kernels


@pytest.mark.parametrize("b, h, n", [(70_000, 2, 5), (300, 300, 70)])
def test_more_heads_than_a_grid_takes(device, b, h, n):
    """CUDA takes 65535 programs on axes 1 and 2."""
    for dtype, kernels in (F32, 2), (torch.bfloat16, 1):
        launches = recorded("sm_90", b, h, n, 16, dtype)
        assert len(launches) == 1 + kernels
        for launch in launches:
            assert all(programs <= 65535 for programs in launch.grid[1:])
            assert math.prod(launch.grid) >= b * h and launch.grid[0] < 2**31
