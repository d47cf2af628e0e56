"""The functions on a CPU, and on any device that has no Triton, from PyTorch's own fused operators.

The same contracts as the Triton kernels: `attention_*` and `layer_norm_linear_*` take and return what their namesakes
in attention.py and prenorm.py do, so that ops.py can choose either.
"""

import torch
import torch.nn.functional as F

from .launch import accumulator
from .packed import GELU, linear

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# PyTorch's fused backward pass is slower in bf16 on a CPU than its products of matrices, which need two maps of all
# pairs of queries and keys. They are used for as many images at a time as have this many pairs (64 MB a map).
MOST_PAIRS = 2**25


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
    images = images_by_products(q, q.shape[1] * q.shape[2] * k.shape[2])
    if not images:
        grads = _flash_backward(*_rows_contiguous(grad, q, k, v, out), lse, 0.0, False, scale=scale)
        for d, g in zip((dq, dk, dv), grads, strict=True):
            d.copy_(g)
        return
    tensors = zip(*(t.split(images) for t in (grad, q, k, v, dq, dk, dv)), strict=True)
    for grad_, q_, k_, v_, *into in tensors:
        copies = [t.clone(memory_format=torch.contiguous_format).flatten(0, 1) for t in (q_, k_, v_)]
        _backward_by_products(grad_.reshape(-1, *grad.shape[2:]), *copies, scale)
        for d, g in zip(into, copies, strict=True):
            d.copy_(g.view(d.shape))


def qkv_attention_backward(grad, qkv, heads, scale, images):
    """grad (B,N,H*D), qkv (B,N,3*H*D) -> dqkv, by products, for so many images at a time."""
    dqkv = qkv.new_empty(qkv.shape)
    n, d = qkv.shape[1], qkv.shape[2] // (3 * heads)
    for grad_, qkv_, dqkv_ in zip(grad.split(images), qkv.split(images), dqkv.split(images), strict=True):
        # (b,n,3*h*d) -> (3,b,h,n,d)
        inside, dinside = (t.view(-1, n, 3, heads, d).permute(2, 0, 3, 1, 4) for t in (qkv_, dqkv_))
        copy = inside.clone(memory_format=torch.contiguous_format)
        grad_ = grad_.view(-1, n, heads, d).transpose(1, 2).reshape(-1, n, d)
        _backward_by_products(grad_, *copy.flatten(1, 2).unbind(), scale)
        dinside.copy_(copy)
    return dqkv


def images_by_products(q, pairs):
    """Of how many images at a time, of so many pairs, products give the gradients; 0 if PyTorch's fused operator."""
    if q.device.type != "cpu":
        return q.shape[0]
    return MOST_PAIRS // pairs if q.dtype == torch.bfloat16 else 0  # fp16 scores may overflow


def _backward_by_products(grad, q, k, v, scale):
    """Overwrite q, k and v with their gradients, (B*H,N,D) all of them, with two maps (B*H,Nq,Nk) in memory."""
    q *= scale
    p = torch.bmm(q, k.transpose(1, 2))
    torch.softmax(p, -1, out=p)
    ds = torch.bmm(grad, v.transpose(1, 2))
    torch.bmm(p.transpose(1, 2), grad, out=v)
    torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
    dk = torch.bmm(ds.transpose(1, 2), q)
    torch.bmm(ds, k, out=q).mul_(scale)
    k.copy_(dk)


def _rows_contiguous(*tensors):
    """Copies of those whose last stride is not 1, which PyTorch's fused operator ignores, in its outputs too."""
    return (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _heads_inside(out):
    """(B,H,N,D) in any layout -> the same, laid out as (B,N,H,D)."""
    inside = out.transpose(1, 2)
    return out if inside.is_contiguous() else inside.contiguous().transpose(1, 2)


def _layer_norm(x, norm_weight, norm_bias, eps):
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
    normed, mean, rstd = _layer_norm(x, norm_weight, norm_bias, eps)
    if normed.dtype != weight.dtype:
        normed = normed.to(weight.dtype)
    if activation is None or not save_preactivation:
        return linear(normed, weight, bias, activation, may_pack=may_pack), None, mean, rstd
    z = linear(normed, weight, bias, may_pack=False)
    return F.gelu(z, approximate=GELU[activation]), z, mean, rstd


def layer_norm_linear_backward(
    grad, x, norm_weight, norm_bias, weight, bias, z, mean, rstd, eps, activation, need_dx, need_dw
):
    """grad, z (...,N), x (...,K) -> dx (...,K) or None, (dnorm_weight, dnorm_bias, dweight, dbias) or None."""
    if activation is not None:
        grad = torch.ops.aten.gelu_backward.default(grad, z, approximate=GELU[activation])
    acc, k = mean.dtype, x.shape[-1]
    gamma, beta = (norm_weight, norm_bias) if norm_weight.dtype == acc else (norm_weight.to(acc), norm_bias.to(acc))
    grad = grad.reshape(mean.numel(), weight.shape[0])
    # of one column, PyTorch's product sums term by term, and errs more
    dy = (grad @ weight if k > 1 else (grad * weight.t()).sum(1, keepdim=True)).view(x.shape)
    if dy.dtype != acc:  # PyTorch's operator sums in its inputs' dtype
        dy = dy.to(acc)
    # its sums would cancel where |mean| is large beside the spread: it gets rows whose mean is 0, in dtype acc
    rows, mean = x - mean.view(*x.shape[:-1], 1), torch.zeros_like(mean)
    if acc == torch.float64:
        rows -= rows.mean(dim=-1, keepdim=True)
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward.default(
        dy, rows, (k,), mean, rstd, gamma, beta, [need_dx, need_dw, need_dw]
    )
    if need_dx and dx.dtype != x.dtype:
        dx = dx.to(x.dtype)
    if not need_dw:
        return dx, None
    if norm_weight.dtype != acc:
        dnorm_weight, dnorm_bias = dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype)
    normed = _layer_norm(x, gamma, beta, eps)[0]
    if normed.dtype != weight.dtype:
        normed = normed.to(weight.dtype)
    dweight = grad.t() @ normed.view(mean.numel(), k)
    return dx, (dnorm_weight, dnorm_bias, dweight, None if bias is None else grad.sum(0))
