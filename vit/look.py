"""Where a Vision Transformer looks: its attention over a photograph, in numbers and as a picture.

>>> panels = look(model, image)                     # of the CLS token in the last layer, each head
>>> panels = look(model, image, method="rollout")   # through all layers
>>> attention_picture("maps.png", model, image)     # either, and a picture of it

`vitriton look` does it for a file: see look_command.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .picture import draw_panels
from .record import attention_layers, record_attention
from .rollout import attention_rollout, patch_shares
from .tokens import tokens_of

__all__ = ["METHODS", "Panel", "attention_picture", "draw_look", "grid_of", "look"]

METHODS = ("cls", "rollout")


@dataclass(frozen=True)
class Panel:
    """One map over the image.

    map         (rows, cols) of the patches: shares of the attention to all tokens; those of a rollout sum to 1
    method      "cls" or "rollout", see `look`
    layer       index of the layer, of `depth`; of a rollout, of the last one that it goes through
    head        index, or how heads were fused: "mean", "max", "min"
    on_patches  the share of all attention that goes to patches, and not to the CLS token or registers; 1 of a rollout,
                which is of patches alone
    """

    map: Tensor
    method: str
    layer: int
    depth: int
    head: int | str
    on_patches: float = 1.0

    @property
    def peak(self):
        """How many times what it would be on average the map is in its largest patch."""
        return (self.map.max() / self.map.mean()).item()

    @property
    def place(self):
        """(row, column) of its largest patch."""
        return divmod(self.map.argmax().item(), self.map.shape[1])

    @property
    def title(self):
        last = self.layer == self.depth - 1
        if self.method == "rollout":
            return ("layer 0" if not self.layer else f"layers 0 to {self.layer}") + (" (all)" if last else "")
        head = f"{self.head} of heads" if isinstance(self.head, str) else f"head {self.head}"
        return f"layer {self.layer}{' (last)' if last else ''}, {head}"

    @property
    def remark(self):
        peak = self.peak
        remark = f"largest {peak:.{0 if peak >= 10 else 1}f}x the average"
        return remark if self.method == "rollout" else f"{remark}, {self.on_patches:.0%} on patches"


@torch.no_grad()
def look(model, image, *, method="cls", layers=None, heads=None, head_fusion="mean", discard_ratio=0.0):
    """The Panels of one image (channels, height, width), prepared as `model` takes it.

    "cls"      what the CLS token attends to, by layer (default: the last) and head (default: their mean, and of a
               single layer also each); costs no map of all tokens
    "rollout"  attention rollout through the layers up to each of `layers` (default: a quarter, half, three quarters
               and all of them), heads fused by `head_fusion` ("mean", "max", "min"), without the smallest
               `discard_ratio` of the weights; see rollout.py

    layers, heads: an index or a list of indices, from the end if negative, or "all".
    Raises ValueError for a model without a CLS token and "cls", for a grid of patches that is not the image's, and for
    arguments that are not allowed.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(repr(m) for m in METHODS)}")
    names, tokens = attention_layers(model), tokens_of(model)
    depth = len(names)
    if layers is None:
        layers = [-1] if method == "cls" else sorted({math.ceil(depth * i / 4) - 1 for i in (1, 2, 3, 4)})
    layers = _indices(layers, depth)
    if outside := [layer for layer in layers if not -depth <= layer < depth]:
        raise ValueError(f"there is no layer {outside[0]}: the model has {depth}, from 0 to {depth - 1}")
    layers = sorted({layer % depth for layer in layers})
    if method == "rollout":
        rolled = attention_rollout(
            model,
            image.unsqueeze(0),
            heads=None if heads == "all" else heads,
            head_fusion=head_fusion,
            discard_ratio=discard_ratio,
        )
        shares = {layer: patch_shares(rolled[layer], tokens)[0].cpu() for layer in layers}
        return [Panel(_on_grid(shares[layer], image), method, layer, depth, head_fusion) for layer in layers]
    with record_attention(model, layers=layers, rows="cls") as maps:
        model(image.unsqueeze(0))
    panels = []
    for layer in layers:
        map = tokens.patches(maps[layer][0, :, 0]).cpu()  # (heads, patches)
        numbers = _heads(heads, len(map), layer) if heads is not None else range(len(map)) if len(layers) == 1 else []
        rows = [("mean", map.mean(dim=0))] if heads is None else []
        rows += [(head, map[head]) for head in numbers]
        panels += [Panel(_on_grid(row, image), method, layer, depth, head, row.sum().item()) for head, row in rows]
    return panels


def attention_picture(path, model, image, *, photo=None, title="Where the model looks", text="", **kwargs):
    """Write a picture of what `look` finds, over the photograph, to `path`, and return the Panels.

    `photo` (height, width, 3) in [0, 1] is what to show of the image, in any resolution; by default the image itself,
    from its least to its largest value. `kwargs` are those of `look`.
    """
    panels = look(model, image, **kwargs)
    if photo is None:
        photo = image.detach().float().cpu()
        photo = ((photo - photo.min()) / (photo.max() - photo.min()).clamp(min=1e-6)).permute(1, 2, 0)
        photo = photo.expand(-1, -1, 3).numpy() if photo.shape[2] == 1 else photo[..., :3].numpy()
    draw_look(path, photo, panels, title, text)
    return panels


def draw_look(path, photo, panels, title, text):
    """Write the picture of Panels; several heads of several layers stand in a table."""
    heads, layers = {panel.head for panel in panels}, {panel.layer for panel in panels}
    columns = len(heads) if len(heads) > 1 and len(layers) > 1 else None
    maps = [(panel.map, panel.title, panel.remark) for panel in panels]
    draw_panels(path, photo, maps, title=title, text=text, columns=columns)


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


def _indices(chosen, count):
    if isinstance(chosen, int):
        return [chosen]
    return list(range(count) if isinstance(chosen, str) and chosen == "all" else chosen)


def _heads(heads, count, layer):
    heads = _indices(heads, count)
    if outside := [head for head in heads if not -count <= head < count]:
        raise ValueError(f"there is no head {outside[0]}: layer {layer} has {count}, from 0 to {count - 1}")
    return [head % count for head in heads]
