"""What `vitriton bench` counts without a clock: operations, memory and traffic, in closed form; its sizes of ViT."""

import pytest
import torch
from vitriton.vit import fuse
from vitriton.vit.bench import cost, functions
from vitriton.vit.bench.race import Case, Race
from vitriton.vit.bench.sizes import SIZES, Shape, build, parse_model
from vitriton.vit.reference import PRESETS

pytest_plugins = ["stand_ins"]
pytestmark = pytest.mark.usefixtures("unguarded", "tiny")


def test_vit_b_16_takes_17_6_billion_multiply_adds():
    record = cost.cost("b")
    assert round(record["multiply_adds"] / 1e9, 1) == 17.6
    assert record["parameters"] == PRESETS["b"].parameters
    # by hand: embedding, and in each block qkv, two products of attention, its output, and the MLP
    n, d = 197, 768
    by_hand = 196 * 768 * d + 12 * (n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d) + d * 1000
    assert record["multiply_adds"] == by_hand
    operators = record["fused"]["operators"]
    assert {"vitriton.qkv_attention", "vitriton.layer_norm_linear"} <= set(operators)
    assert operators["vitriton.qkv_attention"] == 12 * 4 * n * n * d
    # the last feed forward is of the CLS token alone
    assert operators["vitriton.layer_norm_linear"] == 2 * d * (12 * n * 3 * d + (11 * n + 1) * 4 * d)


@pytest.mark.parametrize("name", ["ti", "s", "l", "h", "so400m", "g"])
def test_fusing_changes_the_count_of_one_feed_forward_and_keeps_less(name):
    """The last, of which only the CLS token is made."""
    record, size = cost.cost(name), SIZES[name]
    assert record["plain"]["flops"] == 2 * record["multiply_adds"]
    assert record["fused"]["flops"] == record["plain"]["flops"] - last_feed_forward(record["tokens"], size)
    assert record["fused"]["activation_bytes"] < record["plain"]["activation_bytes"]
    assert record["parameters"] == size.parameters


def last_feed_forward(tokens, size):
    """Operations of the plain model that no logit depends on."""
    return 2 * 2 * (tokens - 1) * size.dim * size.mlp_dim


def test_a_training_step_counts_three_forward_passes_and_what_is_recomputed():
    images = torch.randn(1, 3, 64, 64)
    plain, fused = build("xs", image_size=64), build("xs", image_size=64)
    fuse(fused)
    forward = sum(cost.model_flops(plain, images).values())
    patches = 2 * 16 * 768 * 64  # whose input needs no gradient
    assert sum(cost.model_flops(plain, images, training=True).values()) == 3 * forward - patches
    recomputed = 2 * 2 * 17 * 17 * 64  # q kᵀ of two blocks, for the fused backward pass
    unread = 3 * last_feed_forward(17, SIZES["xs"])
    assert sum(cost.model_flops(fused, images, training=True).values()) == 3 * forward - patches + recomputed - unread


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_what_is_counted_of_fake_tensors_is_kept_of_real_ones(kind):
    counted = cost.cost("xs", image_size=64, batch=3)[kind]["activation_bytes"]
    model = build("xs", image_size=64)
    if kind == "fused":
        fuse(model)
    assert cost.activation_bytes(model, torch.randn(3, 3, 64, 64)) == counted


def test_the_plain_block_keeps_the_map_and_the_fused_one_does_not():
    """From 17 to 65 tokens, what grows with N² is one map of fp32 a head and block in plain, and nothing in fused."""
    kept = {
        kind: [cost.cost("xs", image_size=size)[kind]["activation_bytes"] for size in (64, 128, 192)]
        for kind in ("plain", "fused")
    }
    n = [17, 65, 145]
    quadratic = {}
    for kind, (a, b, c) in kept.items():
        slope = ((c - a) / (n[2] - n[0]) - (b - a) / (n[1] - n[0])) / (n[2] - n[1])  # of N²
        quadratic[kind] = slope
    maps = 2 * 2 * 4  # blocks, heads, bytes
    assert quadratic["plain"] == pytest.approx(maps, rel=0.01)
    assert quadratic["fused"] == pytest.approx(0, abs=0.01)


def test_peak_memory_agrees_with_the_closed_form_of_the_plain_map():
    """The plain formula holds two maps at once (scores before and after scaling; then scores and softmax)."""
    shape = Shape("xs", 2, 300)
    case = Case(functions.QUESTIONS["qkv_attention"], shape, torch.float32, "cpu", False)
    race = Race(case, ("SDPA", "plain"))
    peaks = race.peaks()
    one_map = 2 * 2 * 300 * 300 * 4
    activations = 2 * 300 * 64 * 4  # of q, k, v or the output
    assert 2 * one_map <= peaks["plain"] <= 2 * one_map + 4 * activations
    assert activations <= peaks["SDPA"] < one_map / 2  # which makes no map


def test_traffic_of_a_block_is_each_tensor_once():
    d, hidden, n = 64, 128, 17
    block = 4 * d * d + 2 * d * hidden + 9 * d + hidden
    block += n * (d + 3 * d + 3 * d + d + d + 2 * d + d + hidden + hidden + 2 * d)
    edge = 16 * (768 + d) + 768 * d + n * d + 1000 * d + 1000
    assert cost.model_traffic("xs", 1, n, 16, 4) == 4 * (2 * block + edge)


@pytest.mark.parametrize("text", ["b", "B", "vit_b", "vit_b16", "vit-b-16", "ViT-B/16", "base", "vit_base_patch16"])
def test_names_of_models(text):
    assert parse_model(text) == ("b", 16)


def test_other_names_of_models():
    assert parse_model("so400m14") == parse_model("so400m") == ("so400m", 14)
    assert parse_model("vit_b32") == ("b", 32)
    for text in ("resnet", "", "vit_x16", "16"):
        with pytest.raises(ValueError, match="is no size of ViT; allowed are ti, s, b"):
            parse_model(text)


def test_head_dims_of_no_power_of_two():
    assert (Shape("so400m", 1, 1).dim_head, Shape("g", 1, 1).dim_head, Shape("h", 1, 1).dim_head) == (72, 88, 80)
