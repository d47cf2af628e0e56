"""How calls are timed: the wall clock of a CPU, the events of a GPU, and turns that treat rivals alike."""

import time

import torch

__all__ = ["CPUClock", "GPUClock", "measure"]

PAUSE = 0.02  # s
MOST_CALLS = 200  # of one rival in one turn
LONG = 0.1  # s; what cold caches and sleeping threads add to a call is lost in one as long as this


class CPUClock:
    """Times calls by the wall clock, once the threads of whoever ran before have stopped spinning."""

    def settle(self):
        """Pause until this process is idle: OpenMP's threads spin after their work, for 5 ms or, in Intel's, 0.2 s."""
        for _ in range(20):
            start, cpu_start = time.perf_counter(), time.process_time()
            time.sleep(PAUSE)
            if time.process_time() - cpu_start < 0.5 * (time.perf_counter() - start):
                return

    def time(self, call, count):
        """The seconds of each of `count` calls."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times


class GPUClock:
    """Times calls by events in the stream of `device`, each call with the L2 cache cleared just before it.

    A call that the CPU launches more slowly than the GPU computes counts with the gaps, as it does in eager use.
    """

    CACHE_BYTES = 256 * 2**20  # more than the last-level cache of any GPU so far

    def __init__(self, device):
        self.module = torch.get_device_module(device)
        self.cache = torch.empty(self.CACHE_BYTES, dtype=torch.int8, device=device)

    def settle(self):
        """Wait until the GPU is idle."""
        self.module.synchronize()

    def time(self, call, count):
        """The seconds of each of `count` calls."""
        events = [[self.module.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self.cache.zero_()
            start.record()
            call()
            end.record()
        self.module.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def measure(calls, clock, *, seconds=0.5, turns=5):
    """Time `calls`, {name: function of no arguments}, in turns -> {name: [seconds of one call, ...]}.

    Each has about `seconds` of calls, at least one in each of `turns` turns. A turn is a pause, a call that warms the
    caches up and is not counted (none where calls are LONG), and the calls that are. Every other round goes through the
    rivals backwards, so that a machine that grows slower or faster meanwhile does so for all of them.
    """
    warmups, counts = {}, {}
    for name, call in calls.items():
        clock.settle()
        once = min(clock.time(call, 2))
        warmups[name] = int(once < LONG)
        counts[name] = max(1, min(MOST_CALLS, int(seconds / turns / once)))
    times = {name: [] for name in calls}
    order = list(calls)
    for _ in range(turns):
        for name in order:
            clock.settle()
            times[name] += clock.time(calls[name], warmups[name] + counts[name])[warmups[name] :]
        order.reverse()
    return times
