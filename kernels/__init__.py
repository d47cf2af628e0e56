"""Fused functions for Vision Transformers: Triton kernels on a GPU, PyTorch's own fused operators on a CPU."""

from .backend import explain, use_backend
from .functions import attention, layer_norm_linear, qkv_attention

__all__ = ["attention", "explain", "layer_norm_linear", "qkv_attention", "use_backend"]
