"""What a ViT costs, by counting: parameters, floating-point operations, and what the forward pass keeps for backward.

Nothing is computed: tensors are fake (FakeTensorMode). A multiply-add is two operations.
"""

import math
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ...kernels import use_backend
from ..fuse import fuse
from .sizes import SIZES, build

__all__ = ["activation_bytes", "cost", "count_flops", "model_flops", "model_traffic", "network_flops"]


class Nobody:
    """Stands in for FlopCounterMode's ModuleTracker, whose hooks on every module would make fused ones step aside."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


def count_flops(step):
    """Floating-point operations of step(), by PyTorch's formulas and those of kernels/ops.py -> int."""
    return sum(flops_by_operator(step).values())


def flops_by_operator(step):
    """{operator's name: floating-point operations} of step()."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Nobody()
    with counter:
        step()
    return {str(operator): flops for operator, flops in counter.get_flop_counts().get("Global", {}).items()}


def model_flops(model, images, training=False):
    """{operator: operations} of the forward pass on `images`, and in training of the backward pass too."""

    def step():
        with torch.set_grad_enabled(training):
            logits = model(images)
            if training:
                logits.sum().backward()

    with use_backend("auto"):
        return flops_by_operator(step)


def network_flops(make, image_size, training=False):
    """Operations for one image of the network that `make()` gives."""
    with FakeTensorMode():
        return sum(model_flops(make(), torch.empty(1, 3, image_size, image_size), training).values())


def activation_bytes(model, images):
    """Bytes that the forward pass of `model` keeps for its backward pass, besides parameters and the images."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), images)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own and not isinstance(tensor, nn.Parameter):
            kept[storage._cdata] = storage  # held, so that its address is not given out again
        return tensor

    with use_backend("auto"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)
    del logits
    return sum(storage.nbytes() for storage in kept.values())


def model_traffic(name, batch, tokens, patch_size, itemsize, classes=1000):
    """Bytes of a forward pass if each fused function read its inputs and wrote its output once, and kept nothing.

    A block is LayerNorm + Linear to qkv, attention, Linear with the residual added, LayerNorm + Linear + GELU, Linear
    with the residual added. Beside the blocks: the patches, their embedding, the weights of the head.
    """
    size, rows = SIZES[name], batch * tokens
    d, hidden = size.dim, size.mlp_dim
    weights = 4 * d * d + 2 * d * hidden + 9 * d + hidden
    acts = rows * ((d + 3 * d) + (3 * d + d) + (d + d + d) + (d + hidden) + (hidden + d + d))
    patch = 3 * patch_size**2
    edge = batch * (tokens - 1) * (patch + d) + patch * d + tokens * d + classes * d + batch * classes
    return itemsize * (size.depth * (weights + acts) + edge)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cost(name, *, image_size=224, batch=1, dtype=torch.float32):
    """{"parameters", "multiply_adds", and of plain and fused "flops", "operators", "activation_bytes"} of a size."""
    record = {"model": name, "image_size": image_size, "batch": batch, "dtype": str(dtype)[6:]}
    for kind in ("plain", "fused"):
        with FakeTensorMode(), default_dtype(dtype):  # fake parameters cannot be cast
            model = build(name, image_size=image_size)
            images = torch.empty(batch, 3, image_size, image_size)
            if kind == "fused":
                fuse(model, strict=True)
            operators = model_flops(model, images)
            kept = activation_bytes(model, images)
        record[kind] = {"flops": sum(operators.values()), "operators": operators, "activation_bytes": kept}
    parameters = sum(math.prod(p.shape) for p in model.parameters())
    tokens = (image_size // SIZES[name].patch_size) ** 2 + 1
    return record | {
        "tokens": tokens,
        "parameters": parameters,
        "multiply_adds": record["plain"]["flops"] // 2,
    }
