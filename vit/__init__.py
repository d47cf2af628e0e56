"""Vision Transformers: the plain model, the fused blocks, and fuse(model), which swaps one for the other."""

from .fuse import Block, FuseReport, fuse, unfuse
from .look import attention_picture, look
from .modules import FusedAttention, FusedFeedForward, FusedPreNorm
from .record import AttentionMaps, attention_layers, record_attention
from .reference import PRESETS, Attention, FeedForward, PreNorm, Preset, Transformer, ViT, pair, vit_preset
from .rollout import attention_rollout, patch_rollout, rollout

__all__ = [
    "PRESETS",
    "Attention",
    "AttentionMaps",
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
    "attention_layers",
    "attention_picture",
    "attention_rollout",
    "fuse",
    "look",
    "pair",
    "patch_rollout",
    "record_attention",
    "rollout",
    "unfuse",
    "vit_preset",
]
