"""Attention maps of fused blocks, which make none: what they call right before attention, if somebody records.

`active` is falsy when nobody does.
"""

active = None


def observe(module, q, k, scale):
    """Tell whoever records: `module` is about to compute softmax(scale q kᵀ) v. q (B,H,Nq,D), k (B,H,Nk,D)."""
    active(module, q, k, scale)
