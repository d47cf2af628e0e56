"""What PyTorch asks of operators: derivatives, compilation, export, autocast, checkpoints, flops."""

import io
import shutil

import pytest
import torch
from parity import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    OperatorLog,
    assert_close,
    assert_same_bits,
    attention_inputs,
    backends,
    copies,
    implementations,
    layer_norm_inputs,
    randn,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from vitriton.kernels import (
    attention,
    compiled,
    explain,
    layer_norm_linear,
    native_attention,
    packed,
    qkv_attention,
    reference,
    use_backend,
)

pytest_plugins = ["parity"]


def qkv_inputs(b, n, width, **options):
    return {"qkv": randn(b, n, width, **options).requires_grad_()}


# function, its inputs, its options
CASES = {
    "attention": (attention, lambda **o: attention_inputs(1, 1, 2, 3, 8, **o), {"scale": -0.4}),
    "qkv_attention": (qkv_attention, lambda **o: qkv_inputs(1, 2, 48, **o), {"heads": 2}),
    "layer_norm_linear": (layer_norm_linear, lambda **o: layer_norm_inputs((1, 3), 2, 4, **o), {}),
    "gelu": (layer_norm_linear, lambda **o: layer_norm_inputs((3,), 2, 4, **o), {"activation": "gelu"}),
    "gelu_tanh": (
        layer_norm_linear,
        lambda **o: layer_norm_inputs((3,), 2, 4, bias=False, **o),
        {"activation": "gelu_tanh"},
    ),
}
cases = pytest.mark.parametrize("case", CASES)


def arguments(case, **options):
    """The operator of a case, that of its backward pass, and the arguments of each."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "vitriton":
                calls.append((func, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
            return func(*args, **(kwargs or {}))

    function, inputs, keywords = CASES[case]
    with Recorder():
        function(*inputs(**options).values(), **keywords).sum().backward()
    (forward, forward_args), (backward, backward_args) = calls
    return forward, forward_args, backward, backward_args


# ---- registration


@pytest.mark.parametrize("requires_grad", [True, False])
@cases
@backends
def test_opcheck(where, case, requires_grad):
    forward, forward_args, backward, backward_args = arguments(case, device=where)
    for operator, args in ((forward, forward_args), (backward, backward_args)):
        args = [
            a.clone().requires_grad_(requires_grad) if isinstance(a, torch.Tensor) and a.numel() else a for a in args
        ]
        torch.library.opcheck(operator, tuple(args))


# an operator's results may not share memory, whichever way this processor is fastest: few rows have fewer ways
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("way", packed.LINEARS)
def test_opcheck_of_every_linear_on_a_cpu(way, dtype, monkeypatch, unguarded):
    if packed.why_not_onednn(dtype) and way in ("onednn", "packed", "trusted"):
        pytest.skip(packed.why_not_onednn(dtype))
    if way == "compiled" and compiled.why_no_blocks(dtype):
        pytest.skip(compiled.why_no_blocks(dtype))
    monkeypatch.setattr(packed, "forced", way)
    for activation, save in ((None, False), ("gelu", False), ("gelu", True)):
        inputs = layer_norm_inputs((2, 40), 24, 16, dtype=dtype)
        args = *inputs.values(), 1e-5, activation, save, "native"
        torch.library.opcheck(torch.ops.vitriton.layer_norm_linear, args)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("way", ["flash", "products", "compiled"])
def test_results_of_every_attention_on_a_cpu_share_no_memory(way, dtype, monkeypatch, unguarded):
    """Not by opcheck, to which lse is wrong where it is NaN: the backward pass of products in bf16 does not need it."""
    if way == "compiled" and compiled.why_not(dtype):
        pytest.skip(compiled.why_not(dtype))
    monkeypatch.setattr(native_attention, "forced", way)
    qkv = qkv_inputs(2, 200, 144, dtype=dtype)["qkv"]
    q, k, v = attention_inputs(2, 3, 200, 200, 16, dtype=dtype).values()
    for op, args in (
        (torch.ops.vitriton.attention, (q, k, v, 0.25, "native")),
        (torch.ops.vitriton.qkv_attention, (qkv, 3, 0.25, "native")),
    ):
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        tensors += op(*args)
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@cases
@implementations(F64)
def test_gradcheck(where, case, dtype):
    function, inputs, keywords = CASES[case]
    inputs = list(inputs(dtype=dtype, device=where).values())
    fast = case in ("layer_norm_linear", "gelu_tanh")  # they differ from "gelu" by little
    assert torch.autograd.gradcheck(lambda *args: function(*args, **keywords), inputs, fast_mode=fast)


@pytest.mark.parametrize("case", ["attention", "qkv_attention", "gelu"])
@implementations(F64)
def test_gradcheck_of_several_tiles(where, dtype, case):
    large = {
        "attention": (attention, attention_inputs(1, 1, 67, 130, 40, dtype=dtype, device=where), {}),
        "qkv_attention": (qkv_attention, qkv_inputs(1, 70, 48, dtype=dtype, device=where), {"heads": 2}),
        "gelu": (
            layer_norm_linear,
            layer_norm_inputs((67,), 66, 70, dtype=dtype, device=where),
            {"activation": "gelu"},
        ),
    }
    function, inputs, keywords = large[case]
    assert torch.autograd.gradcheck(lambda *args: function(*args, **keywords), list(inputs.values()), fast_mode=True)


@cases
@implementations(F64)
def test_gradgradcheck(where, case, dtype):
    function, inputs, keywords = CASES[case]
    inputs = list(inputs(dtype=dtype, device=where).values())
    assert torch.autograd.gradgradcheck(lambda *args: function(*args, **keywords), inputs, fast_mode=True)


@cases
@implementations(F64)
def test_double_backward(where, case, dtype):
    """A gradient penalty, on one input, and on all: what autograd makes of the plain formula."""
    function, make, keywords = CASES[case]
    inputs = make(dtype=dtype, device=where)

    def penalised(function, inputs, names):
        wanted = [inputs[name] for name in names]
        out = function(*inputs.values(), **keywords)
        grads = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(penalty, [t for t in inputs.values() if t is not None], allow_unused=True)

    names = [name for name, t in inputs.items() if t is not None]
    for asked in ([names[0]], names[1:2] or names, names):
        ours = penalised(function, inputs, asked)
        plain = penalised(getattr(reference, function.__name__), copies(inputs), asked)
        for name, a, b in zip(names, ours, plain, strict=True):
            assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-9, atol=1e-9), name


# ---- autograd in use


@cases
@backends
def test_backward_twice(where, case):
    function, inputs, keywords = CASES[case]
    inputs = [t for t in inputs(device=where).values() if t is not None]
    out = function(*inputs, **keywords)
    grad = torch.randn_like(out)
    first, second = (torch.autograd.grad(out, inputs, grad, retain_graph=keep) for keep in (True, False))
    assert_same_bits(dict(enumerate(first)), dict(enumerate(second)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs, grad)


@cases
@backends
def test_changing_what_was_saved(where, case):
    """An in-place change of an input, or of an output that is kept, is noticed by the backward pass."""
    function, make, keywords = CASES[case]
    inputs = make(device=where)
    for changed in (*(name for name, t in inputs.items() if t is not None), "out"):
        args = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in inputs.items()}
        out = function(*args.values(), **keywords)
        if changed == "out" and "activation" in keywords:
            continue  # not kept: what the activation was applied to is
        with torch.no_grad():
            (out if changed == "out" else args[changed]).add_(1)
        with pytest.raises(RuntimeError, match=r"modified .*inplace"):
            out.sum().backward()


@cases
@backends
def test_changing_a_result(where, case):
    """In place, under autograd: as good as a copy where the backward pass does not need the result, else its error."""
    function, make, keywords = CASES[case]
    inputs = make(device=where)
    out = function(*inputs.values(), **keywords)
    grad = torch.randn_like(out)
    if case in ("attention", "qkv_attention", "layer_norm_linear"):
        with pytest.raises(RuntimeError, match=r"modified .*inplace"):
            out.mul_(2).backward(grad)
    else:
        assert_same_bits(
            run(lambda *args: function(*args, **keywords).mul_(2), inputs, grad),
            run(lambda *args: function(*args, **keywords) * 2, inputs, grad),
        )


@pytest.mark.parametrize("use_reentrant", [True, False])
@cases
@backends
def test_checkpoint(where, case, use_reentrant):
    function, make, keywords = CASES[case]
    inputs = make(device=where)
    out = function(*inputs.values(), **keywords)
    grad = torch.randn_like(out)
    expected = run(function, inputs, grad, **keywords)
    checkpointed = checkpoint(lambda *args: function(*args, **keywords), *inputs.values(), use_reentrant=use_reentrant)
    checkpointed.backward(grad)
    grads = {f"d{name}": t.grad for name, t in inputs.items() if t is not None}
    assert_same_bits({"out": checkpointed.detach(), **grads}, expected)


@cases
@backends
def test_statistics_are_not_differentiable(where, case):
    """What an operator returns for its backward pass takes no gradient, rather than dropping one."""
    forward, args, _, _ = arguments(case, device=where)
    out, *kept = forward(*(a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args))
    assert out.requires_grad and not any(t.requires_grad for t in kept)


@cases
@backends
def test_unused_output(where, case):
    function, make, keywords = CASES[case]
    inputs = make(device=where)
    (first, *_), out = inputs.values(), function(*inputs.values(), **keywords)
    loss = first.sum() + 0 * out.detach().sum()
    assert torch.equal(torch.autograd.grad(loss, first)[0], torch.ones_like(first))


@cases
@backends
def test_functorch_is_refused(where, case):
    function, make, keywords = CASES[case]
    first, *rest = make(device=where).values()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: function(x, *rest, **keywords).sum())(first)


@cases
@backends
def test_watched_or_not(where, case):
    """A call that a mode watches goes through the operators, any other past them, and both give the same to the bit."""
    function, make, keywords = CASES[case]
    inputs = make(device=where)
    grad = torch.randn_like(function(*inputs.values(), **keywords))
    alone = run(function, inputs, grad, **keywords)
    with OperatorLog() as log:
        watched = run(function, inputs, grad, **keywords)
    name = f"vitriton::{function.__name__}"
    assert log.names == [name, f"{name}_backward"]
    assert_same_bits(alone, watched)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run(function, inputs, grad, **keywords)
        with torch.no_grad():
            function(*inputs.values(), **keywords)
    assert not [event.name for event in profiled.events() if event.name.startswith("vitriton::")]


# ---- compilation and export


class Block(torch.nn.Module):
    """All three functions, with N free."""

    def __init__(self, device):
        super().__init__()
        inputs = layer_norm_inputs((), 48, 16, device=device)
        self.norm_weight, self.norm_bias, self.weight, self.bias = map(torch.nn.Parameter, list(inputs.values())[1:])

    def forward(self, x):
        qkv = layer_norm_linear(x, self.norm_weight, self.norm_bias, self.weight, self.bias)
        x = x + qkv_attention(qkv, 2)
        q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in qkv.chunk(3, -1))
        x = x + attention(q, k, v, scale=0.2).transpose(1, 2).flatten(2)
        return layer_norm_linear(x, self.norm_weight, self.norm_bias, self.weight, self.bias, activation="gelu")


def run_block(block, forward, x):
    out = forward(x)
    return dict(enumerate((out.detach(), *torch.autograd.grad(out, (x, *block.parameters()), torch.ones_like(out)))))


@backends
def test_compiles_once_for_every_length(where):
    """One graph without breaks, N from 127 to 193 without another compilation, and the same bits as eager."""
    torch._dynamo.reset()
    block, compiler = Block(where), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=compiler, fullgraph=True, dynamic=True)
    compilations = set()
    for n in (127, 193, 150):
        x = randn(1, n, 16, device=where).requires_grad_()
        assert_same_bits(run_block(block, compiled, x), run_block(block, block, x))
        compilations.add(compiler.frame_count)
    assert len(compilations) == 1


@pytest.mark.slow
@backends
def test_inductor(where):
    if shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    block = Block(where)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for n in (127, 193):
        x = randn(1, n, 16, device=where).requires_grad_()
        for a, b in zip(run_block(block, compiled, x).values(), run_block(block, block, x).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@backends
def test_export(where):
    """Through a file, with free batch and N."""
    block, dim = Block(where), torch.export.Dim
    x = randn(2, 127, 16, device=where)
    program = torch.export.export(block, (x,), dynamic_shapes={"x": {0: dim("b", min=1), 1: dim("n", min=2)}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((2, 127, 16), (3, 5, 16)):
        x = randn(*shape, device=where)
        assert torch.equal(loaded(x), block(x))


# ---- autocast

LARGER = {
    "attention": lambda device: attention_inputs(2, 2, 33, 20, 16, device=device),
    "qkv_attention": lambda device: qkv_inputs(2, 20, 96, device=device),
    "layer_norm_linear": lambda device: layer_norm_inputs((2, 17), 20, 24, device=device),
}
AUTOCAST = [
    pytest.param(backend, half, case, id=f"{backend}-{half}-{case}")
    for backend, dtypes in DTYPES.items()
    for half in (F16, BF16)
    for case in CASES
    if half in dtypes
]


@pytest.mark.parametrize("backend, half, case", AUTOCAST)
def test_autocast(where, half, case):
    """fp32 inputs: the result is half, gradients are fp32, errors are those of the plain formula under autocast."""
    function, _, keywords = CASES[case]
    inputs = LARGER[function.__name__](where)

    def under_autocast(function):
        def call(*args, **keywords):
            with torch.autocast(where.type, dtype=half):
                return function(*args, **keywords)

        return call

    plain = getattr(reference, function.__name__)
    with torch.autocast(where.type, dtype=half):
        out = function(*inputs.values(), **keywords)
        with torch.autocast(where.type, enabled=False):
            assert function(*inputs.values(), **keywords).dtype == F32
    assert out.dtype == half
    grad = torch.randn_like(out)
    result = run(under_autocast(function), inputs, grad, **keywords)
    base = run(under_autocast(plain), copies(inputs), grad, **keywords)
    assert_close(result, base, run(plain, copies(inputs, F64), grad.double(), **keywords))
    assert all(result[f"d{name}"].dtype == F32 for name, t in inputs.items() if t is not None)


@pytest.mark.parametrize("backend, half, case", AUTOCAST)
def test_autocast_of_half_and_of_double(where, half, case):
    """An input in either half dtype beside fp32 parameters; fp64, which autocast leaves alone."""
    function, make, keywords = CASES[case]
    (_, x), *others = make(device=where).items()
    with torch.autocast(where.type, dtype=half):
        for given in (F16, BF16):
            assert function(x.to(given), *(t for _, t in others), **keywords).dtype == half
        if F64 in DTYPES["native" if where.type == "cpu" else "triton"]:
            assert function(*make(dtype=F64, device=where).values(), **keywords).dtype == F64


# ---- flops


@backends
def test_flops(where):
    b, h, nq, nk, d, m, n, k = 2, 3, 5, 7, 8, 10, 6, 4

    def counted(function, inputs, **keywords):
        with FlopCounterMode(display=False) as forward:
            out = function(*inputs.values(), **keywords)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    pairs = b * h * nq * nk * d
    assert counted(attention, attention_inputs(b, h, nq, nk, d, device=where)) == (4 * pairs, 10 * pairs)
    assert counted(reference.attention, attention_inputs(b, h, nq, nk, d, device=where)) == (4 * pairs, 8 * pairs)
    pairs = b * h * nq * nq * d
    assert counted(qkv_attention, qkv_inputs(b, nq, 3 * h * d, device=where), heads=h) == (4 * pairs, 10 * pairs)
    products = m * n * k
    inputs = layer_norm_inputs((2, m // 2), n, k, device=where)
    assert counted(layer_norm_linear, inputs, activation="gelu") == (2 * products, 4 * products)
    inputs["x"] = inputs["x"].detach()
    assert counted(layer_norm_linear, inputs) == (2 * products, 2 * products)


# ---- which implementation runs


def test_the_backward_pass_runs_where_the_forward_pass_ran(device, launch_log):
    for case in CASES:
        function, make, keywords = CASES[case]
        with use_backend("native"):
            out = function(*make(device=device).values(), **keywords)
        with use_backend("triton"):
            out.sum().backward()
        assert launch_log == []
    for case in CASES:
        function, make, keywords = CASES[case]
        with use_backend("triton"):
            out = function(*make(device=device).values(), **keywords)
        launched = len(launch_log)
        with use_backend("native"):
            out.sum().backward()
        if device.type == "cpu":
            assert len(launch_log) > launched > 0
        launch_log.clear()


def test_choices_that_cannot_run_raise(device, launch_log):
    """A dtype that the kernels do not take here is refused by "triton", taken by "native", and told by explain()."""
    dtype = BF16 if device.type == "cpu" else F64
    for case in CASES:
        function, make, keywords = CASES[case]
        inputs = list(make(dtype=dtype, device=device).values())
        with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was asked for.*float"):
            function(*inputs, **keywords)
        with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was asked for.*float"):
            explain(*(t for t in inputs if t is not None))
        with use_backend("auto"):
            assert function(*inputs, **keywords).dtype == dtype
            assert explain(inputs[0]).startswith("native; Triton is passed over because")
    assert launch_log == []
    with use_backend("auto"):
        assert explain(torch.zeros(1, device=device)).startswith("Triton")
    with use_backend("native"):
        assert "'native' was chosen" in explain(torch.zeros(1, device=device))
    with pytest.raises(ValueError, match="'cuda'; allowed are 'auto', 'triton', 'native'"), use_backend("cuda"):
        pass
