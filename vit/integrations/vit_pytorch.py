"""vit-pytorch: its blocks in the form before 1.4, which is that of reference.py, in the form since, and SimpleViT's.

Many people have copies of them in files of their own, so a class is recognised by what its forward does, instruction
for instruction, whoever wrote it: see the spellings at the end.
"""

from functools import cache
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import einsum, nn

from ..forms import Form, drops, unlike, unlike_heads, unlike_layer_norm, unlike_sequence, why_not_swap
from ..known import is_layer_norm, name_of, same_function
from ..modules import (
    FusedAttention,
    FusedFeedForward,
    FusedPreNorm,
    FusedTransformer,
    FusedViT,
    apply,
    idle,
    takes_norm,
    untouched,
)
from ..notes import note
from ..reference import Attention, FeedForward, PreNorm, Transformer
from .blocks import Fused, attend_at_once, attend_packed, feed_forward, lone_linear, not_plain, project

__all__ = ["FusedNormAttention", "FusedNormFeedForward", "form_of"]


class FusedNormAttention(Fused):
    """vit-pytorch's Attention since 1.4, whose LayerNorm is inside. (b,n,dim) -> (b,n,dim)."""

    def forward(self, x):
        dropout = self._modules.get("dropout")
        if not_plain(x):
            why = not_plain(x)
        elif not (untouched(self.attend, nn.Softmax) and self.attend.dim == -1):
            why = "attend is not an untouched softmax over the last dim"
        elif dropout is not None and not idle(dropout):
            why = "dropout drops, or has a hook"
        else:
            y = attend_at_once(x, self.norm, self._linears, self.heads, self.scale)
            if y is not None:
                return y
            qkv = project(self, x, self.norm, self.to_qkv)
            return apply(self.to_out, attend_packed(self, qkv, self.heads, self.scale))
        note(self, why)
        return self.plain.forward(self, x)

    def _linears(self):
        to_out = self.to_out if untouched(self.to_out, nn.Sequential) else (self.to_out,)
        return lone_linear(self.to_qkv), lone_linear(*to_out)


class FusedNormFeedForward(Fused):
    """vit-pytorch's FeedForward since 1.4, whose first layer is a LayerNorm. (...,dim) -> (...,dim)."""

    def forward(self, x):
        if not untouched(self.net, nn.Sequential):
            note(self, "net is not an untouched nn.Sequential")
            return self.plain.forward(self, x)
        norm, *layers = self.net
        return feed_forward(self, x, norm, layers)


# ---------------------------------------------------------------------------------------------------------------------
# Which modules, and why not the others


def form_of(module):
    """The form of the plain blocks, or of vit-pytorch's, that the module's class has; None if it has none of them."""
    form = _form_of(type(module))
    if form is FEED_FORWARD:  # a forward that says nothing of what is in net
        net = module._modules.get("net")
        if isinstance(net, nn.Sequential) and len(net) and is_layer_norm(net[0]):
            return NORM_FEED_FORWARD
    return form


def has_form(cls):
    return _form_of(cls) is not None


@cache
def _form_of(cls):
    for form in PLAIN:
        if cls is form.fused.plain:
            return form
    if cls.__bases__ != (nn.Module,) or cls.__call__ is not nn.Module.__call__:
        return None
    return next((form for form, known in SPELLINGS if any(same_function(cls.forward, s) for s in known)), None)


def _why_not_attention(module):
    to_qkv, to_out = module.to_qkv, module.to_out
    if why_not := unlike("attend", module.attend, nn.Softmax) or unlike("to_qkv", to_qkv, nn.Linear):
        return why_not
    if module.attend.dim != -1:
        return f"attend is a softmax over dim {module.attend.dim}, not -1"
    if to_qkv.bias is not None:
        return "to_qkv has a bias"
    if why_not := unlike_heads(module.heads, "to_qkv", to_qkv.out_features):
        return why_not
    if type(module.scale) is not float:
        return f"scale is a {type(module.scale).__name__}, not a float"
    if "dropout" in module._modules and (why_not := unlike("dropout", module.dropout, nn.Dropout)):
        return why_not
    return None if type(to_out) is nn.Identity else unlike_sequence("to_out", to_out, nn.Linear, nn.Dropout)


def _why_not_norm_attention(module):
    if type(module.to_out) is nn.Linear:  # SimpleViT's
        module = SimpleNamespace(**vars(module) | module._modules | {"to_out": nn.Identity()})
    return unlike_layer_norm("norm", module.norm) or _why_not_attention(module)


def _drops(module):
    dropout = module._modules.get("dropout")
    return drops(dropout.p) if dropout is not None else None


def _why_not_feed_forward(module):
    return unlike_sequence("net", module.net, nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout)


def _why_not_norm_feed_forward(module):
    net = module.net
    if why_not := unlike("net", net, nn.Sequential) or unlike_layer_norm("net.0", net[0]):
        return why_not
    simple = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear)
    kinds = simple if len(net) == len(simple) else (*simple[:3], nn.Dropout, nn.Linear, nn.Dropout)
    return unlike_sequence("net", net, *kinds)


def _why_not_pre_norm(module):
    norm, fn = module.norm, module.fn
    if why_not := unlike_layer_norm("norm", norm):
        return why_not
    form = form_of(fn)
    if takes_norm(fn) or (form in (ATTENTION, FEED_FORWARD) and why_not_swap(fn, form) is None):
        return None
    return f"its fn, {name_of(type(fn))}, cannot be fused, so norm has no Linear to merge with"


POSITIONS = ("pos_embedding", "pos_embedding_rows", "pos_embedding_cols")


def _why_not_transformer(module):
    layers = module.layers
    if any(type(m) is not nn.ModuleList for m in (layers, *layers)) or any(len(layer) != 2 for layer in layers):
        return "its layers are no ModuleList of ModuleLists of two blocks"
    for layer in layers:
        for block in layer:
            form = form_of(block)
            if not isinstance(block, FusedPreNorm) and (form is not PRE_NORM or why_not_swap(block, form) is not None):
                return "not all of its blocks are PreNorm(Attention) and PreNorm(FeedForward)"
    return None


ATTENTION = Form(
    FusedAttention, ("attend", "to_qkv", "to_out"), ("dropout",), _why_not_attention, _drops, skips=("attend", "to_qkv")
)
FEED_FORWARD = Form(FusedFeedForward, ("net",), (), _why_not_feed_forward, skips=("net", "net.0", "net.1"))
PRE_NORM = Form(FusedPreNorm, ("norm", "fn"), (), _why_not_pre_norm, skips=("norm", "fn"))
NORM_ATTENTION = Form(
    FusedNormAttention, ("norm", "attend", "to_qkv", "to_out"), ("dropout",), _why_not_norm_attention, _drops,
    skips=("norm", "attend", "to_qkv"),
)  # fmt: skip
NORM_FEED_FORWARD = Form(
    FusedNormFeedForward, ("net",), (), _why_not_norm_feed_forward, skips=("net", "net.0", "net.1", "net.2")
)
TRANSFORMER = Form(FusedTransformer, ("layers",), (), _why_not_transformer)
VIT = Form(FusedViT, ("to_patch_embedding", "cls_token", "dropout", "transformer", "to_latent", "mlp_head"), POSITIONS)
PLAIN = (ATTENTION, FEED_FORWARD, PRE_NORM, TRANSFORMER, VIT)


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


def _norm_attention_matmul(self, x):
    x = self.norm(x)
    qkv = self.to_qkv(x).chunk(3, dim=-1)
    q, k, v = map(lambda t: rearrange(t, "b n (h d) -> b h n d", h=self.heads), qkv)
    dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
    attn = self.attend(dots)
    out = torch.matmul(attn, v)
    out = rearrange(out, "b h n d -> b n (h d)")
    return self.to_out(out)


def _norm_attention_matmul_dropout(self, x):
    x = self.norm(x)
    qkv = self.to_qkv(x).chunk(3, dim=-1)
    q, k, v = map(lambda t: rearrange(t, "b n (h d) -> b h n d", h=self.heads), qkv)
    dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
    attn = self.attend(dots)
    attn = self.dropout(attn)
    out = torch.matmul(attn, v)
    out = rearrange(out, "b h n d -> b n (h d)")
    return self.to_out(out)


SPELLINGS = (
    (
        ATTENTION,
        (
            Attention.forward,
            _attention_einsum,
            _attention_einsum_dropout,
            _attention_matmul,
            _attention_matmul_dropout,
        ),
    ),
    (FEED_FORWARD, (FeedForward.forward,)),
    (PRE_NORM, (PreNorm.forward, _pre_norm_without_keywords)),
    (TRANSFORMER, (Transformer.forward,)),
    (NORM_ATTENTION, (_norm_attention_matmul, _norm_attention_matmul_dropout)),
)
