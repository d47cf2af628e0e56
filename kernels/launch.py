"""The one place that calls Triton, and that knows where its versions and the machines differ.

Every kernel is started through `launch`. Under `record(chip)` nothing is started: the launches are kept instead, so
that a launcher can be asked, with tensors on the `meta` device, what it would run on a chip that is not there.
"""

import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

try:
    import triton
except ImportError:  # Windows, macOS
    triton = None

# The variable is read by `@triton.jit`, hence once, when the kernels are imported.
INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

# Triton before 3.7 fails on AMD's chips in two places: see `compiling`, and `sums_of_a_row` in configs.py.
BEFORE_3_7 = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)

# Triton 3.9 warns that fusing a product and a sum into one FMA will be off unless asked for: the kernels count on it.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded: kernel[grid](*args, num_warps=, num_stages=, **constexprs)."""

    kernel: object
    grid: tuple
    args: tuple
    constexprs: dict
    num_warps: int
    num_stages: int


_recording = None  # (chip, list of launches) under `record`


def launch(kernel, grid, *args, num_warps, num_stages, **constexprs):
    """Start `kernel` on `grid` with run-time arguments `args` and compile-time arguments `constexprs`.

    The first of `args` is a tensor; the kernel runs on its device, whichever device is current.
    """
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, args, constexprs, num_warps, num_stages))
        return
    device = args[0].device
    options = {"num_warps": num_warps, "num_stages": num_stages, **constexprs, **OPTIONS}
    if device.type == "cpu":
        kernel[grid](*args, **options)
        return
    module = torch.get_device_module(device)
    with compiling("hip" if torch.version.hip else device.type):
        if device.index == module.current_device():
            kernel[grid](*args, **options)
        else:
            with module.device(device):
                kernel[grid](*args, **options)


def compiling(backend):
    """The context in which kernels are compiled for a backend of Triton's: before 3.7 an assertion fails in its own
    pass to AMD's buffer loads, which is left out there."""
    return _without_buffer_loads() if BEFORE_3_7 and backend == "hip" else nullcontext()


@contextmanager
def _without_buffer_loads():
    with triton.knobs.amd.scope():
        triton.knobs.amd.use_buffer_ops = False
        yield


@contextmanager
def record(chip):
    """Keep launches, as they would be on `chip` ("sm_90", "gfx942", ...), in the list that this yields. One thread."""
    global _recording
    _recording = (chip, [])
    try:
        yield _recording[1]
    finally:
        _recording = None


class Chip(str):
    """The name of a chip, and what `vitriton tune` found best on this very card: {key: value} of tuned.py."""

    winners = MappingProxyType({})  # of a chip that was not looked up by its device


def chip_of(device):
    """The Chip that the kernels are configured for: "sm_90", "gfx942", "xpu", or "interpreter"."""
    if _recording is not None:
        return _recording[0]
    return _chip_of(device)


@cache
def _chip_of(device):
    chip = Chip(_name_of(device))
    if device.type != "cpu":
        from .tuned import read  # which knows what a Tiles is, and configs.py knows this file

        chip.winners = read(device, chip)
    return chip


def _name_of(device):
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def cdiv(a, b):
    """a / b rounded up, for non-negative integers."""
    return -(-a // b)


def next_power_of_2(n):
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def tail(n, block):
    """The width of the masked tile that takes what n leaves over of whole blocks: 0, or a power of two from 16."""
    left = n % block
    return max(16, next_power_of_2(left)) if left else 0


def alignment(*tensors):
    """The largest power of two, up to 16 bytes' worth of elements, that divides every stride but the last dim's."""
    align = 16 // tensors[0].element_size()
    for t in tensors:
        for stride in t.stride()[:-1]:
            align = math.gcd(align, stride)
    return align


def layout(*tensors, widths=()):
    """The compile-time arguments of tiles.py for these tensors.

    ALIGN is their `alignment`, as far as it divides all `widths`. OFFSET is the type of offsets within a tile, of at
    most 256 rows and of any columns: int32, or int64 if they can pass 2³¹.
    """
    wide = any(t.shape[-1] * t.stride(-1) >= 2**30 or 256 * t.stride(-2) >= 2**30 for t in tensors)
    align = math.gcd(alignment(*tensors), *widths)
    return {"ALIGN": align, "OFFSET": triton.language.int64 if wide else triton.language.int32}


def accumulator(dtype):
    """The dtype of sums and statistics: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def tl_accumulator(dtype):
    """`accumulator` as Triton names it."""
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def dot_precision(dtype):
    """tl.dot's input_precision: "tf32" for fp32 where PyTorch's own products on this kind of GPU may use it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
