"""One block of a ViT, PreNorm(Attention) and PreNorm(FeedForward) with their residuals: plain, with SDPA, and fused."""

import pytest
import torch
import torch.nn.functional as F
from race import Question, entries
from vitriton.vit import Attention, Transformer, fuse


class SDPAAttention(Attention):
    """The plain Attention with PyTorch's own fused operator."""

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def plain(shape):
    return Transformer(shape.dim, 1, shape.heads, shape.dim_head, shape.mlp_dim)


def sdpa(shape):
    block = plain(shape)
    block.layers[0][0].fn.__class__ = SDPAAttention
    return block


def fused(shape):
    block = plain(shape)
    fuse(block, strict=True)
    return block


def x_and_parameters(shape):
    parameters = dict(plain(shape).state_dict())
    for name in parameters:
        if ".norm." in name:  # its ones and zeros would hide errors
            parameters[name] = parameters[name] + 0.2 * torch.randn(shape.dim)
    return {"x": torch.randn(shape.batch, shape.tokens, shape.dim), **parameters}


def load(rival, shape, inputs):
    """The rival builds a module, which takes the inputs as its parameters."""
    with torch.device("meta"):
        block = rival(shape).requires_grad_(inputs["x"].requires_grad)
    block.load_state_dict({name: t for name, t in inputs.items() if name != "x"}, assign=True)
    return lambda: block(inputs["x"])


BLOCK = Question("block", x_and_parameters, {"vitriton": fused, "plain": plain, "SDPA": sdpa}, load)


@pytest.mark.parametrize("case, rival", entries(BLOCK))
def test_block(case, rival, compete):
    compete(case, rival)
