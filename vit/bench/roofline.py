"""The ceilings of a roofline (Williams, Waterman and Patterson 2009), measured: matrix products and copies."""

from functools import partial

import torch
import torch.nn.functional as F

from ..timing import CPUClock, GPUClock

__all__ = ["ceilings"]

SIDES_CPU, SIDES_GPU = (512, 1024, 2048), (4096, 8192)
COPY = 2**28  # bytes: more than any last-level cache holds of a source and a target
CACHED = 2**18  # bytes: a source and a target fit beside each other into the caches of one core
SECONDS = 0.3


def ceilings(device, dtypes):
    """{"products": {dtype: floating-point operations/s}, "by": {dtype: whose and of which size}, "copy": bytes/s of
    memory, "cached copy": of the caches, None on a GPU}, each the best of what PyTorch has here. A copy counts what it
    reads and what it writes."""
    clock = CPUClock() if device.type == "cpu" else GPUClock(device)
    products, by = {}, {}
    for name in dtypes:
        speeds = {}
        for side in SIDES_CPU if device.type == "cpu" else SIDES_GPU:
            for way, product in ways(side, getattr(torch, name), device):
                speeds[2 * side**3 / fastest(clock, product)] = f"{way}, {side} x {side}"
        products[name] = max(speeds)
        by[name] = speeds[products[name]]
    cached = None if device.type != "cpu" else 2 * CACHED / fastest(clock, copying(CACHED, device))
    copy = 2 * COPY / fastest(clock, copying(COPY, device))
    return {"products": products, "by": by, "copy": copy, "cached copy": cached}


def copying(size, device):
    source, target = (
        torch.ones(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, device=device),
    )
    return partial(target.copy_, source)


def ways(side, dtype, device):
    """(name, function) of what multiplies two square matrices: F.linear; on a CPU oneDNN, its weight packed before."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    yield "F.linear", partial(F.linear, a, b)
    ops = torch.ops.mkldnn
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise"):
        try:
            packed = ops._reorder_linear_weight(b, side)
            way = partial(ops._linear_pointwise, a, packed, None, "none", [], "")
            way()
        except RuntimeError:  # not in this dtype, or not in this build
            return
        yield "oneDNN", way


def fastest(clock, call):
    """The seconds of the fastest call in about SECONDS of them."""
    clock.settle()
    first = min(clock.time(call, 3))
    return min(first, *clock.time(call, max(3, int(SECONDS / first))))
