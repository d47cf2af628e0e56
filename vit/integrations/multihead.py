"""PyTorch's nn.MultiheadAttention, where a block of torchvision or open_clip holds it and asks for no weights.

Its fast path of evaluation computes the same, and is not needed. Its masks say what is not looked at, True or -inf:
with a mask the plain module runs.
"""

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...kernels.direct import linear
from ..at_once import PLAIN_TENSORS
from ..forms import Form, drops, unlike_heads
from ..known import name_of
from ..modules import merged_with, untouched
from ..notes import NOT_MERGED, note
from .blocks import TakesNorm, attend_at_once, attend_packed, not_plain

__all__ = ["FORMS", "FusedMultiheadAttention", "attend_to_itself"]


class FusedMultiheadAttention(TakesNorm):
    """nn.MultiheadAttention. (B,N,E), or (N,B,E) if not batch_first -> (the same, None)."""

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
        norm=None,
    ):
        if not_plain(query):
            why = not_plain(query)
        elif query is not key or key is not value or query.dim() != 3 or query.is_nested:
            why = "query, key and value are not one and the same tensor of 3 dims"
        elif key_padding_mask is not None or attn_mask is not None or is_causal:
            why = "it was called with a mask"
        elif need_weights:
            why = "its attention weights were asked for"
        elif self.training and self.dropout:
            why = "it drops attention weights"
        else:
            return self._fused(query, norm), None
        note(self, why)
        if norm is not None:
            query = key = value = norm(query)
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
        weights = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        return self.plain.forward(self, query, key, value, **masks, **weights)

    def _fused(self, x, norm):
        weight, bias = self.in_proj_weight, self.in_proj_bias
        # nn.MultiheadAttention reads the weights of its out_proj, and does not call it
        out_weight, out_bias = self.out_proj.weight, self.out_proj.bias
        qkv, scale = None, self.head_dim**-0.5
        if norm is not None:
            if self.batch_first:
                linears = (weight, bias), (out_weight, out_bias)
                y = attend_at_once(x, norm, lambda: linears, self.num_heads, scale)
                if y is not None:
                    return y
            qkv = merged_with(x, norm, weight, bias)
            if qkv is None:
                note(self, NOT_MERGED)
                x = norm(x)
        if qkv is None:
            qkv = _linear(x, weight, bias)
        if self.batch_first:
            out = attend_packed(self, qkv, self.num_heads, scale)
        else:
            out = attend_packed(self, qkv.transpose(0, 1), self.num_heads, scale).transpose(0, 1)
        return _linear(out, out_weight, out_bias)


def attend_to_itself(attention, norm, x, attn_mask=None):
    """attention of norm(x) to itself, for an nn.MultiheadAttention, fused or not."""
    if isinstance(attention, FusedMultiheadAttention) and untouched(attention, type(attention)):
        return attention(x, x, x, need_weights=False, attn_mask=attn_mask, norm=norm)[0]
    x = norm(x)
    return attention(x, x, x, need_weights=False, attn_mask=attn_mask)[0]


def _linear(x, weight, bias):
    if type(weight) in PLAIN_TENSORS and type(bias) in PLAIN_TENSORS:
        return linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _why_not(module):
    if module._parameters.get("in_proj_weight") is None:
        return "key and value have other dims than query, or in_proj_weight is no plain parameter"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "it adds a key and a value of its own (bias_k, bias_v or add_zero_attn)"
    if type(module.out_proj) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return f"out_proj is {name_of(type(module.out_proj))}, not nn.Linear"
    return unlike_heads(module.num_heads, "in_proj_weight", module.in_proj_weight.shape[0])


FORMS = {
    "torch.nn.modules.activation.MultiheadAttention": Form(
        FusedMultiheadAttention,
        ("out_proj", "in_proj_weight"),
        ("in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"),
        _why_not,
        lambda module: drops(module.dropout),
        in_block=True,
    )
}
