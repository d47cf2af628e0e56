"""Linear on a CPU: which product of matrices it takes, and copies of weights laid out as oneDNN reads them.

PyTorch sends F.linear to MKL in fp32, and oneDNN, which is in the same PyTorch, may be twice as fast or slower,
depending on the processor: `choice` measures it once in a process, per dtype and class of sizes. Where a compiler is at
hand, the products of compiled.py are among the choices, which need no copies. oneDNN is faster still on a weight in a
layout of its own, and gives the same bits. That copy is made at a weight's second use without a change in between, so
not in training, and lives as long as the weight. It is used only if the weight is what it was: the same memory, the
same version, and the same bits, of which sums are kept, as PyTorch does not count changes through `.data`, NumPy, or
another process.

VITRITON_CPU_LINEAR=pytorch|onednn|packed|compiled chooses instead; =trusted is packed without the sums, for those who
change weights in ways that PyTorch counts only: small batches gain most by it.
"""

import threading
import weakref
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from . import compiled
from .choice import fastest, from_environment, in_words, once, sample

LINEARS = ("auto", "pytorch", "onednn", "packed", "trusted", "compiled")
VARIABLE = "VITRITON_CPU_LINEAR"
GELU = {"gelu": "none", "gelu_tanh": "tanh"}

LONGEST = 768  # of K in fp32 in one product by oneDNN: see _sum_of_products
MARGIN = 0.9  # oneDNN is passed over where PyTorch's own product takes less than this part of its time
FEW_ROWS = 32  # with fewer, a product takes as long as reading the weight
PACKED_ROWS = 384  # with fewer, checking a copy, which reads the weight, takes as long as the copy saves
CLASSES = {True: (192, 256), False: (768, 1536)}  # K and N that stand for small weights, and for others
SMALL = 2**19  # elements of a weight


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
if HAS_ONEDNN:
    onednn_linear = torch.ops.mkldnn._linear_pointwise.default


forced = from_environment(VARIABLE, LINEARS)


def linear(x, weight, bias, activation=None, *, may_pack=True):
    """activation(x weightᵀ + bias): x (...,K), weight (N,K), bias (N,) or None -> (...,N). Not differentiable.

    `may_pack` False says that weight is about to change, so that a copy of it would be for nothing.
    """
    n, k = weight.shape
    if not (x.is_cpu and x.numel() and n):
        return _activate(F.linear(x, weight, bias), activation)
    rows = x.numel() // k
    chosen = _choice(x.dtype, rows < FEW_ROWS, n * k <= SMALL, torch.get_num_threads(), forced)
    if chosen.linear == "compiled" and compiled.takes(x.dtype, k, weight, bias) and x.shape[-1] == k:
        return compiled.blocks(x, [compiled.block(None, (weight, bias), activation=activation)])
    if chosen.linear == "pytorch":
        return _activate(_pytorch_linear(x, weight, bias), activation)
    pieces = -(-k // LONGEST) if x.dtype == torch.float32 else 1
    w = None
    if may_pack and chosen.linear == "packed" and (rows >= PACKED_ROWS or pieces > 1 or forced == "trusted"):
        w = packed(weight, pieces)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if not x.is_contiguous():
        x = x.contiguous()  # oneDNN has slow ways for other layouts
    if x.dim() == 1:
        return linear(x.view(1, k), weight, bias, activation, may_pack=may_pack).view(n)
    if pieces > 1:
        return _activate(_sum_of_products(x, w or _split(weight, pieces), bias), activation)
    w = w[0] if w else _as_onednn_takes(weight)
    if activation is None:
        return onednn_linear(x, w, bias, "none", (), "")
    if activation == "gelu" and chosen.fuses_gelu:
        return onednn_linear(x, w, bias, "gelu", (), "none")
    return _activate(onednn_linear(x, w, bias, "none", (), ""), activation)


def onednn_product(x, weight):
    """x weightᵀ by oneDNN's Linear: x (M,K), weight (N,K), neither empty -> (M,N)."""
    pieces = -(-weight.shape[1] // LONGEST) if x.dtype == torch.float32 else 1
    x = x.contiguous()  # oneDNN has slow ways for other layouts
    if pieces > 1:
        return _sum_of_products(x, _split(weight, pieces), None)
    return onednn_linear(x, _as_onednn_takes(weight), None, "none", (), "")


def is_compiled(x, *linears):
    """Whether these (weight, bias) may be in a block of compiled.py, and are faster there: the first of x (...,K), not
    empty, each other of what the one before gives."""
    rows, k = x.numel() // x.shape[-1], x.shape[-1]
    for weight, bias in linears:
        if not compiled.takes(x.dtype, k, weight, bias) or choice(x.dtype, rows, *weight.shape).linear != "compiled":
            return False
        k = weight.shape[0]
    return True


def _as_onednn_takes(weight):
    """Weight (N,K) in a layout for which oneDNN has a fast way: contiguous, or the transpose of what is."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _split(weight, pieces):
    """Weight (N,K) along K into so many pieces; their widths, but for the last one's, are multiples of 64."""
    width = -(-weight.shape[1] // (64 * pieces)) * 64
    return [_as_onednn_takes(piece) for piece in weight.split(width, 1)]


def _sum_of_products(x, weights, bias):
    """x (...,K) times the weight that was split: oneDNN's own sum over K has one term after the other, and so errs
    more, the longer it is."""
    y, start = None, 0
    for weight in weights:
        stop = start + weight.shape[1]
        part = onednn_linear(x[..., start:stop].contiguous(), weight, bias if y is None else None, "none", (), "")
        y, start = part if y is None else y.add_(part), stop
    return y


def _pytorch_linear(x, weight, bias):
    """F.linear(x, weight, bias) without its copy of the bias where that costs, in fp32 and fp64."""
    if bias is None or x.dtype.itemsize == 2:
        return F.linear(x, weight, bias)
    return F.linear(x, weight).add_(bias)


def _activate(z, activation):
    return z if activation is None else torch.ops.aten.gelu_.default(z, approximate=GELU[activation])


# ---------------------------------------------------------------------------------------------------------------------
# Copies


class _Known:
    """A weight that was used: a weak reference to it, what it was, and its copy with sums of its bits, if there is one.

    `bits` are those of the weight, in rows that overlap and that are longer than the weight's: each of `sums` is over
    one of them, so that rows or columns that change places change some. (What the sums alone would miss are words of
    8 bytes that change places within one row, in a way that PyTorch does not count.)
    """

    __slots__ = ("bits", "copy", "ref", "state", "sums")

    def __init__(self, weight, state):
        key = id(weight)
        self.ref = weakref.ref(weight, lambda ref: _forget_dead(key, ref))
        self.state, self.bits, self.sums, self.copy = state, None, None, None


_known = {}  # id of a weight -> _Known: weak, and in no state_dict, pickle or deep copy
_making = threading.Lock()


def packed(weight, pieces=1):
    """The copy of weight (N,K) in oneDNN's layout, of each of its `pieces`; None if it was not used before in its
    present state, or cannot be copied."""
    known = _known.get(id(weight))
    state = _state(weight)
    if known is None or known.ref() is not weight or known.state != state:
        _known[id(weight)] = _Known(weight, state)
        return None
    if known.copy is None:
        return _make(known, weight, pieces)
    if forced == "trusted" and state[0] is not None:
        return known.copy
    if not torch.equal(known.bits.sum(1), known.sums):
        _known[id(weight)] = _Known(weight, state)
        return None
    return known.copy


def _state(weight):
    version = None if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _make(known, weight, pieces):
    with _making:  # so that threads that share a model do not make several
        if known.copy is None and _copyable(weight):
            bits = _bits(weight)
            # the sums before the copy: what changes in between is then found at the next use
            known.sums, known.bits = bits.sum(1), bits
            known.copy = [torch.ops.mkldnn._reorder_linear_weight(piece) for piece in _split(weight.detach(), pieces)]
    return known.copy


def _copyable(weight):
    words = 8 // weight.element_size()
    return weight.is_contiguous() and weight.shape[1] % words == 0 and weight.storage_offset() % words == 0


def _bits(weight):
    """The memory of weight (N,K) as int64, as (rows, longer than K's) that overlap so that nothing is left out."""
    words = weight.detach().view(torch.int64)
    total, step = words.numel(), words.shape[1] + 1
    rows = max(1, (total - step) // step + 1)
    return words.as_strided((rows, total - step * (rows - 1)), (step, 1))


def _forget_dead(key, ref):
    known = _known.get(key)
    if known is not None and known.ref is ref:
        del _known[key]


def forget(*weights):
    """Give the copies of these weights back; of all, if none are named."""
    for key in map(id, weights) if weights else list(_known):
        _known.pop(key, None)


def packed_bytes():
    """How many copies there are, and how many bytes they take."""
    copies = [known.copy for known in list(_known.values()) if known.copy is not None]
    return len(copies), sum(piece.numel() * piece.element_size() for copy in copies for piece in copy)


# ---------------------------------------------------------------------------------------------------------------------
# The choice


@dataclass(frozen=True)
class Choice:
    """How Linear is computed for a dtype and a class of sizes, whether oneDNN's own GELU gives PyTorch's bits, why.

    What was measured is LayerNorm, Linear, GELU and Linear.
    """

    linear: str
    fuses_gelu: bool
    why: str


def choices(dtype):
    """How Linear is computed in a dtype, for small and for large weights."""
    return [choice(dtype, 192, n, k) for k, n in (CLASSES[True], CLASSES[False])]


def in_words_for(dtype):
    """The same, and why."""
    small, large = choices(dtype)
    if small == large:
        return f"Linear by {small.linear}: {small.why}"
    return f"Linear of small weights by {small.linear}: {small.why}; of others by {large.linear}: {large.why}"


def choice(dtype, rows, n, k):
    """The Choice for a product (rows,K) times (N,K)ᵀ: forced, or measured at its first use in a process."""
    return _choice(dtype, rows < FEW_ROWS, n * k <= SMALL, torch.get_num_threads(), forced)


@once
def _choice(dtype, few_rows, small, threads, forced):
    if forced == "pytorch":
        return Choice("pytorch", False, f"{VARIABLE} is 'pytorch'")
    not_compiled = f"{VARIABLE} is {forced!r}"
    if forced in ("auto", "compiled"):  # or nothing is compiled
        not_compiled = "few rows" if few_rows else compiled.why_no_blocks(dtype)
    if forced == "compiled" and dtype in compiled.DTYPES and not few_rows:
        if not_compiled:
            raise RuntimeError(f"{VARIABLE} is 'compiled', which cannot run: {not_compiled}")
        return Choice("compiled", False, f"{VARIABLE} is 'compiled'")
    why_not = why_not_onednn(dtype)
    if why_not is not None:
        if forced not in ("auto", "compiled") and not HAS_ONEDNN:
            raise RuntimeError(f"{VARIABLE} is {forced!r}, which cannot run: {why_not}")
        return Choice("pytorch", False, why_not)
    if few_rows and dtype == torch.float32 and forced == "auto":
        return Choice("pytorch", False, "PyTorch's own product errs less, and with few rows it is as fast")
    k, n = CLASSES[small]
    x, weight = sample(16 if few_rows else 192, k).to(dtype), sample(n, k).to(dtype)
    copy = torch.ops.mkldnn._reorder_linear_weight(weight)
    z = onednn_linear(x, weight, None, "none", (), "")
    # in half precision oneDNN's own GELU skips a rounding that the backward pass has
    fuses_gelu = dtype == torch.float32 and not few_rows
    fuses_gelu = fuses_gelu and torch.equal(onednn_linear(x, copy, None, "gelu", (), "none"), F.gelu(z))
    if few_rows:
        best, reason = "onednn", "oneDNN is as fast or faster"
    elif torch.equal(onednn_linear(x, copy, None, "none", (), ""), z):
        best, reason = "packed", "oneDNN is as fast or faster, most of all on weights in its own layout"
    else:
        best, reason = "onednn", "oneDNN is as fast or faster, but gives other bits on weights in its own layout"
    if forced not in ("auto", "compiled"):
        linear = "onednn" if few_rows else "packed" if forced == "trusted" else forced
        return Choice(linear, fuses_gelu, f"{VARIABLE} is {forced!r}")
    ones, back, bits = x.new_ones(k), weight.t().contiguous(), _bits(weight)
    back_copy = torch.ops.mkldnn._reorder_linear_weight(back)

    def feed_forward(linear, first, second):
        normed = torch.native_layer_norm(x, (k,), ones, ones, 1e-5)[0]
        return linear(torch.ops.aten.gelu_.default(linear(normed, first)), second)

    def by_onednn(x, weight):
        return onednn_linear(x, weight, None, "none", (), "")

    def by_copies():
        return bits.sum(1), bits.sum(1), feed_forward(by_onednn, copy, back_copy)  # sums tell whether copies are right

    ways = {
        "pytorch": lambda: feed_forward(F.linear, weight, back),
        "onednn": lambda: feed_forward(by_onednn, weight, back),
        "packed": by_copies,
    }
    if not not_compiled:
        block = compiled.block((ones, ones, 1e-5), (weight, None), (back, None), activation="gelu")
        ways["compiled"] = lambda: compiled.blocks(x, [block])
    seconds = fastest(**ways)
    if not not_compiled and min(seconds.values()) >= MARGIN * seconds["compiled"]:
        best, reason = "compiled", "it is as fast or faster here, and keeps no copies"
    elif seconds["pytorch"] < MARGIN * seconds[best]:
        best, reason = "pytorch", "PyTorch's own product is faster here"
    why = f"{reason} ({len(x)} x {k} x {n} and back: {in_words(seconds)})"
    if not_compiled and not few_rows:
        why += f"; not compiled: {not_compiled}"
    return Choice(best, fuses_gelu and best in ("onednn", "packed"), why)


@cache
def why_not_onednn(dtype):
    """Why oneDNN's Linear cannot take a dtype here, in words; None if it can."""
    if not HAS_ONEDNN:
        return "this PyTorch has no oneDNN, or not its Linear"
    if dtype == torch.float32:
        return None
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if supported is None:
        return f"oneDNN's Linear does not take {dtype}"
    if not getattr(torch.ops.mkldnn, supported)():
        return f"oneDNN does not take {dtype} on this processor"
    return None
