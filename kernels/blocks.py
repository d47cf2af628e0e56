"""A ViT's pre-norm blocks in training on a CPU, each in one autograd.Function, of native.py's functions.

    attention_block      y = Linear(attention(Linear(LayerNorm(x))))
    feed_forward_block   y = Linear(GELU(Linear(LayerNorm(x))))

They are what the public functions and F.linear give, one after the other, each of which costs tens of microseconds in
Python and in autograd, as long as a product of a small ViT takes, and copies what the next one copies again. Kept for
the backward pass: the inputs (and what autocast cast of them), q, k and v, what attention gives, what GELU takes and
gives. Nothing is checked here: see vit/at_once.py.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from . import native
from .backend import chosen_backend, takes_triton
from .direct import DIRECT, watching
from .packed import GELU, linear

__all__ = ["attention_block", "dtype_of_block", "feed_forward_block"]


def dtype_of_block(x):
    """The dtype of the products of a block that takes x past all calls: x's, or autocast's.

    None where that may not be: something watches operators, or x is empty, of another class, device or dtype.
    """
    if watching() or type(x) is not torch.Tensor or not x.is_cpu or x.dtype not in DIRECT or not x.numel():
        return None
    if takes_triton(chosen_backend(), x):
        return None
    if not torch._C._is_any_autocast_enabled():
        return x.dtype
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return torch.bfloat16
    return None


def attention_block(*inputs, heads, scale, eps, dtype):
    """x (B,N,K), N from 2, norm_weight, norm_bias, weight (3*H*D,K), bias, out_weight (M,H*D), out_bias -> (B,N,M).

    All in x's dtype, biases may be None; `dtype` is that of the products. Differentiable in all seven.
    """
    return _AttentionBlock.apply(dtype, eps, (heads, scale), *inputs)


def feed_forward_block(*inputs, activation, eps, dtype):
    """x (...,K), norm_weight, norm_bias, weight (N,K), bias, out_weight (M,N), out_bias -> (...,M), as above."""
    return _FeedForwardBlock.apply(dtype, eps, activation, *inputs)


def _without_autocast():
    return torch.autocast("cpu", enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        return _forward(ctx, None, _attention, *args)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad, _attention_backward, _attention_formula)


class _FeedForwardBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        return _forward(ctx, native.feed_forward_training, _gelu, *args)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad, _gelu_backward, _gelu_formula)


def _forward(ctx, whole, between, dtype, eps, how, *inputs):
    """y; between(z, how, last weight, last bias) gives what the last Linear takes, and what is kept for backward.

    whole, or None, makes all of it: y, what is kept, and what the last Linear took; or None where it cannot.
    """
    x, norm_weight, norm_bias, *parameters = inputs
    with _without_autocast():
        if dtype != x.dtype:
            parameters = [p if p is None else p.to(dtype) for p in parameters]
        weight, bias, out_weight, out_bias = parameters
        found = whole(*inputs, activation=how, eps=eps) if whole and dtype == x.dtype else None
        if found:
            y, *kept, hidden = found
        else:
            if dtype == x.dtype:
                z = native.layer_norm_linear_inference(x, norm_weight, norm_bias, weight, bias, eps, may_pack=False)
            else:
                normed = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)[0].to(dtype)
                z = linear(normed, weight, bias, may_pack=False)
            hidden, kept = between(z, how, out_weight, out_bias)
            y = linear(hidden, out_weight, out_bias, may_pack=False)
    cast = (weight, out_weight) if dtype != x.dtype else ()
    ctx.save_for_backward(*inputs, hidden, *cast, *kept)
    ctx.dtype, ctx.eps, ctx.how = dtype, eps, how
    ctx.set_materialize_grads(False)
    return y


def _backward(ctx, grad, backward_between, formula):
    """The gradients of _forward's arguments.

    backward_between(that of hidden, hidden, kept, how, the dtype of its sums over rows or None) gives that of z, and
    those sums or None.
    """
    if grad is None:
        return (None,) * 10
    needs, saved = ctx.needs_input_grad[3:], ctx.saved_tensors
    if torch.is_grad_enabled() or watching() or torch._C._functorch.is_legacy_batchedtensor(grad):
        # a gradient of this gradient may be to come, or this is a batch of them
        return None, None, None, *_backward_of_formula(ctx, grad, needs, saved[:7], formula)
    x, norm_weight, norm_bias, weight, _, out_weight, _, hidden, *kept = saved
    if ctx.dtype != x.dtype:
        weight, out_weight, *kept = kept
    with _without_autocast():
        dhidden, dout_weight, dout_bias = native.linear_backward(
            grad.contiguous(), hidden, out_weight, any(needs[:5]), *needs[5:]
        )
        if dhidden is None:
            return *(None,) * 8, dout_weight, dout_bias
        dz, dbias = backward_between(dhidden, hidden, kept, ctx.how, x.dtype if needs[4] else None)
        needs = *needs[:4], needs[4] and dbias is None
        *grads, again = native.norm_linear_backward(dz, x, norm_weight, norm_bias, weight, None, None, ctx.eps, needs)
        grads.append(again if dbias is None else dbias)
    return None, None, None, *grads, dout_weight, dout_bias


def _backward_of_formula(ctx, grad, needs, inputs, formula):
    """The gradients of the seven inputs, differentiable, through plain PyTorch; formula(z, how) is `between` in it."""
    with torch.enable_grad(), _without_autocast():
        x, norm_weight, norm_bias, *parameters = inputs
        normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, ctx.eps).to(ctx.dtype)
        weight, bias, out_weight, out_bias = (p if p is None else p.to(ctx.dtype) for p in parameters)
        y = F.linear(formula(F.linear(normed, weight, bias), ctx.how), out_weight, out_bias)
        wrt = [t for t, need in zip(inputs, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wrt, grad, create_graph=True))
    return [next(grads) if need else None for need in needs]


def _attention(qkv, how, *_):
    return native.qkv_attention_training(qkv, *how)


def _attention_backward(grad, out, kept, how, _):
    return native.qkv_attention_training_backward(grad, out, kept, *how), None


def _attention_formula(qkv, how):
    heads, scale = how
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    dots = torch.matmul(q, k.transpose(-1, -2)) * scale
    return torch.matmul(dots.softmax(dim=-1), v).transpose(1, 2).flatten(2)


def _gelu(z, activation, *out):
    return native.gelu_training(z, activation, *out), (z,)


def _gelu_backward(grad, _, kept, activation, sums_dtype):
    return native.gelu_training_backward(grad, *kept, activation, sums_dtype)


def _gelu_formula(z, activation):
    return F.gelu(z, approximate=GELU[activation])
