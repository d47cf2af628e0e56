"""Attention maps of fused and plain models: the numbers of the plain blocks' softmax, and nothing more computed."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from fused_blocks import randomise
from libraries import LIBRARIES, library_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from vitriton.kernels import use_backend
from vitriton.vit import FusedAttention, ViT, attention_layers, fuse, record, record_attention
from vitriton.vit.measure import peak_memory
from vitriton.vit.record import attention_map
from vitriton.vit.tokens import Tokens, tokens_of

SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "heads": 3, "mlp_dim": 40}


@pytest.fixture(autouse=True)
def native():
    with use_backend("native"):
        yield
    assert not record.active and not record._recordings


def small_vit(**kwargs):
    return randomise(ViT(**SMALL | kwargs, dim_head=8)).eval()


def fused_vit(**kwargs):
    model = small_vit(**kwargs)
    fuse(model)
    return model


def images(batch=2):
    return torch.randn(batch, 3, 16, 16)


def maps_of(model, x, **kwargs):
    with record_attention(model, **kwargs) as maps:
        model(x)
    return maps


def softmaxes(model, x):
    """The maps (b, layers, heads, n, n) of a plain model of the form of vitriton.vit, by hooks on its softmax."""
    maps = []
    hooks = [
        module.register_forward_hook(lambda _, args, out: maps.append(out))
        for module in model.modules()
        if isinstance(module, nn.Softmax)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def test_fused_blocks_give_the_softmax_of_the_plain_ones():
    model, x = small_vit(), images()
    expected = softmaxes(model, x)
    assert torch.equal(maps_of(model, x).stack(), expected)
    fuse(model)
    out = model(x)
    with record_attention(model) as maps:
        assert torch.equal(model(x), out)
    torch.testing.assert_close(maps.stack(), expected)
    assert maps.layers == ["transformer.layers.0.0.fn", "transformer.layers.1.0.fn"]
    assert not maps[0].requires_grad
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library(library):
    """Fused or plain, the maps are softmax(scale q kᵀ) of q and k as the library's own modules make them."""
    model, x, expected = library_model(library)
    with torch.no_grad():
        out = model(x)
        out = out if torch.is_tensor(out) else out[0]
        for training in (False, True):
            maps = maps_of(model.train(training), x)
            torch.testing.assert_close(maps.stack(), expected)
            torch.testing.assert_close(maps.stack().sum(dim=-1), torch.ones(expected.shape[:-1]))
        rows = maps_of(model.eval(), x, rows=[-1, 0], heads=1, layers=-1)
        torch.testing.assert_close(rows[-1], expected[:, -1, 1:2, [-1, 0]])
        again = model(x)
    assert torch.equal(again if torch.is_tensor(again) else again[0], out)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "select",
    [
        {"rows": "cls"},
        {"rows": 0},
        {"rows": [3, -1]},
        {"rows": slice(1, None, 5)},
        {"rows": range(3)},
        {"heads": 2},
        {"heads": [2, 0], "rows": slice(2)},
        {"heads": slice(1, None), "rows": [5, 5]},
    ],
)
@pytest.mark.parametrize("make", [small_vit, fused_vit])
def test_a_part_equals_the_part_of_the_whole(make, select):
    model, x = make(), images()
    whole = maps_of(model, x).stack()
    heads, rows = select.get("heads", slice(None)), select.get("rows", slice(None))
    heads, rows = ([i] if isinstance(i, int) else list(i) if isinstance(i, range) else i for i in (heads, rows))
    expected = whole[:, :, heads][:, :, :, [0] if rows == "cls" else rows]
    torch.testing.assert_close(maps_of(model, x, **select).stack(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_are_computed_in_fp32_or_better(dtype):
    """From the q and k that the block has: their rounding is the model's, and the map adds none of half precision."""
    q, k = torch.randn(2, 3, 5, 8, dtype=dtype), torch.randn(2, 7, 3, 8, dtype=dtype).transpose(1, 2)
    map = attention_map(q, k, 0.3)
    exact = (q.double() @ k.double().transpose(-1, -2) * 0.3).softmax(dim=-1)
    assert map.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (map - exact).abs().max() < (1e-15 if dtype == torch.float64 else 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_map(q, k, 0.3), map)


def test_masks():
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8)
    scores = q @ k.transpose(-1, -2) / 2
    keep = torch.rand(3, 5, 6) > 0.4
    keep[1, 2] = False
    for mask in (keep, keep[1], keep[:, :1], torch.where(keep, 0.5, -torch.inf)):
        whole = (scores + (mask if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf))).softmax(dim=-1)
        part = attention_map(q, k, 0.5, mask, heads=[1, 2], rows=[0, 2])
        torch.testing.assert_close(part, whole[:, 1:, [0, 2]].nan_to_num())


def test_gradients_go_through_the_maps_if_asked():
    plain, x, grads = small_vit(), images(), []
    fused = copy.deepcopy(plain)
    fuse(fused)
    for model in (plain, fused):
        maps = maps_of(model, x, rows="cls", detach=False)
        maps[-1].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 5
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


# ---------------------------------------------------------------------------------------------------------------------
# The cost


@pytest.mark.usefixtures("unguarded")
def test_the_cls_rows_need_no_map_of_all_tokens():
    attention = FusedAttention(64, heads=4, dim_head=16).eval()
    x = torch.randn(1, 1025, 64)
    whole = 4 * 1025 * 1025 * 4

    def peak(**kwargs):
        with torch.no_grad():
            return peak_memory(lambda: maps_of(attention, x, **kwargs), x.device)

    with torch.no_grad():
        unrecorded = peak_memory(lambda: attention(x), x.device)
    assert peak(rows=0) < unrecorded + whole / 50
    assert peak() > whole


def test_only_chosen_layers_are_computed(monkeypatch):
    model, x = fused_vit(depth=5), images()
    maps = maps_of(model, x)
    shapes = []

    def logged(*args, **kwargs):
        map = attention_map(*args, **kwargs)
        shapes.append(tuple(map.shape))
        return map

    monkeypatch.setattr(record, "attention_map", logged)
    names = attention_layers(model)
    for layers, chosen in (
        (-1, [4]),
        ([0, -2], [0, 3]),
        (slice(1, 3), [1, 2]),
        (names[2], [2]),
        ("*layers.[13].*", [1, 3]),
        ([names[1], 0], [0, 1]),
    ):
        shapes.clear()
        part = maps_of(model, x, layers=layers, rows="cls")
        assert part.layers == [names[i] for i in chosen] and len(part) == len(chosen)
        assert shapes == [(2, 3, 1, 17)] * len(chosen)
        for i in chosen:
            torch.testing.assert_close(part[i], maps[i][:, :, :1])
            assert part[i] is part[i - 5] is part[names[i]]


def test_reduce_sees_what_is_kept():
    model, x = fused_vit(), images()
    whole = maps_of(model, x, heads=[0, 1])
    mean = maps_of(model, x, heads=[0, 1], reduce=lambda map: map.mean(dim=1))
    for layer in (0, 1):
        torch.testing.assert_close(mean[layer], whole[layer].mean(dim=1))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks that step aside, or cannot be recorded


def test_a_fused_block_that_steps_aside_is_recorded():
    model, x = fused_vit(), images()
    expected = maps_of(model, x).stack()
    attention = model.transformer.layers[0][0].fn
    attention.attend.register_forward_hook(lambda *_: None)  # so the softmax itself has to be called
    for _ in range(2):
        maps = maps_of(model, x, keep="all")
        torch.testing.assert_close(maps.stack(), expected)
        assert len(maps.all(0)) == 1
        assert "plain" not in vars(attention)


def test_vit_pytorch_s_recorder_and_ours_at_once():
    recorder = pytest.importorskip("vit_pytorch.recorder", reason="vit-pytorch is not installed")
    model, x, _ = library_model("vit-pytorch")
    with record_attention(model) as maps:
        _, recorded = recorder.Recorder(model)(x)
    assert torch.equal(maps.stack(), recorded)


class Twice(nn.Module):
    """Its class has no attention in its name; of its two halves the first cannot be recorded."""

    def __init__(self, first):
        super().__init__()
        self.first, self.second = first, FusedAttention(24, 3, 8)

    def forward(self, x):
        return self.second(self.first(x))


class LinearAttention(nn.Module):
    def forward(self, x):
        return x.cumsum(dim=1)


class ChannelAttention(nn.Module):
    def forward(self, x):
        return x @ (x.transpose(1, 2) @ x).unsqueeze(1).softmax(dim=-1).squeeze(1)


class ColumnAttention(nn.Module):
    def forward(self, x):
        return (x @ x.transpose(1, 2)).unsqueeze(1).softmax(dim=2).squeeze(1) @ x


class TwoMapsAttention(nn.Module):
    def forward(self, x):
        scores = (x @ x.transpose(1, 2)).unsqueeze(1)
        return (scores.softmax(dim=-1) - scores.mul(2).softmax(dim=-1)).squeeze(1) @ x


class ExtraKeyAttention(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(24, 3, batch_first=True, add_zero_attn=True)

    def __call__(self, x):
        return super().__call__(x, x, x)[0]


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (LinearAttention, "LinearAttention calls neither softmax nor scaled_dot_product_attention"),
        (ChannelAttention, "has a softmax of 24 x 24, which is not over its 5 tokens"),
        (ColumnAttention, "ColumnAttention calls neither softmax nor scaled_dot_product_attention"),
        (TwoMapsAttention, "makes 2 maps in one call"),
        (ExtraKeyAttention, "adds keys that are no tokens"),
    ],
)
def test_what_cannot_be_recorded_says_why_and_leaves_the_others(first, why):
    model, x = Twice(first()), torch.randn(2, 5, 24)
    out = model(x)
    with record_attention(model) as maps:
        assert torch.equal(model(x), out)
    assert maps[1].shape == (2, 3, 5, 5)
    for ask in (lambda: maps[0], maps.stack, maps.items):
        with pytest.raises(RuntimeError, match=f"there is no map of first: .*{why}"):
            ask()


def test_a_block_that_writes_into_its_map():
    class InPlaceAttention(nn.Module):
        def forward(self, x):
            return (x @ x.transpose(1, 2)).unsqueeze(1).softmax(dim=-1).mul_(0).squeeze(1) @ x

    maps = maps_of(InPlaceAttention(), torch.randn(2, 5, 24))
    torch.testing.assert_close(maps[0].sum(dim=-1), torch.ones(2, 1, 5))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_of_plain_modules():
    """Bool masks mean opposite things in torch.nn and in scaled_dot_product_attention."""
    attention, x = nn.MultiheadAttention(24, 3, batch_first=True).eval(), torch.randn(2, 5, 24)
    hidden, padding = torch.rand(5, 5) > 0.7, torch.zeros(2, 5, dtype=torch.bool)
    hidden.fill_diagonal_(False)
    padding[1, 3:] = True
    per_head = torch.randn(6, 5, 5)
    added = torch.where(padding, -torch.inf, 0.0)
    for mask in (
        {"attn_mask": hidden},
        {"attn_mask": hidden, "key_padding_mask": padding},
        {"attn_mask": per_head, "key_padding_mask": added},
        {"attn_mask": per_head, "key_padding_mask": padding},
    ):
        with record_attention(attention, rows=[1, 4]) as maps:
            _, expected = attention(x, x, x, average_attn_weights=False, **mask)
        torch.testing.assert_close(maps[0], expected[:, :, [1, 4]])
    transposed = copy.deepcopy(attention)
    transposed.batch_first = False
    with record_attention(transposed) as maps:
        _, expected = transposed(*3 * [x.transpose(0, 1)], average_attn_weights=False)
    torch.testing.assert_close(maps[0], expected)


@pytest.mark.parametrize("fused_attn", [True, False])
def test_masks_of_timm(fused_attn):
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    attention, x = layers.Attention(24, 3, qkv_bias=True), torch.randn(2, 5, 24)
    attention.fused_attn = fused_attn
    plain = maps_of(attention, x)[0]
    with record_attention(attention) as maps:
        attention(x, is_causal=True)
        causal = maps[0]
        keep = torch.rand(2, 1, 5, 5) > 0.5
        keep[..., 0] = True
        attention(x, attn_mask=keep)
    for map, mask in ((causal, torch.ones(5, 5, dtype=torch.bool).tril()), (maps[0], keep)):
        expected = plain * mask
        torch.testing.assert_close(map, expected / expected.sum(dim=-1, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# The context


def test_several_calls():
    model, x, y = fused_vit(), images(), images(3)
    with record_attention(model, rows="cls") as last, record_attention(model, rows=1, keep="all") as both:
        model(x)
        first = last[0]
        model(y)
    assert [map.shape[0] for map in both.all(1)] == [2, 3]
    assert both[1] is both.all(1)[1] and len(last.all(0)) == 1
    torch.testing.assert_close(first, maps_of(model, x)[0][:, :, :1])
    torch.testing.assert_close(last[0], maps_of(model, y)[0][:, :, :1])
    torch.testing.assert_close(both.all(0)[0], maps_of(model, x)[0][:, :, 1:2])


def test_an_exception_ends_the_recording():
    for model in (small_vit(), fused_vit()):
        with pytest.raises(ValueError, match="this model takes"), record_attention(model) as maps:
            model(images())
            model(torch.randn(1, 3, 8, 8))
        assert not record.active
        assert len(maps.stack()) == 2  # of the call before
        assert not any(m._forward_hooks or m._forward_pre_hooks or "plain" in vars(m) for m in model.modules())


def test_an_exception_within_a_watched_block_leaves_nothing_behind():
    model = small_vit()
    attention = model.transformer.layers[0][0].fn
    with record_attention(model) as maps:
        for child in (attention.to_qkv, attention.to_out):  # before the softmax and behind it
            handle = child.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(images())
            handle.remove()
        torch.ones(1, 1, 2, 2).softmax(dim=-1)  # nobody's map
        assert not maps.watches
        model(images())
        assert maps.stack().shape == (2, 2, 3, 17, 17)


def test_other_threads_are_not_recorded():
    model, x, errors = fused_vit(), images(), []
    with record_attention(model, keep="all") as maps:
        model(x)

        def elsewhere():
            try:
                model(images(3))
                assert maps_of(model, images(4), rows="cls")[0].shape == (4, 3, 1, 17)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert not errors
    assert [map.shape[0] for map in maps.all(0)] == [2]


@pytest.mark.parametrize("make", [small_vit, fused_vit])
def test_a_checkpointed_block_is_recorded_once(make):
    model, x = make(), images().requires_grad_()
    with record_attention(model, keep="all") as maps:
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert len(maps.all(0)) == 1


def test_maps_do_not_keep_the_model():
    model = fused_vit()
    modules = [weakref.ref(module) for module in model.modules()]
    maps = maps_of(model, images())
    del model
    gc.collect()
    assert not any(module() for module in modules) and maps[0].shape[0] == 2


def test_a_compiled_model():
    """While somebody records, the graph breaks at each attention; with fullgraph=True that is an error."""
    model, x = fused_vit(), images()
    expected = maps_of(model, x)
    compiled = torch.compile(model, backend="eager")
    out = compiled(x)
    for _ in range(2):
        torch.testing.assert_close(maps_of(compiled, x).stack(), expected.stack())
        torch.testing.assert_close(compiled(x), out)
    torch.compiler.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    whole(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attention is recorded in eager calls"):
        maps_of(whole, x)
    torch.testing.assert_close(whole(x), out)
    with pytest.raises(RuntimeError, match="end the recording before you export"), record_attention(model):
        torch.export.export(model, (x,))
    torch.compiler.reset()


def test_a_compiled_plain_model_does_not_pass_in_silence():
    model, x = small_vit(), images()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    maps = maps_of(compiled, x)
    with pytest.raises(RuntimeError, match="if it is compiled or exported, call the model that it was made from"):
        maps.stack()
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_a_model_without_attention():
    with pytest.raises(ValueError, match="nothing can be recorded in Linear: no module in it has a class with"):
        record_attention(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is a dict; it must be"):
        record_attention({})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"layers": 2},
            ValueError,
            "there is no layer 2: the model has 2 attention layers, .*layers.1.0.fn",
        ),
        ({"layers": ["transformer.layers.7*"]}, ValueError, "there is no layer 'transformer.layers.7"),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"layers": True}, ValueError, "there is no layer True"),
        ({"heads": "first"}, ValueError, "heads is 'first': it must be None, an index"),
        ({"heads": []}, ValueError, r"heads is \[\]: it must be"),
        ({"rows": "CLS"}, ValueError, "rows is 'CLS': .* or 'cls'"),
        ({"rows": 0.5}, ValueError, "rows is 0.5"),
        ({"keep": "first"}, ValueError, "keep is 'first'"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        record_attention(fused_vit(), **kwargs)


@pytest.mark.parametrize("make", [small_vit, fused_vit])
def test_indices_that_the_layer_does_not_have(make):
    with pytest.raises(IndexError, match=r"rows are \[17\], and transformer.layers.0.0.fn has 17 rows: 0 to 16"):
        maps_of(make(), images(), rows=17)
    with pytest.raises(IndexError, match=r"heads are \[-4\], .* has 3 heads"):
        maps_of(make(), images(), heads=-4)


def test_what_was_not_recorded_raises():
    model = fused_vit()
    with record_attention(model, layers=1) as maps:
        pass
    with pytest.raises(RuntimeError, match=r"no map of transformer.layers.1.0.fn: it was not called in this context"):
        maps[1]
    with pytest.raises(KeyError, match=r"transformer.layers.0.0.fn is not recorded here; recorded are transformer"):
        maps[0]
    with pytest.raises(KeyError, match="means several layers"):
        maps["*"]
    with pytest.raises(RuntimeError, match="a recording is opened once"), maps:
        pass


def test_stack_refuses_maps_of_different_shapes():
    model = nn.Sequential(FusedAttention(24, 3, 8), FusedAttention(24, 2, 8))
    maps = maps_of(model, torch.randn(1, 5, 24))
    with pytest.raises(ValueError, match=r"differ in shape.*0 \(1, 3, 5, 5\), 1 \(1, 2, 5, 5\)"):
        maps.stack()


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


TOKENS = {
    "vit-pytorch": Tokens(0, 1),
    "vit-pytorch, mean": Tokens(None, 0),
    "vit-pytorch, SimpleViT": Tokens(None, 0),
    "vit-pytorch, registers": Tokens(None, 0, 4),
    "timm": Tokens(0, 1),
    "timm, q/k norm, registers": Tokens(0, 3),
    "timm, mean": Tokens(None, 0),
    "transformers, ViT": Tokens(0, 1),
    "transformers, DeiT": Tokens(0, 2),
    "transformers, DINOv2 with registers": Tokens(0, 5),
    "transformers, DINOv3": Tokens(0, 3),
    "transformers, CLIP": Tokens(0, 1),
    "transformers, SigLIP": Tokens(None, 0),
    "torchvision": Tokens(0, 1),
    "open_clip": Tokens(0, 1),
}


@pytest.mark.parametrize("library", TOKENS)
def test_which_tokens_are_patches(library):
    model, _, maps = library_model(library)
    tokens = tokens_of(model)
    assert tokens == TOKENS[library]
    assert tokens.patches(maps).shape[-1] == 16
    if tokens.cls is None:
        with pytest.raises(ValueError, match=f"rows is 'cls', and {type(model).__name__} has no CLS token"):
            record_attention(model, rows="cls")


def test_a_cls_token_is_of_one_tower():
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
    config = library.CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 16, "patch_size": 4})
    model = library.CLIPModel(config)
    with pytest.raises(ValueError, match=r"rows is 'cls', and text_model.* no CLS token, which is vision_model's"):
        record_attention(model, rows="cls")
    with record_attention(model, layers="vision_model*", rows="cls") as maps, torch.no_grad():
        model.get_image_features(images())
    assert [map.shape for _, map in maps.items()] == [(2, 3, 1, 17)]


def test_tokens_of_ours():
    assert tokens_of(small_vit(pool="mean")) == Tokens(0, 1)
