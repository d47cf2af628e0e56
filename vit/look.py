"""Where a Vision Transformer looks: its attention over a photograph, in numbers and as a picture.

>>> panels = look(model, image)                           # the CLS token of the last layer, each head
>>> panels = look(model, image, method="rollout")         # through all layers
>>> draw_panels("maps.png", photo, panels, title="A photograph")

`vitriton look` does it for a file: see look_command.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .record import attention_layers, record_attention
from .rollout import attention_rollout, patch_shares
from .tokens import tokens_of

__all__ = ["METHODS", "Panel", "grid_of", "look"]

METHODS = ("cls", "rollout")


@dataclass(frozen=True)
class Panel:
    """One map over the image.

    map         (rows, cols) of the patches: shares of the attention to all tokens; those of a rollout sum to 1
    layer       index of the layer; of a rollout, of the last one that it goes through
    head        index, or how heads were fused: "mean", "max", "min"
    on_patches  the share of all attention that goes to patches, and not to the CLS token or registers
    """

    map: Tensor
    layer: int
    head: int | str
    on_patches: float

    @property
    def peak(self):
        """How many times what it would be on average the map is in its largest patch."""
        return (self.map.max() / self.map.mean()).item()


@torch.no_grad()
def look(model, image, *, method="cls", layers=None, heads=None, head_fusion="mean", discard_ratio=0.0):
    """The Panels of one image (channels, height, width), prepared as `model` takes it.

    "cls"      what the CLS token attends to, by layer (default: the last) and head (default: their mean, and of a
               single layer also each); costs no map of all tokens
    "rollout"  attention rollout through the layers up to each of `layers` (default: a quarter, half, three quarters
               and all of them), heads fused by `head_fusion` ("mean", "max", "min"), without the smallest
               `discard_ratio` of the weights; see rollout.py

    layers, heads: an index or a list of indices, from the end if negative; all layers: range(depth).
    Raises ValueError for a model without a CLS token and "cls", for a grid of patches that is not the image's, and for
    arguments that are not allowed.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(repr(m) for m in METHODS)}")
    names, tokens = attention_layers(model), tokens_of(model)
    depth = len(names)
    if layers is None:
        layers = [-1] if method == "cls" else sorted({math.ceil(depth * i / 4) - 1 for i in (1, 2, 3, 4)})
    layers = [layers] if isinstance(layers, int) else list(layers)
    if outside := [layer for layer in layers if not -depth <= layer < depth]:
        raise ValueError(f"there is no layer {outside[0]}: the model has {depth}, from 0 to {depth - 1}")
    layers = sorted({layer % depth for layer in layers})
    if method == "rollout":
        rolled = attention_rollout(
            model, image.unsqueeze(0), heads=heads, head_fusion=head_fusion, discard_ratio=discard_ratio
        )
        shares = {layer: patch_shares(rolled[layer], tokens)[0].cpu() for layer in layers}
        return [Panel(_on_grid(shares[layer], image), layer, head_fusion, 1.0) for layer in layers]
    with record_attention(model, layers=layers, heads=heads, rows="cls") as maps:
        model(image.unsqueeze(0))
    panels = []
    for layer in layers:
        map = tokens.patches(maps[layer][0, :, 0]).cpu()  # (heads, patches)
        numbers = range(len(map)) if heads is None else [heads] if isinstance(heads, int) else heads
        rows = [] if heads is not None else [("mean", map.mean(dim=0))]
        if heads is not None or len(layers) == 1:
            rows += zip(numbers, map, strict=True)
        panels += [Panel(_on_grid(row, image), layer, head, row.sum().item()) for head, row in rows]
    return panels


def grid_of(patches, height, width):
    """(rows, cols) of that many patches over an image of that height and width. Raises ValueError if none fits."""
    fits = [
        (abs(math.log(height * cols / (width * rows))), rows, cols)
        for rows, cols in ((rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0)
        if height % rows == width % cols == 0
    ]
    if not fits or min(fits)[0] > math.log(2.01):  # patches of 1 to 2 there are
        raise ValueError(
            f"{patches} patches do not lie in a grid over an image of {height} x {width}: either this model's maps are "
            "not of the whole image, or it has tokens that are not known to be no patches (see vitriton.vit.tokens)"
        )
    return min(fits)[1:]


def _on_grid(shares, image):
    return shares.unflatten(0, grid_of(len(shares), *image.shape[-2:]))
