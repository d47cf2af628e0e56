"""What modules call on a CPU past the operators of ops.py, and whether they may: nobody must be looking.

The public functions check their arguments, and PyTorch's dispatcher calls an operator in some tens of microseconds:
together as long as a product of a small ViT takes.
"""

import torch
import torch.nn.functional as F

from . import gradients, native, packed
from .backend import chosen_backend, takes_triton

__all__ = ["DIRECT", "direct", "direct_layer_norm_linear", "linear", "mode", "needs_grad", "watched", "watching"]

DIRECT = (torch.float32, torch.bfloat16, torch.float16)  # dtypes for `direct`


def watching():
    """Whether a mode or a transform sees operators, or changes them: tracing, counting, fakes, ..."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def mode():
    """The same, or autocast."""
    return watching() or torch._C._is_any_autocast_enabled()


def watched(args):
    """Whether a mode, or a subclass of Tensor among args, sees operators."""
    if mode():
        return True
    for t in args:
        if isinstance(t, torch.Tensor) and type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter:
            return True
    return False


def needs_grad(*tensors):
    """Whether autograd is to keep what these tensors are used for."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def direct(x):
    """Whether native.py's functions may be called on x past the public ones, whose checks take as long as a small
    product on a CPU: there is nothing to differentiate or to watch, and x is not empty."""
    return (
        not mode()
        and not torch.is_grad_enabled()
        and type(x) is torch.Tensor
        and x.is_cpu
        and x.dtype in DIRECT
        and x.numel() > 0
        and not takes_triton(chosen_backend(), x)
    )


def direct_layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation):
    """layer_norm_linear of an x that is `direct`; None where its arguments need a check."""
    dtype = x.dtype
    if not (
        weight.dtype == dtype and norm_weight.dtype == dtype and norm_bias.dtype == dtype
        and weight.is_cpu and norm_weight.is_cpu and norm_bias.is_cpu
        and (bias is None or (bias.dtype == dtype and bias.is_cpu and bias.shape == weight.shape[:1]))
        and norm_weight.shape == norm_bias.shape == weight.shape[1:] == x.shape[-1:]
    ):  # fmt: skip
        return None
    return native.layer_norm_linear_inference(x, norm_weight, norm_bias, weight, bias, eps, activation)


class _Linear(torch.autograd.Function):
    """F.linear by native.py's products, in fp32 on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return packed.linear(x, weight, bias, may_pack=False)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if not torch.is_grad_enabled():
            dx, dweight, dbias = native.linear_backward(grad, x, weight, *ctx.needs_input_grad)
            return None if dx is None else dx.view(x.shape), dweight, dbias
        # a gradient of this gradient is to come
        rows, needed = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        return (
            grad @ weight if needed[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )


def linear(x, weight, bias):
    """F.linear(x, weight, bias), by packed.py's faster ways where it surely comes to the same."""
    tensors = x, weight, bias
    if watched(tensors):
        return F.linear(*tensors)
    if not needs_grad(*tensors):
        return packed.linear(*tensors)
    return _Linear.apply(*tensors) if _trains_otherwise(x, weight) else F.linear(*tensors)


def _trains_otherwise(x, weight):
    if not (x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.numel() and weight.numel()):
        return False
    forward = packed.choice(x.dtype, x.numel() // weight.shape[1], *weight.shape).linear
    return forward != "pytorch" or gradients.choice(x.dtype, *weight.shape).way != "pytorch"
