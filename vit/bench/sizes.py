"""The sizes of ViTs that benchmarks know, and the shapes of their tensors."""

import re
from typing import NamedTuple

from ..reference import PRESETS, Preset, vit_preset

__all__ = ["SIZES", "Shape", "build", "parse_model"]

# Beside the presets, two whose heads are of no power of two: SigLIP's so400m (Alabdulmohsin et al. 2023), 72 a head,
# and ViT-g (Zhai et al. 2022), 88. H has 80. The counts are those of the plain ViT of that size, with 1000 classes.
SIZES = PRESETS | {
    "so400m": Preset(14, 1152, 27, 16, 4304, 413_504_344),
    "g": Preset(14, 1408, 40, 16, 6144, 1_012_442_472),
}


class Shape(NamedTuple):
    """`batch` images of `tokens` tokens in a ViT of the size `model`, a key of SIZES."""

    model: str
    batch: int
    tokens: int

    dim = property(lambda self: SIZES[self.model].dim)
    heads = property(lambda self: SIZES[self.model].heads)
    dim_head = property(lambda self: self.dim // self.heads)
    mlp_dim = property(lambda self: SIZES[self.model].mlp_dim)

    def __str__(self):
        return f"ViT-{self.model.title()} {self.batch}x{self.tokens}"


def parse_model(text):
    """The key of SIZES and the patch size that a name means: "b", "vit_b", "vit_b16", "ViT-B/16", "so400m14".

    Raises ValueError, naming the sizes, for any other.
    """
    match = re.fullmatch(r"(?:vit[_-]?)?(so400m|[a-z]+?)[/_-]?(?:patch)?([1-9]\d*)?", text.strip().lower())
    name = {"tiny": "ti", "t": "ti", "small": "s", "base": "b", "large": "l", "huge": "h"}.get(
        match[1] if match else "", match[1] if match else ""
    )
    if name not in SIZES:
        raise ValueError(f"{text!r} is no size of ViT; allowed are {', '.join(SIZES)}, as in vit_b16 or vit_h14")
    return name, int(match[2]) if match[2] else SIZES[name].patch_size


def build(name, *, patch_size=None, image_size=224, **kwargs):
    """A plain ViT of a size of SIZES."""
    size = SIZES[name]
    sizes = {"dim": size.dim, "depth": size.depth, "heads": size.heads, "mlp_dim": size.mlp_dim}
    patch_size = patch_size or size.patch_size
    return vit_preset("b", image_size=image_size, patch_size=patch_size, **(sizes | kwargs))
