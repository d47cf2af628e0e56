"""Vision Transformers: the plain model, the fused blocks, and fuse(model), which swaps one for the other."""

from .convert import load_checkpoint
from .explain import Explanation, explain
from .fuse import Block, FuseReport, fuse, unfuse
from .look import attention_picture, look
from .modules import FusedAttention, FusedFeedForward, FusedPreNorm, FusedTransformer, FusedViT
from .record import AttentionMaps, attention_layers, record_attention
from .reference import PRESETS, Attention, FeedForward, PreNorm, Preset, Transformer, ViT, pair, vit_preset
from .rollout import attention_rollout, patch_rollout, rollout
from .verify import Verdict, verify

__all__ = [
    "PRESETS",
    "Attention",
    "AttentionMaps",
    "Block",
    "Explanation",
    "FeedForward",
    "FuseReport",
    "FusedAttention",
    "FusedFeedForward",
    "FusedPreNorm",
    "FusedTransformer",
    "FusedViT",
    "PreNorm",
    "Preset",
    "Transformer",
    "Verdict",
    "ViT",
    "attention_layers",
    "attention_picture",
    "attention_rollout",
    "explain",
    "fuse",
    "load_checkpoint",
    "look",
    "pair",
    "patch_rollout",
    "record_attention",
    "rollout",
    "unfuse",
    "verify",
    "vit_preset",
]
