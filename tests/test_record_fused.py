"""Attention maps through the fused blocks of every library: those of the plain blocks, and what else reads maps."""

import pytest
import torch
from library_models import DROPOUTS, FAMILIES, build
from vitriton.kernels import use_backend
from vitriton.vit import attention_layers, fuse, record, record_attention, unfuse
from vitriton.vit.measure import peak_memory

ALL = {**FAMILIES, **DROPOUTS}


@pytest.fixture(autouse=True)
def native():
    with use_backend("native"):
        yield
    assert not record.active


def maps_of(model, x, **kwargs):
    with torch.no_grad(), record_attention(model, **kwargs) as maps:
        model(x)
    return maps


@pytest.mark.parametrize("family", ALL)
def test_fused_blocks_of_every_family(family, monkeypatch):
    model, x = build(family), torch.randn(2, 3, 16, 16)
    plain = maps_of(model, x)
    names = attention_layers(model)
    fuse(model)
    assert attention_layers(model) == names
    with torch.no_grad():
        out = model(x)
    observed = []

    def observe(module, *args):
        observed.append(module)
        record._keep_in_all(module, *args)

    monkeypatch.setattr(record, "_observe", observe)
    fused = maps_of(model, x)
    assert len(observed) == len(names) == 2
    torch.testing.assert_close(fused.stack(), plain.stack())
    part = maps_of(model, x, rows=[0, -1], heads=-1, layers=-1)
    torch.testing.assert_close(part[-1], plain[-1][:, -1:, [0, -1]])
    with torch.no_grad():
        assert torch.equal(model(x), out)
    unfuse(model)
    assert torch.equal(maps_of(model, x).stack(), plain.stack())


STEP_ASIDE = [family for family in DROPOUTS if "attention dropout" in family or family == "vit-pytorch, dropout"]


@pytest.mark.parametrize("family", STEP_ASIDE)
def test_blocks_that_step_aside_while_training(family):
    """With dropout on its weights a fused attention runs its plain forward: the map is that before dropout."""
    model, x, maps = build(family).train(), torch.randn(2, 3, 16, 16), []
    for swap in (lambda _: None, fuse):
        swap(model)
        torch.manual_seed(1)
        maps.append(maps_of(model, x, keep="all"))
        assert [len(maps[-1].all(layer)) for layer in maps[-1]] == [1, 1]
    torch.testing.assert_close(maps[1].stack(), maps[0].stack())
    torch.testing.assert_close(maps[1].stack().sum(dim=-1), torch.ones(maps[1].stack().shape[:-1]))
    assert not any("plain" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["torchvision", "open_clip, sequence first"])
def test_masks_through_fused_multihead_attention(family):
    """With a mask it steps aside; what is True or -inf there is not looked at."""
    model = build(family)
    fuse(model)
    attention = next(m for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention))
    x, mask = torch.randn(2, 5, 32), torch.ones(5, 5, dtype=torch.bool).triu(1)
    order = x if attention.batch_first else x.transpose(0, 1)
    with torch.no_grad(), record_attention(attention) as maps:
        attention(order, order, order, need_weights=False, attn_mask=mask)
    _, expected = attention(order, order, order, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(maps[0], expected)


@pytest.mark.parametrize("family", ["transformers ViT", "transformers DINOv3", "transformers CLIP"])
def test_transformers_by_name(family):
    """The implementation "vitriton" hands q and k over by itself, once; the blocks are not swapped."""
    from vitriton.vit.integrations.transformers import register

    model, x = build(family), torch.randn(2, 3, 16, 16)
    expected = maps_of(model, x).stack()
    register()
    model.model.set_attn_implementation("vitriton")
    maps = maps_of(model, x, keep="all")
    torch.testing.assert_close(maps.stack(), expected)
    assert [len(maps.all(layer)) for layer in maps] == [1, 1]
    assert maps_of(model, x, rows="cls")[0].shape[2] == 1


def test_what_else_reads_maps_at_the_same_time():
    recorder = pytest.importorskip("vit_pytorch.recorder", reason="vit-pytorch is not installed")
    model, x = build("vit-pytorch"), torch.randn(2, 3, 16, 16)
    fuse(model)
    with record_attention(model) as maps:
        _, recorded = recorder.Recorder(model)(x)
    torch.testing.assert_close(maps.stack(), recorded)


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_timm_s_attention_extract(method):
    """As without vitriton it needs fused_attn=False; with "fx" it reads the plain forward."""
    utils = pytest.importorskip("timm.utils", reason="timm is not installed")
    model, x = build("timm"), torch.randn(2, 3, 16, 16)
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = maps_of(model, x).stack()
    fuse(model)
    with record_attention(model) as maps:
        extracted = utils.AttentionExtract(model, method=method)(x)
    torch.testing.assert_close(torch.stack(list(extracted.values()), dim=1), expected)
    if method == "hook":
        torch.testing.assert_close(maps.stack(), expected)
        return
    for block in model.blocks:
        block.attn.fused_attn = True
    with pytest.raises(RuntimeError, match="No node names found matching"):
        utils.AttentionExtract(model, method="fx")


def test_torch_fx_reads_the_plain_forward_of_timm_s_blocks():
    model = torch.nn.Sequential(build("timm").blocks[0])
    plain = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes]
    fuse(model)
    assert [node.target for node in torch.fx.symbolic_trace(model).graph.nodes] == plain


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("family", ["timm", "transformers ViT", "torchvision", "open_clip", "vit-pytorch"])
def test_the_cls_rows_need_no_map_of_all_tokens(family):
    model = build(family)
    fuse(model)
    attention = model.get_submodule(attention_layers(model)[0])
    x = torch.randn(1, 1025, 32)
    args = (x, x, x) if isinstance(attention, torch.nn.MultiheadAttention) else (x,)
    kwargs = {"need_weights": False} if len(args) == 3 else {}

    def run():
        with torch.no_grad():
            attention(*args, **kwargs)

    def recorded(**select):
        with record_attention(attention, **select):
            run()

    whole = 2 * 1025 * 1025 * 4
    assert peak_memory(lambda: recorded(rows=0), x.device) < peak_memory(run, x.device) + whole / 20
    assert peak_memory(recorded, x.device) > whole
