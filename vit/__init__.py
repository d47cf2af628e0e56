"""Vision Transformers: the plain model, the fused blocks, and fuse(model), which swaps one for the other."""

from .convert import load_checkpoint
from .explain import Explanation, explain
from .fuse import Block, FuseReport, fuse, unfuse
from .modules import FusedAttention, FusedFeedForward, FusedPreNorm
from .reference import PRESETS, Attention, FeedForward, PreNorm, Preset, Transformer, ViT, pair, vit_preset
from .verify import Verdict, verify

__all__ = [
    "PRESETS",
    "Attention",
    "Block",
    "Explanation",
    "FeedForward",
    "FuseReport",
    "FusedAttention",
    "FusedFeedForward",
    "FusedPreNorm",
    "PreNorm",
    "Preset",
    "Transformer",
    "Verdict",
    "ViT",
    "explain",
    "fuse",
    "load_checkpoint",
    "pair",
    "unfuse",
    "verify",
    "vit_preset",
]
