"""Attention compiled on this machine: values, bits, memory; and what is done and said where it cannot be compiled."""

import platform
import subprocess
import sys

import pytest
import torch
from parity import (
    BF16,
    F16,
    F32,
    F64,
    assert_parity,
    attention_inputs,
    compiled_dtypes,
    copies,
    layer_norm_inputs,
    randn,
    run,
)
from test_native_attention import peak
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
from vitriton.vit import ViT, fuse
from vitriton.vit.checkpoint import same_ways

pytest_plugins = ["parity"]
pytestmark = pytest.mark.usefixtures("unguarded", "multiplied")

# b, h, nq, nk, d: head dims that fill no vector, queries and keys that fill no tile, one of each, many chunks of a sum
CASES = [
    (2, 3, 197, 197, 64),
    (1, 1, 1, 1, 8),
    (3, 2, 1, 5, 40),
    (1, 2, 6, 1, 16),
    (2, 5, 17, 17, 59),
    (1, 2, 50, 257, 72),
    (1, 2, 65, 63, 80),
    (2, 1, 197, 50, 88),
    (1, 2, 129, 700, 111),
    (1, 1, 33, 64, 256),
]


X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(autouse=True)
def use_compiled(request, monkeypatch):
    if "fresh" in request.fixturenames:
        yield
        return
    if why_not := compiled.why_not(F32):
        pytest.skip(f"attention cannot be compiled here: {why_not}")
    monkeypatch.setattr(native_attention, "forced", "compiled")
    with use_backend("native"):
        yield


def fused_vit():
    model = ViT(image_size=32, patch_size=4, num_classes=5, dim=48, depth=1, heads=2, mlp_dim=80, dim_head=24)
    fuse(model)
    return model


def inputs_of(case, dtype, scale=1.0):
    return {name: (t.detach() * scale).to(dtype) for name, t in attention_inputs(*case, dtype=F32).items()}


@compiled_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype):
    inputs = attention_inputs(*case, dtype=dtype)
    assert native_attention.form(inputs["q"], inputs["k"]) == "compiled"
    assert_parity(attention, inputs)
    assert_parity(attention, inputs, scale=-0.2)


@compiled_dtypes
@pytest.mark.parametrize("scale", [0.0, 1e-4, 3e4])
def test_scales(dtype, scale):
    """Equal weights; nearly so; and one key with all the weight, the others' powers being 0."""
    assert_parity(attention, inputs_of((1, 2, 70, 90, 24), dtype), scale=scale)


@compiled_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_sum_of_exponentials(case, dtype):
    q, k, v = inputs_of(case, dtype).values()
    _, lse = native_attention.attention_forward(q, k, v, 0.2)
    gold = (q.double() @ k.double().transpose(2, 3) * 0.2).logsumexp(3)
    torch.testing.assert_close(lse.double(), gold, rtol=3e-7, atol=3e-7)


@compiled_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits(case, dtype):
    """In any layout, in any number of threads, with lse and without, one image alone and among others."""
    q, k, v = inputs_of(case, dtype).values()
    out, lse = native_attention.attention_forward(q, k, v, 0.2)
    assert out.transpose(1, 2).is_contiguous()
    for a, b, c in (
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)],
        [torch.stack([t, t], 4)[..., 0] for t in (q, k, v)],
        [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in (q, k, v)],
    ):
        again, lse_again = native_attention.attention_forward(a, b, c, 0.2)
        assert torch.equal(again, out) and torch.equal(lse_again, lse)
    threads = torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            again, nothing = native_attention.attention_forward(q[:1], k[:1], v[:1], 0.2, with_lse=False)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again, out[:1]) and nothing is None


@compiled_dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_stays_in_its_rows(dtype, bad):
    clean = inputs_of((2, 2, 70, 90, 24), dtype)
    out = attention(*clean.values())
    inputs = copies(clean)
    inputs["q"][0, 1, 17, 3] = bad
    rows = torch.zeros(out.shape[:3], dtype=torch.bool)
    rows[0, 1, 17] = True
    result = attention(*inputs.values())
    assert result[rows].isnan().all() and torch.equal(result[~rows], out[~rows])
    inputs = copies(clean)
    inputs["v"][1, 0, 89, 5] = bad
    result, gold = attention(*inputs.values()), reference.attention(*copies(inputs, F64).values())
    assert torch.equal(result.isfinite(), gold.isfinite()) and not result[1, 0, :, 5].isfinite().any()


@compiled_dtypes
def test_a_key_of_no_weight_spoils_no_gradient_of_v(dtype):
    """A score of -inf; the number of queries is odd, and what stands beside the last one is none."""
    inputs = inputs_of((1, 2, 17, 30, 24), dtype)
    inputs["q"][..., 3] = inputs["q"][..., 3].abs() + 0.1
    inputs["k"][0, 1, 5, 3] = -torch.inf
    for t in inputs.values():
        t.requires_grad_()
    grad = randn(1, 2, 17, 24, dtype=dtype)
    result, gold = run(attention, inputs, grad), run(reference.attention, copies(inputs, F64), grad.double())
    assert gold["dv"].isfinite().all() and all(torch.equal(t.isnan(), gold[name].isnan()) for name, t in result.items())


def test_a_nan_of_any_payload_is_one():
    q, k, v = inputs_of((1, 1, 3, 5, 8), F32).values()
    for bits in (0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1):
        k[0, 0, 4, 2] = torch.tensor([bits], dtype=torch.int32).view(F32)[0]
        assert attention(q, k, v).isnan().all()


def test_rounding_to_bf16_is_to_the_nearest_even():
    v = torch.tensor([1.0, 1.0078125, 3.3895314e38, -0.0], dtype=F32).to(BF16).view(1, 1, 4, 1).repeat(1, 1, 1, 8)
    q = torch.zeros(1, 1, 1, 8, dtype=BF16)
    for keys in (slice(0, 2), slice(2, 3), slice(3, 4)):  # the mean of the first two is a tie
        out = attention(q, q.expand(1, 1, keys.stop - keys.start, 8), v[:, :, keys])
        assert torch.equal(out, v[:, :, keys].double().mean(2, keepdim=True).to(BF16))


@compiled_dtypes
def test_backward_by_the_lse_of_the_compiled(dtype):
    for case in ((2, 3, 197, 197, 64), (1, 2, 700, 700, 16)):
        inputs = attention_inputs(*case, dtype=dtype)
        grad = randn(*case[:3], case[4], dtype=dtype)
        first = run(attention, inputs, grad)
        assert all(torch.equal(t, first[name]) for name, t in run(attention, inputs, grad).items())
        assert_parity(attention, inputs, grad)


def test_memory_is_the_outputs_only():
    qkv = randn(1, 4097, 3 * 12 * 16)
    assert peak(qkv_attention, qkv, 12) < 1.1 * qkv.numel() / 3 * 4


def test_fp64_goes_the_other_way():
    q = randn(1, 3, 197, 64, dtype=F64)
    assert native_attention.form(q, q) == "flash"
    assert_parity(attention, attention_inputs(1, 2, 60, 70, 16, dtype=F64))


# ---------------------------------------------------------------------------------------------------------------------
# Where it cannot be compiled


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is compiled yet, and the cache folder is empty."""
    monkeypatch.setattr(compiled, "_found", [])
    monkeypatch.setattr(native_attention, "forced", "auto")
    monkeypatch.setenv("VITRITON_CACHE_DIR", str(tmp_path))
    choices = native_attention._choice, compiled._bf16
    for choice in choices:
        choice.cache_clear()
    with use_backend("native"):
        yield tmp_path
    for choice in choices:
        choice.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("no-such-compiler", "there is no no-such-compiler to compile it with"),
        ("false", "false cannot compile it: exit code 1"),
        ("#!/bin/sh\n[ $1 = --version ] || { echo it is broken >&2; exit 3; }\n", "cannot compile it: it is broken"),
        (
            "#!/bin/sh\n[ $1 = --version ] || { for last; do :; done; echo no library > $last; }\n",
            "compiled and loaded here:",
        ),
    ],
)
def test_without_a_compiler_pytorch_computes(fresh, monkeypatch, compiler, said):
    if compiler.startswith("#!"):
        script = fresh / "compiler"
        script.write_text(compiler)
        script.chmod(0o755)
        compiler = str(script)
    monkeypatch.setenv("CXX", compiler)
    assert said in compiled.why_not(F32)
    assert not list(fresh.glob("tmp*"))
    q = randn(1, 3, 50, 64)
    assert native_attention.form(q, q) == "flash"
    assert "not compiled: " in explain(q) and said in explain(q)
    assert_parity(attention, attention_inputs(1, 2, 60, 70, 16))
    monkeypatch.setattr(native_attention, "forced", "compiled")
    with pytest.raises(RuntimeError, match="VITRITON_CPU_ATTENTION is 'compiled', which cannot run: "):
        attention(q, q, q)


def test_a_cache_folder_that_cannot_be_written(fresh, monkeypatch):
    (fresh / "file").touch()
    monkeypatch.setenv("VITRITON_CACHE_DIR", str(fresh / "file" / "cache"))
    assert "cannot be compiled and loaded here: " in compiled.why_not(F32) and str(fresh) in compiled.why_not(F32)


def test_elsewhere_than_on_linux(fresh, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compiled.why_not(F32) == "it is compiled on Linux only, and this is darwin"


def test_not_beside_another_openmp(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "_openmp", set)
    assert "not those of g++'s OpenMP" in compiled.why_not(F32)


def test_it_is_compiled_once(fresh, monkeypatch):
    if why_not := compiled.why_not(F32):
        pytest.skip(f"attention cannot be compiled here: {why_not}")
    (file,) = fresh.glob("*.so")
    before = file.stat().st_mtime_ns
    run, commands = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: commands.append(command) or run(command, **kwargs))
    compiled._found.clear()
    assert compiled.why_not(BF16) is None
    assert file.stat().st_mtime_ns == before and [command[1:] for command in commands] == [["--version"]]


def test_nothing_is_compiled_where_both_choices_are_others(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "_load", lambda: pytest.fail("the compiler is called"))
    monkeypatch.setattr(native_attention, "forced", "products")
    monkeypatch.setattr(packed, "forced", "packed")
    for dtype in (F32, BF16):
        model = fused_vit().to(dtype)
        x = torch.randn(2, 3, 32, 32, dtype=dtype)
        model(x).sum().backward()
        with torch.no_grad():
            model(x)


@pytest.mark.skipif(not X86, reason=f"this is {platform.machine()}: there are other processors of x86-64 only")
@pytest.mark.parametrize("processor", ["-msse2", "-mavx2 -mfma -mf16c", "-march=native"])
def test_vectors_of_lesser_processors(fresh, monkeypatch, processor):
    """4 and 8 numbers a vector, as well as this one's."""
    if why_not := compiled.why_not(F32):
        pytest.skip(f"attention cannot be compiled here: {why_not}")
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, *processor.split()))
    monkeypatch.setattr(compiled, "NATIVE", "-Wall")
    monkeypatch.setattr(native_attention, "forced", "compiled")
    compiled._found.clear()
    dtypes = (F32, BF16) if "sse2" in processor else (F32, BF16, F16)
    for case in CASES:
        for dtype in dtypes:
            assert_parity(attention, attention_inputs(*case, dtype=dtype))
    assert len(list(fresh.glob("*.so"))) == 2
    monkeypatch.setattr(packed, "forced", "compiled")
    for rows, n, k in ((70, 66, 72), (9, 10, 3), (300, 130, 300)):
        assert_parity(layer_norm_linear, layer_norm_inputs((rows,), n, k), activation="gelu")
        for dtype in dtypes[1:]:
            assert_parity(layer_norm_linear, layer_norm_inputs((rows,), n, k, dtype=dtype), activation="gelu")
    if "native" not in processor:
        assert compiled.bf16() == ("fp32", "this processor has no products of pairs")
        assert compiled.why_not(F16) == (None if "f16c" in processor else "this processor converts no vectors of fp16")
        monkeypatch.setattr(compiled, "forced", "pairs")
        with pytest.raises(RuntimeError, match="VITRITON_CPU_BF16 is 'pairs', which this processor cannot multiply"):
            compiled.bf16()


@pytest.mark.parametrize(("seconds", "faster"), [((1e-3, 2e-3), "pairs"), ((2e-3, 1e-3), "fp32")])
def test_how_bf16_is_multiplied_is_measured_and_told(fresh, monkeypatch, seconds, faster):
    if why_not := compiled.why_not(BF16):
        pytest.skip(f"attention cannot be compiled here: {why_not}")
    monkeypatch.setattr(compiled, "multiplies_pairs", lambda: True)
    monkeypatch.setattr(compiled, "fastest", lambda **calls: dict(zip(calls, seconds, strict=True)))
    monkeypatch.setattr(native_attention, "forced", "compiled")
    said = f"compiled products of bf16 as {faster}: it is the faster one (96 x 768 x 768: pairs "
    assert said in explain(randn(1, dtype=BF16)) and "of bf16" not in explain(randn(1))


def test_a_training_in_bf16_goes_on_as_before(fresh, monkeypatch):
    for able, way in ((True, "pairs"), (False, "fp32")):
        monkeypatch.setattr(compiled, "multiplies_pairs", lambda able=able: able)
        assert same_ways({compiled.VARIABLE: "fp32"}, {compiled.VARIABLE: "pairs"}) == {compiled.VARIABLE: way}


def test_a_training_goes_on_where_there_is_no_compiler(fresh, monkeypatch):
    found = {native_attention.VARIABLE: "products"}
    assert same_ways(found, {native_attention.VARIABLE: "flash"}) == {native_attention.VARIABLE: "flash"}
    for reason, way in ((None, "compiled"), ("there is no compiler", "products")):
        monkeypatch.setattr(compiled, "why_not", lambda dtype, reason=reason: reason)
        assert same_ways(found, {native_attention.VARIABLE: "compiled"}) == {native_attention.VARIABLE: way}
