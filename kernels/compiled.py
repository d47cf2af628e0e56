"""cpu_attention.cpp, compiled on this machine where a g++ is at hand, as Triton compiles what launches its kernels.

It takes a second, once: the library is kept in the cache folder, for this source, compiler and processor. Where it
cannot be had `why_not` says why, and PyTorch's own operators compute the same. Nothing here needs a compiler.
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

from .tuned import folder

__all__ = ["DTYPES", "attention_backward", "attention_forward", "why_not"]

SOURCE = Path(__file__).with_name("cpu_attention.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SECONDS = 120  # for the compiler


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]


SIZES = [(name, ctypes.c_int64) for name in ("batches", "heads", "queries", "keys", "dim")]


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
        *SIZES,
        ("factor", ctypes.c_float),
        ("threads", ctypes.c_int),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("grad", "q", "k", "v", "dq", "dk", "dv")),
        *SIZES,
        ("scale", ctypes.c_float),
        ("factor", ctypes.c_float),
        ("threads", ctypes.c_int),
    ]


def why_not(dtype):
    """Why compiled attention cannot run here in a dtype, in words; None if it can. The first call may compile."""
    if dtype not in DTYPES:
        return f"compiled attention does not take {dtype}"
    return _library()[1]


def attention_forward(q, k, v, scale, with_lse):
    """What native_attention.attention_forward says, in fp32 or bf16; no dim is 0, and last strides are 1."""
    (b, h, n, d), keys = q.shape, k.shape[2]
    out = q.new_empty(b, n, h, d).transpose(1, 2)
    lse = q.new_empty(b, h, n, dtype=torch.float32) if with_lse else None
    log_sums = None if lse is None else lse.data_ptr()
    factor = scale * math.log2(math.e)
    problem = _Forward(*map(_tensor, (q, k, v, out)), log_sums, b, h, n, keys, d, factor, torch.get_num_threads())
    _run("attention_forward", q, keys, problem)
    return out, lse


def attention_backward(grad, q, k, v, scale, dq, dk, dv):
    """Write the gradients of q, k and v into dq, dk and dv: in fp32 or bf16, no dim is 0, and last strides are 1."""
    (b, h, n, d), keys = q.shape, k.shape[2]
    tensors = map(_tensor, (grad, q, k, v, dq, dk, dv))
    problem = _Backward(*tensors, b, h, n, keys, d, scale, scale * math.log2(math.e), torch.get_num_threads())
    _run("attention_backward", q, keys, problem)


def _run(name, q, keys, problem):
    if getattr(_library()[0], f"{name}_{DTYPES[q.dtype]}")(ctypes.byref(problem)):
        raise MemoryError(f"no memory for attention of {keys} keys: each thread holds one head's in fp32")


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
        for name in DTYPES.values():
            library[f"attention_forward_{name}"], library[f"attention_backward_{name}"]
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
    source = SOURCE.read_bytes()
    key = hashlib.sha256(repr((source, FLAGS, NATIVE, said, sorted(processor))).encode()).hexdigest()[:16]
    file = folder() / f"attention-{key}.so"
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(dir=file.parent, suffix=".so")  # processes may compile at once: the last one stays
    os.close(handle)
    try:
        command = [compiler, *FLAGS, NATIVE, str(SOURCE), "-o", made]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
        os.replace(made, file)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(made)
    return file
