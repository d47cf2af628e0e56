"""Which implementation runs: Triton's kernels or the native path. This is the one place where a device chooses."""

from contextlib import contextmanager
from functools import cache

import torch

from . import compiled, gradients, native_attention, packed
from .choice import check_environment, from_environment
from .launch import INTERPRET, chip_of, triton

BACKENDS = ("auto", "triton", "native")

_backend = from_environment("VITRITON_BACKEND", BACKENDS)


@contextmanager
def use_backend(name):
    """Within this context every function of the package runs on `name`: "triton", "native" or "auto" (the default).

    A choice that cannot run raises RuntimeError, saying why, when a function is called. It holds for the whole process;
    the environment variable VITRITON_BACKEND sets what holds outside any such context.
    Raises ValueError for an unknown name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"use_backend's argument is {name!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def chosen_backend():
    """The backend that `use_backend` or VITRITON_BACKEND chose.

    Raises ValueError if an environment variable of vitriton's has a value that is not allowed: every call comes by.
    """
    check_environment()
    return _backend


@cache
def why_not_triton(device, dtype):
    """Why Triton's kernels cannot take a tensor of this device and dtype, in words; None if they can."""
    if triton is None:
        return "the package triton is not installed (it exists for Linux only)"
    if device.type == "cpu":
        if not INTERPRET:
            return "the tensor is on a CPU, and TRITON_INTERPRET=1 was not set when vitriton was imported"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there"
        return None
    if INTERPRET:
        return "TRITON_INTERPRET=1 runs the kernels in the interpreter, which takes CPU tensors only"
    if device.type not in ("cuda", "xpu"):
        return f"Triton has no kernels for the device type {device.type!r}"
    if dtype == torch.float64:
        return "the kernels take float64 in Triton's interpreter only"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels are compiled for compute capability 8.0 and later, and this GPU has {}.{}".format(
            *torch.cuda.get_device_capability(device)
        )
    return None


def takes_triton(backend, x):
    """Whether Triton takes the call; raises RuntimeError if `backend` asks for it in vain."""
    if backend == "native":
        return False
    why_not = why_not_triton(x.device, x.dtype)
    if why_not is not None and backend == "triton":
        raise RuntimeError(f"the backend 'triton' was asked for and cannot run: {why_not}")
    return why_not is None


def _tuned(device):
    """What `vitriton tune` changes in it, in words."""
    winners = chip_of(device).winners
    if not winners:
        return ""
    ones = [f"{k} to {n}" for kind, _, shape in winners if kind == "split" for n, k in [shape]]
    split = f", and LayerNorm + Linear one by one, natively, for {', '.join(ones)} features" if ones else ""
    return f", as `vitriton tune` found best on this card{split}"


def explain(*tensors):
    """Say in words which implementation a call with these tensors takes, and why the other is passed over.

    On a CPU also which products of matrices Linear, its gradients and attention take; what was not measured yet is
    measured now.

    Raises RuntimeError, as the call would, if the backend that was chosen cannot run.
    """
    x, backend = tensors[0], chosen_backend()
    if takes_triton(backend, x):
        how = "in its interpreter" if x.device.type == "cpu" else "on the GPU"
        passed_over = "the native path is passed over because Triton can run"
        if backend == "triton":
            passed_over = "the native path is passed over because the backend 'triton' was chosen"
        return f"Triton, {how}{_tuned(x.device)}; {passed_over}"
    why_not = "the backend 'native' was chosen" if backend == "native" else why_not_triton(x.device, x.dtype)
    said = f"native; Triton is passed over because {why_not}"
    if x.device.type == "cpu" and x.dtype.is_floating_point:
        said += "".join(f"; {of.in_words_for(x.dtype)}" for of in (packed, gradients, native_attention))
        if native_attention.choice(x.dtype).compiled or any(c.linear == "compiled" for c in packed.choices(x.dtype)):
            said += compiled.bf16_in_words(x.dtype)
    return said
