"""The demo's table of costs: time and peak memory of ViTs at 224 px, plain against fused."""

import copy
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

from ..kernels.reference import compare
from .fuse import fuse
from .measure import peak_memory, quartiles
from .reference import vit_preset
from .timing import CPUClock, GPUClock, measure

__all__ = ["cost", "cost_table"]

# (preset, what is run, images at a time): about half a second on two CPU cores; enough to fill a GPU
ROWS_CPU = (("ti", "forward", 8), ("s", "forward", 4), ("b", "forward", 2), ("ti", "training step", 4))
ROWS_GPU = (("ti", "forward", 128), ("s", "forward", 128), ("b", "forward", 64), ("s", "training step", 64))
ROWS_QUICK = (("ti", "forward", 1), ("ti", "training step", 1))
SECONDS = 2  # of timing for a model in a row; up to twice as many if other programs disturb


def cost_table(records, device, quick=False):
    """Header, rows and widths for Console.table. A row is measured when it is asked for; its record joins `records`."""

    def rows():
        for row in ROWS_QUICK if quick else ROWS_CPU if device.type == "cpu" else ROWS_GPU:
            records.append(cost(*row, device, seconds=0.25 if quick else SECONDS))
            yield _cells(records[-1])

    header = ["model", "images", "time: plain", "fused", "faster", "memory: plain", "fused", "less", "answers"]
    return header, rows(), [len("ViT-Ti, training step"), 0, 0, 9, 0, 0, 10, 5, 0]


def cost(preset, what, images, device, *, seconds):
    """Measure `what`, "forward" or "training step" (forward, cross-entropy and backward), on `images` random images.

    On a GPU in bfloat16, in training with float32 weights under autocast; on a CPU in float32. One answer of both
    models is judged by the tolerance rule before anything is timed.
    """
    torch.manual_seed(0)
    training, on_gpu = what == "training step", device.type != "cpu"
    plain = vit_preset(preset).eval()
    if on_gpu and not training:
        plain.to(torch.bfloat16)
    dtype = next(plain.parameters()).dtype
    batch, labels = torch.randn(images, 3, 224, 224).to(dtype), torch.randint(1000, (images,))
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=on_gpu and training)
    gold = _answer(copy.deepcopy(plain).double(), batch[:1].double(), labels[:1], training, nullcontext)
    record = {"model": f"ViT-{preset.capitalize()}", "what": what, "images": images, "dtype": str(dtype)[6:]}
    record |= {"autocast": on_gpu and training, "out_of_memory": False, "noisy": False, "disturbed": False}

    try:
        plain.to(device)
        fused = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})  # the same parameters, not copies
        fuse(fused)
        batch, labels = batch.to(device), labels.to(device)
        base, result = (_answer(model, batch[:1], labels[:1], training, autocast) for model in (plain, fused))
        error = compare("gradients" if training else "logits", result, base, gold, k=3 if training else 2)

        def step(model):
            if training:
                with autocast():
                    loss = F.cross_entropy(model(batch), labels)
                loss.backward()
                model.zero_grad()
            else:
                with torch.no_grad():
                    model(batch)

        steps = {"plain": lambda: step(plain), "fused": lambda: step(fused)}
        peaks = {name: peak_memory(measured, device) for name, measured in steps.items()}
        clock = GPUClock(device) if on_gpu else CPUClock()
        times, undisturbed = measure(steps, clock, seconds=seconds, patience=1)
    except torch.OutOfMemoryError:
        return record | {"out_of_memory": True, "ok": True}

    for name, taken in times.items():
        lower, median, upper = quartiles(taken)
        record[name] = {"seconds": median, "quartiles": [lower, upper], "calls": len(taken), "peak_bytes": peaks[name]}
        record["noisy"] |= upper - lower > median / 3
    return record | {"disturbed": not undisturbed, "ok": bool(error), "judged": str(error)}


def _answer(model, images, labels, training, autocast):
    """The logits; in training the gradients of the cross-entropy over all parameters, end to end."""
    if not training:
        with torch.no_grad():
            return model(images)
    with autocast():
        loss = F.cross_entropy(model(images), labels)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def _cells(record):
    cells = [f"{record['model']}, {record['what']}", str(record["images"])]
    if record["out_of_memory"]:
        return [*cells, "out of", "memory", "", "", "", "", ""]
    plain, fused = record["plain"], record["fused"]
    cells += [f"{1000 * plain['seconds']:.4g} ms", f"{1000 * fused['seconds']:.4g} ms"]
    cells += [f"{plain['seconds'] / fused['seconds']:.2f}x"]
    cells += [f"{variant['peak_bytes'] / 2**20:.1f} MiB" for variant in (plain, fused)]
    cells += [f"{plain['peak_bytes'] / fused['peak_bytes']:.2f}x"]
    return [*cells, "same" if record["ok"] else "WRONG"]
