"""The functions on a CPU, and on any device that has no Triton, from PyTorch's own fused operators.

The same contracts as the Triton kernels: `attention_*` and `layer_norm_linear_*` take and return what their namesakes
in attention.py and prenorm.py do, so that ops.py can choose either.
"""

import torch
import torch.nn.functional as F

from .launch import accumulator

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# PyTorch's fused backward pass is slower in bf16 on a CPU than its products of matrices, which need a map of all pairs:
# up to this many, 64 MB, they are used.
MOST_PAIRS = 2**25

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def attention_forward(q, k, v, scale):
    """q (B,H,Nq,D), k and v (B,H,Nk,D) -> out (B,H,Nq,D) laid out as (B,Nq,H,D), lse (B,H,Nq) in natural logarithms."""
    if q.device.type == "cpu":
        out, lse = _flash(*_rows_contiguous(q, k, v), scale=scale)
    else:
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        out, lse = torch.matmul(scores.softmax(-1), v), scores.to(accumulator(q.dtype)).logsumexp(-1)
    return _heads_inside(out), lse.contiguous()


def attention_backward(grad, q, k, v, out, lse, scale, dq, dk, dv):
    """Write the gradients of q, k and v into dq, dk and dv (any strides)."""
    by_products = q.dtype == torch.bfloat16 and lse.numel() * k.shape[2] <= MOST_PAIRS  # fp16 scores may overflow
    if q.device.type == "cpu" and not by_products:
        grads = _flash_backward(*_rows_contiguous(grad, q, k, v, out), lse, 0.0, False, scale=scale)
    else:
        p = torch.matmul(q, k.transpose(-1, -2)).mul_(scale).softmax(-1)
        dp = torch.matmul(grad, v.transpose(-1, -2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
        grads = (torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q), torch.matmul(p.transpose(-1, -2), grad))
    for d, g in zip((dq, dk, dv), grads, strict=True):
        d.copy_(g)


def _rows_contiguous(*tensors):
    """Copies of those whose last stride is not 1, which PyTorch's fused operator ignores, in its outputs too."""
    return (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


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
    """grad (M,N), z (M,N) -> dx (M,K) or None, (dnorm_weight, dnorm_bias, dweight, dbias) or None."""
    if activation is not None:
        grad = torch.ops.aten.gelu_backward(grad, z, approximate=_GELU[activation])
    acc = mean.dtype
    gamma, beta = norm_weight.to(acc), norm_bias.to(acc)
    normed = _layer_norm(x.to(acc), None, None, eps)[0]
    # PyTorch's operator sums in its inputs' dtype, and cancels where |mean| is large beside the spread: it gets x̂,
    # whose mean is 0 and rstd 1, for x, in fp32
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        (grad @ weight).to(acc), normed, x.shape[1:], torch.zeros_like(mean)[:, None], torch.ones_like(rstd)[:, None],
        gamma, beta, [need_dx, need_dw, need_dw],
    )  # fmt: skip
    if need_dx:
        dx = dx.mul_(rstd[:, None]).to(x.dtype)
    if not need_dw:
        return dx, None
    dweight = grad.t() @ torch.addcmul(beta, normed, gamma).to(weight.dtype)
    dbias = None if bias is None else grad.sum(0)
    return dx, (dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype), dweight, dbias)
