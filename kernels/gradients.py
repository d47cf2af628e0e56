"""The two products of a Linear's backward pass on a CPU: which of several ways they take.

PyTorch's own product (MKL or oneDNN), oneDNN's Linear in fp32, and that of compiled.py, which reads all of gradient,
input and weight where they lie, are measured once in a process, per dtype and class of weights.
VITRITON_CPU_LINEAR_BACKWARD=pytorch|onednn|compiled chooses instead; without it, VITRITON_CPU_LINEAR does if it is set.
"""

from dataclasses import dataclass

import torch

from . import compiled, packed
from .choice import fastest, from_environment, in_words, once, sample
from .packed import CLASSES, SMALL, onednn_product, why_not_onednn

VARIABLE = "VITRITON_CPU_LINEAR_BACKWARD"
forced = from_environment(VARIABLE, ("auto", "pytorch", "onednn", "compiled"))

ROWS = 394  # of what is measured
SUMMED_ROWS = 512  # of weight_grad's inputs in one product by oneDNN: see packed.py's LONGEST


def input_grad(grad, weight):
    """grad weight: grad (M,N), weight (N,K) -> (M,K), the gradient of Linear's input."""
    return _WAYS[_way(grad, weight)][0](grad, weight)


def weight_grad(grad, x):
    """gradᵀ x: grad (M,N), x (M,K) -> (N,K), the gradient of Linear's weight."""
    return _WAYS[_way(grad, x)][1](grad, x)


def _way(grad, other):
    if not (grad.is_cpu and grad.dtype == other.dtype and grad.numel() and other.numel()):
        return "pytorch"
    return choice(grad.dtype, grad.shape[1], other.shape[1]).way


def _weight_grad_by_onednn(grad, x):
    n, k = grad.shape[1], x.shape[1]
    # the smaller one is transposed in memory, the other is read as it lies
    first, second = (grad, x) if n <= k else (x, grad)
    total = None
    for a, b in zip(first.split(SUMMED_ROWS), second.split(SUMMED_ROWS), strict=True):
        part = onednn_product(a.t().contiguous(), b.contiguous().t())
        total = part if total is None else total.add_(part)
    return total if n <= k else total.t().contiguous()


_WAYS = {  # input_grad and weight_grad
    "pytorch": (torch.mm, lambda grad, x: grad.t() @ x),
    "onednn": (lambda grad, weight: onednn_product(grad, weight.t()), _weight_grad_by_onednn),
    "compiled": (compiled.product, lambda grad, x: compiled.product(grad, x, transposed=True)),
}

# ---------------------------------------------------------------------------------------------------------------------
# The choice


@dataclass(frozen=True)
class Choice:
    """Which of _WAYS is taken for a dtype and a class of sizes, and why."""

    way: str
    why: str


def choice(dtype, n, k):
    """The Choice for a weight (N,K): forced, or measured at its first use in a process."""
    return _choice(dtype, n * k <= SMALL, torch.get_num_threads(), forced, packed.forced)


_PYTORCH = Choice("pytorch", "there is no other way")


def in_words_for(dtype):
    """How the gradients of Linear are computed in a dtype, and why, for small and for large weights."""
    small, large = (choice(dtype, *CLASSES[small]) for small in (True, False))
    if small == large:
        return f"gradients of Linear by {small.way}: {small.why}"
    return (
        f"gradients of Linear with small weights by {small.way}: {small.why}; with others by {large.way}: {large.why}"
    )


@once
def _choice(dtype, small, threads, forced, forced_forward):
    variable, wanted = VARIABLE, forced
    if forced == "auto":
        variable, wanted = packed.VARIABLE, forced_forward
        wanted = "onednn" if wanted in ("packed", "trusted") else wanted
    if wanted == "pytorch":
        return Choice("pytorch", f"{variable} is {wanted!r}")
    why_not = {"onednn": why_not_onednn(dtype)}
    if dtype != torch.float32 and why_not["onednn"] is None:
        why_not["onednn"] = "PyTorch's own product is oneDNN's in half precision"
    why_not["compiled"] = compiled.why_no_blocks(dtype) if wanted in ("auto", "compiled") else "it was not asked for"
    if why_not.get(wanted):
        if forced != "auto" and dtype in compiled.DTYPES and (wanted == "compiled" or not packed.HAS_ONEDNN):
            raise RuntimeError(f"{VARIABLE} is {forced!r}, which cannot run: {why_not[wanted]}")
        return Choice("pytorch", why_not[wanted])
    if wanted != "auto":
        return Choice(wanted, f"{variable} is {wanted!r}")
    ways = {way: calls for way, calls in _WAYS.items() if not why_not.get(way)}
    if len(ways) == 1:
        return _PYTORCH
    k, n = CLASSES[small]
    grad, x, weight = (sample(*size).to(dtype) for size in ((ROWS, n), (ROWS, k), (n, k)))

    def both(of_input, of_weight):
        return lambda: (of_input(grad, weight), of_weight(grad, x))

    seconds = fastest(turns=4, **{way: both(*calls) for way, calls in ways.items()})
    best = min(seconds, key=seconds.get)
    return Choice(best, f"it is the fastest here ({ROWS} x {k} x {n}, both: {in_words(seconds)})")
