"""The plain ViT against formulas written out by hand, to the last bit; keys, counts, checkpoints, positions, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from vitriton.vit.reference import PRESETS, Attention, FeedForward, PreNorm, Transformer, ViT, pair, vit_preset

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 5,
    "dim": 24,
    "depth": 2,
    "heads": 3,
    "mlp_dim": 40,
    "dim_head": 8,
}


def randomised(model):
    """The model with random LayerNorm weights and biases too: ones and zeros hide errors."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.startswith("mlp_head.0") or name.endswith("bias"):
                p.normal_()
    return model


# The formulas by hand: no einops, no nn.Module, patches and heads cut out one by one.


def patches_by_hand(img, p1, p2):
    _, c, height, width = img.shape
    rows = []
    for y in range(0, height, p1):
        for x in range(0, width, p2):
            rows.append(
                torch.stack([img[:, k, y + i, x + j] for i in range(p1) for j in range(p2) for k in range(c)], 1)
            )
    return torch.stack(rows, dim=1)


def attention_by_hand(w, prefix, x, heads, dim_head):
    b, n, _ = x.shape
    inner = heads * dim_head
    qkv = F.linear(x, w[f"{prefix}.to_qkv.weight"])
    q, k, v = (qkv[..., i * inner : (i + 1) * inner].view(b, n, heads, dim_head).transpose(1, 2) for i in range(3))
    scores = torch.matmul(q, k.transpose(2, 3)) * dim_head**-0.5
    out = torch.matmul(torch.softmax(scores, dim=3), v).transpose(1, 2).reshape(b, n, inner)
    if f"{prefix}.to_out.0.weight" not in w:
        return out
    return F.linear(out, w[f"{prefix}.to_out.0.weight"], w[f"{prefix}.to_out.0.bias"])


def mlp_by_hand(w, prefix, x):
    hidden = F.gelu(F.linear(x, w[f"{prefix}.net.0.weight"], w[f"{prefix}.net.0.bias"]))
    return F.linear(hidden, w[f"{prefix}.net.3.weight"], w[f"{prefix}.net.3.bias"])


def norm_by_hand(w, prefix, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{prefix}.weight"], w[f"{prefix}.bias"], 1e-5)


def vit_by_hand(w, img, *, patch, depth, heads, dim_head, pool):
    x = F.linear(patches_by_hand(img, *patch), w["to_patch_embedding.1.weight"], w["to_patch_embedding.1.bias"])
    x = torch.cat((w["cls_token"].expand(len(img), 1, -1), x), dim=1) + w["pos_embedding"]
    for i in range(depth):
        block = f"transformer.layers.{i}"
        x = attention_by_hand(w, f"{block}.0.fn", norm_by_hand(w, f"{block}.0.norm", x), heads, dim_head) + x
        x = mlp_by_hand(w, f"{block}.1.fn", norm_by_hand(w, f"{block}.1.norm", x)) + x
    x = x.mean(dim=1) if pool == "mean" else x[:, 0]
    return F.linear(norm_by_hand(w, "mlp_head.0", x), w["mlp_head.1.weight"], w["mlp_head.1.bias"])


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(
    ("image", "patch", "channels"),
    [(16, 4, 3), ((8, 20), (4, 5), 3), ((12, 4), (2, 4), 1)],
    ids=["square", "rectangular", "one channel"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_to_the_last_bit_with_formulas_by_hand(pool, image, patch, channels, dtype):
    torch.manual_seed(0)
    sizes = SMALL | {"image_size": image, "patch_size": patch, "channels": channels, "pool": pool}
    model = randomised(ViT(**sizes)).to(dtype).eval()
    img = torch.randn(2, channels, *pair(image), dtype=dtype)
    by_hand = vit_by_hand(model.state_dict(), img, patch=pair(patch), depth=2, heads=3, dim_head=8, pool=pool)
    assert torch.equal(model(img), by_hand)


def test_gradients_agree_to_the_last_bit_with_formulas_by_hand():
    torch.manual_seed(0)
    model = randomised(ViT(**SMALL))
    img, dy = torch.randn(2, 3, 16, 16), torch.randn(2, 5)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    model(img).backward(dy)
    vit_by_hand(leaves, img, patch=(4, 4), depth=2, heads=3, dim_head=8, pool="cls").backward(dy)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, leaves[name].grad), name


@pytest.mark.parametrize(("dim", "heads", "dim_head"), [(128, 2, 64), (64, 1, 64), (64, 1, 32), (20, 4, 59)])
def test_attention_agrees_to_the_last_bit(dim, heads, dim_head):
    torch.manual_seed(0)
    block = Attention(dim, heads=heads, dim_head=dim_head)
    x = torch.randn(2, 17, dim)
    weights = {f"a.{name}": t for name, t in block.state_dict().items()}
    assert torch.equal(block(x), attention_by_hand(weights, "a", x, heads, dim_head))


def test_blocks_have_the_known_signatures_and_keys():
    assert list(Attention(64).state_dict()) == ["to_qkv.weight", "to_out.0.weight", "to_out.0.bias"]
    assert Attention(64).to_qkv.weight.shape == (3 * 8 * 64, 64)
    assert (Attention(64).heads, Attention(64).scale) == (8, 0.125)
    assert list(Attention(64, 1, 64, 0.1).state_dict()) == ["to_qkv.weight"]  # one head of size dim: to_out is Identity
    assert list(Attention(64, 1, 32).state_dict()) == ["to_qkv.weight", "to_out.0.weight", "to_out.0.bias"]
    assert list(FeedForward(8, 16, 0.1).state_dict()) == ["net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"]
    assert list(PreNorm(8, FeedForward(8, 16)).state_dict())[:2] == ["norm.weight", "norm.bias"]
    assert len(Transformer(8, 3, 2, 4, 16, 0.1).layers) == 3


def test_vit_keys_and_shapes():
    shapes = {name: tuple(t.shape) for name, t in ViT(**SMALL | {"depth": 1}).state_dict().items()}
    block = "transformer.layers.0"
    assert shapes == {
        "pos_embedding": (1, 17, 24),
        "cls_token": (1, 1, 24),
        "to_patch_embedding.1.weight": (24, 48),
        "to_patch_embedding.1.bias": (24,),
        f"{block}.0.norm.weight": (24,),
        f"{block}.0.norm.bias": (24,),
        f"{block}.0.fn.to_qkv.weight": (72, 24),
        f"{block}.0.fn.to_out.0.weight": (24, 24),
        f"{block}.0.fn.to_out.0.bias": (24,),
        f"{block}.1.norm.weight": (24,),
        f"{block}.1.norm.bias": (24,),
        f"{block}.1.fn.net.0.weight": (40, 24),
        f"{block}.1.fn.net.0.bias": (40,),
        f"{block}.1.fn.net.3.weight": (24, 40),
        f"{block}.1.fn.net.3.bias": (24,),
        "mlp_head.0.weight": (24,),
        "mlp_head.0.bias": (24,),
        "mlp_head.1.weight": (5, 24),
        "mlp_head.1.bias": (5,),
    }


# Counts that the field publishes for the same sizes at 224 px and 1000 classes, with a bias in the qkv projection.
PUBLISHED = {"ti": 5_717_416, "s": 22_050_664, "b": 86_567_656, "l": 304_326_632, "h": 632_045_800}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_parameter_counts(name):
    size = PRESETS[name]
    with torch.device("meta"):
        model = vit_preset(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == size.parameters == PUBLISHED[name] - size.depth * 3 * size.dim
    assert model.transformer.layers[0][0].fn.scale == (size.dim // size.heads) ** -0.5


def test_preset_takes_the_arguments_of_vit():
    with torch.device("meta"):
        model = vit_preset("Ti", image_size=(32, 64), num_classes=7, depth=1, dropout=0.25, pool="mean")
    assert model.pos_embedding.shape == (1, 2 * 4 + 1, 192)
    assert model.mlp_head[1].out_features == 7 and len(model.transformer.layers) == 1 and model.pool == "mean"
    assert model.transformer.layers[0][1].fn.net[2].p == 0.25
    with pytest.raises(ValueError, match=r"no preset 'g'.*'ti', 's', 'b', 'l', 'h'"):
        vit_preset("g")


@pytest.mark.parametrize("pos_embed", ["learned", "sincos", "axial"])
def test_checkpoint_loads_and_gives_the_same_logits(pos_embed, tmp_path):
    first, second = (ViT(**SMALL, pos_embed=pos_embed).eval() for _ in range(2))
    img = torch.randn(2, 3, 16, 16)
    assert not torch.equal(first(img), second(img))
    torch.save(first.state_dict(), tmp_path / "vit.pt")
    second.load_state_dict(torch.load(tmp_path / "vit.pt", weights_only=True))
    assert torch.equal(first(img), second(img))


def test_pool_mean_is_over_all_tokens():
    model = ViT(**SMALL, pool="mean").eval()
    seen = []
    model.transformer.register_forward_hook(lambda _, __, out: seen.append(out))
    model.to_latent.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(2, 3, 16, 16))
    tokens, pooled = seen
    assert tokens.shape == (2, 17, 24)
    assert torch.equal(pooled, tokens.mean(dim=1))


def test_dropout_places():
    model = ViT(**SMALL, dropout=0.25, emb_dropout=0.5)
    places = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    blocks = [
        f"transformer.layers.{i}.{place}" for i in range(2) for place in ("0.fn.to_out.1", "1.fn.net.2", "1.fn.net.4")
    ]
    assert places == {"dropout": 0.5} | dict.fromkeys(blocks, 0.25)

    img = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model(img), model(img))
    assert torch.equal(model.eval()(img), model(img))


@pytest.mark.parametrize("place", ["dropout", "transformer.layers.1.0.fn.to_out.1", "transformer.layers.1.1.fn.net.2"])
def test_dropout_acts_where_it_stands(place):
    torch.manual_seed(0)
    model = ViT(**SMALL, dropout=0.5, emb_dropout=0.5).eval()
    img = torch.randn(2, 3, 16, 16)
    expected = model(img)
    dropout = model.get_submodule(place).train()
    assert not torch.equal(model(img), expected)
    dropout.p = 0.0
    assert torch.equal(model(img), expected)


def test_learned_positions_are_drawn_from_a_normal():
    positions = ViT(**SMALL | {"image_size": 64, "dim": 256}).pos_embedding
    assert abs(positions.mean()) < 0.02 and abs(positions.std() - 1) < 0.02


def test_sincos_positions():
    model = ViT(**SMALL | {"image_size": (8, 12)}, pos_embed="sincos")
    assert not any("pos" in name for name in model.state_dict())
    assert not any("pos" in name for name, _ in model.named_parameters())
    positions = model.positions()
    assert positions.shape == (1, 7, 24) and positions.dtype == torch.float32
    assert not positions[0, 0].any()
    for row in range(2):
        for col in range(3):
            angles = [position * 10000 ** (-4 * i / 24) for position in (row, col) for i in range(6)]
            expected = [f(a) for half in (angles[:6], angles[6:]) for f in (math.sin, math.cos) for a in half]
            torch.testing.assert_close(positions[0, 1 + 3 * row + col], torch.tensor(expected), rtol=0, atol=1e-7)
    assert model.half().positions().dtype == torch.float16
    assert model.to("meta").positions().device.type == "meta"


def test_axial_positions_are_rows_plus_columns():
    model = ViT(**SMALL | {"image_size": (8, 12)}, pos_embed="axial")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "pos" in name}
    assert shapes == {"pos_embedding_rows": (2, 1, 24), "pos_embedding_cols": (1, 3, 24)}
    positions = model.positions()
    assert positions.shape == (1, 7, 24) and not positions[0, 0].any()
    for row in range(2):
        for col in range(3):
            expected = model.pos_embedding_rows[row, 0] + model.pos_embedding_cols[0, col]
            assert torch.equal(positions[0, 1 + 3 * row + col], expected)


@pytest.mark.parametrize("pos_embed", ["sincos", "axial"])
def test_other_positions_are_added_to_the_tokens(pos_embed):
    torch.manual_seed(0)
    model = randomised(ViT(**SMALL, pos_embed=pos_embed)).eval()
    img = torch.randn(2, 3, 16, 16)
    weights = model.state_dict() | {"pos_embedding": model.positions().detach()}
    by_hand = vit_by_hand(weights, img, patch=(4, 4), depth=2, heads=3, dim_head=8, pool="cls")
    assert torch.equal(model(img), by_hand)
    model(img).sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "pos" in name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 18}, "image_size 18x18 does not divide into patches of patch_size 4x4"),
        ({"image_size": (16, 18)}, "16x18 does not divide"),
        ({"patch_size": (5, 4)}, "patch_size 5x4"),
        ({"pool": "max"}, "pool is 'max': it must be 'cls'"),
        ({"pos_embed": "rotary"}, "pos_embed is 'rotary': it must be 'learned', 'sincos' or 'axial'"),
        ({"pos_embed": "sincos", "dim": 26}, "dim is 26: pos_embed='sincos' needs a multiple of 4"),
        ({"image_size": 0}, "image_height is 0: it must be a positive integer"),
        ({"patch_size": (4, -4)}, "patch_width is -4"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"dim": 0}, "dim is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"dim_head": -1}, "dim_head is -1"),
        ({"mlp_dim": 0}, "hidden_dim is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"patch_size": 1.5}, "patch_height is 1.5"),
    ],
    ids=str,
)
def test_bad_sizes_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        ViT(**SMALL | wrong)


@pytest.mark.parametrize("shape", [(2, 3, 16, 12), (2, 3, 20, 16), (2, 1, 16, 16), (3, 16, 16)], ids=str)
def test_wrong_images_raise(shape):
    with pytest.raises(ValueError, match=r"this model takes \(batch, 3, 16, 16\)"):
        ViT(**SMALL)(torch.randn(shape))


def test_pair():
    assert pair(3) == (3, 3) and pair((3, 4)) == (3, 4) and pair([3, 4]) == (3, 4)
