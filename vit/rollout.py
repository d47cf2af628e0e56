"""Attention rollout: from the maps of all layers, what each token is made of behind them.

Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers": behind a block a token is half itself, by the
residual connection, and half what it attended to; the product over the blocks tells how much of each input token is
in it. Heads are averaged there. Their maximum or minimum, and leaving out the smallest weights, often give clearer
pictures; each row is made to sum to 1 again.
"""

import torch
from torch import Tensor

from .record import record_attention
from .tokens import tokens_of

__all__ = ["HEAD_FUSIONS", "attention_rollout", "discard", "fuse_heads", "patch_rollout", "rollout"]

HEAD_FUSIONS = {"mean": Tensor.mean, "max": Tensor.amax, "min": Tensor.amin}


def fuse_heads(maps, how="mean"):
    """(b, heads, n, m) -> (b, n, m): the "mean", "max" or "min" over the heads."""
    if how not in HEAD_FUSIONS:
        raise ValueError(f"head_fusion is {how!r}: it must be one of {', '.join(map(repr, HEAD_FUSIONS))}")
    return HEAD_FUSIONS[how](maps, dim=1)


def discard(maps, ratio):
    """(b, n, m) with the smallest weights of each map, `ratio` of all n * m, set to zero; 0 <= ratio < 1."""
    if not 0 <= ratio < 1:
        raise ValueError(f"discard_ratio is {ratio}: it must be at least 0 and less than 1")
    smallest = int(ratio * maps[0].numel()) if len(maps) else 0
    if not smallest:
        return maps
    flat = maps.flatten(1)
    return flat.scatter(1, flat.topk(smallest, largest=False, sorted=False).indices, 0).view_as(maps)


def rollout(maps, *, head_fusion="mean", discard_ratio=0.0):
    """What the tokens are made of behind all layers: (b, n, n), of row i what token i is; each row sums to 1.

    `maps` are those of the layers in order, each (b, heads, n, n), or (b, n, n) where the heads are fused already.
    ValueError for other shapes, and for arguments that are not allowed.
    """
    return list(rollouts(maps, head_fusion=head_fusion, discard_ratio=discard_ratio))[-1]


def rollouts(maps, *, head_fusion="mean", discard_ratio=0.0):
    """`rollout` behind the first layer, the first two, ..., all of them: yields (b, n, n) each."""
    result = None
    for i, layer in enumerate(maps):
        if layer.ndim not in (3, 4) or layer.shape[-1] != layer.shape[-2]:
            raise ValueError(
                f"the map of layer {i} has shape {tuple(layer.shape)}: a rollout needs (b, heads, n, n) or (b, n, n), "
                "that is, of all tokens on all tokens"
            )
        layer = discard(fuse_heads(layer, head_fusion) if layer.ndim == 4 else layer, discard_ratio)
        layer = layer + torch.eye(layer.shape[-1], dtype=layer.dtype, device=layer.device)
        layer = layer / layer.sum(dim=-1, keepdim=True)
        if result is not None and layer.shape != result.shape:
            raise ValueError(
                f"the map of layer {i} has shape {tuple(layer.shape)}, heads fused, and those before it "
                f"{tuple(result.shape)}: a rollout needs the same tokens in all layers, and no windows"
            )
        result = layer if result is None else layer @ result
        yield result
    if result is None:
        raise ValueError("there are no maps: a rollout needs those of one layer at least")


@torch.no_grad()
def attention_rollout(model, images, *, heads=None, head_fusion="mean", discard_ratio=0.0):
    """The rollouts of `model` on `images` behind each of its layers: a list of (b, n, n), fused or plain blocks alike.

    `heads` chooses some, as in record_attention. Of each layer one map is held at a time, its heads fused.
    """

    def fused(map):
        return discard(fuse_heads(map, head_fusion), discard_ratio)

    with record_attention(model, heads=heads, reduce=fused) as maps:
        model(images)
    return list(rollouts(map for _, map in maps.items()))


def patch_rollout(model, images, **kwargs):
    """How much of the CLS token comes from each patch, behind all layers: (b, patches), each row summing to 1.

    Where there is no CLS token, how much of the mean of all patches does. Keywords as in attention_rollout.
    """
    tokens = tokens_of(model)
    return patch_shares(attention_rollout(model, images, **kwargs)[-1], tokens)


def patch_shares(rolled, tokens):
    """(b, n, n) -> (b, patches), rows summing to 1: the CLS token's row of a rollout, or the mean row of the patches.

    ValueError where nothing is left of them.
    """
    row = tokens.patches(rolled, dim=1).mean(dim=1) if tokens.cls is None else rolled[:, tokens.cls]
    shares = tokens.patches(row)
    total = shares.sum(dim=-1, keepdim=True)
    if not total.all():
        raise ValueError("nothing of the patches is left in the rollout: choose a smaller discard_ratio")
    return shares / total
