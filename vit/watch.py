"""Plain attention modules of any library, watched while they run: what record.py keeps of blocks that are not fused.

nn.MultiheadAttention, which need not pass through any function of Python, is read from its arguments. In any other
module the one softmax or scaled_dot_product_attention that its forward calls is the map.

A recording here is any object with hears() -> bool, whether this call counts; keep(module, q, k, scale, mask);
keep_map(module, map); fail(module, why), where there is no map; and the list `watches` of those that are open.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["watch_calls", "watched"]

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)


def watch_calls(module, recording):
    """Let `recording` have the maps that the plain `module` makes; returns the hooks to remove."""
    open_watches = []

    def before(module, args, kwargs):
        if recording.hears():
            open_watches.append(watched(module, recording, args, kwargs))
            open_watches[-1].__enter__()

    def after(module, args, kwargs, out):
        if open_watches and recording.hears():
            raised = RuntimeError if out is None else None  # all that a hook is told
            open_watches.pop().__exit__(raised, None, None)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]


def watched(module, recording, args, kwargs):
    """A context for one call of the plain forward of `module` with these arguments."""
    if getattr(type(module), "plain", type(module)).forward is nn.MultiheadAttention.forward:
        _multihead(module, args, kwargs, recording)
        return nullcontext()
    return Watch(module, recording, next(iter(args), None))


class Watch(TorchFunctionMode):
    """A context in which the plain forward of `module` runs on `x`. `silent`: it has no more to say, as the module
    handed its q and k to record.observe, or cannot be recorded."""

    def __init__(self, module, recording, x=None):
        super().__init__()
        self.module, self.recording, self.x = module, recording, x
        self.silent, self.seen = False, 0

    def __enter__(self):
        self.recording.watches.append(self)
        return super().__enter__()

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        self.recording.watches.remove(self)
        if kind is not None or self.silent or self.seen == 1:
            return
        why = "calls neither softmax nor scaled_dot_product_attention on (batch, heads, tokens, dim)"
        self.fail(why if not self.seen else f"makes {self.seen} maps in one call, so which one is meant is not clear")

    def fail(self, why):
        self.silent = True
        self.recording.fail(self.module, f"{type(self.module).__name__} {why}")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.silent:
            return out
        if func in SOFTMAX and out.ndim == 4 and _dim(*args, **kwargs) in (-1, 3):
            if self._over_tokens(*out.shape[-2:]):
                self.seen += 1
                self.recording.keep_map(self.module, out)
        elif func is F.scaled_dot_product_attention and out.ndim == 4:
            q, k, *rest = _as_observed(*args, **kwargs)
            if self._over_tokens(q.shape[2], k.shape[2]):
                self.seen += 1
                self.recording.keep(self.module, q, k, *rest)
        return out

    def _over_tokens(self, *shape):
        if not isinstance(self.x, Tensor) or self.x.ndim != 3 or self.x.shape[1] in shape:
            return True
        self.fail(f"has a softmax of {shape[0]} x {shape[1]}, which is not over its {self.x.shape[1]} tokens")
        return False


def _dim(input, dim=None, *_, **__):
    return dim


def _as_observed(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """q, k, scale and mask, from the arguments of scaled_dot_product_attention."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return query, key, query.shape[-1] ** -0.5 if scale is None else scale, attn_mask


def _multihead(module, args, kwargs, recording):
    if module.bias_k is not None or module.add_zero_attn:
        recording.fail(module, "this MultiheadAttention adds keys that are no tokens (add_bias_kv or add_zero_attn)")
    else:
        recording.keep(module, *_multihead_as_observed(module, *args, **kwargs))


def _multihead_as_observed(
    module,
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    """q, k, scale and mask, from the arguments of nn.MultiheadAttention, whose bool masks are True where none looks."""
    if query.ndim == 2:
        query, key = query.unsqueeze(0), key.unsqueeze(0)
    elif not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    weights = (module.q_proj_weight, module.k_proj_weight)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    biases = (None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    heads = module.num_heads
    q, k = (
        F.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key), weights[:2], biases[:2], strict=True)
    )
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, heads)) if attn_mask.ndim == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(-1, 1, 1, k.shape[2]))
    masks = [~mask if mask.dtype == torch.bool else mask for mask in masks]
    if len(masks) == 2 and any(mask.dtype != torch.bool for mask in masks):
        masks = [q.new_zeros(()).where(mask, -torch.inf) if mask.dtype == torch.bool else mask for mask in masks]
    mask = None if not masks else masks[0] if len(masks) == 1 else _both(*masks)
    return q, k, (module.embed_dim // heads) ** -0.5, mask


def _both(a, b):
    return a & b if a.dtype == torch.bool else a + b
