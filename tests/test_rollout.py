"""Attention rollout against examples by hand, and what it takes from models."""

import pytest
import torch
from fused_blocks import randomise
from libraries import library_model
from vitriton.vit import ViT, fuse
from vitriton.vit.record import record_attention
from vitriton.vit.rollout import attention_rollout, discard, fuse_heads, patch_rollout, rollout, rollouts
from vitriton.vit.tokens import Tokens, tokens_of

pytestmark = pytest.mark.usefixtures("native")


def matrix(*rows):
    return torch.tensor([rows], dtype=torch.float64)


FIRST = matrix([0.2, 0.8], [0.6, 0.4])
SECOND = matrix([0.5, 0.5], [1.0, 0.0])


def test_two_layers_by_hand():
    """Behind the first layer: (FIRST + I) / 2; behind the second, (SECOND + I) / 2 times that."""
    first, second = rollouts([FIRST, SECOND])
    torch.testing.assert_close(first, matrix([0.6, 0.4], [0.3, 0.7]))
    # 0.75 * 0.6 + 0.25 * 0.3, ...
    torch.testing.assert_close(second, matrix([0.525, 0.475], [0.45, 0.55]))
    assert torch.equal(rollout([FIRST, SECOND]), second)
    # the order matters
    torch.testing.assert_close(rollout([SECOND, FIRST]), matrix([0.65, 0.35], [0.575, 0.425]))


@pytest.mark.parametrize(
    ("how", "fused", "rolled"),
    [
        ("mean", [[0.35, 0.65], [0.8, 0.2]], [[0.675, 0.325], [0.4, 0.6]]),
        # rows of the maximum sum to more than 1: 1.5 / 2.3, 0.8 / 2.3, 1 / 2.4, 1.4 / 2.4
        ("max", [[0.5, 0.8], [1.0, 0.4]], [[15 / 23, 8 / 23], [5 / 12, 7 / 12]]),
        ("min", [[0.2, 0.5], [0.6, 0.0]], [[12 / 17, 5 / 17], [3 / 8, 5 / 8]]),
    ],
)
def test_fused_heads_by_hand(how, fused, rolled):
    heads = torch.stack([FIRST, SECOND], dim=1)
    torch.testing.assert_close(fuse_heads(heads, how), matrix(*fused))
    torch.testing.assert_close(rollout([heads], head_fusion=how), matrix(*rolled))


def test_discard_by_hand():
    maps = torch.cat([matrix([0.1, 0.9, 0.0], [0.3, 0.3, 0.4]), matrix([0.6, 0.2, 0.2], [0.05, 0.05, 0.9])])
    assert torch.equal(discard(maps, 0), maps)
    assert torch.equal(discard(maps, 0.16), maps)  # less than one weight
    half = torch.cat([matrix([0, 0.9, 0], [0.0, 0.3, 0.4]), matrix([0.6, 0.2, 0], [0, 0, 0.9])])
    result = discard(maps, 0.5)
    assert (result == 0).sum(dim=(1, 2)).tolist() == [3, 3]
    torch.testing.assert_close(result.sum(dim=(1, 2)), half.sum(dim=(1, 2)))  # of ties either goes
    torch.testing.assert_close(discard(maps, 0.99)[1], matrix([0, 0, 0], [0, 0, 0.9])[0])


def test_a_row_that_is_discarded_stays_itself():
    # all but the largest of FIRST: 0.8
    expected = matrix([1 / 1.8, 0.8 / 1.8], [0, 1])
    torch.testing.assert_close(rollout([FIRST], discard_ratio=0.75), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rollout([]), "there are no maps"),
        (lambda: rollout([FIRST[0]]), r"the map of layer 0 has shape \(2, 2\)"),
        (lambda: rollout([FIRST, FIRST[:, :1]]), r"layer 1 has shape \(1, 1, 2\): a rollout needs"),
        (lambda: rollout([FIRST, torch.eye(3).expand(1, 3, 3)]), r"layer 1 has shape \(1, 3, 3\), .* the same tokens"),
        (lambda: rollout([FIRST.unsqueeze(1)], head_fusion="sum"), "head_fusion is 'sum': it must be one of 'mean'"),
        (lambda: rollout([FIRST], discard_ratio=1), "discard_ratio is 1: it must be at least 0 and less than 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("how", ["mean", "max", "min"])
def test_a_model_s_rollout_is_that_of_its_maps(how):
    model = randomise(ViT(image_size=16, patch_size=4, num_classes=5, dim=24, depth=3, heads=3, mlp_dim=40, dim_head=8))
    images = torch.randn(2, 3, 16, 16)
    with record_attention(model, heads=[0, 2]) as maps:
        model(images)
    expected = list(rollouts([map for _, map in maps.items()], head_fusion=how, discard_ratio=0.5))
    fuse(model)
    result = attention_rollout(model, images, heads=[0, 2], head_fusion=how, discard_ratio=0.5)
    assert len(result) == 3
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.sum(dim=-1), torch.ones(2, 17))


def test_shares_of_patches_leave_other_tokens_out():
    model, images, maps = library_model("timm, q/k norm, registers")
    assert tokens_of(model) == Tokens(0, 3)
    shares = patch_rollout(model, images)
    expected = rollout(maps.unbind(dim=1))[:, 0, 3:]
    torch.testing.assert_close(shares, expected / expected.sum(dim=1, keepdim=True))


def test_without_a_cls_token_it_is_the_mean_of_the_patches():
    model, images, maps = library_model("vit-pytorch, registers")
    shares = patch_rollout(model, images)
    expected = rollout(maps.unbind(dim=1))[:, :16, :16].mean(dim=1)
    torch.testing.assert_close(shares, expected / expected.sum(dim=1, keepdim=True))
