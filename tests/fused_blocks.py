"""What the tests of the fused blocks and of fuse share: random LayerNorms, gradients by name, and operators called."""

from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vitriton.kernels import use_backend
from vitriton.kernels.reference import compare

# the fused operators, and those that they replace
OPERATORS = ("layer_norm_linear", "qkv_attention", "attention", "native_layer_norm", "_softmax", "gelu")


def randomise(module):
    """Random LayerNorm weights and biases in `module`: ones and zeros hide errors."""
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.weight.normal_()
                norm.bias.normal_()
    return module


def run(module, x, grad):
    """The output, and the gradients of x and of every parameter, by name."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.backward(grad.to(output.dtype))
    grads = {f"gradient of {name}": p.grad.clone() for name, p in module.named_parameters()}
    return {"output": output.detach(), "gradient of x": x.grad, **grads}


def assert_within_rounding(result, base, gold):
    """Each tensor of `result` is as near to `gold`, in fp64, as the plain `base` is, by the tolerance rule."""
    assert result.keys() == base.keys() == gold.keys()
    for name in gold:
        assert result[name].dtype == base[name].dtype, name
        error = compare(name, result[name], base[name], gold[name], k=2 if name == "output" else 3)
        assert error, str(error)


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def called(module, *args):
    """How often a forward pass on the native path calls each of OPERATORS; those that it does not call are left out."""
    with use_backend("native"), torch.no_grad(), _Calls() as calls:
        module(*args)
    return {name: calls.names[name] for name in OPERATORS if name in calls.names}


def plain_reasons(explanation):
    """Which fused blocks went the plain way, by name, and why."""
    return {block.name: block.reason for block in explanation.plain}
