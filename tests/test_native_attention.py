"""The ways in which attention is computed on a CPU, at sizes that take each: values, gradients, memory, the choice."""

import pytest
import torch
from parity import BF16, F16, F32, F64, assert_parity, attention_inputs, copies, randn, run
from torch.profiler import ProfilerActivity, profile
from vitriton.kernels import (
    attention,
    compiled,
    explain,
    native_attention,
    packed,
    qkv_attention,
    reference,
    use_backend,
)

pytestmark = pytest.mark.usefixtures("unguarded")

# dtype, b, h, nq, nk, d -> the form that it takes
CASES = {
    (F32, 2, 3, 197, 197, 64): "convolutions",
    (F32, 1, 2, 300, 331, 59): "convolutions",
    (F32, 1, 12, 420, 120, 16): "convolutions",  # the backward pass is PyTorch's fused one, by the lse of this one
    (F32, 1, 2, 640, 700, 16): "flash",
    (F32, 1, 3, 50, 50, 64): "flash",
    (BF16, 3, 3, 197, 197, 64): "softmax",
    (BF16, 1, 2, 61, 99, 59): "softmax",
    (BF16, 1, 3, 700, 300, 16): "products",
    (BF16, 1, 1, 1500, 1501, 16): "products",  # in two parts
    (BF16, 1, 3, 40, 40, 64): "flash",
    (F16, 1, 2, 197, 197, 16): "flash",
    (F64, 1, 2, 197, 197, 16): "flash",
}


@pytest.fixture(autouse=True)
def products(monkeypatch):
    if packed.why_not_onednn(F32) is not None or packed.why_not_onednn(BF16) is not None:
        pytest.skip("oneDNN does not take both dtypes here")
    monkeypatch.setattr(native_attention, "forced", "products")
    with use_backend("native"):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_of_each_form(case):
    inputs = attention_inputs(*case[1:], dtype=case[0])
    assert native_attention.form(inputs["q"], inputs["k"]) == CASES[case]
    assert_parity(attention, inputs, scale=-0.2 if case[5] == 16 else None)
    with torch.no_grad():
        out = attention(*inputs.values())
    with_grad = attention(*inputs.values())
    assert torch.equal(out, with_grad.detach()) and torch.equal(out, attention(*copies(inputs).values()).detach())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parity_packed(dtype):
    """More images than one map holds, whose q, k and v are read where they lie."""
    qkv = randn(10, 197, 3 * 3 * 64, dtype=dtype).requires_grad_()
    assert native_attention.PAIRS < 10 * 3 * 197**2
    assert_parity(qkv_attention, {"qkv": qkv}, heads=3)


@pytest.mark.parametrize(
    "case", [case for case, form in CASES.items() if form in ("products", "convolutions")], ids=str
)
def test_log_sum_of_exponentials(case):
    q, k, v = (t.detach() for t in attention_inputs(*case[1:], dtype=case[0]).values())
    _, lse = native_attention.attention_forward(q, k, v, 0.2)
    gold = (q.double() @ k.double().transpose(2, 3) * 0.2).logsumexp(3)
    assert lse.dtype == F32
    torch.testing.assert_close(lse.double(), gold, rtol=0, atol=0.02 if case[0] == BF16 else 1e-5)


@pytest.mark.parametrize("tokens", [90, 800])
@pytest.mark.parametrize("level", [-500.0, 500.0])
def test_scores_far_from_zero_in_bf16(tokens, level):
    """bf16 holds 500 in steps of 2: one image's rows are computed in another way, which the others do not notice."""
    inputs = {name: t.detach() for name, t in attention_inputs(3, 3, tokens, tokens, 16, dtype=BF16).items()}
    assert native_attention.form(inputs["q"], inputs["k"]) == ("softmax" if tokens == 90 else "products")
    clean = attention(*inputs.values(), scale=1.0)
    inputs["q"][1, :, 7:9, 0], inputs["k"][1, :, :, 0] = level, 1.0
    out = attention(*inputs.values(), scale=1.0)
    gold = reference.attention(*copies(inputs, F64).values(), scale=1.0)
    eps = torch.finfo(BF16).eps
    assert (out[1, :, 7:9] - gold[1, :, 7:9]).abs().max() <= 4 * eps * gold[1].abs().max()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_query_touches_its_row_only(case, bad):
    inputs = {name: t.detach() for name, t in attention_inputs(*case[1:], dtype=case[0]).items()}
    clean = attention(*inputs.values())
    inputs["q"][0, 1 % case[2], 17, 3] = bad
    out = attention(*inputs.values())
    rows = torch.zeros(out.shape[:3], dtype=torch.bool)
    rows[0, 1 % case[2], 17] = True
    assert out[rows].isnan().all() and torch.equal(out[~rows], clean[~rows])


@pytest.mark.parametrize("heads", [3, 12])
def test_an_image_alone_in_bf16(heads, one_thread):
    """The same bits, in one thread: among more, PyTorch's product shares out few matrices in another order of sums."""
    qkv = randn(4, 197, 3 * heads * 64, dtype=BF16)
    together = qkv_attention(qkv, heads)
    for i in range(4):
        assert torch.equal(qkv_attention(qkv[i : i + 1], heads), together[i : i + 1])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_backward_repeats(dtype):
    inputs = attention_inputs(2, 3, 197, 197, 64, dtype=dtype)
    grad = randn(2, 3, 197, 64, dtype=dtype)
    first = run(attention, inputs, grad)
    assert all(torch.equal(t, first[name]) for name, t in run(attention, inputs, grad).items())


def peak(function, *args):
    """The most bytes held at a time during function(*args), beyond what was held before."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function(*args)
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_memory_grows_linearly_in_tokens(dtype):
    """From 1025 to 4097 tokens by a factor of at most 4, and little more than q, k and v; the plain map's is 16."""
    peaks = {n: peak(qkv_attention, randn(1, n, 3 * 12 * 16, dtype=dtype), 12) for n in (1025, 4097)}
    assert peaks[4097] < 4.2 * peaks[1025] + 2**23
    assert peaks[4097] < 2**25 < 12 * 4097**2 * dtype.itemsize / 8


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def test_the_choice_is_measured_and_told(monkeypatch):
    monkeypatch.setattr(native_attention, "forced", "auto")
    monkeypatch.setattr(compiled, "why_not", lambda dtype: None)
    forms = {
        "flash": ("flash", "PyTorch's fused operator"),
        "products": ("convolutions", "products"),
        "compiled": ("compiled", "a kernel compiled here"),
    }
    for faster, (form, words) in forms.items():
        native_attention._choice.cache_clear()
        monkeypatch.setattr(
            native_attention, "fastest", lambda faster=faster, **calls: dict.fromkeys(forms, 1.0) | {faster: 0.5}
        )
        q = randn(1, 3, 300, 64)
        assert native_attention.form(q, q) == form
        said = explain(q)
        assert f"attention by {words}" in said
        assert f"{faster} 500000 us" in said and "Linear" in said
    native_attention._choice.cache_clear()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_a_forced_choice(dtype, monkeypatch):
    monkeypatch.setattr(native_attention, "forced", "flash")
    q = randn(1, 3, 300, 64, dtype=dtype)
    assert native_attention.form(q, q) == "flash"
    if dtype in (F32, BF16):
        assert "VITRITON_CPU_ATTENTION is 'flash'" in explain(q)
