"""The questions about functions, and the implementations that answer them. To add a rival, add it to a table here.

"plain" is the formula written out in kernels/reference.py: of LayerNorm + Linear that is F.layer_norm and F.linear.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from ...kernels import attention, layer_norm_linear, qkv_attention, reference
from ..fuse import fuse
from ..reference import Attention, Transformer
from .race import HALF, Question, Rival

__all__ = ["QUESTIONS", "SDPAAttention", "missing"]

# ---------------------------------------------------------------------------------------------------------------------
# Attention


def heads_inside(shape):
    """q, k and v (B,H,N,D), each laid out as (B,N,H,D)."""
    size = shape.batch, shape.tokens, shape.heads, shape.dim_head
    return {name: torch.randn(size).transpose(1, 2) for name in "qkv"}


def packed(shape):
    return {"qkv": torch.randn(shape.batch, shape.tokens, 3 * shape.dim)}


def with_heads(rival, shape, inputs):
    return lambda: rival(inputs["qkv"], shape.heads)


def sdpa(backend):
    """PyTorch's fused attention by that backend and no other; it raises where that one cannot run."""

    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def flash_attn(q, k, v):
    from flash_attn import flash_attn_func

    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def flash_attn_packed(qkv, heads):
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, heads, -1))).flatten(2)


def xformers(q, k, v):
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def qkv_sdpa(qkv, heads):
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


ATTENTION = Question(
    "attention",
    heads_inside,
    {
        "vitriton": attention,
        "plain": reference.attention,
        "SDPA": F.scaled_dot_product_attention,
        "SDPA math": sdpa(SDPBackend.MATH),
        "SDPA flash": Rival(sdpa(SDPBackend.FLASH_ATTENTION)),
        "SDPA efficient": Rival(sdpa(SDPBackend.EFFICIENT_ATTENTION), devices=("gpu",)),
        "SDPA cuDNN": Rival(sdpa(SDPBackend.CUDNN_ATTENTION), devices=("gpu",), dtypes=HALF),
        "compile": Rival(reference.attention, compiled=True),
        "FlexAttention": Rival(flex_attention, compiled=True, backward=("gpu",)),
        "flash-attn": Rival(flash_attn, package="flash-attn", devices=("gpu",), dtypes=HALF),
        "xformers": Rival(xformers, package="xformers", devices=("gpu",)),
    },
)
QKV_ATTENTION = Question(
    "qkv_attention",
    packed,
    {
        "vitriton": qkv_attention,
        "plain": reference.qkv_attention,
        "SDPA": qkv_sdpa,
        "compile": Rival(reference.qkv_attention, compiled=True),
        "flash-attn": Rival(flash_attn_packed, package="flash-attn", devices=("gpu",), dtypes=HALF),
    },
    with_heads,
)

# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm + Linear


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


NORM_RIVALS = {
    "vitriton": layer_norm_linear,
    "plain": reference.layer_norm_linear,
    "compile": Rival(reference.layer_norm_linear, compiled=True),
}
LAYER_NORM_LINEAR = Question("layer_norm_linear", to_qkv, NORM_RIVALS)
LAYER_NORM_LINEAR_GELU = Question("layer_norm_linear_gelu", to_hidden, NORM_RIVALS, with_gelu)

# ---------------------------------------------------------------------------------------------------------------------
# A block: PreNorm(Attention) and PreNorm(FeedForward) with their residuals


class SDPAAttention(Attention):
    """The plain Attention with PyTorch's own fused operator."""

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def plain_block(shape):
    return Transformer(shape.dim, 1, shape.heads, shape.dim_head, shape.mlp_dim)


def sdpa_block(shape):
    block = plain_block(shape)
    block.layers[0][0].fn.__class__ = SDPAAttention
    return block


def fused_block(shape):
    block = plain_block(shape)
    fuse(block, strict=True)
    return block


def compiled_block(shape):
    torch.compiler.reset()  # as Race does
    block = plain_block(shape)
    block.compile(fullgraph=True, dynamic=False)
    return block


def x_and_parameters(shape):
    parameters = dict(plain_block(shape).state_dict())
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


BLOCK = Question(
    "block",
    x_and_parameters,
    {"vitriton": fused_block, "plain": plain_block, "SDPA": sdpa_block, "compile": compiled_block},
    load,
)

QUESTIONS = {
    question.name: question for question in (ATTENTION, QKV_ATTENTION, LAYER_NORM_LINEAR, LAYER_NORM_LINEAR_GELU, BLOCK)
}


def missing():
    """{rival: why it cannot be had here} over all questions."""
    found = {}
    for question in QUESTIONS.values():
        for name in question.rivals:
            if why := question.rival(name).missing():
                found[name] = why
    return found
