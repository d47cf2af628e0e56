"""fuse and unfuse: what they swap, what they leave alone and why, and that nothing but the cost of a model changes.

Numbers run on the native path; how the kernels do in the fused blocks is in test_modules.py.
"""

import copy
import pickle
import re

import pytest
import torch
from fused_blocks import assert_within_rounding, called, randomise, run
from torch import nn
from torch.nn.utils import parametrize
from vitriton.vit import FusedAttention, FusedFeedForward, FusedPreNorm, fuse, unfuse
from vitriton.vit.modules import FusedViT
from vitriton.vit.reference import Attention, FeedForward, PreNorm, ViT, vit_preset

SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "heads": 3, "mlp_dim": 40}

pytestmark = pytest.mark.usefixtures("native")


def small_vit(**kwargs):
    return randomise(ViT(**SMALL, dim_head=8, **kwargs))


def images(batch=2, size=16):
    return torch.randn(batch, 3, size, size)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


# ---------------------------------------------------------------------------------------------------------------------
# The same model


def test_vit_tiny_within_the_rounding_error_of_the_plain_model():
    model = randomise(vit_preset("ti", num_classes=10))
    # with fewer images a LayerNorm's gradient is a sum of so few rows that one rounding decides: 3.5x was seen with one
    x, grad = images(4, 224), torch.randn(4, 10)
    gold = run(copy.deepcopy(model).double(), x.double(), grad.double())
    base = run(model, x, grad)
    fuse(model)
    assert called(model, x)["layer_norm_linear"] == 24
    assert_within_rounding(run(model, x, grad), base, gold)
    unfuse(model)
    again = run(model, x, grad)
    assert all(torch.equal(again[name], base[name]) for name in base)


def test_unfuse_restores_outputs_to_the_last_bit():
    model, x = small_vit(), images()
    before, plain = model(x), classes(model)
    fuse(model)
    assert not torch.equal(model(x), before)
    assert classes(model) != plain
    report = unfuse(model)
    assert len(report.swapped) == 10 and not report.left
    assert classes(model) == plain
    assert torch.equal(model(x), before)


def test_modules_parameters_hooks_and_flags_stay():
    model = small_vit()
    model.transformer.layers[0][0].fn.eval()
    model.transformer.layers[0][1].fn.net[0].weight.requires_grad_(False)
    seen = []
    handle = model.transformer.layers[1][0].norm.register_forward_hook(lambda *args: seen.append(args))
    things = [*model.modules(), *model.parameters()]
    state = {name: (t.data_ptr(), t.requires_grad) for name, t in model.named_parameters()}
    training = [module.training for module in model.modules()]
    for swap in (fuse, unfuse):
        swap(model)
        assert all(a is b for a, b in zip([*model.modules(), *model.parameters()], things, strict=True))
        assert {name: (t.data_ptr(), t.requires_grad) for name, t in model.named_parameters()} == state
        assert [module.training for module in model.modules()] == training
        model(images())
        assert len(seen) == 1
        seen.clear()
    handle.remove()
    fuse(model)
    assert called(model, images())["layer_norm_linear"] == 4 and not seen


def test_checkpoints_cross_both_ways():
    plain, fused, x = small_vit().eval(), small_vit().eval(), images()
    fuse(fused)
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(x), plain(x))
    other = small_vit().eval()
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), plain(x))
    assert list(fused.state_dict()) == list(plain.state_dict())


def test_training_goes_on_in_the_middle():
    """Adam's state survives the swap, and the losses are those of the plain model, dropout included."""

    def train(model, swap):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for step in range(6):
            if step == 3:
                swap(model)
            loss = nn.functional.cross_entropy(model(images(8)), torch.arange(8) % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    model = small_vit(dropout=0.2, emb_dropout=0.1)
    expected = train(copy.deepcopy(model), lambda model: None)
    result = train(model, fuse)
    assert isinstance(model.transformer.layers[0][0], FusedPreNorm)
    assert torch.equal(result[:3], expected[:3])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_hooks_see_the_same():
    plain, x = small_vit(), images()
    fused = copy.deepcopy(plain)
    seen = {}
    for which, model in (("plain", plain), ("fused", fused)):
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _, args, out, key=(which, name): seen.__setitem__(key, (*args, out)), prepend=True
            )
    fuse(fused)
    plain(x)
    fused(x)
    names = [name for which, name in seen if which == "plain"]
    assert len(names) == len(list(plain.modules())) - 3  # ModuleLists are not called
    for name in names:
        for a, b in zip(seen["fused", name], seen["plain", name], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_fused_model(copied):
    model, x = small_vit().eval(), images()
    expected = model(x)
    fuse(model)
    other = copied(model)
    assert classes(other) == classes(model)
    assert torch.equal(other(x), model(x))
    assert all(a is not b for a, b in zip(other.parameters(), model.parameters(), strict=True))
    unfuse(other)
    assert torch.equal(other(x), expected)
    assert isinstance(model.transformer.layers[0][0], FusedPreNorm)


def test_half_and_to():
    model, x = small_vit().eval(), images()
    fuse(model)
    assert model.half()(x.half()).dtype == torch.float16
    torch.testing.assert_close(model.double()(x.double()).float(), unfuse_copy(model)(x.double()).float())
    assert all(p.is_meta for p in model.to("meta").parameters())
    assert isinstance(model.transformer.layers[0][0], FusedPreNorm)


def unfuse_copy(model):
    model = copy.deepcopy(model)
    unfuse(model)
    return model


def test_a_model_that_is_a_block_itself():
    for block, cls in ((Attention(24, 3, 8), FusedAttention), (FeedForward(24, 40), FusedFeedForward)):
        report = fuse(block)
        assert type(block) is cls
        assert [b.name for b in report.swapped] == [""] and "the model itself" in str(report.swapped[0])
        unfuse(block)
        assert type(block) is cls.plain
    block = PreNorm(24, FeedForward(24, 40))
    assert len(fuse(block).swapped) == 2
    assert type(block) is FusedPreNorm and type(block.fn) is FusedFeedForward


def test_a_block_used_twice_is_swapped_once():
    block = Attention(24, 3, 8)
    assert len(fuse(nn.Sequential(block, block)).swapped) == 1


def test_unfuse_makes_plain_blocks_of_drop_ins():
    block, x = FusedPreNorm(24, FusedAttention(24, 3, 8)), torch.randn(2, 5, 24)
    y = block(x)
    unfuse(block)
    assert type(block) is PreNorm and type(block.fn) is Attention
    torch.testing.assert_close(block(x), y)


def test_unfuse_leaves_subclasses_of_drop_ins():
    block = MyFusedAttention(24, 3, 8)
    report = unfuse(block)
    assert type(block) is MyFusedAttention and not report.swapped
    assert "a subclass of a fused block" in report.left[0].reason


def test_a_plain_norm_around_a_drop_in_is_swapped():
    block = PreNorm(24, FusedAttention(24, 3, 8))
    report = fuse(block)
    assert type(block) is FusedPreNorm
    assert (len(report.swapped), report.already) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def test_report():
    model = small_vit()
    model.transformer.layers[1][0].fn.to_qkv = nn.Identity()
    report = fuse(model)
    left = {block.name: block for block in report.left}
    assert left.keys() == {"transformer.layers.1.0", "transformer.layers.1.0.fn"}
    assert left["transformer.layers.1.0.fn"].cls == "vitriton.vit.reference.Attention"
    assert left["transformer.layers.1.0.fn"].reason == "to_qkv is torch.nn.modules.linear.Identity, not nn.Linear"
    assert "cannot be fused" in left["transformer.layers.1.0"].reason
    swapped = [block.name for block in report.swapped]
    assert swapped == [
        name
        for name, cls in classes(model).items()
        if cls in (FusedViT, FusedAttention, FusedFeedForward, FusedPreNorm)
    ]
    assert len(swapped) == 7
    text = str(report)
    assert text.startswith("fused 7 blocks: 1 vitriton.vit.reference.ViT, 3 vitriton.vit.reference.PreNorm, 1 vitriton")
    assert "left as they are: 2 blocks" in text
    assert "  transformer.layers.1.0.fn (vitriton.vit.reference.Attention): to_qkv is" in text


def test_dry_run_changes_nothing():
    model = small_vit()
    before = classes(model)
    report = fuse(model, dry_run=True)
    assert classes(model) == before
    assert str(report).startswith("would fuse 10 blocks: ")
    assert report.swapped == fuse(model).swapped


def test_fusing_twice_changes_nothing_and_says_so():
    model = small_vit()
    fuse(model)
    before = classes(model)
    report = fuse(model, strict=True)
    assert classes(model) == before
    assert (report.swapped, report.left, report.already) == ([], [], 10)
    assert str(report) == "fused 0 blocks\nalready fused: 10 blocks"


def test_strict_raises_before_anything_is_changed():
    model = small_vit()
    model.transformer.layers[1][1].fn.net[1] = nn.ReLU()
    before = classes(model)
    with pytest.raises(ValueError, match=r"strict=True(.|\n)*layers.1.1.fn .*net.1 is .*ReLU, not nn.GELU"):
        fuse(model, strict=True)
    assert classes(model) == before


def test_nothing_to_fuse_raises():
    for model in (nn.Linear(2, 2), nn.Sequential(nn.ReLU())):
        for dry_run in (False, True):
            with pytest.raises(ValueError, match=r"nothing to fuse .* looked for the blocks Attention, FeedForward"):
                fuse(model, dry_run=dry_run)
        assert str(unfuse(model)) == "unfused 0 blocks"
    with pytest.raises(ValueError, match=r"nothing to fuse(.|\n)*\(.*FeedForward\): net has 2 layers"):
        block = FeedForward(24, 40)
        block.net = block.net[:2]
        fuse(block)


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_what_is_no_module_raises(function):
    with pytest.raises(TypeError, match=r"model is a dict; it must be a torch\.nn\.Module"):
        function({})


# ---------------------------------------------------------------------------------------------------------------------
# Left alone, and why


class MyAttention(Attention):
    pass


class MyFusedAttention(FusedAttention):
    pass


def child(name, make):
    """An alteration: put a new module in the place `name` of a block."""

    def alter(block):
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, make())

    return alter


def attribute(name, make):
    return lambda block: setattr(block, name, make(block))


def parametrized(name):
    return lambda block: parametrize.register_parametrization(block.get_submodule(name), "weight", nn.Identity())


ALTERED = [
    (Attention, child("to_qkv", lambda: nn.Linear(24, 72)), "to_qkv has a bias"),
    (Attention, child("to_qkv", lambda: type("LoRA", (nn.Linear,), {})(24, 72)), "to_qkv is .*LoRA, not nn.Linear"),
    (Attention, parametrized("to_qkv"), "to_qkv is .*ParametrizedLinear, not nn.Linear"),
    (Attention, child("attend", nn.Sigmoid), "attend is .*Sigmoid, not nn.Softmax"),
    (Attention, child("attend", lambda: nn.Softmax(dim=1)), "attend is a softmax over dim 1, not -1"),
    (Attention, lambda block: delattr(block, "attend"), "it has no attend"),
    (Attention, child("to_out", lambda: nn.Linear(24, 24)), "to_out is .*Linear, not nn.Sequential"),
    (Attention, parametrized("to_out.0"), "to_out.0 is .*ParametrizedLinear, not nn.Linear"),
    (Attention, child("dropout", nn.AlphaDropout), "dropout is .*AlphaDropout, not nn.Dropout"),
    (Attention, child("q_norm", lambda: nn.LayerNorm(8)), "it also has q_norm"),
    (Attention, attribute("gate", lambda _: nn.Parameter(torch.ones(1))), "it also has gate"),
    (Attention, lambda block: block.register_buffer("bias", torch.ones(1)), "it also has bias"),
    (Attention, attribute("scale", lambda _: torch.ones(())), "scale is a Tensor, not a float"),
    (Attention, attribute("heads", lambda _: 5), "heads is 5, which does not divide to_qkv's 72 features"),
    (Attention, attribute("heads", lambda _: 6), "its head dim is 4, and the kernels take 8 to 256"),
    (Attention, attribute("forward", lambda block: block.forward), "its forward was replaced on this one module"),
    (Attention, attribute("__class__", lambda _: MyAttention), "a subclass of vitriton.vit.reference.Attention may"),
    (Attention, attribute("__class__", lambda _: MyFusedAttention), "a subclass of vitriton.vit.modules.FusedAtt"),
    (FeedForward, child("net.1", nn.ReLU), "net.1 is .*ReLU, not nn.GELU"),
    (FeedForward, child("net.2", nn.Identity), "net.2 is .*Identity, not nn.Dropout"),
    (FeedForward, parametrized("net.0"), "net.0 is .*ParametrizedLinear, not nn.Linear"),
    (FeedForward, lambda block: block.net.append(nn.LayerNorm(24)), "net has 6 layers, not Linear, GELU, Dropout"),
    (FeedForward, child("net", lambda: nn.Linear(24, 24)), "net is .*Linear, not nn.Sequential"),
    (FeedForward, child("gate", lambda: nn.Linear(24, 40)), "it also has gate"),
    (FeedForward, attribute("__class__", lambda _: type("Mine", (FeedForward,), {})), "a subclass of"),
    (PreNorm, child("norm", lambda: nn.RMSNorm(24)), "norm is .*RMSNorm, not nn.LayerNorm"),
    (PreNorm, child("norm", lambda: nn.LayerNorm((5, 24))), "norm is not over the last dim alone"),
    (PreNorm, child("norm", lambda: nn.LayerNorm(24, bias=False)), "norm is not over the last dim alone, or has no"),
    (PreNorm, child("fn", nn.Identity), "its fn, torch.nn.modules.linear.Identity, cannot be fused"),
    (PreNorm, child("fn", lambda: MyAttention(24, 3, 8)), "its fn, .*MyAttention, cannot be fused"),
    (PreNorm, attribute("__class__", lambda _: type("Mine", (PreNorm,), {})), "a subclass of"),
]


@pytest.mark.parametrize(("kind", "alter", "reason"), ALTERED, ids=[f"{k.__name__}: {r}" for k, _, r in ALTERED])
def test_altered_blocks_are_left_alone(kind, alter, reason):
    block = {
        Attention: lambda: Attention(24, 3, 8),
        FeedForward: lambda: FeedForward(24, 40),
        PreNorm: lambda: PreNorm(24, FeedForward(24, 40)),
    }[kind]()
    alter(block)
    model = nn.ModuleList([block, Attention(24)])
    before = type(block)
    left = {b.name: b.reason for b in fuse(model).left}
    assert type(block) is before
    assert type(model[1]) is FusedAttention
    assert re.search(reason, left["0"]), left["0"]
