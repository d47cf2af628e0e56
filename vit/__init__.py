"""Vision Transformers: the plain model and its blocks."""

from .reference import PRESETS, Attention, FeedForward, PreNorm, Preset, Transformer, ViT, pair, vit_preset

__all__ = ["PRESETS", "Attention", "FeedForward", "PreNorm", "Preset", "Transformer", "ViT", "pair", "vit_preset"]
