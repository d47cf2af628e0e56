"""What each function of this package means, in plain PyTorch up to fp64, and the rule that judges the rest.

Tests, benchmarks and `vitriton check` hold the kernels against these formulas. No kernel imports this file.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["Error", "attention", "compare", "layer_norm_linear", "qkv_attention"]


def attention(q, k, v, *, scale=None):
    """softmax(scale q kᵀ) v, as the plain ViT writes it. q (B,H,Nq,D), k and v (B,H,Nk,D) -> (B,H,Nq,D).

    Vaswani et al. 2017, equation 1. `scale` defaults to D ** -0.5. No keys give zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dots = torch.matmul(q, k.transpose(-1, -2)) * scale
    return torch.matmul(dots.softmax(dim=-1), v)


def qkv_attention(qkv, heads, *, scale=None):
    """`attention` of the packed projection qkv (B,N,3*H*D), split by `chunk(3, -1)` -> (B,N,H*D)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    return attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def layer_norm_linear(x, norm_weight, norm_bias, weight, bias=None, *, eps=1e-5, activation=None):
    """activation(LayerNorm(x) weightᵀ + bias). x (...,K), weight (N,K) -> (...,N).

    LayerNorm of Ba et al. 2016 over the last dim with the biased variance; GELU of Hendrycks and Gimpel 2016: "gelu" is
    exact (erf), "gelu_tanh" its tanh approximation.
    """
    if x.dtype == torch.float64:  # changes nothing but the rounding, so that fp64 is a golden value at any mean
        x = x - x.mean(dim=-1, keepdim=True)
    y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)
    if activation is None:
        return y
    return F.gelu(y, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])


@dataclass(frozen=True)
class Error:
    """How far a result is from the golden value, beside what the rule allows; true if it is within."""

    name: str
    max: float  # max |result - gold|
    max_allowed: float
    rms: float
    rms_allowed: float
    same_nonfinite: bool

    def __bool__(self):
        return self.same_nonfinite and self.max <= self.max_allowed and self.rms <= self.rms_allowed

    def __str__(self):
        finite = "" if self.same_nonfinite else "; NaN or Inf stand in other places than in the golden value"
        return (
            f"{self.name}: max error {self.max:.3g} ({self.max_allowed:.3g} allowed), "
            f"rms {self.rms:.3g} ({self.rms_allowed:.3g} allowed){finite}"
        )


def compare(name, result, base, gold, *, k):
    """Judge `result` against the fp64 `gold`, with the same-dtype plain result `base` as the measure of rounding.

    max |result - gold| <= k max |base - gold| + eps max |gold|, and the rms within 1.5 times that of `base`
    + eps rms(gold), where eps is that of result's dtype; k is 2 for outputs and 3 for gradients. An fp64 result is held
    to 1e-12 of max |gold| instead. NaN and Inf must stand in the same places. Returns an `Error`.
    """
    if result.shape != gold.shape:
        raise ValueError(f"{name}: the result has shape {tuple(result.shape)}, the golden value {tuple(gold.shape)}")
    if gold.numel() == 0:
        return Error(name, 0.0, 0.0, 0.0, 0.0, True)
    result, base, gold = (t.detach().cpu() for t in (result, base, gold.double()))
    dtype, same = torch.finfo(result.dtype), True
    sizes = _max_and_rms(result - gold, base - gold, gold)
    if not sizes.max() <= dtype.max:  # so that the usual case needs no masks, which are slow
        # what overflows the result's dtype is infinite in it, in the golden value too
        expected = gold.to(result.dtype)
        same = all(torch.equal(test(result), test(expected)) for test in (torch.isnan, torch.isposinf, torch.isneginf))
        finite = expected.isfinite() & result.isfinite() & base.isfinite()
        if not finite.any():
            return Error(name, 0.0, 0.0, 0.0, 0.0, same)
        result, base, gold = result[finite], base[finite], gold[finite]
        sizes = _max_and_rms(result - gold, base - gold, gold)
    (error_max, error_rms), (base_max, base_rms), (peak, rms) = sizes.tolist()
    if result.dtype == torch.float64:
        return Error(name, error_max, 1e-12 * peak, error_rms, 1e-12 * peak, same)
    return Error(name, error_max, k * base_max + dtype.eps * peak, error_rms, 1.5 * base_rms + dtype.eps * rms, same)


def _max_and_rms(*tensors):
    """max |x| and the root of the mean of x², for each x -> (len(tensors), 2)."""
    norm = torch.linalg.vector_norm
    return torch.stack([torch.stack([norm(x, torch.inf), norm(x) / x.numel() ** 0.5]) for x in tensors])
