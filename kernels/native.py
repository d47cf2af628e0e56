"""The functions on a CPU, and on any device that has no Triton, from PyTorch's own fused operators.

The same contracts as the Triton kernels: `attention_*` and `layer_norm_linear_*` take and return what their namesakes
in attention.py and prenorm.py do, so that ops.py can choose either.
"""

import torch
import torch.nn.functional as F

from .launch import accumulator

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def attention_forward(q, k, v, scale):
    """q (B,H,Nq,D), k and v (B,H,Nk,D) -> out (B,H,Nq,D) laid out as (B,Nq,H,D), lse (B,H,Nq) in natural logarithms."""
    if q.device.type == "cpu":
        out, lse = _flash(_rows_contiguous(q), k, v, scale=scale)
    else:
        scores = torch.matmul(q, k.transpose(-1, -2)).to(accumulator(q.dtype)) * scale
        lse = scores.logsumexp(dim=-1)
        out = torch.matmul((scores - lse[..., None]).exp().to(v.dtype), v)
    return _heads_inside(out), lse.contiguous()


def attention_backward(grad, q, k, v, out, lse, scale, dq, dk, dv):
    """Write the gradients of q, k and v into dq, dk and dv (any strides)."""
    if q.device.type == "cpu":
        grad, q, out = _rows_contiguous(grad), _rows_contiguous(q), _rows_contiguous(out)
        grads = _flash_backward(grad, q, k, v, out, lse, 0.0, False, scale=scale)
    else:
        acc = accumulator(q.dtype)
        p = (torch.matmul(q, k.transpose(-1, -2)).to(acc) * scale - lse[..., None]).exp()
        dp = torch.matmul(grad, v.transpose(-1, -2)).to(acc)
        delta = (grad.to(acc) * out.to(acc)).sum(-1, keepdim=True)
        ds = (p * (dp - delta) * scale).to(q.dtype)
        grads = (ds @ k, ds.transpose(-1, -2) @ q, p.to(v.dtype).transpose(-1, -2) @ grad)
    for d, g in zip((dq, dk, dv), grads, strict=True):
        d.copy_(g)


def _rows_contiguous(x):
    """x, copied if its last stride is not 1: the fused operator passes that on to its outputs, and ignores it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_inside(out):
    """(B,H,N,D) in any layout -> the same, laid out as (B,N,H,D)."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _layer_norm(x, norm_weight, norm_bias, eps):
    """LayerNorm of x (M,K) in x's dtype, and mean (M,) and rstd (M,) in fp32 (fp64 for fp64)."""
    shift = 0.0
    if x.dtype == torch.float64 or x.shape[-1] == 1:
        # centring twice takes away what the rounding of a large mean leaves: fp64 promises that, and of K = 1 it is all
        shift = x.mean(dim=-1, keepdim=True)
        x = x - shift
    if norm_weight is not None:  # PyTorch keeps the statistics in the dtype of these
        norm_weight, norm_bias = norm_weight.to(accumulator(x.dtype)), norm_bias.to(accumulator(x.dtype))
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    return normed, (mean + shift).view(-1), rstd.view(-1)


def layer_norm_linear_forward(x, norm_weight, norm_bias, weight, bias, eps, activation, save_preactivation):
    """x (M,K), weight (N,K) -> y (M,N), its pre-activation (M,N) or None, mean (M,), rstd (M,)."""
    normed, mean, rstd = _layer_norm(x, norm_weight, norm_bias, eps)
    z = F.linear(normed.to(weight.dtype), weight, bias)
    if activation is None:
        return z, None, mean, rstd
    return F.gelu(z, approximate=_GELU[activation]), z if save_preactivation else None, mean, rstd


def layer_norm_linear_backward(
    grad, x, norm_weight, norm_bias, weight, bias, z, mean, rstd, eps, activation, need_dx, need_dw
):
    """grad (M,N), z (M,N) -> dx (M,K) or None, (dnorm_weight, dnorm_bias, dweight, dbias) or None.

    The maths is that of prenorm.py: dγ and dβ come from W and the small matrix G, not from sums over all rows.
    """
    if activation is not None:
        grad = torch.ops.aten.gelu_backward(grad, z, approximate=_GELU[activation])
    acc = mean.dtype
    normed = _layer_norm(x, None, None, eps)[0]
    dx = dw = None
    if need_dx:
        # of x̂, whose mean is 0 and rstd 1: PyTorch's formula cancels where |mean| is large beside the spread
        dx = torch.ops.aten.native_layer_norm_backward(
            (grad @ weight).to(x.dtype), normed, x.shape[-1:], torch.zeros_like(mean)[:, None],
            torch.ones_like(rstd)[:, None], norm_weight.to(acc), norm_bias.to(acc), [True, False, False],
        )[0].mul_(rstd[:, None])  # fmt: skip
    if need_dw:
        g = (grad.t() @ normed.to(weight.dtype)).to(acc)
        db = grad.sum(0, dtype=acc)
        w = weight.to(acc)
        dw = (
            (w * g).sum(0).to(norm_weight.dtype),
            (db @ w).to(norm_bias.dtype),
            g.mul_(norm_weight).addr_(db, norm_bias.to(acc)).to(weight.dtype),
            None if bias is None else db.to(bias.dtype),
        )
    return dx, dw
