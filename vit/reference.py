"""The plain Vision Transformer: the model that the fused modules replace, and the meaning they are held to.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", in the form that vit-pytorch had before 1.4, with the same
classes, arguments, state_dict keys and order of operations. Shapes are written as einops patterns: b images,
c channels, h and w patches down and across, p1 x p2 pixels in a patch, n tokens. Nothing here knows of a kernel.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

__all__ = ["PRESETS", "Attention", "FeedForward", "PreNorm", "Preset", "Transformer", "ViT", "pair", "vit_preset"]


def pair(t):
    """(t, t), or t itself where it is a pair already: sizes are (height, width)."""
    return tuple(t) if isinstance(t, (tuple, list)) else (t, t)


class PreNorm(nn.Module):
    """fn(LayerNorm(x)). `dim` is the size of x's last dim; `fn` takes and gives (..., dim), and takes any keyword."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.fn(self.norm(x), **kwargs)


class FeedForward(nn.Module):
    """Linear, GELU (exact), Linear, with dropout after GELU and at the end. (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        _check_positive(dim=dim, hidden_dim=hidden_dim)
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """Multi-head self-attention of Vaswani et al. 2017, scores scaled by dim_head ** -0.5. (b, n, dim) -> (b, n, dim).

    `to_qkv` has no bias. `to_out` is a Linear and dropout, or Identity where one head is already of size `dim`.
    """

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0):
        super().__init__()
        _check_positive(dim=dim, heads=heads, dim_head=dim_head)
        inner_dim = dim_head * heads
        project_out = not (heads == 1 and dim_head == dim)

        self.heads = heads
        self.scale = dim_head**-0.5

        self.attend = nn.Softmax(dim=-1)
        self.to_qkv = nn.Linear(dim, inner_dim * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, dim), nn.Dropout(dropout)) if project_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in qkv)

        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        attn = self.attend(dots)

        out = torch.matmul(attn, v)
        out = rearrange(out, "b h n d -> b n (h d)")
        return self.to_out(out)


class Transformer(nn.Module):
    """`depth` times: x = attention(norm(x)) + x; x = mlp(norm(x)) + x. (b, n, dim) -> (b, n, dim)."""

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, mlp_dim: int, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            self.layers.append(
                nn.ModuleList(
                    [
                        PreNorm(dim, Attention(dim, heads=heads, dim_head=dim_head, dropout=dropout)),
                        PreNorm(dim, FeedForward(dim, mlp_dim, dropout=dropout)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x


class ViT(nn.Module):
    """Patches, positions, transformer, pooling and head. (b, channels, height, width) -> (b, num_classes).

    `image_size` and `patch_size` are in pixels, one number or a (height, width) pair; patches must tile the image.
    `pool` is "cls" (the CLS token) or "mean" (the mean of all tokens, CLS among them). `dropout` acts in the blocks,
    `emb_dropout` on the embedded tokens, both in training only. `pos_embed` chooses what is added to the tokens:

    - "learned": a parameter `pos_embedding` (1, n, dim), one vector a token, drawn from N(0, 1) at first;
    - "sincos": the fixed two-dimensional sine-cosine of MoCo v3 and MAE, for which dim must be a multiple of 4:
      no parameter, and nothing in the state_dict;
    - "axial": parameters `pos_embedding_rows` (h, 1, dim) and `pos_embedding_cols` (1, w, dim), drawn likewise; each
      patch gets the sum of its row's and its column's.

    With the last two the CLS token gets no position: it is itself a learned vector that stands in one place.
    Raises ValueError for sizes that are not positive or do not divide, for an unknown `pool` or `pos_embed`, and in
    forward for an image of another shape.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        pos_embed: str = "learned",
    ):
        super().__init__()
        image_height, image_width = pair(image_size)
        patch_height, patch_width = pair(patch_size)
        _check_positive(image_height=image_height, image_width=image_width, num_classes=num_classes, channels=channels)
        _check_positive(patch_height=patch_height, patch_width=patch_width, dim=dim, depth=depth)
        if image_height % patch_height or image_width % patch_width:
            raise ValueError(
                f"image_size {image_height}x{image_width} does not divide into patches of patch_size "
                f"{patch_height}x{patch_width}: choose a height and width that are multiples of the patch's"
            )
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool is {pool!r}: it must be 'cls' (the CLS token) or 'mean' (the mean of all tokens)")

        rows, cols = image_height // patch_height, image_width // patch_width
        patch_dim = channels * patch_height * patch_width
        self.image_shape = (channels, image_height, image_width)

        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=patch_height, p2=patch_width),
            nn.Linear(patch_dim, dim),
        )

        if pos_embed == "learned":
            self.pos_embedding = nn.Parameter(torch.randn(1, rows * cols + 1, dim))
        elif pos_embed == "sincos":
            self.register_buffer("pos_embedding", sincos_positions(rows, cols, dim), persistent=False)
        elif pos_embed == "axial":
            self.pos_embedding_rows = nn.Parameter(torch.randn(rows, 1, dim))
            self.pos_embedding_cols = nn.Parameter(torch.randn(1, cols, dim))
        else:
            raise ValueError(f"pos_embed is {pos_embed!r}: it must be 'learned', 'sincos' or 'axial'")
        self.pos_embed = pos_embed

        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(emb_dropout)

        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_dim, dropout)

        self.pool = pool
        self.to_latent = nn.Identity()

        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def positions(self) -> Tensor:
        """What is added to the tokens, (1, n, dim), the CLS token first."""
        if self.pos_embed != "axial":
            return self.pos_embedding
        patches = rearrange(self.pos_embedding_rows + self.pos_embedding_cols, "h w d -> 1 (h w) d")
        return F.pad(patches, (0, 0, 1, 0))

    def forward(self, img: Tensor) -> Tensor:
        if img.ndim != 4 or img.shape[1:] != self.image_shape:
            raise ValueError(
                f"img has shape {tuple(img.shape)}: this model takes (batch, {', '.join(map(str, self.image_shape))}), "
                "that is (batch, channels, height, width); resize the images or build the model with their image_size"
            )
        x = self.to_patch_embedding(img)

        cls_tokens = repeat(self.cls_token, "1 1 d -> b 1 d", b=x.shape[0])
        x = torch.cat((cls_tokens, x), dim=1)
        x += self.positions()
        x = self.dropout(x)

        x = self.transformer(x)

        x = x.mean(dim=1) if self.pool == "mean" else x[:, 0]

        x = self.to_latent(x)
        return self.mlp_head(x)


def sincos_positions(rows: int, cols: int, dim: int) -> Tensor:
    """Fixed positions (1, 1 + rows * cols, dim) of a grid of patches behind a CLS token, whose own position is zero.

    A quarter of the channels each: sin(row f), cos(row f), sin(col f), cos(col f), with the frequencies
    f_i = 10000 ** (-4 i / dim), i < dim / 4: Vaswani et al. 2017 in two dimensions, as in MoCo v3 (Chen, Xie and
    He 2021) and MAE (He et al. 2022). Raises ValueError where dim is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(
            f"dim is {dim}: pos_embed='sincos' needs a multiple of 4 (sine and cosine of rows and columns)"
        )
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = (torch.arange(size, dtype=torch.float64)[:, None] * frequency for size in (rows, cols))
    row = repeat(torch.cat((row.sin(), row.cos()), dim=-1), "h d -> h w d", w=cols)
    col = repeat(torch.cat((col.sin(), col.cos()), dim=-1), "w d -> h w d", h=rows)
    patches = rearrange(torch.cat((row, col), dim=-1), "h w d -> 1 (h w) d")
    return F.pad(patches, (0, 0, 1, 0)).to(torch.get_default_dtype())


class Preset(NamedTuple):
    """A size of ViT. `parameters` counts those of the model at 224 px, 3 channels and 1000 classes."""

    patch_size: int
    dim: int
    depth: int
    heads: int
    mlp_dim: int
    parameters: int


# Sizes of Dosovitskiy et al. 2021, table 1, and of Touvron et al. 2021 (DeiT) for Ti and S.
# The counts are below the published ones by depth * 3 * dim: to_qkv has no bias here.
PRESETS = {
    "ti": Preset(16, 192, 12, 3, 768, 5_710_504),
    "s": Preset(16, 384, 12, 6, 1536, 22_036_840),
    "b": Preset(16, 768, 12, 12, 3072, 86_540_008),
    "l": Preset(16, 1024, 24, 16, 4096, 304_252_904),
    "h": Preset(14, 1280, 32, 16, 5120, 631_922_920),
}


def vit_preset(name: str, *, image_size: int | tuple[int, int] = 224, num_classes: int = 1000, **kwargs) -> ViT:
    """A ViT of the size "ti", "s", "b", "l" or "h" (patch 16; 14 in H). `kwargs` are ViT's, and win over the preset's.

    >>> vit_preset("ti", num_classes=10, pos_embed="sincos", dropout=0.1)
    """
    if name.lower() not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose one of {', '.join(map(repr, PRESETS))}")
    sizes = PRESETS[name.lower()]._asdict() | kwargs
    del sizes["parameters"]
    sizes.setdefault("dim_head", sizes["dim"] // sizes["heads"])
    return ViT(image_size=image_size, num_classes=num_classes, **sizes)


def _check_positive(**sizes):
    for name, size in sizes.items():
        if size != int(size) or size < 1:
            raise ValueError(f"{name} is {size}: it must be a positive integer")
