"""Attention maps of fused and plain models: the numbers of the plain blocks' softmax, and nothing more computed."""

import pytest
import torch
from fused_blocks import randomise
from vitriton.kernels import use_backend
from vitriton.vit import ViT, fuse, record_attention

SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "heads": 3, "mlp_dim": 40}


@pytest.fixture(autouse=True)
def native():
    with use_backend("native"):
        yield


def maps_of(model, x, **kwargs):
    with record_attention(model, **kwargs) as maps:
        model(x)
    return maps


def test_fused_blocks_give_the_softmax_of_the_plain_ones():
    model, x = randomise(ViT(**SMALL, dim_head=8)), torch.randn(2, 3, 16, 16)
    softmaxes = []
    hooks = [
        attention.fn.attend.register_forward_hook(lambda _, args, out: softmaxes.append(out))
        for attention, _ in model.transformer.layers
    ]
    expected = model(x)
    for hook in hooks:
        hook.remove()
    fuse(model)
    maps = maps_of(model, x)
    assert maps.layers == ["transformer.layers.0.0.fn", "transformer.layers.1.0.fn"]
    torch.testing.assert_close(maps.stack(), torch.stack(softmaxes, dim=1))
    assert not maps[0].requires_grad
    torch.testing.assert_close(model(x), expected)
