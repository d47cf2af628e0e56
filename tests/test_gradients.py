"""The products of a Linear's backward pass on a CPU: values and bits of each way, and the choice between them."""

import pytest
import torch
from parity import BF16, F32, F64, compiled_dtypes, randn
from vitriton.kernels import compiled, explain, gradients, packed, use_backend
from vitriton.kernels.reference import compare

pytest_plugins = ["parity"]
pytestmark = pytest.mark.usefixtures("unguarded", "multiplied")

# M, N, K: one of each; what fills no tile, vector, panel or pair; many chunks and spans of each sum; many parts
CASES = [(1, 1, 1), (7, 5, 3), (197, 576, 192), (33, 770, 65), (1601, 100, 130), (64, 6, 64), (900, 1700, 40)]
WAYS = ("pytorch", "onednn", "compiled")


@pytest.fixture(autouse=True)
def fresh():
    gradients._choice.cache_clear()
    yield
    gradients._choice.cache_clear()


def force(way, dtype, monkeypatch):
    monkeypatch.setattr(gradients, "forced", way)
    if way == "compiled" and compiled.why_not(dtype):
        pytest.skip(compiled.why_no_blocks(dtype))
    if way == "onednn" and packed.why_not_onednn(dtype):
        pytest.skip(packed.why_not_onednn(dtype))


@compiled_dtypes
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, way, dtype, monkeypatch):
    force(way, dtype, monkeypatch)
    m, n, k = case
    grad, x, weight = randn(m, n, dtype=dtype), randn(m, k, dtype=dtype), randn(n, k, dtype=dtype)
    for name, computed, a, b in (
        ("dx", gradients.input_grad(grad, weight), grad, weight),
        ("dweight", gradients.weight_grad(grad, x), grad.t(), x),
    ):
        error = compare(name, computed, a @ b, a.double() @ b.double(), k=2)
        assert error, str(error)
        assert computed.dtype == dtype and computed.is_contiguous()


@compiled_dtypes
def test_the_same_bits_in_any_layout_and_number_of_threads(dtype, monkeypatch):
    force("compiled", dtype, monkeypatch)
    grad, x, weight = randn(700, 190, dtype=dtype), randn(700, 129, dtype=dtype), randn(190, 129, dtype=dtype)
    results = gradients.input_grad(grad, weight), gradients.weight_grad(grad, x)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(gradients.input_grad(grad, weight), results[0])
            assert torch.equal(gradients.weight_grad(grad, x), results[1])
    finally:
        torch.set_num_threads(threads)
    grad, weight, x = (torch.cat((t, t), 1)[:, : t.shape[1]] for t in (grad, weight, x))
    assert torch.equal(gradients.input_grad(grad, weight), results[0])
    assert torch.equal(gradients.weight_grad(grad, x.t().contiguous().t()), results[1])


@pytest.mark.parametrize("way", WAYS)
def test_of_nothing(way, monkeypatch):
    force(way, F32, monkeypatch)
    for m, n, k in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        grad, x, weight = randn(m, n), randn(m, k), randn(n, k)
        assert torch.equal(gradients.input_grad(grad, weight), torch.zeros(m, k))
        assert torch.equal(gradients.weight_grad(grad, x), torch.zeros(n, k))


def test_the_fastest_is_taken_and_told(monkeypatch):
    monkeypatch.setattr(gradients, "forced", "auto")
    monkeypatch.setattr(packed, "forced", "auto")
    ways = [w for w in WAYS if not (w == "compiled" and compiled.why_not(F32))]
    ways = [w for w in ways if not (w == "onednn" and packed.why_not_onednn(F32))]
    for fast in ways if len(ways) > 1 else ():
        monkeypatch.setattr(gradients, "fastest", lambda fast=fast, **calls: {w: 2 - (w == fast) for w in calls})
        gradients._choice.cache_clear()
        assert gradients.choice(F32, 768, 192).way == fast
        with use_backend("native"):
            assert f"gradients of Linear with small weights by {fast}: it is the fastest here (394 x " in explain(
                randn(1)
            )
    assert gradients.choice(F64, 768, 192).way == "pytorch"


def test_the_way_of_linear_is_that_of_its_gradients(monkeypatch):
    monkeypatch.setattr(gradients, "forced", "auto")
    for linear, way in {"pytorch": "pytorch", "packed": "onednn", "onednn": "onednn", "trusted": "onednn"}.items():
        if way == "onednn" and packed.why_not_onednn(F32):
            continue
        monkeypatch.setattr(packed, "forced", linear)
        assert gradients.choice(F32, 768, 192).way == way
    monkeypatch.setattr(packed, "forced", "compiled")
    if compiled.why_not(F32) is None:
        assert gradients.choice(F32, 768, 192).way == gradients.choice(BF16, 768, 192).way == "compiled"
    assert gradients.choice(F64, 768, 192).way == "pytorch"


def test_a_way_that_cannot_run_raises(monkeypatch):
    monkeypatch.setattr(gradients, "forced", "compiled")
    monkeypatch.setattr(compiled, "why_not", lambda dtype: "there is no compiler")
    with pytest.raises(RuntimeError, match="'compiled', which cannot run: there is no compiler"):
        gradients.choice(F32, 768, 192)
    assert gradients.choice(F64, 768, 192).way == "pytorch"
