"""explain(model, images): which way each fused block takes, and why it does not take the other."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..kernels import explain as explain_tensors
from .fuse import Block, fused_modules
from .known import name_of
from .notes import listening

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """Of a forward pass: the implementation of the functions; the blocks that were fused; those that went plain."""

    implementation: str
    fused: list[Block] = field(default_factory=list)
    plain: list[Block] = field(default_factory=list)  # with the reason

    def __str__(self):
        kinds = ", ".join(f"{count} {cls}" for cls, count in Counter(block.cls for block in self.fused).items())
        lines = [f"implementation: {self.implementation}", f"the fused way: {len(self.fused)} blocks"]
        lines[1] += f": {kinds}" if kinds else ""
        if self.plain:
            lines.append(f"the plain way, wholly or in part: {len(self.plain)} blocks")
            lines += [f"  {block}" for block in self.plain]
        return "\n".join(lines)


def explain(model: nn.Module, images) -> Explanation:
    """Run `model` on `images` once, without gradients, and say which way each of its fused blocks went, and why.

    `images` are what the model is called with: a tensor, or a tuple or a dict of arguments. The model runs in the mode
    in which it is, so in training mode dropout draws. Raises TypeError if `model` is no nn.Module, ValueError if it has
    no fused block, and RuntimeError, as the call would, if the backend that was chosen cannot run.
    """
    blocks = fused_modules(model)
    if not blocks:
        raise ValueError(f"{name_of(type(model))} has no fused block: call fuse(model) first")
    tensors = [t for t in [*tree_leaves(images), *model.parameters()] if isinstance(t, torch.Tensor)]
    explanation = Explanation(explain_tensors(next(t for t in tensors if t.is_floating_point())))
    with torch.no_grad(), listening() as heard:
        call(model, images)
    reasons = {}
    for module, reason in heard:
        reasons.setdefault(id(module), {})[reason] = None
    for name, module in blocks.items():
        reason = "; ".join(reasons.get(id(module), ()))
        block = Block(name, name_of(type(module).plain), reason)
        (explanation.plain if reason else explanation.fused).append(block)
    return explanation


def call(model, arguments):
    """model(arguments): a tensor, or a tuple or dict of arguments."""
    if isinstance(arguments, dict):
        return model(**arguments)
    return model(*arguments) if isinstance(arguments, tuple) else model(arguments)
