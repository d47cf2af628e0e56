"""What `vitriton check` compares: each function and module beside its plain form, on tensors of its own."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import kernels
from ..kernels import reference
from .fuse import fuse
from .modules import FusedAttention, FusedFeedForward, FusedPreNorm
from .reference import Attention, FeedForward, PreNorm, ViT

__all__ = ["Case", "cases"]


@dataclass(frozen=True)
class Case:
    """`fused` and `plain` take the tensors (float64, on the CPU) by name, in any dtype, and give one tensor."""

    name: str
    plain: Callable
    fused: Callable
    tensors: dict[str, Tensor]


def cases(seed):
    """All cases. Token counts and head dims leave a rest in every tile; gammas, betas and biases are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [*_attention(), *_layer_norm_linear(), *_modules()]


def _attention():
    q, k, v, qkv = _randn(2, 3, 50, 64), _randn(2, 3, 77, 64), _randn(2, 3, 77, 64), _randn(2, 67, 3 * 2 * 40)
    yield Case(
        "attention",
        reference.attention,
        kernels.attention,
        {"q": q, "k": k, "v": v},
    )
    yield Case(
        "qkv_attention",
        partial(reference.qkv_attention, heads=2),
        partial(kernels.qkv_attention, heads=2),
        {"qkv": qkv},
    )


def _layer_norm_linear():
    for activation, bias in ((None, {}), ("gelu", {"bias": _randn(72)}), ("gelu_tanh", {"bias": _randn(72)})):
        x, weight = 3 + _randn(2, 50, 96), _randn(72, 96) / 96**0.5
        yield Case(
            f"layer_norm_linear with {activation}" if activation else "layer_norm_linear without a bias",
            partial(reference.layer_norm_linear, activation=activation),
            partial(kernels.layer_norm_linear, activation=activation),
            {"x": x, "norm_weight": _randn(96), "norm_bias": _randn(96), "weight": weight} | bias,
        )


def _modules():
    dim = 96
    x = _randn(2, 50, dim)
    sizes = {"heads": 3, "dim_head": 40}
    yield _module("FusedAttention", Attention(dim, **sizes), FusedAttention(dim, **sizes), x=x)
    yield _module("FusedFeedForward", FeedForward(dim, 128), FusedFeedForward(dim, 128), x=x)
    yield _module(
        "FusedPreNorm(FusedAttention)",
        PreNorm(dim, Attention(dim, **sizes)),
        FusedPreNorm(dim, FusedAttention(dim, **sizes)),
        x=x,
    )
    yield _module(
        "FusedPreNorm(FusedFeedForward)",
        PreNorm(dim, FeedForward(dim, 128)),
        FusedPreNorm(dim, FusedFeedForward(dim, 128)),
        x=x,
    )
    plain = ViT(image_size=32, patch_size=8, num_classes=32, dim=dim, depth=2, heads=2, dim_head=40, mlp_dim=128)
    fused = copy.deepcopy(plain)
    fuse(fused)
    yield _module("a ViT after fuse", plain, fused, img=_randn(4, 3, 32, 32))


def _module(name, plain, fused, **inputs):
    """The case of two modules with the same parameters: those of `plain`, but for random LayerNorms."""
    for module in plain.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    parameters = {name: parameter.detach().double() for name, parameter in plain.named_parameters()}

    def call(module, **tensors):
        inputs_now = tuple(tensors.pop(name) for name in inputs)
        return functional_call(module, tensors, inputs_now)

    return Case(name, partial(call, plain), partial(call, fused), inputs | parameters)


def _randn(*shape):
    return torch.randn(shape, dtype=torch.float64)
