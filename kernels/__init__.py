"""Fused functions for Vision Transformers: Triton kernels on a GPU, PyTorch's own fused operators on a CPU."""

if __name__ == "kernels":
    # In the root of a checkout, `import kernels` finds this folder. transformers does that, in search of Hugging Face's
    # package of the same name, and must not take this one for it: what has no file is passed over.
    __file__ = None
else:
    from .backend import explain, use_backend
    from .functions import attention, layer_norm_linear, qkv_attention

__all__ = ["attention", "explain", "layer_norm_linear", "qkv_attention", "use_backend"]
