"""Instructions that attention's forward pass executes per (query, key) pair that is needed, everything counted.

A head's programs are those with whole tiles of queries and at most one with the queries left over, which may be
narrower, or wider by a tile beside it; where all keys are taken at once, the loop is over tiles of queries. Each warp
executes what stands around its loop (prologue, the tail of the keys, epilogue: `Loop.around`, the longest way) and the
loop once for each whole tile of keys. The sum over warps and programs is divided by N² pairs: rows and columns of
padding, work that warps repeat and predicated-off instructions are paid for, and nothing is assumed about caches.

How often the loop runs is not taken on trust: multiply-adds around the loop and in it must add up to those of the
tiles. A compiler that moves an iteration out of the loop (AMD's pipeliner does) shows in them and is allowed for;
where they do not add up there is no figure, but the reason.
"""

from dataclasses import dataclass

__all__ = ["Executed", "executed_per_pair"]

TOLERANCE = 0.1  # of one iteration: where there are no tensor cores, softmax's own FFMAs are counted as products


@dataclass
class Executed:
    """Executed warp instructions per needed pair, or None and the reason."""

    per_pair: float | None
    why: str | None = None


def executed_per_pair(record, n):
    """For the record of an attention forward kernel and n tokens -> Executed, for one head."""
    if record.config["TILES"]:
        return _of_all_keys_at_once(record, n)
    c = record.config
    block_m, block_n, tail_n = c["BLOCK_M"], c["BLOCK_N"], c["TAIL_N"]
    variants = [(block_m, n // block_m)]  # (rows of a tile, how many programs)
    if c["LAST_M"]:
        whole = (n - 1) // block_m - (c["LAST_M"] == block_m and c["SIDE_M"] > 0)
        variants = sorted([(block_m, whole), (c["LAST_M"] + c["SIDE_M"], 1)], reverse=True)
    loops = [loop for loop in record.loops if loop.macs]
    if not record.complete:
        return Executed(None, "an indirect jump hides part of the control flow")
    if len(loops) != len(variants):
        return Executed(None, f"{len(loops)} loops with products, and {len(variants)} heights of tiles")
    total, peeled = 0.0, None
    for (rows, programs), loop in zip(variants, loops, strict=True):
        if loop.around is None:
            return Executed(None, "the ways around a loop cannot be followed")
        pairs = rows * (2 * c["D0"] + c["D1"] + c["DV"]) / c["num_warps"]
        if peeled is None:  # the first has the largest tile, of which no warp repeats work
            per_trip = loop.macs / (pairs * block_n)
            if abs(per_trip - 1) > TOLERANCE:
                return Executed(None, f"the loop multiplies {per_trip:.3g} times what a tile of keys needs")
            outside = (loop.around_macs - pairs * tail_n) / loop.macs
            peeled = round(outside)
            if abs(outside - peeled) > TOLERANCE or not 0 <= peeled <= n // block_n:
                return Executed(None, f"{outside:.3g} tiles of keys, beside the tail, stand around the loop")
        total += programs * c["num_warps"] * (loop.around[1] + (n // block_n - peeled) * loop.instructions)
    return Executed(round(total / n**2, 4))


def _of_all_keys_at_once(record, n):
    """Of the short form, whose loop is over tiles of queries; behind it, in the last program, those left over."""
    c = record.config
    loops = [loop for loop in record.loops if loop.macs]
    if not record.complete or len(loops) != 1 or loops[0].around is None:
        return Executed(None, f"{len(loops)} loops with products instead of one whose surroundings can be followed")
    (loop,) = loops
    keys = c["BLOCK_N"] + c["NEXT_N"] + c["TAIL_N"]
    columns = c["D0"] + c["D1"], c["D0"] + c["DV"]  # of k and v; a tail of 8 keys is 16 rows of v
    products = (keys * columns[0] + (keys + 8 * (c["TAIL_N"] == 8)) * columns[1]) / c["num_warps"]  # of a query
    if abs(loop.macs / (c["BLOCK_M"] * products) - 1) > TOLERANCE:
        return Executed(None, f"the loop multiplies {loop.macs / (c['BLOCK_M'] * products):.3g} times a tile's needs")
    rest = c["LAST_M"] if c["LAST_M"] < c["BLOCK_M"] else 0
    # warps repeat products of the queries left over that have too few rows: with the last keys, and of second parts
    if not rest * products <= loop.around_macs <= 2 * rest * products:
        return Executed(None, f"{loop.around_macs:g} multiply-adds around the loop, not {rest * products:g}")
    tiles = n // c["BLOCK_M"] + (c["LAST_M"] == c["BLOCK_M"])
    programs = max(1, -(-tiles // c["TILES"]))
    before_last = loop.around[0 if rest else 1]
    total = c["num_warps"] * (tiles * loop.instructions + (programs - 1) * before_last + loop.around[1])
    return Executed(round(total / n**2, 4))
