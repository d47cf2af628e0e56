"""Attention of separate q, k, v and of the packed qkv, as a ViT's projections leave them in memory."""

import pytest
from cases import entries
from vitriton.vit.bench.functions import QUESTIONS


@pytest.mark.parametrize("case, rival", entries(QUESTIONS["attention"], QUESTIONS["qkv_attention"]))
def test_attention(case, rival, compete):
    compete(case, rival)
