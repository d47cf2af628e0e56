"""fuse(model) swaps the plain blocks of a model for the fused ones, in place; unfuse(model) swaps them back.

A swap changes the class of a module and nothing else. The module, its parameters, hooks and every reference to it
stay what they were, so swapping back restores the model bit for bit. What is swapped are the blocks of reference.py,
and classes of the same form: vit-pytorch's before 1.4, and the copies of it in people's own files. That a class has the
same form is not guessed from its name: its forward must be one of the spellings at the end of this file, instruction
for instruction, and the module's children exactly the expected ones. All else is left alone, and the report says why.
"""

import dis
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FunctionType

import torch
from einops import rearrange
from torch import einsum, nn

from ..kernels.functions import MAX_HEAD_DIM, MIN_HEAD_DIM
from .modules import FusedAttention, FusedFeedForward, FusedPreNorm, takes_norm, untouched
from .reference import Attention, FeedForward, PreNorm

__all__ = ["Block", "FuseReport", "fuse", "unfuse"]

FUSED = (FusedAttention, FusedFeedForward, FusedPreNorm)
NAMES = ("Attention", "FeedForward", "PreNorm")


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
    """Swap each plain Attention, FeedForward and PreNorm in `model`, itself included, for its fused form, in place.

    With `dry_run` nothing is changed and the report is the same. Fusing a fused model again changes nothing, and the
    report counts what had been fused before.
    Raises TypeError if `model` is no nn.Module; ValueError, before anything is changed, if it has no block to swap and
    none that is fused already, or with `strict` if anything that looks like a block would be left as it is.
    """
    report = FuseReport("would fuse" if dry_run else "fused", already=len(_fused_modules(model)))
    classes = []
    for name, module in model.named_modules():
        cls = type(module)
        if _is_fused(cls):
            continue
        form = _form(cls)
        why_not = _why_not_class(module) if form is None else _why_not_instance(module, form)
        if why_not is None:
            report.swapped.append(Block(name, _name(cls), _remark(module, form)))
            classes.append((module, _fused_class(cls, form)))
        elif _looks_like_a_block(cls, form):
            report.left.append(Block(name, _name(cls), why_not))
    if not report.swapped and not report.already:
        raise ValueError(
            f"found nothing to fuse in {_name(type(model))}: looked for the blocks Attention, FeedForward and PreNorm "
            f"of vitriton.vit, and for classes of the same form, such as vit-pytorch's before 1.4\n{report}"
        )
    if strict and report.left:
        raise ValueError(f"strict=True, and not every block can be fused; nothing was changed\n{report}")
    if not dry_run:
        for module, fused in classes:
            module.__class__ = fused
    return report


def unfuse(model: nn.Module) -> FuseReport:
    """Swap every fused block in `model`, itself included, back to the plain class that it had, in place.

    Outputs are again what they were, to the last bit. A block that was built as a fused one becomes the plain one of
    vitriton.vit. A model without fused blocks is left as it is. Raises TypeError if `model` is no nn.Module.
    """
    report = FuseReport("unfused")
    for name, module in _fused_modules(model).items():
        report.swapped.append(Block(name, _name(type(module).plain)))
        module.__class__ = type(module).plain
    for name, module in model.named_modules():
        if isinstance(module, FUSED):
            why_not = "a subclass of a fused block has no plain class"
            if _is_sharded(type(module)):
                why_not = f"{SHARDED}: unfuse a model that is not sharded, into which its state_dict loads"
            report.left.append(Block(name, _name(type(module)), why_not))
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Fused classes


@cache
def _fused_class(plain, form):
    """The class that `plain` is swapped for: a subclass of it, so that isinstance and all other methods stay."""
    if plain is form.plain:
        return form
    return type(form.__name__, (form, plain), {"plain": plain, "__module__": __name__, "__reduce_ex__": _reduce})


def _reduce(module, protocol):
    """Pickle and copy by the plain class, as a class that is made here cannot be found by its name."""
    form = next(fused for fused in FUSED if isinstance(module, fused))
    _, _, *state = object.__reduce_ex__(module, protocol)
    return _new, (type(module).plain, form), *state


def _new(plain, form):
    fused = _fused_class(plain, form)
    return fused.__new__(fused)


def _is_fused(cls):
    """Whether `cls` is a fused block, and no subclass that somebody made of one."""
    return issubclass(cls, FUSED) and "plain" in vars(cls)


def _fused_modules(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    return {name: module for name, module in model.named_modules() if _is_fused(type(module))}


# ---------------------------------------------------------------------------------------------------------------------
# Which modules, and why not the others


@cache
def _form(cls):
    """The fused block whose plain form `cls` has, or None."""
    for form in FUSED:
        if cls is form.plain:
            return form
        plain_class = cls.__bases__ == (nn.Module,) and cls.__call__ is nn.Module.__call__
        if plain_class and any(_same_function(cls.forward, spelling) for spelling in SPELLINGS[form]):
            return form
    return None


def _looks_like_a_block(cls, form):
    # many a class that is no FeedForward has that forward, self.net(x)
    return any(base.__name__ in NAMES for base in cls.__mro__) or form in (FusedAttention, FusedPreNorm)


def _is_sharded(cls):
    return any(base.__name__ == "FSDPModule" for base in cls.__mro__)  # by name: its import takes half a second


def _why_not_class(module):
    if _is_sharded(type(module)):
        return f"{SHARDED}: fuse the model before it is sharded"
    for base in type(module).__mro__[1:]:
        if _form(base) is not None or _is_fused(base):
            return f"a subclass of {_name(base)} may mean something else"
    why_not = "its forward is none of the known spellings of the plain block's"
    if "norm" in module._modules and "fn" not in module._modules:
        why_not += "; it has a norm of its own, as vit-pytorch's since 1.4"
    return why_not


def _why_not_instance(module, form):
    """What is other in `module`, whose class has the form, than in the plain block; None if nothing."""
    check, expected, allowed = CHECKS[form]
    lacks = [name for name in expected if module._modules.get(name) is None]
    if lacks:
        return f"it has no {', no '.join(lacks)}"
    others = [*module._modules, *module._parameters, *module._buffers]
    others = [name for name in others if name not in expected and name not in allowed]
    if others:
        return f"it also has {', '.join(others)}"
    if "forward" in vars(module):
        return "its forward was replaced on this one module"
    return check(module)


def _why_not_attention(module):
    heads, scale, to_qkv, to_out = module.heads, module.scale, module.to_qkv, module.to_out
    if why_not := _unlike("attend", module.attend, nn.Softmax) or _unlike("to_qkv", to_qkv, nn.Linear):
        return why_not
    if module.attend.dim != -1:
        return f"attend is a softmax over dim {module.attend.dim}, not -1"
    if to_qkv.bias is not None:
        return "to_qkv has a bias"
    if type(heads) is not int or heads < 1 or to_qkv.out_features % (3 * heads):
        return f"heads is {heads!r}, which does not divide to_qkv's {to_qkv.out_features} features into q, k and v"
    if not MIN_HEAD_DIM <= to_qkv.out_features // (3 * heads) <= MAX_HEAD_DIM:
        dim_head = to_qkv.out_features // (3 * heads)
        return f"its head dim is {dim_head}, and the kernels take {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    if type(scale) is not float:
        return f"scale is a {type(scale).__name__}, not a float"
    if "dropout" in module._modules and (why_not := _unlike("dropout", module.dropout, nn.Dropout)):
        return why_not
    return None if type(to_out) is nn.Identity else _unlike_sequence("to_out", to_out, nn.Linear, nn.Dropout)


def _why_not_feed_forward(module):
    return _unlike_sequence("net", module.net, nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout)


def _why_not_pre_norm(module):
    norm, fn = module.norm, module.fn
    if why_not := _unlike("norm", norm, nn.LayerNorm):
        return why_not
    if len(norm.normalized_shape) != 1 or norm.bias is None:
        return "norm is not over the last dim alone, or has no weight and bias"
    form = _form(type(fn))
    if takes_norm(fn) or (form in (FusedAttention, FusedFeedForward) and _why_not_instance(fn, form) is None):
        return None
    return f"its fn, {_name(type(fn))}, cannot be fused, so norm has no Linear to merge with"


CHECKS = {  # with the children that must be there, and those that may
    FusedAttention: (_why_not_attention, ("attend", "to_qkv", "to_out"), ("dropout",)),
    FusedFeedForward: (_why_not_feed_forward, ("net",), ()),
    FusedPreNorm: (_why_not_pre_norm, ("norm", "fn"), ()),
}

SKIPPED = {  # the children that a fused call does not call
    FusedAttention: ("attend", "to_qkv"),
    FusedFeedForward: ("net", "net.0", "net.1"),
    FusedPreNorm: ("norm", "fn"),
}
SHARDED = "fully_shard has given it a class of its own"


def _unlike(name, module, kind):
    if type(module) is not kind:
        return f"{name} is {_name(type(module))}, not nn.{kind.__name__}"
    return None


def _unlike_sequence(name, sequence, *kinds):
    if why_not := _unlike(name, sequence, nn.Sequential):
        return why_not
    if len(sequence) != len(kinds):
        return f"{name} has {len(sequence)} layers, not {', '.join(kind.__name__ for kind in kinds)}"
    unlike = (_unlike(f"{name}.{i}", layer, kind) for i, (layer, kind) in enumerate(zip(sequence, kinds, strict=True)))
    return next(filter(None, unlike), None)


def _remark(module, form):
    remarks = []
    dropout = module._modules.get("dropout")
    if dropout is not None and dropout.p:
        remarks.append(f"it drops attention weights (p={dropout.p}), so while training the plain formula runs")
    children = {name: module.get_submodule(name) for name in SKIPPED[form]}
    watched = [name for name, child in children.items() if not untouched(child, type(child))]
    if watched:
        why = "a hook (as a pruned Linear has) or a forward of its own"
        remarks.append(f"{', '.join(watched)} has {why}: it is called, and not merged, while that is there")
    return "; ".join(remarks)


def _name(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def _blocks(count):
    return f"{count} block" if count == 1 else f"{count} blocks"


# ---------------------------------------------------------------------------------------------------------------------
# The same function


def _same_function(function, spelling):
    """Whether two functions do the same: the same instructions on the same globals, without default arguments."""
    if type(function) is not FunctionType or function.__defaults__ or function.__kwdefaults__:
        return False
    if _instructions(function.__code__) != _instructions(spelling.__code__):
        return False
    names = _global_names(spelling.__code__)  # a builtin is in neither's globals
    return all(function.__globals__.get(name) is spelling.__globals__.get(name) for name in names)


def _instructions(code):
    """What `code` takes and does; local variables by number, so that what they are called does not matter."""
    steps = []
    for step in dis.get_instructions(code):
        value = step.argval
        if isinstance(value, CodeType):
            value = _instructions(value)
        elif step.opcode in dis.haslocal or step.opcode in dis.hasfree:
            value = step.arg
        elif isinstance(value, str) and "<locals>" in value:  # what Python 3.10 calls a lambda: it names the class
            value = None
        steps.append((step.opname, type(value), value))
    variadic = code.co_flags & (0x04 | 0x08)  # *args, **kwargs
    return code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, variadic, tuple(steps)


def _global_names(code):
    nested = [_global_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}.union(*nested)


# ---------------------------------------------------------------------------------------------------------------------
# The spellings of forward that mean what the plain blocks mean. Compared, never called; those of attention are in the
# order in which vit-pytorch had them.
# ruff: noqa: C417


def _attention_einsum(self, x):
    _b, _n, _, h = *x.shape, self.heads
    qkv = self.to_qkv(x).chunk(3, dim=-1)
    q, k, v = map(lambda t: rearrange(t, "b n (h d) -> b h n d", h=h), qkv)
    dots = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
    attn = self.attend(dots)
    out = einsum("b h i j, b h j d -> b h i d", attn, v)
    out = rearrange(out, "b h n d -> b n (h d)")
    return self.to_out(out)


def _attention_einsum_dropout(self, x):
    _b, _n, _, h = *x.shape, self.heads
    qkv = self.to_qkv(x).chunk(3, dim=-1)
    q, k, v = map(lambda t: rearrange(t, "b n (h d) -> b h n d", h=h), qkv)
    dots = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
    attn = self.attend(dots)
    attn = self.dropout(attn)
    out = einsum("b h i j, b h j d -> b h i d", attn, v)
    out = rearrange(out, "b h n d -> b n (h d)")
    return self.to_out(out)


def _attention_matmul(self, x):
    qkv = self.to_qkv(x).chunk(3, dim=-1)
    q, k, v = map(lambda t: rearrange(t, "b n (h d) -> b h n d", h=self.heads), qkv)
    dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
    attn = self.attend(dots)
    out = torch.matmul(attn, v)
    out = rearrange(out, "b h n d -> b n (h d)")
    return self.to_out(out)


def _attention_matmul_dropout(self, x):
    qkv = self.to_qkv(x).chunk(3, dim=-1)
    q, k, v = map(lambda t: rearrange(t, "b n (h d) -> b h n d", h=self.heads), qkv)
    dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
    attn = self.attend(dots)
    attn = self.dropout(attn)
    out = torch.matmul(attn, v)
    out = rearrange(out, "b h n d -> b n (h d)")
    return self.to_out(out)


def _pre_norm_without_keywords(self, x):
    return self.fn(self.norm(x))


SPELLINGS = {
    FusedAttention: (
        Attention.forward,
        _attention_einsum,
        _attention_einsum_dropout,
        _attention_matmul,
        _attention_matmul_dropout,
    ),
    FusedFeedForward: (FeedForward.forward,),
    FusedPreNorm: (PreNorm.forward, _pre_norm_without_keywords),
}
