"""Drop-ins for the plain blocks, on the fused functions of vitriton.kernels.

Each is its plain block with another forward: the same arguments, parameters, state_dict keys, submodules and dropout.
Where a submodule that the fused call would skip is not what it was (a hook, a forward of its own, another class: LoRA,
quantised, parametrised; pruned Linears and those that fully_shard shards by themselves have hooks), or a tensor is of
another class (DTensor), the modules are called one by one as in the plain block, so hooks see what they always saw.
A hook on every module (torch.nn.modules.module.register_module_forward_hook, torch's FlopCounterMode) counts as such.
"""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import compiled, layer_norm_linear, qkv_attention
from ..kernels.blocks import dtype_of_block
from ..kernels.direct import direct, direct_layer_norm_linear, linear, needs_grad
from ..kernels.native import compiled_attention, compiled_feed_forward
from ..kernels.packed import forget
from . import record
from .at_once import PLAIN_TENSORS, all_plain, attention_at_once, feed_forward_at_once, fits_heads, parameters_of
from .known import is_layer_norm
from .notes import NOT_MERGED, note
from .reference import Attention, FeedForward, PreNorm, Transformer, ViT

__all__ = ["FusedAttention", "FusedFeedForward", "FusedPreNorm", "FusedTransformer", "FusedViT"]

LOOKED_AT = "something looks at the attention weights, or changes them"
ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}  # nn.GELU's approximate -> layer_norm_linear's activation


class _Packs:
    """A block that gives copies of its weights, which are for a CPU, back when they are cast or moved."""

    def _apply(self, *args, **kwargs):
        forget(*self.parameters())
        return super()._apply(*args, **kwargs)


class FusedAttention(_Packs, Attention):
    """`Attention` that makes no n x n map. (b, n, dim) -> (b, n, dim); head dims 8 to 256.

    `norm`, if given, is a LayerNorm to apply to x first, in the same kernel as `to_qkv`. Raises what `qkv_attention`
    raises, ValueError for another head dim among it.
    """

    plain = Attention  # whose forward holds wherever this one cannot replace it

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        if type(x) not in PLAIN_TENSORS or not self._only_softmax():
            note(self, LOOKED_AT if type(x) in PLAIN_TENSORS else f"its input is a {type(x).__name__}")
            return self.plain.forward(self, x if norm is None else norm(x))
        qkv = None if norm is None else merged(x, norm, self.to_qkv)
        if qkv is None:
            if norm is not None:
                note(self, NOT_MERGED)
            qkv = self.to_qkv(x if norm is None else norm(x))
        if record.active:
            record.observe_qkv(self, qkv, self.heads, self.scale)
        return apply(self.to_out, qkv_attention(qkv, self.heads, scale=self.scale))

    def parts(self, x, norm):
        """The parameters of norm and of this block, if self(x, norm) is surely a function of x and them; else None."""
        modules = self._modules
        attend, to_qkv, to_out = modules["attend"], modules["to_qkv"], modules["to_out"]
        kinds, leaves, linears = IN_ATTENTION, [norm, attend, to_qkv, to_out], [to_qkv]
        if type(to_out) is nn.Sequential:
            kinds = IN_ATTENTION_WITH_OUT
            leaves += to_out._modules.values()
            linears += leaves[4:5]
        dropout = modules.get("dropout")
        if not all_bare(kinds, leaves) or attend.dim != -1 or not (dropout is None or idle(dropout)):
            return None
        return all_plain(x, norm, *chain.from_iterable(map(parameters_of, linears)))

    def directly(self, x, norm, dtype):
        """self(x, norm), with products in the dtype_of_block, past all calls; None where it is not surely the same."""
        parameters = self.parts(x, norm)
        if parameters is None:
            return None
        return attention_at_once(x, parameters, heads=self.heads, scale=self.scale, eps=norm.eps, dtype=dtype)

    def compiled(self, x, norm, parameters):
        """The block of kernels/compiled.py that is this one, with these `parts`; None if there is none."""
        if not fits_heads(x, len(parameters[2]), self.heads):
            return None
        return compiled_attention(x, *parameters, heads=self.heads, scale=self.scale, eps=norm.eps)

    def _only_softmax(self):
        """Whether nothing but softmax stands between the scores and their product with v, and nobody looks at it."""
        attend = self.attend
        if not (untouched(attend, nn.Softmax) and attend.dim == -1):
            return False
        dropout = self._modules.get("dropout")  # vit-pytorch 1.0 to 1.3 drops attention weights while training
        return dropout is None or idle(dropout)


class FusedFeedForward(_Packs, FeedForward):
    """`FeedForward` that can take a LayerNorm in. (..., dim) -> (..., dim).

    `norm`, if given, is a LayerNorm to apply to x first, in the same kernel as the first Linear and GELU. Without it
    there is nothing to fuse, and this is the plain block.
    """

    plain = FeedForward

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        if norm is None:
            return self.plain.forward(self, x)
        hidden = None
        if untouched(self.net, nn.Sequential):
            first, gelu, *rest = self.net
            if untouched(gelu, nn.GELU):
                hidden = merged(x, norm, first, ACTIVATIONS[gelu.approximate])
        if hidden is None:
            note(self, NOT_MERGED)
            return self.plain.forward(self, norm(x))
        for module in rest:
            hidden = apply(module, hidden)
        return hidden

    def parts(self, x, norm):
        """The parameters of norm and of this block, if self(x, norm) is surely a function of x and them; else None."""
        net = self._modules["net"]
        leaves = (norm, net, *net._modules.values())
        if not all_bare(IN_FEED_FORWARD, leaves):
            return None
        return all_plain(x, norm, *parameters_of(leaves[2]), *parameters_of(leaves[5]))

    def directly(self, x, norm, dtype):
        """self(x, norm), with products in the dtype_of_block, past all calls; None where it is not surely the same."""
        parameters = self.parts(x, norm)
        if parameters is None:
            return None
        return feed_forward_at_once(x, parameters, activation=self._activation(), eps=norm.eps, dtype=dtype)

    def compiled(self, x, norm, parameters):
        """The block of kernels/compiled.py that is this one, with these `parts`; None if there is none."""
        return compiled_feed_forward(x, *parameters, activation=self._activation(), eps=norm.eps)

    def _activation(self):
        return ACTIVATIONS[self._modules["net"]._modules["1"].approximate]


class FusedPreNorm(PreNorm):
    """`PreNorm` that hands its LayerNorm to `fn`, if that is a block of this file. (..., dim) -> (..., dim).

    Around any other `fn`, with keyword arguments for it, or where a hook on `fn` would miss the normalised x, it is
    the plain block.
    """

    plain = PreNorm

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        fn = self.fn
        if kwargs or not takes_norm(fn) or not untouched(fn, type(fn)):
            note(self, "fn is no fused block, has a hook, or was given keyword arguments")
            return self.plain.forward(self, x, **kwargs)
        dtype = None if record.active else dtype_of_block(x)
        if dtype is not None:
            y = fn.directly(x, self.norm, dtype)
            if y is not None:
                return y
        return fn(x, norm=self.norm)


class FusedTransformer(Transformer):
    """`Transformer` whose blocks, if fused, are one call where nothing is to be differentiated on a CPU.

    (b, n, dim) -> (b, n, dim). Anywhere else, and where a hook would miss its input, the blocks are called one by one.
    """

    plain = Transformer

    def forward(self, x: Tensor) -> Tensor:
        if blocks := self.compiled(x):
            return compiled.blocks(x, blocks, residual=True)
        return self.plain.forward(self, x)

    def first_token(self, x: Tensor) -> Tensor:
        """self(x)[:, 0], (b, dim), without the last feed forward of all other tokens, unless a hook would miss them.

        Where the blocks are one call, without the last queries of these as well: they give only keys and values.
        """
        if type(x) not in PLAIN_TENSORS or not untouched(self, type(self)) or not len(self.layers):
            return self(x)[:, 0]
        blocks = self.compiled(x)
        if blocks and blocks[-2].heads and not blocks[-1].heads:
            return compiled.blocks(x, blocks, residual=True, first=True)
        last = self.layers[-1][1]
        if not is_feed_forward(last, x):
            return self(x)[:, 0]
        for attn, ff in self.layers:
            x = attn(x) + x
            if ff is last:
                x = x[:, :1]
            x = ff(x) + x
        return x[:, 0]

    def compiled(self, x):
        """The blocks of kernels/compiled.py that are this module's; None where one has none, or is not surely one."""
        if record.active or dtype_of_block(x) != x.dtype:
            return None
        layers = self._modules["layers"]
        if any(type(module) is not nn.ModuleList for module in (layers, *layers._modules.values())):
            return None
        blocks = []
        for layer in layers._modules.values():
            for pre_norm in layer._modules.values():
                parameters = bare_parts(pre_norm, x)
                if parameters is None or needs_grad(x, *parameters):
                    return None
                block = pre_norm._modules["fn"].compiled(x, pre_norm._modules["norm"], parameters)
                if block is None or parameters[-2].shape[0] != x.shape[-1]:
                    return None
                blocks.append(block)
        return blocks


class FusedViT(ViT):
    """`ViT` whose patches and head take the faster Linear as well. (b, channels, height, width) -> (b, num_classes)."""

    plain = ViT

    def forward(self, img: Tensor) -> Tensor:
        if img.ndim != 4 or img.shape[1:] != self.image_shape:
            return self.plain.forward(self, img)  # which says what is wrong
        x = apply(self.to_patch_embedding, img)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x += self.positions()
        x = self.dropout(x)
        if self.pool == "mean":
            x = self.transformer(x).mean(dim=1)
        elif type(self.transformer).forward is FusedTransformer.forward:
            x = self.transformer.first_token(x)
        else:
            x = self.transformer(x)[:, 0]
        return apply(self.mlp_head, self.to_latent(x))


def bare_parts(pre_norm, x):
    """The `parts` of what a FusedPreNorm holds; None where it is none, or has a hook, as has its `fn`, or these do."""
    kind = type(pre_norm)
    if kind.forward is not FusedPreNorm.forward or not all_bare((kind,), (pre_norm,)):
        return None
    norm, fn = pre_norm._modules["norm"], pre_norm._modules["fn"]
    return fn.parts(x, norm) if takes_norm(fn) and all_bare((type(fn),), (fn,)) else None


def is_feed_forward(pre_norm, x):
    """Whether a block of x is surely feed forward, each token by itself, in which no hook sees one."""
    return bare_parts(pre_norm, x) is not None and isinstance(pre_norm.fn, FeedForward)


def takes_norm(module):
    """Whether `module` is a block of this file, or a subclass that kept its forward."""
    return type(module).forward in (FusedAttention.forward, FusedFeedForward.forward)


IN_FEED_FORWARD = (nn.LayerNorm, nn.Sequential, nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout)
IN_ATTENTION = (nn.LayerNorm, nn.Softmax, nn.Linear, nn.Identity)
IN_ATTENTION_WITH_OUT = (nn.LayerNorm, nn.Softmax, nn.Linear, nn.Sequential, nn.Linear, nn.Dropout)


def all_bare(kinds, modules):
    """Whether modules are of these kinds and `untouched`, but for hooks on every module, and Dropouts idle."""
    if len(kinds) != len(modules):
        return False
    for kind, module in zip(kinds, modules, strict=True):
        own = module.__dict__
        if (
            type(module) is not kind
            or own["_forward_hooks"] or own["_forward_pre_hooks"]
            or own["_backward_hooks"] or own["_backward_pre_hooks"]
            or "forward" in own
            or (kind is nn.Dropout and own["training"] and own["p"])
        ):  # fmt: skip
            return False
    return True


def untouched(module, kind):
    """Whether `module` is a `kind` and no subclass of it, with no hook on it and no forward of its own."""
    return (
        type(module) is kind
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
    )


def idle(module):
    """Whether `module` is a Dropout that drops nothing."""
    return untouched(module, nn.Dropout) and not (module.training and module.p)


def is_bare_norm(module):
    """Whether `module` is a LayerNorm of the last dim, with nothing on it."""
    return is_layer_norm(module) and untouched(module, type(module)) and len(module.normalized_shape) == 1


def merged(x, norm, fn, activation=None):
    """activation(fn(norm(x))) in one call, fn being a Linear; None where that is not surely the same."""
    if not untouched(fn, nn.Linear):
        return None
    return merged_with(x, norm, *parameters_of(fn), activation)


def merged_with(x, norm, weight, bias, activation=None):
    """activation(norm(x) weightᵀ + bias) in one call; None where that is not surely the same."""
    if not is_bare_norm(norm):
        return None
    norm_weight, norm_bias = parameters_of(norm)
    if not (type(norm_weight) in PLAIN_TENSORS and type(norm_bias) in PLAIN_TENSORS and type(weight) in PLAIN_TENSORS):
        return None
    if direct(x):
        y = direct_layer_norm_linear(x, norm_weight, norm_bias, weight, bias, norm.eps, activation)
        if y is not None:
            return y
    return layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps=norm.eps, activation=activation)


def apply(module, x):
    """module(x), past what calls it where that is surely the same: a Linear's fastest way, a Dropout that is idle."""
    if untouched(module, nn.Sequential):
        for child in module:
            x = apply(child, x)
        return x
    if untouched(module, nn.Linear):
        weight, bias = parameters_of(module)
        if type(weight) in PLAIN_TENSORS and type(bias) in PLAIN_TENSORS:
            return linear(x, weight, bias)
    elif idle(module):
        return x
    return module(x)
