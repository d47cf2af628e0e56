"""fuse(model) swaps the blocks of a model for fused ones, in place; unfuse(model) swaps them back.

A swap changes the class of a module and nothing else. The module, its parameters, hooks and every reference to it
stay what they were, so swapping back restores the model bit for bit. What is swapped are the blocks of reference.py,
those of vit-pytorch and of people's own files that do the same, instruction for instruction, and those classes of the
libraries in integrations/ whose forward was verified; a module with anything that its block does not have is left
alone, and the report says why.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from .integrations import FORMS, form_of, handed, looks_like_a_block, remark, why_not, why_unknown
from .integrations.blocks import Fused
from .known import SHARDED, is_sharded, learn, name_of
from .modules import FusedAttention, FusedFeedForward, FusedPreNorm, FusedTransformer, FusedViT

__all__ = ["Block", "FuseReport", "fuse", "fused_class", "fused_modules", "unfuse"]

FUSED = (FusedAttention, FusedFeedForward, FusedPreNorm, FusedTransformer, FusedViT, Fused)


@dataclass(frozen=True)
class Block:
    """A module that was looked at: its name in the model ("" is the model itself), its class, and the reason."""

    name: str
    cls: str
    reason: str = ""

    def __str__(self):
        return f"{self.name or 'the model itself'} ({self.cls})" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class FuseReport:
    """What was swapped, with a remark in `reason` where one is due; what looks like a block and was left, and why."""

    action: str  # "fused", "would fuse" or "unfused"
    swapped: list[Block] = field(default_factory=list)
    left: list[Block] = field(default_factory=list)
    already: int = 0  # blocks that had been fused before

    def __str__(self):
        kinds = ", ".join(f"{count} {cls}" for cls, count in Counter(block.cls for block in self.swapped).items())
        lines = [f"{self.action} {_blocks(len(self.swapped))}" + (f": {kinds}" if kinds else "")]
        lines += [f"  {block}" for block in self.swapped if block.reason]
        if self.already:
            lines.append(f"already fused: {_blocks(self.already)}")
        if self.left:
            lines.append(f"left as they are: {_blocks(len(self.left))}")
            lines += [f"  {block}" for block in self.left]
        return "\n".join(lines)


def fuse(model: nn.Module, *, dry_run: bool = False, strict: bool = False) -> FuseReport:
    """Swap each block of `model` that is known, itself included, for its fused form, in place.

    With `dry_run` nothing is changed and the report is the same. Fusing a fused model again changes nothing, and the
    report counts what had been fused before.
    Raises TypeError if `model` is no nn.Module; ValueError, before anything is changed, if it has no block to swap and
    none that is fused already, or with `strict` if anything that looks like a block would be left as it is.
    """
    report = FuseReport("would fuse" if dry_run else "fused", already=len(fused_modules(model)))
    learn()
    modules = {name: module for name, module in model.named_modules() if not _is_fused(type(module))}
    forms = {name: form_of(module) for name, module in modules.items()}
    reasons = {name: why_not(modules[name], form) for name, form in forms.items() if form is not None}
    takers = _handed_a_norm(model, modules, forms, reasons)
    for name, module in modules.items():
        cls, form = type(module), forms[name]
        why = why_unknown(module) if form is None else reasons[name]
        if why is None and form.in_block and id(module) not in takers:
            why = "the block that holds it is not one that can be fused, and by itself there is nothing to fuse"
        if why is None:
            report.swapped.append(Block(name, name_of(cls), remark(module, form)))
        elif looks_like_a_block(module, form):
            report.left.append(Block(name, name_of(cls), why))
    if not report.swapped and not report.already:
        raise ValueError(
            f"found nothing to fuse in {name_of(type(model))}: looked for the blocks Attention, FeedForward and "
            "PreNorm of vitriton.vit, for vit-pytorch's and copies of them, and for those of timm, transformers, "
            f"torchvision and open_clip\n{report}"
        )
    if strict and report.left:
        raise ValueError(f"strict=True, and not every block can be fused; nothing was changed\n{report}")
    if not dry_run:
        for block in report.swapped:
            module = modules[block.name]
            module.__class__ = fused_class(type(module), forms[block.name].fused)
    return report


def unfuse(model: nn.Module) -> FuseReport:
    """Swap every fused block in `model`, itself included, back to the plain class that it had, in place.

    Outputs are again what they were, to the last bit. A block that was built as a fused one becomes the plain one of
    vitriton.vit. A model without fused blocks is left as it is. Raises TypeError if `model` is no nn.Module.
    """
    report = FuseReport("unfused")
    for name, module in fused_modules(model).items():
        report.swapped.append(Block(name, name_of(type(module).plain)))
        module.__class__ = type(module).plain
    for name, module in model.named_modules():
        if isinstance(module, FUSED):
            why = "a subclass of a fused block has no plain class"
            if is_sharded(type(module)):
                why = f"{SHARDED}: unfuse a model that is not sharded, into which its state_dict loads"
            report.left.append(Block(name, name_of(type(module)), why))
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Fused classes


@cache
def fused_class(plain, form):
    """The class that `plain` is swapped for: a subclass of it, so that isinstance and all other methods stay."""
    learn()
    if plain is form.plain:
        return form
    return type(
        form.__name__,
        (form, plain),
        {"plain": plain, "form": form, "__module__": form.__module__, "__reduce_ex__": _reduce},
    )


def _reduce(module, protocol):
    """Pickle and copy by the plain class, as a class that is made here cannot be found by its name."""
    _, _, *state = object.__reduce_ex__(module, protocol)
    return _new, (type(module).plain, type(module).form), *state


def _new(plain, form):
    fused = fused_class(plain, form)
    return fused.__new__(fused)


def _is_fused(cls):
    """Whether `cls` is a fused block, and no subclass that somebody made of one."""
    return issubclass(cls, FUSED) and "plain" in vars(cls)


def fused_modules(model):
    """The fused blocks of `model`, by name. Raises TypeError if it is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    return {name: module for name, module in model.named_modules() if _is_fused(type(module))}


def _handed_a_norm(model, modules, forms, reasons):
    """The modules, by id, that a block that is or will be fused hands a LayerNorm."""
    blocks = [(module, forms[name]) for name, module in modules.items() if name in reasons and reasons[name] is None]
    blocks += [(module, FORMS.get(name_of(type(module).plain))) for module in fused_modules(model).values()]
    return {id(child) for module, form in blocks if form is not None for child in handed(module, form)}


def _blocks(count):
    return f"{count} block" if count == 1 else f"{count} blocks"
