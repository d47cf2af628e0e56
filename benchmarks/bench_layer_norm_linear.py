"""LayerNorm + Linear, as before attention (K to 3K, no bias), and with GELU, as in the MLP (K to 4K)."""

import pytest
from cases import entries
from vitriton.vit.bench.functions import QUESTIONS


@pytest.mark.parametrize("case, rival", entries(QUESTIONS["layer_norm_linear"], QUESTIONS["layer_norm_linear_gelu"]))
def test_layer_norm_linear(case, rival, compete):
    compete(case, rival)
