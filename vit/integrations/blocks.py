"""What the fused blocks of all libraries share: how they attend, how they feed forward, and when they may not.

A fused block of a library is a class of two bases: one of these files' classes, which has the forward, and the
library's own class, `plain`, whose forward holds wherever the fused one cannot replace it.
"""

from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Proxy

from ...kernels import attention, qkv_attention
from ...kernels.blocks import dtype_of_block
from .. import record
from ..at_once import PLAIN_TENSORS, all_plain, attention_at_once, feed_forward_at_once, parameters_of
from ..known import QUICK_GELUS, gelu_of
from ..modules import _Packs, apply, idle, is_bare_norm, merged, untouched
from ..notes import NOT_MERGED, note


class Fused(_Packs):
    """A fused block of a library. `plain` is the library's class."""

    plain = None


class TakesNorm(Fused):
    """A fused block whose forward takes `norm`: a LayerNorm to apply to x first, together with the first Linear."""


def with_norm(block, norm, x, *args, **kwargs):
    """block(norm(x)), the block applying `norm` itself if it can."""
    if isinstance(block, TakesNorm) and untouched(block, type(block)) and not traced(x):
        return block(x, *args, norm=norm, **kwargs)
    return block(norm(x), *args, **kwargs)


def traced(x):
    """Whether torch.fx reads the forward, to find the steps of the plain one, as timm's and torchvision's extraction of
    features and maps does."""
    return isinstance(x, Proxy)


def asked_for(args, kwargs):
    """What a block was called with beyond x, in words; None if nothing."""
    for name, value in [*((f"argument {i}", a) for i, a in enumerate(args, 2)), *kwargs.items()]:
        if value is not None and value is not False:
            return f"it was called with {name}"
    return None


def not_plain(x):
    """Why the functions cannot take x, in words; None if they can."""
    return None if type(x) in PLAIN_TENSORS else f"its input is a {type(x).__name__}"


def attend_packed(module, qkv, heads, scale):
    """Attention on qkv (B,N,3*H*D) -> (B,N,H*D)."""
    if record.active:
        record.observe_qkv(module, qkv, heads, scale)
    return qkv_attention(qkv, heads, scale=scale)


def attend(module, q, k, v, scale):
    """Attention on q, k, v (B,H,N,D) -> (B,N,H*D)."""
    if record.active:
        record.observe(module, q, k, scale)
    return attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def attend_at_once(x, norm, linears, heads, scale):
    """Linear(attention(Linear(norm(x)))), x (B,N,C), in one step; None where that is not surely the same.

    linears() gives (weight, bias) of both, or None for one; it is not called where there is no such step, as on a GPU.
    """
    return None if record.active else _at_once(attention_at_once, x, norm, linears, heads=heads, scale=scale)


def lone_linear(*layers):
    """(weight, bias) of the one Linear among the layers, if the others do nothing and nothing is on any of them."""
    found = None
    for layer in layers:
        if found is None and untouched(layer, nn.Linear):
            found = parameters_of(layer)
        elif not (idle(layer) or untouched(layer, nn.Identity)):
            return None
    return found


def _at_once(block, x, norm, linears, **how):
    dtype = dtype_of_block(x)
    if dtype is None or not is_bare_norm(norm) or not all(found := linears()):
        return None
    parameters = all_plain(x, norm, *chain.from_iterable(found))
    return None if parameters is None else block(x, parameters, eps=norm.eps, dtype=dtype, **how)


def project(module, x, norm, fn, activation=None):
    """activation(fn(norm(x))), in one call where that is surely the same; fn is a Linear, norm may be None."""
    if norm is not None:
        y = merged(x, norm, fn, activation)
        if y is not None:
            return y
        note(module, NOT_MERGED)
        x = norm(x)
    y = apply(fn, x)
    return y if activation is None else F.gelu(y, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])


def feed_forward(module, x, norm, layers):
    """`layers` one after the other on norm(x); the first is a Linear, which `norm` and a GELU behind it join."""
    first, act, *rest = layers
    kind = gelu_of(act) if untouched(act, type(act)) else None
    if kind is not None:
        y = _at_once(feed_forward_at_once, x, norm, lambda: (lone_linear(first), lone_linear(*rest)), activation=kind)
        if y is not None:
            return y
    x = project(module, x, norm, first, kind)
    if kind is None:
        x = quick_gelu(x) if type(act) in QUICK_GELUS and untouched(act, type(act)) else apply(act, x)
    for layer in rest:
        x = apply(layer, x)
    return x


def quick_gelu(x):
    """x sigmoid(1.702 x), to the last bit as the libraries write it, with one tensor in place of three."""
    if torch.is_grad_enabled():
        return x * torch.sigmoid(1.702 * x)
    return (1.702 * x).sigmoid_().mul_(x)


def sequence_with_norm(module, sequence, norm, x):
    """sequence(norm(x)), where `sequence` is an nn.Sequential that belongs to `module`."""
    if not untouched(sequence, type(sequence)) or len(sequence) < 2:
        note(module, "its MLP has a hook")
        return sequence(norm(x))
    return feed_forward(module, x, norm, sequence)
