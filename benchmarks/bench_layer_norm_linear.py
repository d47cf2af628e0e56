"""LayerNorm + Linear, as before attention (K to 3K, no bias), and with GELU, as in the MLP (K to 4K)."""

import pytest
import torch
from race import Question, entries
from vitriton.kernels import layer_norm_linear, reference


def to_qkv(shape):
    return {**normed(shape), "weight": torch.randn(3 * shape.dim, shape.dim) * shape.dim**-0.5}


def to_hidden(shape):
    weight = torch.randn(shape.mlp_dim, shape.dim) * shape.dim**-0.5
    return {**normed(shape), "weight": weight, "bias": torch.randn(shape.mlp_dim)}


def normed(shape):
    x = torch.randn(shape.batch, shape.tokens, shape.dim)
    return {"x": x, "norm_weight": 1 + 0.2 * torch.randn(shape.dim), "norm_bias": 0.2 * torch.randn(shape.dim)}


def with_gelu(rival, shape, inputs):
    return lambda: rival(**inputs, activation="gelu")


RIVALS = {"vitriton": layer_norm_linear, "plain": reference.layer_norm_linear}  # plain: F.layer_norm, F.linear, F.gelu

LAYER_NORM_LINEAR = Question("layer_norm_linear", to_qkv, RIVALS)
LAYER_NORM_LINEAR_GELU = Question("layer_norm_linear_gelu", to_hidden, RIVALS, with_gelu)


@pytest.mark.parametrize("case, rival", entries(LAYER_NORM_LINEAR, LAYER_NORM_LINEAR_GELU))
def test_layer_norm_linear(case, rival, compete):
    compete(case, rival)
