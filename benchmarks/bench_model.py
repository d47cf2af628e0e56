"""Whole ViTs with the same weights in every rival, and beside them timm's GhostNet, another network at equal input."""

import pytest
from cases import model_entries


@pytest.mark.parametrize("case, rival", model_entries())
def test_model(case, rival, compete):
    compete(case, rival)
