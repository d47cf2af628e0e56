"""The functions on a CPU, and on any device that has no Triton, from PyTorch's own fused operators.

The same contracts as the Triton kernels: `attention_*` and `layer_norm_linear_*` take and return what their namesakes
in attention.py and prenorm.py do, so that ops.py can choose either. Attention is in native_attention.py.
"""

from functools import cache

import torch
import torch.nn.functional as F

from . import compiled, packed
from .gradients import input_grad, weight_grad
from .launch import accumulator
from .native_attention import (
    attention_backward,
    attention_forward,
    choice,
    heads_apart,
    images_by_products,
    qkv_attention_backward,
)
from .packed import GELU, is_compiled, linear

__all__ = [
    "attention_backward",
    "attention_forward",
    "compiled_attention",
    "compiled_feed_forward",
    "feed_forward_training",
    "gelu_training",
    "gelu_training_backward",
    "heads_apart",
    "images_by_products",
    "layer_norm_linear_backward",
    "layer_norm_linear_forward",
    "layer_norm_linear_inference",
    "linear_backward",
    "norm_linear_backward",
    "qkv_attention_backward",
    "qkv_attention_inference",
    "qkv_attention_training",
    "qkv_attention_training_backward",
]

_gelu_backward_into = torch.ops.aten.gelu_backward.grad_input


def layer_norm(x, norm_weight, norm_bias, eps):
    """LayerNorm of x (...,K) in x's dtype, and mean and rstd (...,1) in fp32 (fp64 for fp64)."""
    acc = accumulator(x.dtype)
    if norm_weight.dtype != acc:  # in which PyTorch keeps the statistics
        norm_weight, norm_bias = norm_weight.to(acc), norm_bias.to(acc)
    if x.dtype != torch.float64 and x.shape[-1] > 1:
        return torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    # centring twice takes away what the rounding of a large mean leaves: fp64 promises that, and of K = 1 it is all
    shift = x.mean(dim=-1, keepdim=True)
    normed, mean, rstd = torch.native_layer_norm(x - shift, x.shape[-1:], norm_weight, norm_bias, eps)
    return normed, mean + shift, rstd


def layer_norm_linear_forward(
    x, norm_weight, norm_bias, weight, bias, eps, activation, save_preactivation, *, may_pack=True
):
    """x (...,K), weight (N,K) -> y (...,N), its pre-activation (...,N) or None, mean and rstd, of a row each."""
    if _of_one_dtype(x, norm_weight, norm_bias, weight) and _are_compiled(x, norm_weight, norm_bias, (weight, bias)):
        mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))  # results share no memory
        how = {"statistics": (mean, rstd), "activation": None if save_preactivation else activation}
        y = compiled.blocks(x, [compiled.block((norm_weight, norm_bias, eps), (weight, bias), **how)])
        z = y if save_preactivation else None
        return y if z is None or activation is None else compiled.gelu(z, activation), z, mean, rstd
    normed, mean, rstd = layer_norm(x, norm_weight, norm_bias, eps)
    if normed.dtype != weight.dtype:
        normed = normed.to(weight.dtype)
    if activation is None or not save_preactivation:
        return linear(normed, weight, bias, activation, may_pack=may_pack), None, mean, rstd
    z = linear(normed, weight, bias, may_pack=False)
    return F.gelu(z, approximate=GELU[activation]), z, mean, rstd


def _of_one_dtype(x, *tensors):
    return x.is_cpu and x.numel() > 0 and all(t.dtype == x.dtype for t in tensors)


def _are_compiled(x, norm_weight, norm_bias, *linears):
    """Whether a LayerNorm of x, which is not empty, and these Linears behind it are a block of compiled.py, which is
    faster."""
    vectors = norm_weight, norm_bias
    return all(v.shape == x.shape[-1:] and v.is_contiguous() for v in vectors) and is_compiled(x, *linears)


def layer_norm_linear_backward(
    grad, x, norm_weight, norm_bias, weight, bias, z, mean, rstd, eps, activation, need_dx, need_dw
):
    """grad, z (...,N), x (...,K) -> dx (...,K) or None, (dnorm_weight, dnorm_bias, dweight, dbias) or None."""
    if activation is not None:
        grad = torch.ops.aten.gelu_backward.default(grad, z, approximate=GELU[activation])
    needs = need_dx, need_dw, need_dw, need_dw, need_dw and bias is not None
    mean, rstd = (t.view(*x.shape[:-1], 1) for t in (mean, rstd))
    dx, *dw = norm_linear_backward(grad, x, norm_weight, norm_bias, weight, mean, rstd, eps, needs)
    if need_dx and dx.dtype != x.dtype:
        dx = dx.to(x.dtype)
    if need_dw and dw[0].dtype != norm_weight.dtype:
        dw[:2] = (t.to(norm_weight.dtype) for t in dw[:2])
    return dx, tuple(dw) if need_dw else None


def norm_linear_backward(grad, x, norm_weight, norm_bias, weight, mean, rstd, eps, needs):
    """The gradients of layer_norm_linear's x, norm_weight, norm_bias, weight and bias, without an activation.

    grad (...,N), x (...,K), mean and rstd (...,1), or None; `needs` says which; None where not needed. The gradients of
    x, norm_weight and norm_bias may be in the dtype that mean has.
    """
    need_dx, *need_norm, need_dweight, need_dbias = needs
    need_norm, k = any(need_norm), x.shape[-1]
    grad = grad.reshape(x.numel() // k, weight.shape[0])
    dy = None
    if need_dx or need_norm:
        # of one column, PyTorch's product sums term by term, and errs more
        dy = input_grad(grad, weight) if k > 1 else (grad * weight.t()).sum(1, keepdim=True)
        dy = dy.view(x.shape)
    in_bf16 = x.is_cpu and x.dtype == weight.dtype == torch.bfloat16 and k > 1 and x.numel()
    backward = _bf16_norm_backward if in_bf16 else _norm_backward
    if _compiles_norm(x, norm_weight, norm_bias, weight):
        backward = _compiled_norm_backward
        if dy is None:
            dy = weight.new_empty(x.shape)  # nothing that is needed depends on it
    dx, dnorm_weight, dnorm_bias, normed = backward(
        dy, x, norm_weight, norm_bias, mean, rstd, eps, need_dx, need_norm, need_dweight
    )
    dweight = None
    if need_dweight:
        if normed.dtype != weight.dtype:
            normed = normed.to(weight.dtype)
        dweight = weight_grad(grad, normed.view(len(grad), k))
    return dx, dnorm_weight, dnorm_bias, dweight, grad.sum(0) if need_dbias else None


def _compiles_norm(x, norm_weight, norm_bias, weight):
    dtypes = norm_weight.dtype, norm_bias.dtype, x.dtype
    return (
        x.is_cpu
        and x.numel() > 0
        and x.dtype in compiled.DTYPES
        and dtypes == (x.dtype,) * 3
        and (weight.dtype == x.dtype or (x.dtype, weight.dtype) == (torch.float32, torch.bfloat16))
        and _may_compile(x.dtype)
    )


def _may_compile(dtype):
    return packed.forced in ("auto", "compiled") and compiled.why_not(dtype) is None


def _compiled_norm_backward(dy, x, norm_weight, norm_bias, mean, rstd, eps, *needs):
    """`_norm_backward` by cpu_norm.cpp, which makes mean and rstd again; LayerNorm of x is in dy's dtype."""
    return compiled.norm_backward(dy, x, norm_weight, norm_bias, eps, *needs)


def _norm_backward(dy, x, norm_weight, norm_bias, mean, rstd, eps, need_dx, need_norm, need_normed):
    """dy, x (...,K) -> the gradients of x, norm_weight and norm_bias, and LayerNorm of x; None where not needed."""
    acc, k = accumulator(x.dtype), x.shape[-1]
    gamma, beta = (norm_weight, norm_bias) if norm_weight.dtype == acc else (norm_weight.to(acc), norm_bias.to(acc))
    dx = dnorm_weight = dnorm_bias = normed = None
    if need_normed or mean is None:
        normed, mean, rstd = layer_norm(x, gamma, beta, eps)
    if need_dx or need_norm:
        if dy.dtype != acc:  # PyTorch's operator sums in its inputs' dtype
            dy = dy.to(acc)
        # its sums would cancel where |mean| is large beside the spread: it gets rows whose mean is 0, in dtype acc
        rows, mean = x - mean, torch.zeros_like(mean)
        if acc == torch.float64:
            rows -= rows.mean(dim=-1, keepdim=True)
        dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward.default(
            dy, rows, (k,), mean, rstd, gamma, beta, [need_dx, need_norm, need_norm]
        )
    return dx, dnorm_weight, dnorm_bias, normed


def _bf16_norm_backward(dy, x, norm_weight, norm_bias, mean, rstd, eps, need_dx, need_norm, need_normed):
    """The same for bf16, with fewer copies in fp32: the operator above sums dnorm_weight and dnorm_bias in bf16, and
    that of a BatchNorm of x̂ in fp32, which with mean 0 and variance 1 are the same sums."""
    k = x.shape[-1]
    zeros, ones = _zeros_and_ones(k)
    dx = dnorm_weight = dnorm_bias = normed = None
    xhat, mean, rstd = torch.native_layer_norm(x, (k,), ones, zeros, eps)  # mean and rstd in fp32, as these are
    if need_dx:
        gamma = norm_weight if norm_weight.dtype == torch.float32 else norm_weight.float()
        dx = torch.ops.aten.native_layer_norm_backward.default(
            dy, x, (k,), mean, rstd, gamma, None, [True, False, False]
        )[0]
    if need_norm:
        _, dnorm_weight, dnorm_bias = torch.ops.aten.native_batch_norm_backward.default(
            dy.view(-1, k), xhat.view(-1, k), ones, zeros, ones, None, None, False, 0.0, [False, True, True]
        )
    if need_normed:
        normed = torch.addcmul(norm_bias, xhat, norm_weight)
    return dx, dnorm_weight, dnorm_bias, normed


@cache
def _zeros_and_ones(k):
    return torch.zeros(k), torch.ones(k)


def linear_backward(grad, x, weight, need_dx, need_dweight, need_dbias):
    """The gradients of Linear's x (...,K), weight (N,K) and bias, given grad (...,N); None where not needed."""
    grad, x = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    return (
        input_grad(grad, weight) if need_dx else None,
        weight_grad(grad, x) if need_dweight else None,
        grad.sum(0) if need_dbias else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# For blocks in inference: see direct.py. The bits are those of the functions above.


def layer_norm_linear_inference(x, norm_weight, norm_bias, weight, bias, eps, activation=None, *, may_pack=True):
    """y of layer_norm_linear_forward, all tensors being in x's dtype, fp32, bf16 or fp16."""
    k = x.shape[-1]
    if _are_compiled(x, norm_weight, norm_bias, (weight, bias)):
        norm = norm_weight, norm_bias, eps
        return compiled.blocks(x, [compiled.block(norm, (weight, bias), activation=activation)])
    if k == 1:
        return layer_norm_linear_forward(x, norm_weight, norm_bias, weight, bias, eps, activation, False)[0]
    normed = torch.native_layer_norm(x, (k,), norm_weight, norm_bias, eps)[0]
    return linear(normed, weight, bias, activation, may_pack=may_pack)


def compiled_attention(x, norm_weight, norm_bias, weight, bias, out_weight=None, out_bias=None, *, heads, scale, eps):
    """The block of compiled.py for Linear(attention(Linear(LayerNorm(x)))), x (B,N,K); None where it is none.

    It holds for any x of this shape and dtype, as long as the parameters are where they are. weight is (3*H*D,K).
    """
    if out_weight is None or not choice(x.dtype).compiled:
        return None
    if not compiled.takes(x.dtype, weight.shape[0] // 3, out_weight, out_bias):
        return None
    if not _are_compiled(x, norm_weight, norm_bias, (weight, bias)):
        return None
    norm, first, second = (norm_weight, norm_bias, eps), (weight, bias), (out_weight, out_bias)
    return compiled.block(norm, first, second, heads=heads, scale=scale)


def compiled_feed_forward(x, norm_weight, norm_bias, weight, bias, out_weight, out_bias, *, activation, eps):
    """The same for Linear(act(Linear(LayerNorm(x)))), x (...,K)."""
    first, second = (weight, bias), (out_weight, out_bias)
    if not _are_compiled(x, norm_weight, norm_bias, first, second):
        return None
    return compiled.block((norm_weight, norm_bias, eps), first, second, activation=activation)


def qkv_attention_inference(qkv, heads, scale):
    """qkv (B,N,3*H*D), contiguous -> out (B,N,H*D)."""
    return _inside(attention_forward(*_apart(qkv, heads), scale, with_lse=False)[0])


# ---------------------------------------------------------------------------------------------------------------------
# For blocks in training: see blocks.py. N is 2 at least.


def feed_forward_training(x, norm_weight, norm_bias, weight, bias, out_weight, out_bias, *, activation, eps):
    """Linear(act(z)), z = Linear(LayerNorm(x)), and z and act(z), from one call; None where there is none."""
    first, second = (weight, bias), (out_weight, out_bias)
    if weight.shape[0] % compiled.PANEL or not _are_compiled(x, norm_weight, norm_bias, first, second):
        return None
    hidden = [x.new_empty(*x.shape[:-1], weight.shape[0]) for _ in range(2)]
    if any(t.data_ptr() % compiled.LINE for t in hidden):
        return None
    block = compiled.block((norm_weight, norm_bias, eps), first, second, hidden=hidden, activation=activation)
    return compiled.blocks(x, [block]), *hidden


def gelu_training(z, activation, weight, bias):
    """GELU of z (...,K), as it stands before the Linear by weight (N,K) in inference."""
    if is_compiled(z, (weight, bias)):
        return compiled.gelu(z, activation)
    return F.gelu(z, approximate=GELU[activation])


def gelu_training_backward(grad, z, activation, sums_dtype):
    """grad (M,K), that of GELU of z (...,K), both contiguous -> that of z, which overwrites it; where it is cheap, and
    sums_dtype is one, its sums over M in that."""
    z = z.view(grad.shape)
    if z.is_cpu and z.dtype == torch.bfloat16 and _may_compile(z.dtype):
        return compiled.gelu_backward(grad, z, activation, sums_dtype)
    return _gelu_backward_into(grad, z, approximate=GELU[activation], grad_input=grad), None


def qkv_attention_training(qkv, heads, scale):
    """qkv (B,N,3*H*D), contiguous -> out (B,N,H*D), and what its backward pass takes."""
    apart = _apart(qkv, heads)
    if isinstance(apart, torch.Tensor):
        return _inside(attention_forward(*apart, scale, with_lse=False)[0]), (apart,)
    out, lse = attention_forward(*apart, scale)
    return _inside(out), (qkv, lse)


def qkv_attention_training_backward(grad, out, kept, heads, scale):
    """grad (B*N,H*D) and out (B,N,H*D), both contiguous -> dqkv (B,N,3*H*D)."""
    grad = grad.view(out.shape)
    if len(kept) == 1:
        return qkv_attention_backward(grad, *kept, scale)
    qkv, lse = kept
    dqkv = torch.empty_like(qkv)
    grad, out = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (grad, out))
    attention_backward(grad, *_views(qkv, heads), out, lse, scale, *_views(dqkv, heads))
    return dqkv


def _views(qkv, heads):
    """(B,N,3*H*D) -> its q, k and v as views (B,H,N,D)."""
    b, n, width = qkv.shape
    return qkv.view(b, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind()


def _apart(qkv, heads):
    """The same, or one copy of them (3,B,H,N,D) where their products are made, forward and backward."""
    n = qkv.shape[1]
    if qkv.dtype == torch.bfloat16 and images_by_products(qkv, heads * n * n):
        return heads_apart(qkv, heads)
    return _views(qkv, heads)


def _inside(out):
    """out (B,H,N,D), laid out as (B,N,H,D) -> (B,N,H*D)."""
    b, h, n, d = out.shape
    return out.transpose(1, 2).view(b, n, h * d)
