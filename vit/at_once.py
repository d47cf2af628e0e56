"""A pre-norm block on a CPU in one step, past the calls of its modules: what all fused blocks share.

Where autograd is to keep something it is one autograd.Function, else one call of what kernels/compiled.py compiles, or
two or three functions of kernels/native.py: the numbers of the modules called one after the other, in fewer calls.
"""

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..kernels import compiled
from ..kernels.blocks import attention_block, feed_forward_block
from ..kernels.direct import needs_grad
from ..kernels.functions import MAX_HEAD_DIM, MIN_HEAD_DIM
from ..kernels.native import (
    compiled_attention,
    compiled_feed_forward,
    layer_norm_linear_inference,
    qkv_attention_inference,
)
from ..kernels.packed import linear

__all__ = ["PLAIN_TENSORS", "all_plain", "attention_at_once", "feed_forward_at_once", "fits_heads", "parameters_of"]

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)  # the last under torch.export; other subclasses act as they like


def parameters_of(module):
    """The weight and the bias of a Linear or a LayerNorm, None for each that it has not; None for both where they are
    no parameters, such as the views of one that FSDP1 puts in their place."""
    own = module._parameters  # by attribute each takes a microsecond
    return (own.get("weight"), own["bias"]) if "bias" in own else (None, None)


def all_plain(x, norm, *parameters):
    """Those of norm, a LayerNorm of x's last dim, and `parameters`, weights and biases of Linears, the first behind it;
    None where one is no plain tensor like x."""
    k, dtype = x.shape[-1], x.dtype
    parameters = *parameters_of(norm), *parameters
    for p in parameters:
        if p is not None and (type(p) not in PLAIN_TENSORS or p.dtype != dtype or not p.is_cpu):
            return None
    norm_weight, norm_bias, weight, *_ = parameters
    if norm_bias is None or any(w is None for w in parameters[::2]):
        return None
    return parameters if norm_weight.shape == (k,) and weight.shape[1] == k else None


def fits_heads(x, features, heads):
    """Whether x is (B,N,K), and so many features are q, k and v of so many heads, of a dim that the functions take."""
    head_dim, rest = divmod(features, 3 * heads)
    return x.dim() == 3 and not rest and MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM


def attention_at_once(x, parameters, *, heads, scale, eps, dtype):
    """Linear(attention(Linear(LayerNorm(x)))), x (B,N,K), with products in the dtype_of_block; None where it cannot be.

    `parameters` are all_plain; without the last two there is no Linear at the end.
    """
    if not fits_heads(x, len(parameters[2]), heads):
        return None
    if needs_grad(x, *parameters):
        if not parameters[4:] or min(x.shape[1:]) < 2 or dtype == torch.float16:
            return None
        return attention_block(x, *parameters, heads=heads, scale=scale, eps=eps, dtype=dtype)
    if dtype != x.dtype:
        return None
    if block := compiled_attention(x, *parameters, heads=heads, scale=scale, eps=eps):
        return compiled.blocks(x, [block])
    y = qkv_attention_inference(layer_norm_linear_inference(x, *parameters[:4], eps), heads, scale)
    return linear(y, *parameters[4:]) if parameters[4:] else y


def feed_forward_at_once(x, parameters, *, activation, eps, dtype):
    """The same for Linear(act(Linear(LayerNorm(x)))), x (...,K)."""
    if needs_grad(x, *parameters):
        if x.shape[-1] < 2 or dtype == torch.float16:
            return None
        return feed_forward_block(x, *parameters, activation=activation, eps=eps, dtype=dtype)
    if dtype != x.dtype:
        return None
    if block := compiled_feed_forward(x, *parameters, activation=activation, eps=eps):
        return compiled.blocks(x, [block])
    return linear(layer_norm_linear_inference(x, *parameters[:4], eps, activation), *parameters[4:])
