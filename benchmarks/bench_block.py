"""One block of a ViT, PreNorm(Attention) and PreNorm(FeedForward) with their residuals: plain, with SDPA, and fused."""

import pytest
from cases import entries
from vitriton.vit.bench.functions import QUESTIONS


@pytest.mark.parametrize("case, rival", entries(QUESTIONS["block"]))
def test_block(case, rival, compete):
    compete(case, rival)
