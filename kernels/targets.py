"""What the kernels are meant to cost, beside what they do cost and what others' kernels cost: lines for a table.

All is bf16, aligned, head dim 64 unless said. Figures are counts of machine code (counts.py, executed.py), no timings:
they stand for time only where the pipe that is counted binds. Peers were counted in the same way: FA2 as PyTorch 2.14
ships it, FA3, FA4 (consumer warps; where executed instructions stand, those of their main loops alone) and QuACK.
"""

import math
from dataclasses import dataclass

__all__ = ["WIDE", "Form", "Line", "forms", "lines"]

FORWARD = {"sm_80": (300, "FA4 312, FA2 419"), "sm_90": (240, "FA4 209, FA3 211, FA2 408")}
BACKWARD = {"sm_80": (800, "FA2 788, with atomics"), "sm_90": (520, "FA2 776, FA4 326")}
SHORT = {"sm_80": (0.45, "FA4 0.51, FA2 0.69"), "sm_90": (0.36, "FA4 0.52, FA3 0.78")}  # 197 tokens, and 257
LONG = {"sm_80": 0.38, "sm_90": 0.31}  # 577 and 1025
HEAD_DIMS = {72: 1.3, 80: 1.35, 88: 1.45}  # beside head dim 64; padding to 128 costs 2
WIDE = 1576, 1664, 4992  # rows, features in and out of LayerNorm + Linear where K is large: ViT-G's qkv, 8 images
EPILOGUE = {"qkv": (200, "QuACK 223"), "gelu inference": (420, "QuACK 454")}


@dataclass(frozen=True)
class Line:
    """`now`, of `what`, is to be at most `most`."""

    what: str
    now: float
    most: float
    peers: str = ""

    @property
    def met(self):
        return self.now <= self.most


@dataclass(frozen=True)
class Form:
    """A figure of LayerNorm + Linear in the fused form, and of the split one: LayerNorm, stored, then the product."""

    what: str
    fused: float
    split: float


def forms(records):
    """The Forms of each chip whose four kernels are among these Records, and their bytes: no verdict, as a card has to
    say which is faster at large K. What differs is the epilogue, the pass over x, and what is read and written."""
    m, k, n = WIDE
    kernels = {
        (record.arch, record.kernel): record
        for record in records
        if "wide" in record.variants and record.dtype == "bf16" and record.aligned
    }
    found = []
    for arch in sorted({arch for arch, _ in kernels}):
        products = [kernels.get((arch, name)) for name in ("layer_norm_linear_fwd", "plain_product")]
        passes = [kernels.get((arch, name)) for name in ("row_statistics", "layer_norm")]
        if None in (*products, *passes):
            continue
        slots = [
            _slots(r, k) * 1024 * r.config["num_warps"] / (r.config["BLOCK_M"] * r.config["BLOCK_N"]) for r in products
        ]
        found.append(Form(f"{arch}: product, slots per 1024 outputs", *slots))
        slots = [_slots(r, k) * 1024 * r.config["num_warps"] / (r.config["BLOCK_M"] * k) for r in passes]
        found.append(Form(f"{arch}: pass over x, slots per 1024 elements", *slots))
    for rows in (m, 8 * m) if found else ():
        x, w, y = (2e-6 * size for size in (rows * k, n * k, rows * n))
        # fused: x for the statistics and the product; W read, W' written and read. split: x read, x̂ written and read
        found.append(Form(f"MB moved, {rows} rows", 2 * x + 3 * w + y, 3 * x + w + y))
    return found


def _slots(record, k):
    """Instructions of a warp over a row of k, or a tile with a sum over k."""
    if record.hot is None:
        return record.instructions
    return record.prologue + math.ceil(k / record.config["BLOCK_K"]) * record.hot.instructions + record.epilogue


def lines(records):
    """The Lines whose figures are among these Records."""
    figures = _Figures(records)
    found = []
    for arch, (most, peers) in FORWARD.items():
        found.append(Line(f"attention forward, {arch}: slots per 1024 pairs", figures.forward(arch), most, peers))
    for arch in FORWARD:
        for n, most, peers in (
            (197, *SHORT[arch]),
            (257, SHORT[arch][0], ""),
            (577, LONG[arch], ""),
            (1025, LONG[arch], ""),
        ):
            what = f"attention forward, {arch}, N = {n}: executed per pair"
            found.append(Line(what, figures.executed(arch, n) / n**2, most, peers))
        one_more = figures.executed(arch, 257) / figures.executed(arch, 256)
        found.append(Line(f"attention forward, {arch}: N = 257 beside 256", one_more, 1.1))
        for d, most in HEAD_DIMS.items():
            what = f"attention forward, {arch}, head dim {d} beside 64"
            executed = figures.executed(arch, 257, d) / figures.executed(arch, 257)
            found.append(Line(f"{what}: executed", executed, most))
            tensor = figures.forward(arch, "tensor", d) / figures.forward(arch, "tensor")
            found.append(Line(f"{what}: tensor cycles", tensor, most))
    for arch, (most, peers) in BACKWARD.items():
        slots = figures.backward(arch)
        found.append(Line(f"attention backward, {arch}: slots per 1024 pairs", slots, most, peers))
    tensor = figures.backward("sm_80", "tensor")
    found.append(Line("attention backward, sm_80: tensor cycles per 1024 pairs", tensor, 1280, "FA2 1280"))
    for shape, (most, peers) in EPILOGUE.items():
        what = f"LayerNorm + Linear, sm_90, {shape}: epilogue's slots per 1024 outputs"
        found.append(Line(what, figures.epilogue("sm_90", shape), most, peers))
    return [line for line in found if not math.isnan(line.now)]


class _Figures:
    """Figures of the default kernels; NaN where the record is missing, or has none."""

    def __init__(self, records):
        self.records = {
            (record.kernel, record.arch, record.head_dim, str(variant)): record
            for record in records
            if record.dtype == "bf16" and record.aligned
            for variant in record.variants
        }

    def forward(self, arch, pipe="issue", head_dim=64):
        """Of the leanest loop, that of whole tiles; of short and of long sequences the one that costs more."""
        found = [self.records.get(("attention_fwd", arch, head_dim, n)) for n in ("257", "1025")]
        costs = [min(loop.per_1024[pipe] for loop in record.loops if loop.macs) for record in found if record]
        return max(costs, default=math.nan)

    def executed(self, arch, n, head_dim=64):
        """Instructions of a head, in warp instructions."""
        record = self.records.get(("attention_fwd", arch, head_dim, str(n)))
        per_pair = record and record.executed[str(n)].per_pair
        return math.nan if per_pair is None else per_pair * n**2

    def backward(self, arch, pipe="issue"):
        """Of the one kernel that 257 tokens of many heads take, or the sum over two."""
        parts = [
            record
            for (kernel, *of), record in self.records.items()
            if kernel.startswith("attention_bwd") and of == [arch, 64, "257"]
        ]
        one = [part for part in parts if part.kernel == "attention_bwd"]
        if not parts or {part.kernel for part in parts} in ({"attention_bwd_dq"}, {"attention_bwd_dkdv"}):
            return math.nan  # half of two
        return sum(part.hot.per_1024[pipe] for part in one or parts)

    def epilogue(self, arch, shape):
        record = self.records.get(("layer_norm_linear_fwd", arch, None, shape))
        if record is None:
            return math.nan
        outputs = record.config["BLOCK_M"] * record.config["BLOCK_N"] / record.config["num_warps"]
        return record.epilogue * 1024 / outputs
