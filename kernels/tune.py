"""The search for the fastest tiles of a kernel: uphill from the table's, among those that the kernel can run with.

Who measures is given (`time`), so that nothing here knows a clock or a GPU.
"""

import math
from dataclasses import dataclass, field, replace

from .configs import TABLE, Tiles
from .tuned import FIELDS, allowed

__all__ = ["LEAST_GAIN", "Asked", "Search", "neighbours", "search"]

LEAST_GAIN = 0.02  # what is closer to the table's tiles than this is noise, and the table holds


class Asked(dict):
    """Winners that remember which keys launches asked for, in their order."""

    def __init__(self, winners=()):
        super().__init__(winners)
        self.keys_asked = {}

    def get(self, key, default=None):
        self.keys_asked[key] = None
        return super().get(key, default)


@dataclass
class Search:
    """What was tried for one kernel. `seconds` are those of each shape; gain is the geometric mean over the shapes."""

    default: Tiles
    best: Tiles
    gain: float  # by which the best is faster than the default: 1.25 takes 0.8 of the time
    seconds: dict[Tiles, list[float]] = field(default_factory=dict)
    unfit: dict[Tiles, str] = field(default_factory=dict)  # why it was not timed: it does not compile, or is wrong


def neighbours(kernel, tiles, dtype, head_dim):
    """Tiles that differ from these in one field, and those of the table's other rows for such a launch."""
    found = []
    for name in FIELDS:
        value = getattr(tiles, name)
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        found += [replace(tiles, **{name: step}) for step in steps]
    dtypes = ("half", "any") if dtype.itemsize == 2 else ("any",)
    found += [
        row.tiles
        for row in TABLE
        if row.kernel == kernel and row.chips != "interpreter" and row.dtypes in dtypes and head_dim <= row.most
    ]
    return [t for t in dict.fromkeys(found) if t != tiles and allowed(kernel, t)]


def search(key, default, time, *, most=40, progress=lambda tiles: None):
    """The fastest tiles for `key` (kernel, dtype, head dim), uphill from `default` -> Search.

    time(tiles) gives the seconds of each shape, or raises: then those tiles are out, and `unfit` says why. It is called
    at most `most` times. The default itself must run.
    """
    kernel, dtype, head_dim = key
    base = time(default)
    result = Search(default, default, 1.0, {default: base})
    centre = None
    while centre != result.best and len(result.seconds) + len(result.unfit) < most:
        centre = result.best
        for tiles in neighbours(kernel, centre, dtype, head_dim):
            if tiles in result.seconds or tiles in result.unfit:
                continue
            if len(result.seconds) + len(result.unfit) >= most:
                break
            progress(tiles)
            try:
                result.seconds[tiles] = time(tiles)
            except Exception as error:  # whatever a compiler or a launch raises
                result.unfit[tiles] = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                )
                continue
            gain = gain_over(base, result.seconds[tiles])
            if gain > result.gain and gain > 1 + LEAST_GAIN:
                result.best, result.gain = tiles, gain
    return result


def gain_over(before, now):
    """The geometric mean over shapes of how many times faster `now` is."""
    return math.exp(sum(math.log(b / n) for b, n in zip(before, now, strict=True)) / len(before))
