"""verify(model, images): is a model that was fused still the same model? Layer by layer, and as a whole."""

import copy
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..kernels.reference import Error, compare
from .explain import Explanation, call, explain
from .fuse import FuseReport, fuse, fused_modules, unfuse
from .known import is_layer_norm

__all__ = ["Verdict", "verify"]

DRAWS = 4  # of the gradient of the outputs: of one, the rms error of a small tensor is chance


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: true if the fused model gives the plain one's answers, by the rule of `compare`."""

    report: FuseReport
    explanation: Explanation
    layers: dict[str, list[Error]] = field(default_factory=dict)  # name of a block -> output, gradient of its input
    whole: list[Error] = field(default_factory=list)  # outputs; gradients, those of all layers together
    unfuse_restores: bool = True
    plain_repeats: bool = True  # whether the plain model itself gives the same bits twice

    def __bool__(self):
        return self.unfuse_restores and all(self.whole) and all(all(errors) for errors in self.layers.values())

    def __str__(self):
        lines = [str(self.report), str(self.explanation)]
        lines.append(f"layer by layer, {len(self.layers)} blocks, each by itself:")
        for name, errors in self.layers.items():
            worst = max(errors, key=lambda error: error.max / error.max_allowed if error.max_allowed else 0.0)
            lines.append(f"  {_ok(all(errors))} {name or 'the model itself'}: {worst}")
        lines.append("the whole model, outputs and the gradient of every parameter:")
        lines += [f"  {_ok(error)} {error}" for error in self.whole]
        if self.plain_repeats:
            lines.append(f"unfuse {'restores' if self.unfuse_restores else 'does NOT restore'} it bit for bit")
        else:
            lines.append("the plain model gives other bits each time, so that of unfuse no more can be asked")
        return "\n".join([*lines, self.sentence()])

    def sentence(self):
        if self:
            return "verdict: the same model, up to rounding"
        wrong = [name or "the model itself" for name, errors in self.layers.items() if not all(errors)]
        wrong += [error.name for error in self.whole if not error]
        return f"verdict: NOT the same model: {', '.join(wrong) or 'unfuse does not restore it'}"


def _ok(right):
    return "ok   " if right else "WRONG"


def verify(model: nn.Module, images) -> Verdict:
    """Hold `model`, fused, against `model`, plain, with the plain model in float64 as the golden value.

    `model` may be fused or not, and stays what it is: all happens on copies, in eval mode, in the model's own dtype, on
    its device, with the backend that is chosen. `images` are what it is called with: a tensor, or a tuple or a dict of
    arguments; a handful of images tell rounding from chance. First each block that fuse swaps runs by itself, on the
    input that it has in the golden model: its output and the gradient of that input are compared. Then the whole model:
    each floating-point output, and the gradients of all parameters, those of the same parameter of all layers together.
    An error may be twice (of a gradient three times) what the plain model's own is: see kernels/reference.py.
    Raises what `fuse` raises.
    """
    plain = copy.deepcopy(model).eval()
    unfuse(plain)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    gold = exact(plain)
    images = _cast(images, _dtype(plain))
    with torch.no_grad():
        base_output = call(plain, images)
        plain_repeats = _same(base_output, call(plain, images))
    verdict = Verdict(report, explain(fused, images), plain_repeats=plain_repeats)
    verdict.layers.update(_layers(fused, plain, gold, images))
    verdict.whole.extend(_whole(fused, plain, gold, images))
    unfuse(fused)
    with torch.no_grad():
        restored = not plain_repeats or _same(base_output, call(fused, images))
    return Verdict(report, verdict.explanation, verdict.layers, verdict.whole, restored, plain_repeats)


def exact(model):
    """A copy of the plain `model` that computes in float64."""
    model = copy.deepcopy(model).double()
    for norm in model.modules():
        if is_layer_norm(norm) and type(norm).__name__ == "LayerNormFp32":  # which computes in float32 whatever it is
            norm.__class__ = nn.LayerNorm
    if hasattr(model, "set_attn_implementation"):  # transformers' "eager" takes its softmax in float32
        model.set_attn_implementation("sdpa")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Each block by itself


def _layers(fused, plain, gold, images):
    """name -> errors of the output and of the gradient of the first input, for each block that no other one holds."""
    swapped = list(fused_modules(fused))
    outer = [name for name in swapped if not any(_holds(other, name) for other in swapped)]
    inputs, handles = {}, []
    for name in outer:

        def keep(module, args, kwargs, name=name):
            inputs.setdefault(name, (args, kwargs))  # of its first call

        handles.append(gold.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        call(gold, _cast(images, torch.float64))
    for handle in handles:
        handle.remove()
    results = {}
    for name in outer:
        if name in inputs:
            blocks = (model.get_submodule(name) for model in (fused, plain, gold))
            results[name] = _block(*blocks, *inputs[name])
    return results


def _holds(name, other):
    return name != other and (name == "" or other.startswith(f"{name}."))


def _block(fused, plain, gold, args, kwargs):
    dtype, grad, outputs, gradients = _dtype(plain), None, [], []
    for block in (gold, plain, fused):
        # rounded to the model's dtype first: what is judged is the arithmetic, not the rounding of the input
        now, named = _cast(_cast((args, kwargs), dtype), torch.float64 if block is gold else dtype)
        x = next(t for t in (*now, *named.values()) if _is_float(t)).requires_grad_()
        output = block(*now, **named)
        output = output[0] if isinstance(output, tuple) else output
        grad = _noise(output).to(dtype) if grad is None else grad
        outputs.append(output.detach())
        gradients += torch.autograd.grad(output, x, grad.to(output.dtype))
    return [
        compare("output", *reversed(outputs), k=2),
        compare("gradient of its input", *reversed(gradients), k=3),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The whole model


def _whole(fused, plain, gold, images):
    """Errors of each output, and of the gradients of each parameter, of all layers and draws together."""
    results, noise = [], None
    for model in (gold, plain, fused):
        with torch.enable_grad():
            leaves = tree_leaves(call(model, _cast(images, torch.float64 if model is gold else _dtype(plain))))
        outputs = [t for t in leaves if _is_float(t)]
        if noise is None:
            noise = [[_noise(t, seed) for t in outputs] for seed in range(DRAWS)]
        values = {f"output {i}" if len(outputs) > 1 else "output": t.detach() for i, t in enumerate(outputs)}
        results.append((values, _gradients(model, outputs, noise)))
    (gold_out, gold_grads), (base_out, base_grads), (out, grads) = results
    errors = [compare(name, out[name], base_out[name], gold_out[name], k=2) for name in gold_out]
    for name in gold_grads:
        errors.append(compare(f"gradient of {name}", grads[name], base_grads[name], gold_grads[name], k=3))
    return errors


def _gradients(model, outputs, noise):
    """name, with * for the number of a layer -> its gradients, one a layer and draw, flat."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    wanted = [i for i, t in enumerate(outputs) if t.requires_grad]
    gradients = {}
    for grads in noise:
        which = [outputs[i] for i in wanted], parameters, [grads[i].to(outputs[i].dtype) for i in wanted]
        of_draw = torch.autograd.grad(*which, retain_graph=True, allow_unused=True)
        for name, parameter, grad in zip(names, parameters, of_draw, strict=True):
            known = gradients.setdefault(re.sub(r"(?<=[._])\d+(?=[._])", "*", name), [])
            known.append((torch.zeros_like(parameter) if grad is None else grad).flatten())
    return {name: torch.cat(tensors) for name, tensors in gradients.items()}


def _dtype(model):
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _cast(values, dtype):
    """Copies of the floating-point tensors in a structure, detached, in `dtype`."""
    return tree_map(lambda t: t.detach().to(dtype, copy=True) if _is_float(t) else t, values)


def _noise(like, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)


def _is_float(t):
    return isinstance(t, Tensor) and t.is_floating_point()


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True) if _is_float(x))
