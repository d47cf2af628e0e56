"""Attention on a CPU, and on any device that has no Triton: compiled here, or by PyTorch's operators.

Where a compiler is at hand, the forward pass is that of cpu_attention.cpp (compiled.py), in fp32 twice as fast as the
others. PyTorch's fused operator makes no map of queries and keys, and is twice as slow in bf16 as products of matrices,
which oneDNN computes; in fp32 oneDNN's products, which PyTorch gives as a convolution only, are faster too, up to some
hundred tokens. They are made for so many images, or rows of one image, at a time that their maps stay in cache:

    m = max s,   p = 2^(s - m),   out = (p v) / (Σ p),   lse = ln 2 (m + log2 Σ p),   where s = log2(e) scale q kᵀ
"""

import math
from dataclasses import dataclass

import torch

from . import compiled
from .choice import fastest, from_environment, in_words, once, sample
from .launch import accumulator
from .packed import HAS_ONEDNN, MARGIN, why_not_onednn

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

VARIABLE = "VITRITON_CPU_ATTENTION"
forced = from_environment(VARIABLE, ("auto", "flash", "products", "compiled"))

# Where products are used: the number of keys, in bf16 and in fp32, in which the error grows with it, and of pairs
LEAST_KEYS_BF16 = 48
LEAST_KEYS, MOST_KEYS = 96, 640
LEAST_PAIRS = 2**17
MOST_SUMMED = 400  # queries or keys in the backward pass in fp32
SMALL_MAP = 2**19  # pairs of an image, below which few operators matter more than that each is fast
PAIRS = 2**20  # in one map of the forward pass: 4 MB in fp32
LEAST_ROWS = 64  # of queries in one map, so that products stay fast
FAR = 32.0  # from 0: bf16 rounds such scores too much, and the fused operator keeps them in fp32

# PyTorch's fused backward pass is slower in bf16 on a CPU than its products of matrices, which need two maps of all
# pairs of queries and keys. They are used for as many images at a time as have this many pairs (64 MB a map).
MOST_PAIRS = 2**25


def attention_forward(q, k, v, scale, *, with_lse=True):
    """q (B,H,Nq,D), k and v (B,H,Nk,D) -> out (B,H,Nq,D) laid out as (B,Nq,H,D), lse (B,H,Nq) in natural logarithms.

    lse is None unless `with_lse`, and NaN where the backward pass does not need it.
    """
    if q.device.type != "cpu":
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        out, lse = torch.matmul(scores.softmax(-1), v), scores.to(accumulator(q.dtype)).logsumexp(-1)
        return _heads_inside(out), lse.contiguous()
    how = form(q, k)
    if how == "compiled":
        return compiled.attention_forward(*_rows_contiguous(q, k, v), scale, with_lse)
    if how == "flash":
        out, lse = _flash(*_rows_contiguous(q, k, v), scale=scale)
        return _heads_inside(out), lse.contiguous()
    return _in_parts(FORMS[how], q, k, v, scale, with_lse)


def form(q, k):
    """How attention of q (B,H,Nq,D) and k (B,H,Nk,D) is computed on a CPU: "compiled", or as `form_of_pytorch` says."""
    return "compiled" if choice(q.dtype).compiled and q.numel() and k.numel() else form_of_pytorch(q, k)


def form_of_pytorch(q, k):
    """The form by PyTorch's operators: "flash", or one of FORMS."""
    (b, h, n, _), keys = q.shape, k.shape[2]
    if q.dtype == torch.bfloat16 and keys >= LEAST_KEYS_BF16 and choice(q.dtype).products:
        return "softmax" if h * n * keys <= SMALL_MAP else "products"
    if q.dtype == torch.float32 and LEAST_KEYS <= keys <= MOST_KEYS and choice(q.dtype).products:
        return "convolutions" if b * h * n * keys >= LEAST_PAIRS else "flash"
    return "flash"


@dataclass(frozen=True)
class Choice:
    """Whether the forward pass is compiled; else, and backward, by products where their number allows it; why."""

    compiled: bool
    products: bool
    why: str


def choice(dtype):
    """The Choice for a dtype: forced, or measured at its first use in a process."""
    return _choice(dtype, torch.get_num_threads(), forced)


@once
def _choice(dtype, threads, forced):
    no_products = "fp16 may overflow in products of matrices" if dtype == torch.float16 else why_not_onednn(dtype)
    not_compiled = compiled.why_not(dtype) if forced in ("auto", "compiled") else f"{VARIABLE} is {forced!r}"
    if forced == "products" and no_products and not HAS_ONEDNN:
        raise RuntimeError(f"{VARIABLE} is 'products', which cannot run: {no_products}")
    if forced == "compiled" and not_compiled and dtype in compiled.DTYPES:
        raise RuntimeError(f"{VARIABLE} is 'compiled', which cannot run: {not_compiled}")
    if forced == "flash" or (no_products and not_compiled):
        return Choice(False, False, no_products or not_compiled)
    if forced == "products" or (forced == "compiled" and not not_compiled):
        return Choice(forced == "compiled", no_products is None, f"{VARIABLE} is {forced!r}")
    q = sample(1, 12, 197, 64).to(dtype)
    ways = {"flash": lambda: _flash(q, q, q)}
    if not no_products:
        compute = _by_softmax if dtype == torch.bfloat16 else _by_convolutions
        ways["products"] = lambda: _in_parts(compute, q, q, q, 0.125, False)
    if not not_compiled:
        ways["compiled"] = lambda: compiled.attention_forward(q, q, q, 0.125, False)
    seconds = fastest(turns=9, **ways)
    products = not no_products and seconds["flash"] >= MARGIN * seconds["products"]
    is_compiled = not not_compiled and min(seconds.values()) >= MARGIN * seconds["compiled"]
    which = "it is as fast or faster here" if is_compiled or products else "it is faster here"
    said = f"{which} (1 x 12 x 197 x 64: {in_words(seconds)})"
    return Choice(is_compiled, products, f"{said}; not compiled: {not_compiled}" if not_compiled else said)


def in_words_for(dtype):
    """How attention is computed in a dtype, and why."""
    chosen = choice(dtype)
    how = "products of matrices, where tokens are not few," if chosen.products else "PyTorch's fused operator"
    how = "a kernel compiled here" if chosen.compiled else how
    return f"attention by {how}: {chosen.why}".replace(",:", ":")


def _in_parts(compute, q, k, v, scale, with_lse):
    """attention_forward by compute(k's and v's of some images) -> function of some rows of their queries."""
    b, h, n, d = q.shape
    keys = k.shape[2]
    out = q.new_empty(b, n, h, d).transpose(1, 2)
    lse = q.new_empty(b, h, n, dtype=torch.float32) if with_lse else None
    images = max(1, PAIRS // (h * n * keys))
    rows = max(LEAST_ROWS, PAIRS // (h * keys))
    factor = scale * math.log2(math.e)
    if images >= b and rows >= n:
        compute(k, v, factor)(q, out, lse)
        return out, lse
    for i in range(0, b, images):
        some = slice(i, i + images)
        of_rows = compute(k[some], v[some], factor)
        for j in range(0, n, rows):
            part = some, slice(None), slice(j, j + rows)
            of_rows(q[part], out[part], lse[part] if with_lse else None)
    return out, lse


def _by_softmax(k, v, factor):
    """k and v (b,H,Nk,D) -> function(q, out (b,H,n,D), lse (b,H,n) or None) that writes out and lse.

    The map is (Nk,n), as PyTorch's softmax in bf16 is faster over the dim that is not the last.
    """
    b, h, keys, d = k.shape
    flat_k, flat_v = k.reshape(b * h, keys, d), v.reshape(b * h, keys, d)
    scale = factor * math.log(2)

    def of_rows(q, out, lse):
        n = q.shape[2]
        p, far = _softmax_map(q.reshape(b * h, n, d), flat_k, scale)
        if lse is not None:
            lse.fill_(torch.nan)  # the backward pass, by products too, needs none
        out.copy_(torch.bmm(p.transpose(1, 2), flat_v).view(b, h, n, d))
        if far is not None:
            _replace_far(far.view(b, h, n), q, k, v, scale, out, None)

    return of_rows


def _softmax_map(q, k, scale):
    """q (G,Nq,D), k (G,Nk,D) -> softmax(scale q kᵀ) as (G,Nk,Nq), the largest |scores| (G,Nq) if one is beyond FAR."""
    p = _scaled_product(k, q.transpose(1, 2), scale)
    least, most = p.aminmax()
    far = p.float().abs_().amax(1) if max(most.item(), -least.item()) > FAR else None
    return torch.softmax(p, 1, out=p), far


def _by_products(k, v, factor):
    """The same, where softmax is computed in fp32."""
    b, h, keys, d = k.shape
    flat_k, flat_v = k.reshape(b * h, keys, d).transpose(1, 2), v.reshape(b * h, keys, d)

    def of_rows(q, out, lse):
        n = q.shape[2]
        p = torch.bmm(q.reshape(b * h, n, d), flat_k)
        minus_m, total = _powers(s := p.float(), factor)
        p.copy_(s.div_(total))
        out.copy_(torch.bmm(p, flat_v).view(b, h, n, d))
        if lse is not None:
            lse.copy_(_log_sum(minus_m, total).view(b, h, n))
        far = minus_m.abs_().mul_(math.log(2))
        if (far > FAR).any():
            _replace_far(far.view(b, h, n), q, k, v, factor * math.log(2), out, lse)

    return of_rows


def _scaled_product(a, b, scale, into=None):
    """scale a b, of matrices a (G,M,K) and b (G,K,N), rounded once; into (G,M,N) or a new tensor."""
    into = a.new_empty(a.shape[0], a.shape[1], b.shape[2]) if into is None else into
    if abs(scale) < 1e-30:  # with 0 in fp32, baddbmm_ leaves `into` as it is
        return torch.bmm(a, b, out=into).mul_(scale)
    return into.baddbmm_(a, b, beta=0, alpha=scale)


def _replace_far(far, q, k, v, scale, out, lse):
    """Overwrite the rows of out (b,H,n,D), and of lse, whose scores are as far (b,H,n) from 0 as FAR, and finite."""
    far = (far > FAR).logical_and_(far < torch.inf)
    exact, exact_lse = _flash(*_rows_contiguous(q, k, v), scale=scale)
    out.copy_(torch.where(far.unsqueeze(3), exact, out))
    if lse is not None:
        lse.copy_(torch.where(far, exact_lse, lse))


def _by_convolutions(k, v, factor):
    """The same. A convolution of width 1 with a group a head is the product of each head's tokens with a matrix."""
    b, h, keys, d = k.shape
    groups = b * h
    k, v = k.reshape(groups * keys, d, 1, 1), v.transpose(2, 3).reshape(groups * d, keys, 1, 1)

    def of_rows(q, out, lse):
        n = q.shape[2]
        x = q.permute(2, 0, 1, 3).reshape(n, groups * d)
        s = _heads_product(x, k, groups).view(n, groups, keys)
        minus_m, total = _powers(s, factor)
        y = _heads_product(s.view(n, groups * keys), v, groups).view(n, b, h, d)
        torch.div(y, total.view(n, b, h, 1), out=out.permute(2, 0, 1, 3))
        if lse is not None:
            lse.copy_(_log_sum(minus_m, total).view(n, b, h).permute(1, 2, 0))

    return of_rows


def _powers(s, factor):
    """Overwrite s (...,Nk) with 2^(factor s - m), where m is the maximum of factor s -> -m and the sum (...,1)."""
    minus_m = (s.amax(-1, keepdim=True) if factor >= 0 else s.amin(-1, keepdim=True)).mul_(-factor)
    torch.add(minus_m, s, alpha=factor, out=s)
    return minus_m, s.exp2_().sum(-1, keepdim=True)


def _log_sum(minus_m, total):
    return total.log2().sub_(minus_m).mul_(math.log(2))


FORMS = {"softmax": _by_softmax, "products": _by_products, "convolutions": _by_convolutions}


def _heads_product(x, weight, groups):
    """x (n, groups*K), weight (groups*N,K,1,1) -> (n, groups*N)."""
    x = x.view(1, x.shape[0], 1, x.shape[1]).permute(0, 3, 1, 2)
    y = torch.ops.aten.mkldnn_convolution.default(x, weight, None, (0, 0), (1, 1), (1, 1), groups)
    return y.permute(0, 2, 3, 1).reshape(x.shape[2], -1)


def attention_backward(grad, q, k, v, out, lse, scale, dq, dk, dv):
    """Write the gradients of q, k and v into dq, dk and dv (any strides)."""
    if q.device.type == "cpu" and form(q, k) == "compiled":
        grads = (dq, dk, dv)
        into = [t if t.stride(-1) == 1 else t.new_empty(t.shape) for t in grads]
        compiled.attention_backward(*_rows_contiguous(grad, q, k, v), scale, *into)
        for d, g in zip(grads, into, strict=True):
            if d is not g:
                d.copy_(g)
        return
    images = images_by_products(q, q.shape[1] * q.shape[2] * k.shape[2])
    if not images and form_of_pytorch(q, k) == "convolutions" and max(q.shape[2], k.shape[2]) <= MOST_SUMMED:
        images = max(1, PAIRS // (q.shape[1] * q.shape[2] * k.shape[2]))
        for tensors in zip(*(t.split(images) for t in (grad, q, k, v, out, lse, dq, dk, dv)), strict=True):
            _backward_by_convolutions(*tensors, scale)
        return
    if not images:
        grads = _flash_backward(*_rows_contiguous(grad, q, k, v, out), lse, 0.0, False, scale=scale)
        for d, g in zip((dq, dk, dv), grads, strict=True):
            d.copy_(g)
        return
    tensors = zip(*(t.split(images) for t in (grad, q, k, v, dq, dk, dv)), strict=True)
    for grad_, *qkv_, dq_, dk_, dv_ in tensors:
        flat = [t.reshape(-1, *t.shape[2:]) for t in (grad_, *qkv_)]
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in flat[1:]]
        _backward_by_products(*flat, scale, *grads)
        for d, g in zip((dq_, dk_, dv_), grads, strict=True):
            d.copy_(g.view(d.shape))


def heads_apart(qkv, heads):
    """(B,N,3*H*D) -> a copy (3,B,H,N,D)."""
    b, n, width = qkv.shape
    inside = qkv.view(b, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return inside.clone(memory_format=torch.contiguous_format)


def qkv_attention_backward(grad, apart, scale):
    """grad (B,N,H*D), q, k and v apart (3,B,H,N,D) -> dqkv (B,N,3*H*D), by products, for some images at a time."""
    _, b, h, n, d = apart.shape
    images = images_by_products(apart[0], h * n * n)
    dapart = torch.empty_like(apart)
    grad = grad.view(b, n, h, d).transpose(1, 2)
    for i in range(0, b, images):
        some = slice(i, i + images)
        flat = [t[:, some].flatten(1, 2).unbind() for t in (apart, dapart)]
        _backward_by_products(grad[some].reshape(-1, n, d), *flat[0], scale, *flat[1])
    return dapart.permute(1, 3, 0, 2, 4).reshape(b, n, 3 * h * d)


def images_by_products(q, pairs):
    """Of how many images at a time, of so many pairs, products give the gradients; 0 if PyTorch's fused operator."""
    if q.device.type != "cpu":
        return q.shape[0]
    return MOST_PAIRS // pairs if q.dtype == torch.bfloat16 and not choice(q.dtype).compiled else 0  # fp16 may overflow


def _backward_by_convolutions(grad, q, k, v, out, lse, dq, dk, dv, scale):
    """The products of _by_convolutions, with two maps (Nk,B,H,Nq) of p = exp(scale q kᵀ - lse) and of its gradient."""
    (b, h, n, d), keys = q.shape, k.shape[2]
    groups = b * h

    def as_tokens(t):  # (B,H,N,D) -> (N,B*H*D)
        return t.permute(2, 0, 1, 3).reshape(t.shape[2], groups * d)

    def as_weight(t):  # (B,H,N,D) -> (B*H*N,D,1,1)
        return t.reshape(-1, d, 1, 1)

    def as_transposed_weight(t):  # (B,H,N,D) -> (B*H*D,N,1,1)
        return t.transpose(2, 3).reshape(groups * d, -1, 1, 1)

    p = _heads_product(as_tokens(k), as_weight(q), groups).view(keys, b, h, n)
    torch.add(lse * -math.log2(math.e), p, alpha=scale * math.log2(math.e), out=p)
    p.exp2_()
    ds = _heads_product(as_tokens(v), as_weight(grad), groups).view(keys, b, h, n)
    ds.sub_((grad * out).sum(3)).mul_(p)

    def product(x, weight, into, factor):  # x (N,B,H,M) times weight's (B*H*D,M) -> into (B,H,N,D)
        y = _heads_product(x.reshape(x.shape[0], -1), weight, groups).view(-1, b, h, d)
        torch.mul(y, factor, out=into.permute(2, 0, 1, 3))

    product(p, as_transposed_weight(grad), dv, 1.0)
    product(ds, as_transposed_weight(q), dk, scale)
    product(ds.permute(3, 1, 2, 0), as_transposed_weight(k), dq, scale)


def _backward_by_products(grad, q, k, v, scale, dq, dk, dv):
    """Write the gradients of q, k and v into dq, dk and dv, (G,N,D) all of them, with two maps (G,Nk,Nq)."""
    p = _scaled_product(k, q.transpose(1, 2), scale)
    torch.softmax(p, 1, out=p)
    ds = torch.bmm(v, grad.transpose(1, 2))
    torch.bmm(p, grad, out=dv)
    torch.ops.aten._softmax_backward_data.out(ds, p, 1, p.dtype, grad_input=ds)
    _scaled_product(ds, q, scale, dk)
    _scaled_product(ds.transpose(1, 2), k, scale, dq)


def _rows_contiguous(*tensors):
    """Copies of those whose last stride is not 1, which PyTorch's fused operator ignores, in its outputs too."""
    return (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _heads_inside(out):
    """(B,H,N,D) in any layout -> the same, laid out as (B,N,H,D)."""
    inside = out.transpose(1, 2)
    return out if inside.is_contiguous() else inside.contiguous().transpose(1, 2)
