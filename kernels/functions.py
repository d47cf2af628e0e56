"""The public functions: what they mean, which arguments they take, and autocast.

Each checks its arguments, so that a mistake is named before anything is computed, and calls one operator of ops.py.
"""

import math

import torch

from . import direct, ops
from .backend import chosen_backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "gelu", "gelu_tanh")
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
MAX_HEADS = 65535  # of a grid's third dim


def _check_tensor(name, t, like_name, like, *, or_float32=False):
    """A supported dtype, that of `like` (or float32 beside a half `like`, if allowed), and the same device."""
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {t.dtype}; allowed are {', '.join(map(str, DTYPES))}: convert it with .to()")
    if t.dtype != like.dtype and not (or_float32 and t.dtype == torch.float32 and like.dtype in HALF):
        raise TypeError(f"{name} has dtype {t.dtype} and {like_name} has {like.dtype}: convert one of them with .to()")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device} and {like_name} on {like.device}: move one of them with .to()")


def _check_heads(heads, head_dim):
    if heads > MAX_HEADS:
        raise ValueError(f"there are {heads} heads; allowed are at most {MAX_HEADS}: make some of them a batch")
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"the head dim is {head_dim}; allowed are {MIN_HEAD_DIM} to {MAX_HEAD_DIM}: use plain PyTorch there"
        )


def _check_scale(scale, head_dim):
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, torch.Tensor) or not -math.inf < scale < math.inf:
        raise ValueError(f"scale is {scale!r}; a finite number is needed: multiply q by a scale that is learned")
    return float(scale)


def _autocast_dtype(x):
    """The dtype that autocast asks for on x's device, or None."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _autocast(dtype, *tensors):
    """Cast as autocast does: every floating-point tensor but float64 ones."""
    return (t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# The public functions


def attention(q, k, v, *, scale=None):
    """softmax(scale q kᵀ) v without an (Nq,Nk) map in memory (Dao et al. 2022, FlashAttention).

    Shapes: q (B,H,Nq,D), k and v (B,H,Nk,D), of any strides -> (B,H,Nq,D), laid out in memory as (B,Nq,H,D), so that
    `.transpose(1, 2).flatten(2)` is free. D is 8 to 256; B, H, Nq and Nk may be 0 (no keys give zeros).
    dtypes: float16, bfloat16, float32, float64, the same for all; sums are in fp32 (float64: fp64). Autocast applies.
    `scale` is a number, D ** -0.5 by default. Differentiable in q, k and v; the backward pass is bitwise repeatable.

    Raises TypeError for dtypes, ValueError for ranks, shapes, devices and scales, RuntimeError for a backend that can't
    run, all before anything is computed.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; it must have 4 dims, (batch, heads, tokens, head dim)"
            )
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; k and v must be alike, "
            "and have q's batch, heads and head dim"
        )
    _check_heads(q.shape[1], q.shape[3])
    scale = _check_scale(scale, q.shape[3])
    dtype = _autocast_dtype(q)
    if dtype is not None:
        q, k, v = _autocast(dtype, q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, t, "q", q)
    return ops.call_attention(q, k, v, scale, chosen_backend(), needs_grad=direct.needs_grad(q, k, v))


def qkv_attention(qkv, heads, *, scale=None):
    """`attention` on the packed output of a ViT's `to_qkv`, read where it lies.

    Shapes: qkv (B,N,3*H*D), split as `chunk(3, -1)` splits it and then into `heads` = H heads -> (B,N,H*D), contiguous.
    Its gradient is one (B,N,3*H*D) tensor. Everything else is as in `attention`.
    """
    if qkv.dim() != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; it must have 3 dims, (batch, tokens, 3 * heads * head dim)"
        )
    if heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"heads is {heads} and qkv's last dim {qkv.shape[2]}; heads must be positive, and the last dim a multiple "
            "of 3 * heads"
        )
    head_dim = qkv.shape[2] // (3 * heads)
    _check_heads(heads, head_dim)
    scale = _check_scale(scale, head_dim)
    dtype = _autocast_dtype(qkv)
    if dtype is not None:
        (qkv,) = _autocast(dtype, qkv)
    _check_tensor("qkv", qkv, "qkv", qkv)
    return ops.call_qkv_attention(qkv, heads, scale, chosen_backend(), needs_grad=direct.needs_grad(qkv))


def layer_norm_linear(x, norm_weight, norm_bias, weight, bias=None, *, eps=1e-5, activation=None):
    """activation(LayerNorm(x) weightᵀ + bias): a ViT's pre-norm and the Linear behind it, in one.

    Shapes: x (...,K), norm_weight and norm_bias (K,), weight (N,K), bias (N,) or None, of any strides -> (...,N).
    dtypes: float16, bfloat16, float32, float64, the same for all, but for what mixed precision needs: x may be float32
    beside half weights (the row is normalised before it is rounded), and norm_weight and norm_bias may be float32
    beside a half x. The result has weight's dtype. Autocast applies to weight and bias.
    `activation` is None, "gelu" (exact, erf) or "gelu_tanh". Differentiable in all five tensors; kept for the backward
    pass are the inputs, the mean and 1/std of each row and, with an activation, what it was applied to.
    The maths: Ba et al. 2016 (LayerNorm), Hendrycks and Gimpel 2016 (GELU).

    Raises TypeError for dtypes, ValueError for shapes, devices, eps and activation, RuntimeError for a backend that
    cannot run, all before anything is computed.
    """
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or weight.shape[1] < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; weight must be (N,K) with K the last dim "
            "of x, and at least 1"
        )
    for name, t, dim in (("norm_weight", norm_weight, 1), ("norm_bias", norm_bias, 1), ("bias", bias, 0)):
        if t is not None and t.shape != weight.shape[dim : dim + 1]:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; beside weight {tuple(weight.shape)} it must be "
                f"({weight.shape[dim]},)"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps!r}; a number of at least 0 is needed")
    dtype = _autocast_dtype(x)
    if dtype is not None:
        weight, bias = _autocast(dtype, weight, bias)
        if x.dtype not in (torch.float32, weight.dtype):
            (x,) = _autocast(dtype, x)
        if norm_weight.dtype not in (torch.float32, x.dtype):
            norm_weight, norm_bias = _autocast(x.dtype, norm_weight, norm_bias)
    _check_tensor("weight", weight, "weight", weight)
    _check_tensor("x", x, "weight", weight, or_float32=True)
    if bias is not None:
        _check_tensor("bias", bias, "weight", weight)
    _check_tensor("norm_weight", norm_weight, "x", x, or_float32=True)
    _check_tensor("norm_bias", norm_bias, "norm_weight", norm_weight)
    needs_grad = direct.needs_grad(x, norm_weight, norm_bias, weight, bias)
    save = activation is not None and needs_grad
    return ops.call_layer_norm_linear(
        x, norm_weight, norm_bias, weight, bias, eps, activation, save, chosen_backend(), needs_grad=needs_grad
    )
