"""Vision Transformers: the plain model, the fused blocks, and fuse(model), which swaps one for the other."""

from .fuse import Block, FuseReport, fuse, unfuse
from .modules import FusedAttention, FusedFeedForward, FusedPreNorm
from .reference import PRESETS, Attention, FeedForward, PreNorm, Preset, Transformer, ViT, pair, vit_preset

__all__ = [
    "PRESETS",
    "Attention",
    "Block",
    "FeedForward",
    "FuseReport",
    "FusedAttention",
    "FusedFeedForward",
    "FusedPreNorm",
    "PreNorm",
    "Preset",
    "Transformer",
    "ViT",
    "fuse",
    "pair",
    "unfuse",
    "vit_preset",
]
