"""Choices by measurement: which of several ways that come to the same is the fastest on this processor.

A choice is measured at its first use in a process, in milliseconds, and holds from then on: results repeat to the last
bit within a process, and across processes where the environment variable of the choice names one.
"""

import os
import threading
import time
from functools import cache, wraps

import torch

_not_allowed = []  # what is wrong with environment variables, in words


def from_environment(variable, allowed):
    """The value of an environment variable, the first of `allowed` if it is not set.

    It is that too for a value that is not allowed, for which check_environment raises: an import does not, so that the
    command `vitriton` can say it in a line.
    """
    name = os.environ.get(variable, allowed[0])
    if name in allowed:
        return name
    _not_allowed.append(
        f"the environment variable {variable} is {name!r}; allowed are {', '.join(map(repr, allowed))}: "
        "set it to one of these, or unset it"
    )
    return allowed[0]


def check_environment():
    """Raise ValueError if an environment variable that chooses had a value that is not allowed when it was read."""
    if _not_allowed:
        raise ValueError(_not_allowed[0])


def once(measure):
    """A cache of measure(*args), which runs in one thread at a time, undisturbed by autograd and autocast."""
    lock, measure = threading.Lock(), cache(measure)

    @cache
    @wraps(measure)
    def chosen(*args):
        with lock, torch.no_grad(), torch.autocast("cpu", enabled=False):
            return measure(*args)

    def forget():
        measure.cache_clear()
        chosen_clear()

    chosen_clear, chosen.cache_clear = chosen.cache_clear, forget
    return chosen


def sample(*shape):
    """Values in fp32 from -1 to 1, not from the generator, whose state is the user's."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).remainder_(1009).sub_(504).div_(504).view(shape)


def fastest(*, turns=5, **calls):
    """The shortest time of each call, in seconds, of some that were made in turns."""
    seconds = dict.fromkeys(calls, float("inf"))
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def in_words(seconds):
    """What `fastest` gives: "pytorch 96 us, onednn 58 us"."""
    return ", ".join(f"{name} {1e6 * s:.0f} us" for name, s in seconds.items())
