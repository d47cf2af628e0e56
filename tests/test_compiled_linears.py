"""Linear layers compiled on this machine, with LayerNorm and GELU: values, bits, and what they leave to PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from parity import BF16, F32, F64, assert_parity, layer_norm_inputs, randn
from vitriton.kernels import compiled, layer_norm_linear, native, packed, use_backend
from vitriton.kernels.reference import compare

pytestmark = pytest.mark.usefixtures("unguarded")

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
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
ACTIVATIONS = pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])


@pytest.fixture(autouse=True)
def use_compiled(monkeypatch, request):
    dtype = request.node.callspec.params.get("dtype", F32) if hasattr(request.node, "callspec") else F32
    if why_not := compiled.why_no_blocks(dtype):
        pytest.skip(f"Linear cannot be compiled here: {why_not}")
    monkeypatch.setattr(packed, "forced", "compiled")
    with use_backend("native"):
        yield


def feed_forward(x, norm_weight, norm_bias, weight, bias, out_weight, out_bias, activation="gelu"):
    y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), weight, bias)
    return F.linear(F.gelu(y, approximate=packed.GELU[activation]), out_weight, out_bias)


def feed_forward_inputs(rows, n, k, dtype, **options):
    inputs = [t.detach() for t in layer_norm_inputs(rows, n, k, dtype=dtype, **options).values()]
    return [*inputs, randn(k, n, dtype=dtype, std=n**-0.5), randn(k, dtype=dtype)]


def of_block(x, *parameters, activation="gelu"):
    block = native.compiled_feed_forward(x, *parameters, activation=activation, eps=1e-5)
    return compiled.blocks(x, [block])


@DTYPES
@ACTIVATIONS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_norm_linear(case, activation, dtype):
    inputs = {name: t.detach() for name, t in layer_norm_inputs(*case, dtype=dtype).items()}
    assert packed.is_compiled(inputs["x"], (inputs["weight"], inputs["bias"]))
    with torch.no_grad():
        assert_parity(layer_norm_linear, inputs, activation=activation)


@DTYPES
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


@DTYPES
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
        y, gold = (layer_norm_linear(*inputs.values()), F.linear(*_normed(inputs)))
    assert (y - gold).abs().max() < 2e-5


def _normed(inputs):
    x, norm_weight, norm_bias, weight, bias = (t.double() for t in inputs.values())
    return F.layer_norm(x - x.mean(-1, keepdim=True), x.shape[-1:], norm_weight, norm_bias), weight, bias


@DTYPES
@pytest.mark.parametrize("n", [200, 800])
def test_the_same_bits(n, dtype):
    """In any layout, in any number of threads, one image alone and among others, but for how few rows there are."""
    x, norm_weight, norm_bias, weight, bias, *second = feed_forward_inputs((2, n), 130, 72, dtype)
    y = of_block(x, norm_weight, norm_bias, weight, bias, *second)
    wide = torch.nn.functional.pad(weight, (2, 4))[:, 2:-4]
    again = of_block(x.transpose(0, 1), norm_weight, norm_bias, wide, bias, *second)
    assert torch.equal(again, y.transpose(0, 1))
    threads = torch.get_num_threads()
    for number in (1, 3, 5):
        torch.set_num_threads(number)
        try:
            again = of_block(x, norm_weight, norm_bias, weight, bias, *second)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again, y)
    assert torch.equal(of_block(x[1], norm_weight, norm_bias, weight, bias, *second), y[1])


@DTYPES
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


@DTYPES
def test_a_change_of_a_weight_shows(dtype):
    x, *parameters = feed_forward_inputs((70,), 66, 72, dtype)
    for t in parameters:
        before = of_block(x, *parameters)
        t.data.view(-1)[3] += 1
        assert not torch.equal(of_block(x, *parameters), before)


def test_no_copies_are_kept():
    x, *parameters = feed_forward_inputs((500,), 66, 72, F32)
    for _ in range(3):
        of_block(x, *parameters)
        packed.linear(x, parameters[2], None)
    assert packed.packed_bytes() == (0, 0)


@pytest.mark.parametrize(
    "dtype, weight",
    [(BF16, randn(6, 59, dtype=BF16)), (BF16, randn(6, 61, dtype=BF16)[:, :60]), (F32, randn(60, 6).t())],
    ids=["odd K", "odd rows", "transposed"],
)
def test_weights_that_are_left_to_pytorch(dtype, weight):
    x = randn(40, weight.shape[1], dtype=dtype)
    assert not packed.is_compiled(x, (weight, None))
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
        with pytest.raises(RuntimeError):
            packed.linear(*args)
    parts = x, norm_weight, norm_bias, weight, bias, out_weight[:, :60], out_bias
    assert native.compiled_feed_forward(*parts, activation="gelu", eps=1e-5) is None
