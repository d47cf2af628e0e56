"""What fuse needs to know of a class in order to swap it: the fused class, and when a module may not be swapped."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..kernels.functions import MAX_HEAD_DIM, MIN_HEAD_DIM
from .known import is_layer_norm, name_of

__all__ = ["Form", "drops", "unlike", "unlike_heads", "unlike_layer_norm", "unlike_sequence", "why_not_swap"]


def _nothing(module):
    return None


@dataclass(frozen=True)
class Form:
    """A form of block that can be swapped for `fused`.

    `children` are the submodules, parameters and buffers that it must have, `optional` those that it may have.
    `why_not` says in words what is other in a module than in the block, or None; `remark` what a user should know.
    `norms` are pairs of children, a LayerNorm and the block to hand it to: one of them at least must be possible.
    """

    fused: type
    children: tuple[str, ...]
    optional: tuple[str, ...] = ()
    why_not: Callable[[nn.Module], str | None] = _nothing
    remark: Callable[[nn.Module], str | None] = _nothing
    norms: tuple[tuple[str, str], ...] = ()
    skips: tuple[str, ...] = ()  # the submodules that the fused call does not call
    in_block: bool = False  # to be swapped only where a block hands it a LayerNorm


def why_not_swap(module, form):
    """What is other in `module`, whose class has the form, than in the block; None if nothing."""
    has = [*module._modules, *module._parameters, *module._buffers]
    lacks = [
        name
        for name in form.children
        if module._modules.get(name) is None and module._parameters.get(name) is None and name not in module._buffers
    ]
    if lacks:
        return f"it has no {', no '.join(lacks)}"
    others = [name for name in has if name not in form.children and name not in form.optional]
    if others:
        return f"it also has {', '.join(others)}"
    if "forward" in vars(module):
        return "its forward was replaced on this one module"
    return form.why_not(module)


def drops(p):
    return f"it drops attention weights (p={p}), so while training the plain formula runs" if p else None


def unlike(name, module, kind):
    if type(module) is not kind:
        return f"{name} is {name_of(type(module))}, not nn.{kind.__name__}"
    return None


def unlike_sequence(name, sequence, *kinds):
    if why_not := unlike(name, sequence, nn.Sequential):
        return why_not
    if len(sequence) != len(kinds):
        return f"{name} has {len(sequence)} layers, not {', '.join(kind.__name__ for kind in kinds)}"
    unlikes = (unlike(f"{name}.{i}", layer, kind) for i, (layer, kind) in enumerate(zip(sequence, kinds, strict=True)))
    return next(filter(None, unlikes), None)


def unlike_layer_norm(name, norm):
    if not is_layer_norm(norm):
        return f"{name} is {name_of(type(norm))}, not nn.LayerNorm"
    if len(norm.normalized_shape) != 1 or norm.weight is None or norm.bias is None:
        return f"{name} is not over the last dim alone, or has no weight and bias"
    return None


def unlike_heads(heads, name, features, what="q, k and v"):
    """`features` of the child `name` are to be `what` of so many heads."""
    parts = 3 if what == "q, k and v" else 1
    if type(heads) is not int or heads < 1 or features % (parts * heads):
        return f"heads is {heads!r}, which does not divide {name}'s {features} features into {what}"
    dim_head = features // (parts * heads)
    if not MIN_HEAD_DIM <= dim_head <= MAX_HEAD_DIM:
        return f"its head dim is {dim_head}, and the kernels take {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    return None
