"""Attention of separate q, k, v and of the packed qkv, as a ViT's projections leave them in memory."""

import pytest
import torch
import torch.nn.functional as F
from race import Question, entries
from vitriton.kernels import attention, qkv_attention, reference


def heads_inside(shape):
    """q, k and v (B,H,N,D), each laid out as (B,N,H,D)."""
    size = shape.batch, shape.tokens, shape.heads, shape.dim_head
    return {name: torch.randn(size).transpose(1, 2) for name in "qkv"}


def packed(shape):
    return {"qkv": torch.randn(shape.batch, shape.tokens, 3 * shape.dim)}


def with_heads(rival, shape, inputs):
    return lambda: rival(inputs["qkv"], shape.heads)


def qkv_sdpa(qkv, heads):
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


ATTENTION = Question(
    "attention",
    heads_inside,
    {"vitriton": attention, "plain": reference.attention, "SDPA": F.scaled_dot_product_attention},
)
QKV_ATTENTION = Question(
    "qkv_attention",
    packed,
    {"vitriton": qkv_attention, "plain": reference.qkv_attention, "SDPA": qkv_sdpa},
    with_heads,
)


@pytest.mark.parametrize("case, rival", entries(ATTENTION, QKV_ATTENTION))
def test_attention(case, rival, compete):
    compete(case, rival)
