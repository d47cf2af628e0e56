"""The C++ beside this file, compiled here where a g++ is at hand, as Triton compiles what launches its kernels.

It takes some seconds, once: the library is kept in the cache folder, for these sources, compiler and processor. Where
it cannot be had `why_not` says why, and PyTorch's own operators compute the same. Nothing here needs a compiler.

Processors that multiply pairs of bf16 do so at twice the rate of fp32, or at half of it: `bf16` measures once in a
process which is faster, pairs or fp32 that bf16 was widened to. VITRITON_CPU_BF16=pairs|fp32 chooses instead.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

from .choice import fastest, from_environment, in_words, once, sample
from .tuned import folder

__all__ = [
    "DTYPES",
    "LINE",
    "PANEL",
    "attention_backward",
    "attention_forward",
    "bf16",
    "bf16_in_words",
    "block",
    "blocks",
    "gelu",
    "gelu_backward",
    "multiplies_pairs",
    "norm_backward",
    "product",
    "takes",
    "why_no_blocks",
    "why_not",
]

SOURCES = tuple(map(Path(__file__).with_name, ("cpu_attention.cpp", "cpu_blocks.cpp", "cpu_norm.cpp")))
HEADERS = tuple(map(Path(__file__).with_name, ("cpu_attention.h", "cpu_vectors.h")))
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ACTIVATIONS = (None, "gelu", "gelu_tanh")
HEADS = "attention of {} keys: each thread holds one head's in fp32"
SUMS = "sums over rows, in fp32, of up to 512 blocks of rows"
SECONDS = 120  # for the compiler
PANEL = 64  # columns of a Linear's output, or fewer on lesser processors
LINE = 64  # bytes of a line of cache

VARIABLE = "VITRITON_CPU_BF16"
forced = from_environment(VARIABLE, ("auto", "pairs", "fp32"))


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


SIZES = [(name, ctypes.c_int64) for name in ("batches", "heads", "queries", "keys", "dim")]


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
        *SIZES,
        ("factor", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("pairs", "threads")),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("grad", "q", "k", "v", "dq", "dk", "dv")),
        *SIZES,
        *((name, ctypes.c_float) for name in ("scale", "factor")),
        *((name, ctypes.c_int) for name in ("pairs", "threads")),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k", "row")),
    ]


class _Block(ctypes.Structure):  # its first members are the Linears of the source
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias")),
        *((name, _Linear) for name in ("first", "second")),
        *((name, ctypes.c_void_p) for name in ("mean", "rstd", "z", "hidden")),
        ("eps", ctypes.c_float),
        ("activation", ctypes.c_int),
        ("heads", ctypes.c_int64),
        ("factor", ctypes.c_float),
    ]


class _Blocks(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "between", "blocks")),
        *((name, ctypes.c_int64) for name in ("count", "batches", "tokens")),
        *((name, ctypes.c_int) for name in ("residual", "pairs", "threads", "first")),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "c")),
        *((name, ctypes.c_int64) for name in ("rows", "depth", "n", "row")),
        *((name, ctypes.c_int) for name in ("transposed", "pairs", "threads")),
    ]


class _NormBackward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "gamma", "beta", "dx", "dgamma", "dbeta", "normed")),
        *((name, ctypes.c_int64) for name in ("rows", "k")),
        ("eps", ctypes.c_float),
        ("threads", ctypes.c_int),
    ]


class _GeluBackward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "grad", "dz", "sums")),
        *((name, ctypes.c_int64) for name in ("rows", "n")),
        *((name, ctypes.c_int) for name in ("tanh", "threads")),
    ]


def why_not(dtype):
    """Why compiled attention cannot run here in a dtype, in words; None if it can. The first call may compile."""
    if dtype not in DTYPES:
        return f"compiled attention does not take {dtype}"
    library, why = _library()
    if library is not None and not hasattr(library, f"blocks_{DTYPES[dtype]}"):
        return "this processor converts no vectors of fp16"
    return why


def attention_forward(q, k, v, scale, with_lse):
    """What native_attention.attention_forward says, in one of DTYPES; no dim is 0, and last strides are 1."""
    (b, h, n, d), keys = q.shape, k.shape[2]
    out = q.new_empty(b, n, h, d).transpose(1, 2)
    lse = q.new_empty(b, h, n, dtype=torch.float32) if with_lse else None
    factor = scale * math.log2(math.e)
    how = factor, _in_pairs(q), torch.get_num_threads()
    problem = _Forward(*map(_tensor, (q, k, v, out)), _address(lse), b, h, n, keys, d, *how)
    _run(f"attention_forward_{DTYPES[q.dtype]}", problem, HEADS, keys)
    return out, lse


def attention_backward(grad, q, k, v, scale, dq, dk, dv):
    """Write the gradients of q, k and v into dq, dk and dv: in one of DTYPES, no dim is 0, and last strides are 1."""
    (b, h, n, d), keys = q.shape, k.shape[2]
    tensors = map(_tensor, (grad, q, k, v, dq, dk, dv))
    how = scale, scale * math.log2(math.e), _in_pairs(q), torch.get_num_threads()
    problem = _Backward(*tensors, b, h, n, keys, d, *how)
    _run(f"attention_backward_{DTYPES[q.dtype]}", problem, HEADS, keys)


def why_no_blocks(dtype):
    """The same of `blocks`."""
    why = why_not(dtype)
    return why and why.replace("attention", "Linear")


def bf16():
    """How bf16 is multiplied, "pairs" or "fp32", and why; where `why_not` is None."""
    return _bf16(forced)


def bf16_in_words(dtype):
    """How a dtype is multiplied where it is bf16; else ""."""
    return "; compiled products of bf16 as {}: {}".format(*bf16()) if dtype == torch.bfloat16 else ""


@once
def _bf16(forced):
    if not multiplies_pairs():
        if forced == "pairs":
            raise RuntimeError(
                f"{VARIABLE} is 'pairs', which this processor cannot multiply: unset it, or set it to fp32"
            )
        return "fp32", "this processor has no products of pairs"
    if forced != "auto":
        return forced, f"{VARIABLE} is {forced!r}"
    x, weight = sample(96, 768).bfloat16(), sample(768, 768).bfloat16()
    made = [block(None, (weight, None))]
    # by one thread, which other programs disturb least
    seconds = fastest(pairs=lambda: _blocks(x, made, False, True, 1), fp32=lambda: _blocks(x, made, False, False, 1))
    return min(seconds, key=seconds.get), f"it is the faster one (96 x 768 x 768: {in_words(seconds)})"


def multiplies_pairs():
    """Whether this processor can multiply pairs of bf16; `why_not` is None."""
    return bool(ctypes.c_int.in_dll(_library()[0], "multiplies_pairs").value)


def _in_pairs(x):
    return x.dtype == torch.bfloat16 and bf16()[0] == "pairs"


def takes(dtype, k, weight, bias):
    """Whether a block may have this Linear of (...,k), k > 0: all is as F.linear takes it, and pairs of bf16 lie so."""
    n = weight.shape[0]
    return (
        n > 0
        and weight.stride(1) == 1
        and weight.shape[1] == k
        and weight.dtype == dtype
        and (bias is None or (bias.dtype == dtype and bias.shape == (n,) and bias.is_contiguous()))
        and (not (k | weight.stride(0)) % 2 or not _in_pairs(weight))
    )


def block(
    norm, first, second=None, *, statistics=(None, None), hidden=(None, None), activation=None, heads=0, scale=0.0
):
    """For `blocks`: Linear(act(Linear(LayerNorm(x)))), or attention where GELU stands if there are heads.

    norm: (its weight (K,), its bias (K,), eps), or None for the identity; first, second: (weight, bias or None), which
    `takes` holds for; no second is the identity. To be written: `statistics`, mean and rstd of x's rows, in fp32, and
    `hidden`, what stands before and behind act between two Linears, if that is in whole panels of PANEL and in memory
    aligned to a LINE.
    """
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    made = _Block(
        _address(norm_weight),
        _address(norm_bias),
        _linear(*first),
        _linear(*second) if second else _NOTHING,
        *map(_address, (*statistics, *hidden)),
        eps,
        ACTIVATIONS.index(activation),
        heads,
        scale * math.log2(math.e),
    )
    made.tensors = norm, first, second, statistics, hidden  # whose addresses it has
    return made


def blocks(x, blocks, *, residual=False, first=False):
    """These blocks of x (...,K), not empty, one after the other, each + what it takes if `residual`; (B,N,K) if one has
    heads. All is of one dtype, which is in DTYPES; not differentiable.

    If `first`, of the first token only, (B,M), in the same bits: the last two blocks, which then are attention and one
    without, make of other tokens but keys and values.
    """
    return _blocks(x.contiguous(), blocks, residual, _in_pairs(x), torch.get_num_threads(), first)


def _blocks(x, blocks, residual, pairs, threads, first=False):
    *outer, tokens, _ = x.shape if x.dim() > 1 else (1, *x.shape)
    last = blocks[-1].second.n or blocks[-1].first.n
    y = x.new_empty(*x.shape[:-1], last)
    inner = max((b.first.n // 3 for b in blocks if b.heads), default=0)
    batches = math.prod(outer)
    between = x.new_empty(batches * tokens, 4 * inner) if inner else None
    array = (_Block * len(blocks))(*blocks)
    problem = _Blocks(
        x.data_ptr(),
        y.data_ptr(),
        _address(between),
        ctypes.addressof(array),
        len(blocks),
        batches,
        tokens,
        residual,
        pairs,
        threads,
        first,
    )
    _run(f"blocks_{DTYPES[x.dtype]}", problem, "what threads keep of {} x {} tokens", batches, tokens)
    return y.view(batches * tokens, last)[:batches] if first else y


def product(a, b, *, transposed=False):
    """a b, or aᵀ b if `transposed`: a (M,K) or (K,M), b (K,N), none of them empty -> (M,N); all in one of DTYPES."""
    a, b = a.contiguous(), b if b.stride(1) == 1 else b.contiguous()
    depth, rows = a.shape if transposed else reversed(a.shape)
    pairs = _in_pairs(a)
    if pairs and depth % 2 and not transposed:
        a, b = F.pad(a, (0, 1)), F.pad(b, (0, 0, 0, 1))
        depth += 1
    c = a.new_empty(rows, b.shape[1])
    sizes = rows, depth, b.shape[1], b.stride(0)
    problem = _Product(*map(_address, (a, b, c)), *sizes, transposed, pairs, torch.get_num_threads())
    _run(f"product_{DTYPES[a.dtype]}", problem, "what threads keep of {} x {} x {}", *sizes[:3])
    return c


def gelu(z, activation):
    """GELU of z, contiguous, in the bits that a block has between its Linears."""
    y = torch.empty_like(z)
    run = getattr(_library()[0], f"gelu_{DTYPES[z.dtype]}")
    arguments = ctypes.c_void_p(z.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(z.numel())
    run(*arguments, activation == "gelu_tanh", torch.get_num_threads())
    return y


def norm_backward(dy, x, norm_weight, norm_bias, eps, need_dx, need_norm, need_normed):
    """dy, x (...,K) -> the gradients of x, norm_weight and norm_bias (K,), in their dtypes, and LayerNorm of x in dy's;
    None where not needed. x, which is not empty, and the parameters are in one dtype, dy in it or in bf16."""
    tensors = dy, x, norm_weight, norm_bias = [t.contiguous() for t in (dy, x, norm_weight, norm_bias)]
    k = x.shape[-1]
    dx, normed = (torch.empty_like(t) if need else None for t, need in ((x, need_dx), (dy, need_normed)))
    dnorm = [torch.empty_like(t) if need_norm else None for t in tensors[2:]]
    addresses = map(_address, (x, dy, norm_weight, norm_bias, dx, *dnorm, normed))
    problem = _NormBackward(*addresses, x.numel() // k, k, eps, torch.get_num_threads())
    _run(f"norm_backward_{DTYPES[x.dtype]}_{DTYPES[dy.dtype]}", problem, SUMS)
    return dx, *dnorm, normed


def gelu_backward(grad, z, activation, sums_dtype):
    """grad, z (M,N), contiguous, in bf16 -> that of z, which overwrites grad, and its sums (N,) in a dtype, or None."""
    sums = None if sums_dtype is None else grad.new_empty(grad.shape[1], dtype=sums_dtype)
    addresses = map(_address, (z, grad, grad, sums))
    problem = _GeluBackward(*addresses, *grad.shape, activation == "gelu_tanh", torch.get_num_threads())
    _run(f"gelu_backward_{DTYPES[sums_dtype or grad.dtype]}", problem, SUMS)
    return grad, sums


_NOTHING = _Linear()


def _linear(weight, bias):
    return _Linear(weight.data_ptr(), _address(bias), *weight.shape, weight.stride(0))


def _address(t):
    return None if t is None else t.data_ptr()


def _run(name, problem, of, *values):
    """A function of the library, which says by another result than 0 that there is no memory for `of` these values."""
    if getattr(_library()[0], name)(ctypes.byref(problem)):
        raise MemoryError(f"no memory for {of.format(*values)}")


def _tensor(t):
    batch, head, row, _ = t.stride()
    return _Tensor(t.data_ptr(), batch, head, row)


# ---------------------------------------------------------------------------------------------------------------------
# The library

_lock, _found = threading.Lock(), []


def _library():
    """The library, or None, and why there is none."""
    if not _found:
        with _lock:
            if not _found:
                _found.append(_load())
    return _found[0]


def _load():
    if not sys.platform.startswith("linux"):
        return None, f"it is compiled on Linux only, and this is {sys.platform}"
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        return None, f"there is no {os.environ.get('CXX') or 'g++'} to compile it with"
    before = _openmp()
    if not before:
        return None, "PyTorch's threads here are not those of g++'s OpenMP"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
        for name in ("fp32", "bf16"):
            library[f"attention_forward_{name}"], library[f"attention_backward_{name}"], library[f"blocks_{name}"]
    except subprocess.CalledProcessError as error:
        said = next(iter(error.stderr.strip().splitlines()), f"exit code {error.returncode}")
        return None, f"{compiler} cannot compile it: {said}"
    except (OSError, subprocess.TimeoutExpired, AttributeError) as error:
        return None, f"it cannot be compiled and loaded here: {error}"
    if _openmp() != before:  # two would each keep threads for all cores
        return None, "it would bring a second OpenMP beside PyTorch's"
    return library, None


def _openmp():
    """The libraries of g++'s OpenMP in this process."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return {line.split()[-1] for line in maps if "libgomp" in line}


def _compiled(compiler):
    """The file of the library, which is compiled unless it is there."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        processor = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    sources = [source.read_bytes() for source in (*SOURCES, *HEADERS)]
    key = hashlib.sha256(repr((sources, FLAGS, NATIVE, said, sorted(processor))).encode()).hexdigest()[:16]
    file = folder() / f"cpu-{key}.so"
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(dir=file.parent, suffix=".so")  # processes may compile at once: the last one stays
    os.close(handle)
    try:
        command = [compiler, *FLAGS, NATIVE, *map(str, SOURCES), "-o", made]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
        os.replace(made, file)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(made)
    return file
