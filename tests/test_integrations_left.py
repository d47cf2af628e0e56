"""What fuse leaves alone in the libraries' models, and why; what runs the plain way for one call.

Numbers run on the native path.
"""

import importlib
import re

import pytest
import torch
from fused_blocks import called, plain_reasons
from library_models import build, open_clip_vit, timm_vit
from torch import nn
from vitriton.vit import explain, fuse, unfuse
from vitriton.vit.known import KNOWN, why_not_known

X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)

pytestmark = pytest.mark.usefixtures("native")


def left(model, **options):
    return {block.name: block.reason for block in fuse(model, **options).left}


def put(name, make):
    """Put make(old) in the place of the submodule `name`."""

    def alter(model):
        parent, _, last = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, last, make(getattr(parent, last, None)))

    return alter


def subclass(module):
    module.__class__ = type(f"My{type(module).__name__}", (type(module),), {})
    return module


def set_on(name, **values):
    return lambda model: [setattr(model.get_submodule(name), key, value) for key, value in values.items()]


LEFT = {
    "timm attention": ("timm", put("blocks.0.attn", subclass), {"blocks.0.attn": "a subclass of timm.layers"}),
    "timm block": ("timm", put("blocks.0", subclass), {"blocks.0": "a subclass of timm", "blocks.0.mlp": "the block"}),
    "timm qkv": ("timm", put("blocks.0.attn.qkv", subclass), {"blocks.0.attn": "qkv is .*MyLinear, not nn.Linear"}),
    "timm fc1": ("timm", put("blocks.1.mlp.fc1", subclass), {"blocks.1.mlp": "fc1 is .*MyLinear, not nn.Linear"}),
    "timm scale": ("timm", set_on("blocks.0.attn", scale=1.0), {"blocks.0.attn": r"scale is 1.0, not head_dim"}),
    "timm heads": ("timm", set_on("blocks.0.attn", num_heads=5), {"blocks.0.attn": "heads is 5, which does not"}),
    "timm more": ("timm", put("blocks.0.attn.extra", lambda _: nn.Identity()), {"blocks.0.attn": "it also has extra"}),
    "timm less": ("timm", lambda m: delattr(m.blocks[0], "ls1"), {"blocks.0": "it has no ls1", "blocks.0.mlp": "the"}),
    "timm forward": (
        "timm", set_on("blocks.0.attn", forward=lambda x, **_: x), {"blocks.0.attn": "its forward was replaced"},
    ),
    "timm norms": (
        "timm", lambda m: [setattr(m.blocks[0], n, nn.RMSNorm(32)) for n in ("norm1", "norm2")],
        {"blocks.0": "norm1 is .*RMSNorm, not nn.LayerNorm; norm2 is .*RMSNorm", "blocks.0.mlp": "the"},
    ),
    "transformers q_proj": (
        "transformers ViT", put("model.vit.layers.0.attention.q_proj", subclass),
        {"model.vit.layers.0.attention": "q_proj is .*MyLinear"},
    ),
    "transformers flash": (
        "transformers ViT", lambda m: setattr(m.model.config, "_attn_implementation_internal", "flash_attention_2"),
        {f"model.vit.layers.{i}.attention": "its attention implementation is flash_attention_2" for i in (0, 1)},
    ),
    "torchvision out_proj": (
        "torchvision", put("encoder.layers.encoder_layer_0.self_attention.out_proj", subclass),
        {"encoder.layers.encoder_layer_0.self_attention": "out_proj is .*MyNonDynamically"},
    ),
    "open_clip cross attention": (
        "open_clip", set_on("transformer.resblocks.0.attn", add_zero_attn=True),
        {"transformer.resblocks.0.attn": "it adds a key and a value of its own"},
    ),
    "vit-pytorch attend": (
        "vit-pytorch", put("transformer.layers.0.0.attend", lambda _: nn.Sigmoid()),
        {"transformer.layers.0.0": "attend is .*Sigmoid, not nn.Softmax"},
    ),
    "vit-pytorch norm": (
        "vit-pytorch", put("transformer.layers.0.0.norm", lambda _: nn.RMSNorm(32)),
        {"transformer.layers.0.0": "norm is .*RMSNorm, not nn.LayerNorm"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left_alone_with_the_reason(case):
    family, alter, expected = LEFT[case]
    model = build(family)
    alter(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    reasons = left(model)
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert re.match(reason, reasons[name]), reasons[name]
        assert type(model.get_submodule(name)) is kinds[name]
    unfuse(model)
    with pytest.raises(ValueError, match="strict=True"):
        fuse(model, strict=True)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


@pytest.mark.parametrize("name", KNOWN)
def test_the_table_knows_what_is_installed(name):
    module, _, cls = name.rpartition(".")
    library = pytest.importorskip(module.partition(".")[0])
    why_not = why_not_known(getattr(importlib.import_module(module), cls))
    if why_not and library.__version__ not in KNOWN[name].values():
        pytest.skip(f"{library.__name__} {library.__version__} was never read, and fuse leaves this alone: {why_not}")
    assert why_not is None


def test_another_forward_is_left_alone(monkeypatch):
    layers = pytest.importorskip("timm.layers")

    def forward(self, x, attn_mask=None, is_causal=False):
        return 2 * self.proj(x)

    monkeypatch.setattr(layers.Attention, "forward", forward)
    reasons = left(build("timm"))
    assert reasons.keys() == {"blocks.0.attn", "blocks.1.attn"}
    assert "is not the one that was verified (that of timm 1.0.31)" in reasons["blocks.0.attn"]


def test_a_class_that_borrows_a_name_is_left_alone():
    layers = pytest.importorskip("timm.layers")
    cls = type("Attention", (layers.Attention,), {"__module__": "timm.layers.attention"})
    model = build("timm")
    model.blocks[0].attn.__class__ = cls
    assert "it is not the class that timm.layers.attention has" in left(model)["blocks.0.attn"]


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({"attn_layer": "diff"}, "blocks.0.attn", "it subtracts a second softmax"),
        ({"block_fn": "ParallelScalingBlock"}, "blocks.0", "one Linear makes q, k, v and the MLP's input"),
        ({"block_fn": "ResPostBlock"}, "blocks.0", "it normalises behind attention and MLP"),
        ({"block_fn": "ParallelThingsBlock"}, "blocks.0", "its LayerNorms are in parallel branches"),
    ],
)
def test_timm_classes_that_are_refused(options, name, reason):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    if "block_fn" in options:
        options = {"block_fn": getattr(vision_transformer, options["block_fn"])}
    model = timm_vit(**options)
    try:
        report = str(fuse(model))
    except ValueError as error:
        report = str(error)
    assert re.search(rf"  {name} \(.*{reason}", report), report


def test_only_the_vision_tower_of_clip_attends_fused():
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    text, vision = {"vocab_size": 50, **sizes}, {"image_size": 16, "patch_size": 4, **sizes}
    model = library.CLIPModel(library.CLIPConfig(text_config=text, vision_config=vision)).eval()
    tokens = torch.tensor([[1, 2, 3, 49]])
    expected = model(input_ids=tokens, pixel_values=X)
    assert left(model) == {"text_model.encoder.layers.0.self_attn": "the text tower's attention is causal"}
    result = model(input_ids=tokens, pixel_values=X)
    torch.testing.assert_close(result.logits_per_image, expected.logits_per_image)


# ---------------------------------------------------------------------------------------------------------------------
# One call the plain way


@pytest.mark.parametrize("mask", ["bool", "float", "is_causal"])
def test_timm_masks(mask):
    model, x = build("timm").blocks, torch.randn(2, 7, 32)
    bools = torch.rand(7, 7) > 0.3
    bools.fill_diagonal_(True)
    named = {"bool": {"attn_mask": bools}, "float": {"attn_mask": torch.randn(7, 7)}, "is_causal": {"is_causal": True}}
    expected = model[0](x, **named[mask])
    fuse(model)
    torch.testing.assert_close(model[0](x, **named[mask]), expected)
    reasons = plain_reasons(explain(model[0], {"x": x, **named[mask]}))
    assert reasons == {"attn": f"it was called with {next(iter(named[mask]))}"}
    assert not plain_reasons(explain(model[0], x))


@pytest.mark.parametrize("sequence_first", [False, True])
def test_open_clip_masks(sequence_first):
    block = open_clip_vit(sequence_first=sequence_first).transformer.resblocks[0].eval()
    x = torch.randn(7, 2, 32) if sequence_first else torch.randn(2, 7, 32)
    mask = torch.full((7, 7), -torch.inf).triu(1)
    expected = [block(x, attn_mask=mask), block(x), block(x, k_x=x, v_x=x + 1)]
    fuse(block)
    for result, wanted in zip([block(x, attn_mask=mask), block(x), block(x, k_x=x, v_x=x + 1)], expected, strict=True):
        torch.testing.assert_close(result, wanted)
    assert plain_reasons(explain(block, {"q_x": x, "attn_mask": mask})) == {"attn": "it was called with a mask"}


def test_weights_of_multihead_attention_can_be_had():
    attention, x = build("torchvision").encoder.layers[0].self_attention, torch.randn(2, 7, 32)
    model = build("torchvision")
    fuse(model)
    attention = model.encoder.layers[0].self_attention
    out, weights = attention(x, x, x)
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], out)
    assert weights.shape == (2, 7, 7) and attention(x, x, x, need_weights=False)[1] is None
    unfuse(model)
    torch.testing.assert_close(attention(x, x, x)[1], weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "family", ["transformers ViT", "transformers DINOv3", "transformers CLIP", "transformers SigLIP"]
)
def test_output_attentions(family):
    model = build(family)
    model.model.set_attn_implementation("eager")
    expected = model.model(X, output_attentions=True, output_hidden_states=True)
    fuse(model)
    result = model.model(X, output_attentions=True, output_hidden_states=True)
    assert len(result.attentions) == len(expected.attentions) == 2
    torch.testing.assert_close(result.attentions, expected.attentions)
    torch.testing.assert_close(result.hidden_states, expected.hidden_states)
    assert called(model, X)["attention"] == 2  # the hooks that transformers left do not count


@pytest.mark.parametrize(
    "named",
    [{"is_causal": True}, {"attention_mask": torch.linspace(-3, 3, 98).sin().mul(9).view(2, 1, 7, 7)}],
    ids=lambda named: next(iter(named)),
)
def test_transformers_masks(named):
    attention, x = build("transformers ViT").model.vit.layers[0].attention, torch.randn(2, 7, 32)
    expected = attention(x, **named)[0]
    assert not torch.allclose(attention(x)[0], expected, atol=1e-3)
    fuse(attention)
    torch.testing.assert_close(attention(x, **named)[0], expected)
    if "attention_mask" in named:
        torch.testing.assert_close(attention(x, named["attention_mask"])[0], expected)


# ---------------------------------------------------------------------------------------------------------------------
# transformers, by name


@pytest.mark.parametrize(
    "family", ["transformers ViT", "transformers DINOv2", "transformers DINOv3", "transformers CLIP"]
)
def test_transformers_by_name(family):
    pytest.importorskip("transformers")
    from vitriton.vit.integrations.transformers import register

    model = build(family)
    expected = model(X)
    register()
    model.model.set_attn_implementation("vitriton")
    assert called(model, X)["attention"] == 2
    torch.testing.assert_close(model(X), expected)
    out = model.model(X, output_attentions=True)
    model.model.set_attn_implementation("eager")
    plain = model.model(X, output_attentions=True)
    assert len(out.attentions) == 2
    torch.testing.assert_close(out.attentions, plain.attentions)


def test_transformers_by_name_with_a_mask_and_dropout():
    pytest.importorskip("transformers")
    from vitriton.vit.integrations.transformers import register

    register()
    model = build("transformers ViT, attention dropout").model
    mask = torch.ones(2, 17)
    mask[:, 9:] = 0
    expected = model(X, attention_mask=mask).logits
    model.set_attn_implementation("vitriton")
    torch.testing.assert_close(model(X, attention_mask=mask).logits, expected)
    model.train()
    torch.manual_seed(1)
    dropped = model(X).logits
    model.set_attn_implementation("sdpa")
    torch.manual_seed(1)
    assert torch.equal(model(X).logits, dropped)
    fuse(model)
    torch.testing.assert_close(model.eval()(X, attention_mask=mask).logits, expected)
