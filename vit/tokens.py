"""Which of a ViT's tokens is the CLS token, and which are patches: read from a model of any library."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Tokens", "cls_holder", "tokens_of"]

CLS = ("cls_token", "class_token", "class_embedding")  # ours, vit-pytorch, timm, transformers; torchvision; CLIPs
OTHERS = (
    "dist_token",
    "distillation_token",
    "reg_token",
    "register_tokens",
)  # behind the CLS token


@dataclass(frozen=True)
class Tokens:
    """`cls` is the index of the CLS token, or None; the patches stand after `before` and before `after` others."""

    cls: int | None
    before: int
    after: int = 0

    def patches(self, x, dim=-1):
        """The part of `x` that belongs to patches, along `dim`."""
        return x.narrow(dim, self.before, x.shape[dim] - self.before - self.after)


def tokens_of(model):
    """The Tokens of `model`, ours or of vit-pytorch, timm, transformers, torchvision, open_clip, by its parameters.

    A model without a known CLS, distillation or register token is taken to have patches alone. Of a model with several
    towers, pass the vision tower.
    """
    cls = others = after = 0
    for module in model.modules():
        cls = max(cls, _count(module, CLS))
        others = max(others, sum(_count(module, (name,)) for name in OTHERS))
        # vit-pytorch puts registers last where there is no CLS token
        if type(module).__module__.startswith("vit_pytorch") and hasattr(module, "register_tokens"):
            others, after = 0, _count(module, ("register_tokens",))
    for module in model.modules():
        prefix = getattr(module, "num_prefix_tokens", None)  # timm says it itself
        if type(prefix) is int:
            return Tokens(0 if cls and prefix else None, prefix)
    return Tokens(0 if cls else None, cls + others, after)


def cls_holder(model):
    """The name of the module in `model` that holds the CLS token; None if none does."""
    return next((name for name, module in model.named_modules() if _count(module, CLS)), None)


def _count(module, names):
    """How many tokens the first of `names` that `module` has holds: (1, n, dim), (n, dim) or (dim)."""
    for name in names:
        token = getattr(module, name, None)
        if isinstance(token, Tensor):
            return token.numel() // token.shape[-1] if token.shape[-1] else 0
    return 0
