"""Devices and whether they can run what was chosen, in words; peak memory on a CPU or a GPU, and quartiles."""

import json
import os
import platform
import tempfile
from pathlib import Path

import torch

from ..kernels import explain
from .console import Problem

__all__ = [
    "MEMORY",
    "check_runs",
    "cpu_name",
    "describe",
    "gpu",
    "peak_memory",
    "pick_device",
    "quantiles",
    "quartiles",
]

MEMORY = "the most that PyTorch's allocator held at a time, beyond what it held before: weights and input not counted"


def gpu():
    """The GPU that is current, as a torch.device with its index; None if there is none. ROCm's is a "cuda" too."""
    for kind in ("cuda", "xpu"):
        if getattr(torch, kind).is_available():
            return torch.device(kind, getattr(torch, kind).current_device())
    return None


def pick_device(name="auto"):
    """The torch.device called `name`; "auto" is a GPU if there is one, else the CPU. Raises Problem."""
    if name == "auto":
        return gpu() or torch.device("cpu")
    if name.split(":")[0] not in ("cpu", "cuda", "xpu"):
        raise Problem(f"--device {name} is none of auto, cpu, cuda and xpu (or, say, cuda:1 for the second GPU)")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: this PyTorch was built without CUDA
        why = str(error).strip().splitlines()[0].split(". ")[0]
        raise Problem(f"--device {name} cannot be used: {why}; `vitriton doctor` lists the devices here") from error
    return device


def check_runs(device, dtype=torch.float32):
    """What `explain` says of `device`; raises Problem if what the environment variables choose cannot run there."""
    try:
        return explain(torch.empty(0, device=device, dtype=dtype))
    except RuntimeError as error:
        variable = "it" if str(error).startswith("VITRITON_") else "VITRITON_BACKEND"
        raise Problem(f"{error}; unset {variable}") from error


def describe(device):
    """The device in words: "AMD EPYC 7B13, 2 threads", "NVIDIA H100 80GB HBM3"."""
    if device.type == "cpu":
        return f"{cpu_name()}, {_count(torch.get_num_threads(), 'thread')}"
    return torch.get_device_module(device).get_device_name(device)


def cpu_name():
    """What the processor calls itself, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _synchronize(device):
    """Wait until `device` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def quantiles(times, shares):
    """The values below which these shares of `times` lie."""
    return torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(shares, dtype=torch.float64)).tolist()


def quartiles(times):
    """The lower quartile, the median and the upper quartile."""
    return quantiles(times, (0.25, 0.5, 0.75))


def peak_memory(step, device):
    """Bytes by which what PyTorch's allocator for `device` has given out grew at most during step().

    On a GPU this is max_memory_allocated. On a CPU it is the highest sum of the allocations and releases that PyTorch's
    profiler sees. Scratch that MKL and oneDNN take for themselves is in neither.
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        _synchronize(device)
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
        step()
        _synchronize(device)
        return module.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes to stderr, of missing GPUs too
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak


def _count(n, noun):
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
