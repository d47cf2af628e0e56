"""How calls are timed: the wall clock of a CPU, the events of a GPU, and turns that treat rivals alike."""

import os
import time
from pathlib import Path

import torch

__all__ = ["CPUClock", "GPUClock", "measure"]

PAUSE = 0.02  # s
MOST_CALLS = 200  # of one rival in one turn
LONG = 0.1  # s; what cold caches and sleeping threads add to a call is lost in one as long as this
OTHERS = 0.15  # processors; Linux counts in ticks of 0.01 s, and something small always runs


class CPUClock:
    """Times calls by the wall clock, once the threads of whoever ran before have stopped spinning."""

    def __init__(self):
        self.spent = spent_by_others()

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

    def disturbed(self):
        """Whether others took more of the processors than these threads leave, since this was last asked.

        Then calls take several times as long as they should, not just their share longer: each parallel loop ends when
        its last thread does, and while one waits for a processor that another program has, the others spin. False where
        the system does not tell (it does on Linux).
        """
        (since, before), self.spent = self.spent, spent_by_others()
        now, after = self.spent
        spare = len(os.sched_getaffinity(0)) - torch.get_num_threads() if after else 0
        return after - before > (max(spare, 0) + OTHERS) * (now - since)


def spent_by_others():
    """Now, and the seconds for which others have had the processors that this process may use: other programs, and the
    host of a virtual machine, since some time. 0 where the system does not tell."""
    now, own = time.perf_counter(), time.process_time()
    stat = Path("/proc/stat")
    if not stat.exists() or not hasattr(os, "sched_getaffinity"):
        return now, 0.0
    mine = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    ticks = 0
    for line in stat.read_text().splitlines():
        name, *counts = line.split()
        if name in mine:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts[:8])
            ticks += user + nice + system + irq + softirq + steal
    return now, ticks / os.sysconf("SC_CLK_TCK") - own


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

    def disturbed(self):
        """False: who shares the GPU is not known."""
        return False


def measure(calls, clock, *, seconds=0.5, turns=5, patience=2):
    """Time `calls`, {name: function of no arguments}, in turns -> ({name: [seconds of one call, ...]}, undisturbed).

    Each has about `seconds` of calls, at least one in each of `turns` turns. A turn is a pause, a call that warms the
    caches up and is not counted (none where calls are LONG), and the calls that are. Every other round goes through the
    rivals backwards, so that a machine that grows slower or faster meanwhile does so for all of them.

    A round of turns in which `clock` was disturbed is made again, as long as all of them took less than 1 + `patience`
    times what was asked for. Undisturbed rounds count; if there is none, the others do, and `undisturbed` is False.
    """
    fastest = {}
    for name, call in calls.items():
        clock.settle()
        fastest[name] = min(clock.time(call, 2))
    rounds = {False: [], True: []}  # undisturbed, disturbed
    spent, most = 0.0, (1 + patience) * seconds * len(calls)
    order = list(calls)
    clock.disturbed()
    while len(rounds[False]) < turns and (not rounds[True] or spent < most):
        times = {}
        for name in order:
            warmups = int(fastest[name] < LONG)
            count = max(1, min(MOST_CALLS, int(seconds / turns / fastest[name])))
            clock.settle()
            times[name] = clock.time(calls[name], warmups + count)[warmups:]
            fastest[name] = min(fastest[name], *times[name])
            spent += sum(times[name])
        order.reverse()
        rounds[clock.disturbed()].append(times)
    counted = rounds[False] or rounds[True]
    return {name: [t for times in counted for t in times[name]] for name in calls}, bool(rounds[False])
