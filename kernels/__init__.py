"""Fused functions for Vision Transformers: Triton kernels on a GPU, PyTorch's own fused operators on a CPU."""

from .functions import attention, layer_norm_linear, qkv_attention
from .ops import explain, use_backend

__all__ = ["attention", "explain", "layer_norm_linear", "qkv_attention", "use_backend"]
