"""Linear layers compiled on this machine, with LayerNorm and GELU: values, bits, and what they leave to PyTorch."""

import copy
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from parity import BF16, F16, F32, F64, assert_parity, compiled_dtypes, layer_norm_inputs, randn
from test_packed import CHANGES, tokens
from test_packed import blocks as blocks_of_packed
from vitriton.kernels import compiled, layer_norm_linear, native, native_attention, packed, use_backend
from vitriton.kernels.blocks import feed_forward_block
from vitriton.kernels.reference import compare
from vitriton.vit import Transformer, ViT, fuse, record_attention, unfuse

pytest_plugins = ["parity"]
pytestmark = pytest.mark.usefixtures("unguarded", "multiplied")

# rows, N, K: few rows and many parts of them; widths that fill no vector, panel or chunk; one of each; K of many chunks
CASES = [
    ((197,), 576, 192),
    ((2, 50), 130, 64),
    ((64,), 70, 60),
    ((33,), 1, 2),
    ((40,), 3, 130),
    ((2, 300), 65, 258),
    ((600,), 10, 48),
    ((37,), 192, 3072),
]
ACTIVATIONS = pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])


@pytest.fixture(autouse=True)
def use_compiled(monkeypatch, request):
    dtype = request.node.callspec.params.get("dtype", F32) if hasattr(request.node, "callspec") else F32
    if why_not := compiled.why_no_blocks(dtype):
        pytest.skip(f"Linear cannot be compiled here: {why_not}")
    monkeypatch.setattr(packed, "forced", "compiled")
    monkeypatch.setattr(native_attention, "forced", "compiled")
    with use_backend("native"):
        yield


@pytest.mark.skipif(not (sys.platform.startswith("linux") and shutil.which("g++")), reason="there is no g++ on a Linux")
def test_the_source_compiles():
    assert compiled.why_not(F32) is None


def feed_forward(x, norm_weight, norm_bias, weight, bias, out_weight, out_bias, activation="gelu"):
    y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), weight, bias)
    return F.linear(F.gelu(y, approximate=packed.GELU[activation]), out_weight, out_bias)


def feed_forward_inputs(rows, n, k, dtype, **options):
    inputs = [t.detach() for t in layer_norm_inputs(rows, n, k, dtype=dtype, **options).values()]
    return [*inputs, randn(k, n, dtype=dtype, std=n**-0.5), randn(k, dtype=dtype)]


def of_block(x, *parameters, activation="gelu"):
    block = native.compiled_feed_forward(x, *parameters, activation=activation, eps=1e-5)
    return compiled.blocks(x, [block])


@compiled_dtypes
@ACTIVATIONS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_norm_linear(case, activation, dtype):
    inputs = {name: t.detach() for name, t in layer_norm_inputs(*case, dtype=dtype).items()}
    assert packed.is_compiled(inputs["x"], (inputs["weight"], inputs["bias"]))
    with torch.no_grad():
        assert_parity(layer_norm_linear, inputs, activation=activation)


@compiled_dtypes
@ACTIVATIONS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_linears(case, activation, dtype):
    if activation is None:
        pytest.skip("of a block with GELU only")
    rows, n, k = case
    inputs = feed_forward_inputs(rows, n + n % 2, k, dtype)  # rows of bf16 are pairs
    result = of_block(*inputs, activation=activation)
    base, gold = (feed_forward(*(t.to(to) for t in inputs), activation) for to in (dtype, F64))
    error = compare("y", result, base, gold, k=2)
    assert error, str(error)


@compiled_dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(33,), (3, 197), (1, 1, 400)], ids=str)
def test_linear_by_itself(rows, bias, dtype):
    x, weight, b = randn(*rows, 130, dtype=dtype), randn(70, 130, dtype=dtype), randn(70, dtype=dtype) if bias else None
    result = packed.linear(x, weight, b)
    base, gold = (F.linear(*(t if t is None else t.to(to) for t in (x, weight, b))) for to in (dtype, F64))
    error = compare("y", result, base, gold, k=2)
    assert result.shape == gold.shape and error, str(error)


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_statistics_survive_a_large_mean(mean):
    """Of x itself: its rounding, which LayerNorm cannot take away, is in the golden value as well."""
    inputs = {name: t.detach() for name, t in layer_norm_inputs((300,), 64, 192, mean=mean).items()}
    with torch.no_grad():
        y, gold = layer_norm_linear(*inputs.values()), F.linear(*_normed(inputs))
    assert (y - gold).abs().max() < 2e-5


def _normed(inputs):
    x, norm_weight, norm_bias, weight, bias = (t.double() for t in inputs.values())
    return F.layer_norm(x - x.mean(-1, keepdim=True), x.shape[-1:], norm_weight, norm_bias), weight, bias


@compiled_dtypes
@pytest.mark.parametrize(("n", "hidden"), [(200, 130), (800, 130), (40, 1700)])
def test_the_same_bits(n, hidden, dtype):
    """In any layout, in any number of threads, which share rows or not, one image alone and among others, but for how
    few rows there are."""
    x, norm_weight, norm_bias, weight, bias, *second = feed_forward_inputs((2, n), hidden, 72, dtype)
    y = of_block(x, norm_weight, norm_bias, weight, bias, *second)
    wide = torch.nn.functional.pad(weight, (2, 4))[:, 2:-4]
    again = of_block(x.transpose(0, 1), norm_weight, norm_bias, wide, bias, *second)
    assert torch.equal(again, y.transpose(0, 1))
    threads = torch.get_num_threads()
    for number in (1, 2, 3, 5, 8):
        torch.set_num_threads(number)
        try:
            again = of_block(x, norm_weight, norm_bias, weight, bias, *second)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again, y)
    assert torch.equal(of_block(x[1], norm_weight, norm_bias, weight, bias, *second), y[1])


@compiled_dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_stays_in_its_row(bad, dtype):
    x, *parameters = feed_forward_inputs((70,), 66, 72, dtype)
    y = of_block(x, *parameters)
    x[17, 70] = bad
    result = of_block(x, *parameters)
    rows = torch.arange(70) == 17
    assert result[rows].isnan().all() and torch.equal(result[~rows], y[~rows])
    weight = parameters[2]
    weight[65, 71] = bad
    z = packed.linear(y.repeat(1, 1), weight, None)
    assert not z[:, 65].isfinite().any() and z[~rows, :65].isfinite().all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu(activation):
    """Of every size: x Φ(x) to a rounding of Φ, NaN of NaN, and what becomes of infinities."""
    x = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor([0.0, -0.0, 3e38, -3e38, 1e-30, torch.inf, torch.nan])])
    weight = torch.ones(1, 1)
    block = compiled.block(None, (weight, None), activation=activation)
    y = compiled.blocks(x[:, None], [block])[:, 0]
    gold = F.gelu(x.double(), approximate=packed.GELU[activation])
    close = (y - gold).abs() <= 2e-7 * x.abs() + 1e-37
    assert close[:-2].all() and y[-2] == torch.inf and y[-1].isnan()


@compiled_dtypes
@ACTIVATIONS
def test_training_and_inference_give_the_same_bits(dtype, activation):
    inputs = layer_norm_inputs((3, 67), 96, 64, dtype=dtype)
    y = layer_norm_linear(*inputs.values(), activation=activation)
    with torch.no_grad():
        assert y.requires_grad and torch.equal(layer_norm_linear(*inputs.values(), activation=activation), y)
        assert torch.equal(native.layer_norm_linear_inference(*inputs.values(), 1e-5, activation), y)


@compiled_dtypes
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("n", [192, 130])
def test_what_feed_forward_leaves_for_its_backward_pass(n, activation, dtype):
    """In whole panels: what stands before and behind GELU, and y, in the bits of one Linear after the other."""
    x, norm_weight, norm_bias, weight, bias, *second = feed_forward_inputs((3, 150), n, 72, dtype)
    parts = x, norm_weight, norm_bias, weight, bias
    left = native.feed_forward_training(*parts, *second, activation=activation, eps=1e-5)
    if n % 64:
        assert left is None
        return
    y, z, hidden = left
    assert torch.equal(z, native.layer_norm_linear_inference(*parts, 1e-5))
    assert torch.equal(hidden, native.layer_norm_linear_inference(*parts, 1e-5, activation))
    assert torch.equal(y, packed.linear(hidden, *second))
    block = native.compiled_feed_forward(*parts, *second, activation=activation, eps=1e-5)
    assert torch.equal(y, compiled.blocks(x, [block]))


@compiled_dtypes
def test_gradients_of_feed_forward(dtype):
    if dtype == F16:
        pytest.skip("blocks in fp16 train one function after the other")
    names = ("x", "norm_weight", "norm_bias", "weight", "bias", "out_weight", "out_bias")
    inputs = [t.requires_grad_() for t in feed_forward_inputs((3, 150), 192, 72, dtype)]
    grad = randn(3, 150, 72, dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    golds = torch.autograd.grad(feed_forward(*doubles), doubles, grad.double())
    bases = torch.autograd.grad(feed_forward(*inputs), inputs, grad)
    y = feed_forward_block(*inputs, activation="gelu", eps=1e-5, dtype=dtype)
    for name, found, base, gold in zip(names, torch.autograd.grad(y, inputs, grad), bases, golds, strict=True):
        error = compare(name, found, base, gold, k=3)
        assert error, str(error)


@compiled_dtypes
@pytest.mark.parametrize("wanted", ["all", "x"])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_gradients(mean, wanted, dtype):
    """Through the statistics that the forward pass keeps, if not those of LayerNorm made again for a weight's."""
    inputs = layer_norm_inputs((3, 67), 96, 64, dtype=dtype, mean=mean)
    for name, t in inputs.items():
        t.requires_grad_(wanted in ("all", name))
    assert_parity(layer_norm_linear, inputs, activation="gelu")


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16)], ids=["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("rows, k", [(1, 17), (7, 2), (197, 192), (33, 100), (5000, 24)])
def test_norm_backward(rows, k, mean, dtypes):
    """Of LayerNorm by itself, against fp64; the same bits for one thread and for three."""
    dtype, dy_dtype = dtypes
    x, weight, bias = randn(rows, k, dtype=dtype, mean=mean), randn(k, dtype=dtype), randn(k, dtype=dtype)
    dy = randn(rows, k, dtype=dy_dtype)
    results = compiled.norm_backward(dy, x, weight, bias, 1e-5, True, True, True)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    centred = leaves[0] - leaves[0].mean(-1, keepdim=True)
    y = F.layer_norm(centred, (k,), *leaves[1:], 1e-5)
    golds = *torch.autograd.grad(y, leaves, dy.double()), y.detach()
    # of x - mean, which fp32 knows to eps |mean|, where mean is large
    eps = [torch.finfo(t.dtype).eps for t in results]
    for result, gold, e in zip(results, golds, eps, strict=True):
        allowed = (4 * e + 8e-7) * gold.abs().max() + 1e-6
        assert (result - gold).abs().max() <= allowed
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = compiled.norm_backward(dy, x, weight, bias, 1e-5, True, True, True)
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(again, results, strict=True))
    some = compiled.norm_backward(dy, x, weight, bias, 1e-5, False, True, False)
    assert some[0] is None is some[3] and torch.equal(some[1], results[1])


# ---------------------------------------------------------------------------------------------------------------------
# Whole ViTs


def vit(dtype=F32, **options):
    sizes = {"image_size": 48, "patch_size": 8, "num_classes": 10, "dim": 48, "depth": 3, "heads": 3, "mlp_dim": 80}
    model = ViT(**sizes | {"dim_head": 24} | options).to(dtype).eval()
    for p in model.parameters():  # biases and LayerNorms that do something
        p.data += 0.1 * torch.randn_like(p)
    return model, torch.randn(3, 3, 48, 48, dtype=dtype)


@pytest.fixture
def calls(monkeypatch):
    """How many blocks each call of compiled.blocks has."""
    found, blocks = [], compiled.blocks

    def counted(x, some, **options):
        found.append(len(some))
        return blocks(x, some, **options)

    monkeypatch.setattr(compiled, "blocks", counted)
    return found


@compiled_dtypes
@pytest.mark.parametrize(
    "options", [{}, {"pool": "mean"}, {"heads": 5, "dim_head": 8}, {"pos_embed": "axial"}], ids=str
)
def test_a_vit_in_one_call(dtype, options, calls):
    """Its blocks in one; the same bits as one by one; right."""
    plain, x = vit(dtype, **options)
    model = copy.deepcopy(plain)
    fuse(model)
    with torch.no_grad():
        y = model(x)
        assert 6 in calls
        model.transformer.layers[1].register_forward_hook(lambda *_: None)  # of a list, that nobody calls
        assert torch.equal(model(x), y)
        one_by_one = copy.deepcopy(model)
        one_by_one.transformer.__class__ = Transformer
        calls.clear()
        assert torch.equal(one_by_one(x), y) and max(calls) == 1
        base, gold = plain(x), copy.deepcopy(plain).double()(x.double())
    error = compare("logits", y, base, gold, k=2)
    assert error, str(error)


@compiled_dtypes
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("shape", [(1, 40), (20, 2), (2, 300)], ids=str)
def test_the_first_token_alone(shape, depth, dtype, calls):
    """In the bits that it has among all tokens."""
    model, _ = vit(dtype, depth=depth)
    fuse(model)
    x = randn(*shape, 48, dtype=dtype)
    with torch.no_grad():
        before = x.clone()
        y = model.transformer.first_token(x)
        assert calls == [2 * depth] and torch.equal(x, before)
        assert torch.equal(y, model.transformer(x)[:, 0])


@compiled_dtypes
def test_the_first_token_of_a_last_layer_without_attention(dtype):
    """Two feed forwards: nothing gathers the first tokens for them."""
    plain, x = vit(dtype)
    plain.transformer.layers[-1][0] = copy.deepcopy(plain.transformer.layers[-1][1])
    model = copy.deepcopy(plain)
    fuse(model)
    with torch.no_grad():
        y, base, gold = model(x), plain(x), copy.deepcopy(plain).double()(x.double())
    error = compare("logits", y, base, gold, k=2)
    assert error, str(error)


def test_hooks_in_the_last_block_see_all_tokens():
    model, x = vit()
    fuse(model)
    for grad in (False, True):
        for name, module in model.transformer.layers[-1].named_modules():
            if isinstance(module, torch.nn.ModuleList):
                continue
            seen = []
            handle = module.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.shape))
            with torch.set_grad_enabled(grad):
                model(x)
            handle.remove()
            assert [shape[-2] for shape in seen] == [37], name


def test_hooks_anywhere_see_what_they_saw(calls):
    model, x = vit()
    fuse(model)
    names = [name for name, module in model.named_modules() if not isinstance(module, torch.nn.ModuleList)]
    with torch.no_grad():
        y = model(x)
        for name in names:
            seen, calls[:] = [], []
            handle = model.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
            out = model(x)
            handle.remove()
            assert len(seen) == 1, name
            torch.testing.assert_close(out, y, rtol=1e-4, atol=1e-5)
            in_a_block = name.startswith("transformer.layers")
            assert (6 in calls) != in_a_block, name


def test_what_a_transformer_leaves_to_its_blocks(calls):
    """Gradients, dropout, attention that is recorded, a block that is no longer fused."""
    model, x = vit(dropout=0.1)
    fuse(model)
    with torch.no_grad():
        y = model(x)
        assert calls.count(6) == 1
        with record_attention(model) as maps:
            torch.testing.assert_close(model(x), y)
        assert len(maps) == 3
        model.train()
        assert not torch.equal(model(x), y)
        model.eval()
        unfuse(model.transformer.layers[1][0])
        torch.testing.assert_close(model(x), y)
    fuse(model)
    torch.testing.assert_close(model(x), y)
    assert model(x).requires_grad and calls.count(6) == 1
    model.requires_grad_(False)
    assert torch.equal(model(x), y) and calls.count(6) == 2


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_never_stale(change):
    model, x = blocks_of_packed(), tokens()
    with torch.no_grad():
        before = model(x)
        change(model)
        y = model(x)
        assert not torch.equal(y, before) and torch.equal(copy.deepcopy(model)(x), y)


def test_no_copies_are_kept():
    x, *parameters = feed_forward_inputs((500,), 66, 72, F32)
    for _ in range(3):
        of_block(x, *parameters)
        packed.linear(x, parameters[2], None)
    assert packed.packed_bytes() == (0, 0)


@pytest.mark.parametrize(
    "dtype, weight, multiplied",
    [
        (BF16, randn(6, 59, dtype=BF16), "pairs"),
        (BF16, randn(6, 61, dtype=BF16)[:, :60], "pairs"),
        (F32, randn(60, 6).t(), "auto"),
    ],
    indirect=["multiplied"],
    ids=["odd K", "odd rows", "transposed"],
)
def test_weights_that_are_left_to_pytorch(dtype, weight):
    x = randn(40, weight.shape[1], dtype=dtype)
    assert not packed.is_compiled(x, (weight, None))
    base, gold = F.linear(x, weight), F.linear(x.double(), weight.double())
    error = compare("y", packed.linear(x, weight, None), base, gold, k=2)
    assert error, str(error)


@pytest.mark.parametrize("multiplied", ["fp32"], indirect=True)
def test_weights_without_pairs():
    x, weight = randn(40, 59, dtype=BF16), randn(6, 61, dtype=BF16)[:, :59]
    assert packed.is_compiled(x, (weight, None))
    base, gold = F.linear(x, weight), F.linear(x.double(), weight.double())
    error = compare("y", packed.linear(x, weight, None), base, gold, k=2)
    assert error, str(error)


def test_what_does_not_fit_raises_as_in_pytorch():
    x, norm_weight, norm_bias, weight, bias, out_weight, out_bias = feed_forward_inputs((40,), 66, 72, F32)
    for args in (
        (x[:, :70].contiguous(), weight, bias),
        (x, weight, bias[:65]),
        (x, weight.to(BF16), bias),
        (x, weight, bias.to(BF16)),
    ):
        with pytest.raises(
            RuntimeError, match=r"shapes|size|dtype|primitive descriptor"
        ):  # PyTorch's words, or oneDNN's
            packed.linear(*args)
    parts = x, norm_weight, norm_bias, weight, bias, out_weight[:, :60], out_bias
    assert native.compiled_feed_forward(*parts, activation="gelu", eps=1e-5) is None
