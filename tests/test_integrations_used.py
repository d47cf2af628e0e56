"""The libraries' models, fused, in use: with hooks and recorders on them, copied, checkpointed, compiled, autocast.

Numbers run on the native path.
"""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_blocks import called, plain_reasons
from library_models import build, timm_vit
from vitriton.vit import explain, fuse, record_attention, unfuse

X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("family", ["timm", "transformers ViT", "torchvision", "open_clip", "vit-pytorch"])
def test_hooks_see_the_same(family):
    plain = build(family)
    fused = copy.deepcopy(plain)
    seen = {}
    for which, model in (("plain", plain), ("fused", fused)):
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _, args, out, key=(which, name): seen.__setitem__(key, (args, out)))
    fuse(fused)
    with torch.no_grad():
        plain(X)
        fused(X)
    assert [name for which, name in seen if which == "plain"] == [name for which, name in seen if which == "fused"]
    for which, name in list(seen):
        if which == "plain" and name:
            for a, b in zip(seen["fused", name], seen["plain", name], strict=True):
                a, b = ([t for t in leaves(pair) if t is not None] for pair in (a, b))
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", ["timm", "transformers ViT", "torchvision", "open_clip", "vit-pytorch"])
def test_no_hook_is_passed_over(family):
    """Each by itself: other hooks would keep a block from being one call."""
    plain = build(family)
    fused = copy.deepcopy(plain)
    fuse(fused)
    calls = []
    for grad in (False, True):
        for (name, module), other in zip(plain.named_modules(), fused.modules(), strict=True):
            handles = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in (module, other)]
            with torch.set_grad_enabled(grad):
                plain(X)
                fused(X)
            assert calls.count(module) == calls.count(other), name
            calls.clear()
            for handle in handles:
                handle.remove()


def leaves(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if t is None or isinstance(t, torch.Tensor)]


FAMILIES = ("timm", "timm, q and k norm", "transformers ViT", "transformers DINOv3", "transformers CLIP", "torchvision")


@pytest.mark.parametrize("family", [*FAMILIES, "open_clip", "open_clip, sequence first", "vit-pytorch"])
def test_recorded_attention(family):
    model = build(family)

    def maps():
        with record_attention(model) as recorded, torch.no_grad():
            model(X)
        return [recorded[name] for name in recorded.layers]

    expected = maps()
    fuse(model)
    result = maps()
    assert len(result) == 2 and result[0].shape[1:] == result[0].shape[1:2] + 2 * result[0].shape[-1:]
    torch.testing.assert_close(result, expected)
    assert not plain_reasons(explain(model, X))


def test_timm_attention_extract():
    utils = pytest.importorskip("timm.utils")
    model = build("timm")
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = utils.AttentionExtract(copy.deepcopy(model), method="hook")(X)
    fuse(model)
    result = utils.AttentionExtract(model, method="hook")(X)
    assert list(result) == list(expected) and len(result) == 2
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])


def test_vit_pytorch_recorder():
    recorder = pytest.importorskip("vit_pytorch.recorder")
    model = build("vit-pytorch")
    _, expected = recorder.Recorder(copy.deepcopy(model))(X)
    fuse(model)
    _, result = recorder.Recorder(model)(X)
    assert result.shape == (2, 2, 2, 17, 17)
    torch.testing.assert_close(result, expected)


def test_timm_attn_layer():
    timm = pytest.importorskip("timm")
    from vitriton.vit.integrations.timm import attention_layer

    model = timm_vit(attn_layer=attention_layer(), attn_drop_rate=0.1).eval()
    assert isinstance(model.blocks[0].attn, timm.layers.Attention)
    assert called(model, X)["qkv_attention"] == 2
    expected = model(X)
    fuse(model)
    torch.testing.assert_close(model(X), expected)
    unfuse(model)
    assert type(model.blocks[0].attn) is timm.layers.Attention
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("family", ["transformers ViT", "transformers DINOv3"])
def test_transformers_gradient_checkpointing(family):
    model = build(family).train()

    def grads():
        model.zero_grad()
        torch.manual_seed(1)
        model(X).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    fuse(model)
    expected = grads()
    model.model.gradient_checkpointing_enable()
    calls = []
    layer = model.get_submodule("model.vit.layers.0" if "ViT" in family else "model.model.layer.0")
    layer.attention.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(grads(), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["timm", "transformers ViT", "torchvision", "open_clip", "vit-pytorch"])
def test_copies(family, copied):
    model = build(family)
    expected = model(X)
    fuse(model)
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(other(X), model(X))
    unfuse(other)
    assert torch.equal(other(X), expected)


@pytest.mark.parametrize(
    "family", ["timm", "timm, q and k norm", "torchvision", "open_clip, sequence first", "vit-pytorch"]
)
def test_compiled_to_one_graph(family, unguarded):
    model = build(family)
    fuse(model)
    expected = model(X)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(X), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["timm", "transformers ViT", "torchvision", "open_clip", "vit-pytorch"])
def test_autocast(family):
    model = build(family)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(X)
        fuse(model)
        result = model(X)
    with torch.no_grad():
        gold = model.double()(X.double())
    assert result.dtype == expected.dtype
    assert (result - gold).abs().max() <= 2 * (expected - gold).abs().max() + 0.01 * gold.abs().max()


def test_importing_vitriton_imports_no_library():
    code = (
        "import sys, vitriton.vit, vitriton.vit.integrations.transformers, vitriton.vit.cli, vitriton.vit.check_model\n"
        "print([m for m in ('timm', 'transformers', 'torchvision', 'open_clip', 'vit_pytorch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_transformers_in_the_root_of_a_checkout():
    """There `import kernels` finds our folder, where transformers looks for another package of that name."""
    pytest.importorskip("transformers")
    code = (
        "import transformers.models.vit.modeling_vit, vitriton.vit, kernels\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(kernels.__file__, is_kernels_available(), vitriton.kernels.__file__ is None)"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.stdout == "None False False\n", result.stderr
