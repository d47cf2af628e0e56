"""fuse and unfuse: what they swap, what they leave alone and why, and that nothing but the cost of a model changes.

Numbers run on the native path; how the kernels do in the fused blocks is in test_modules.py.
"""

import copy
import pickle
import re
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from vitriton.kernels import use_backend
from vitriton.kernels.reference import compare
from vitriton.vit import FusedAttention, FusedFeedForward, FusedPreNorm, fuse, unfuse
from vitriton.vit.fuse import _same_function
from vitriton.vit.reference import Attention, FeedForward, PreNorm, ViT, vit_preset

SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "heads": 3, "mlp_dim": 40}


@pytest.fixture(autouse=True)
def native():
    with use_backend("native"):
        yield


def randomise(model):
    """Random LayerNorm weights and biases: ones and zeros hide errors."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.weight.normal_()
                norm.bias.normal_()
    return model


def small_vit(**kwargs):
    return randomise(ViT(**SMALL, dim_head=8, **kwargs))


def images(batch=2, size=16):
    return torch.randn(batch, 3, size, size)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def run(model, x, grad):
    """Logits and the gradient of every parameter, by name."""
    model.zero_grad()
    logits = model(x)
    logits.backward(grad)
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_alike(result, base, gold):
    for name in gold:
        error = compare(name, result[name], base[name], gold[name], k=2 if name == "logits" else 3)
        assert error, str(error)


class Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


def operators(module, x):
    with torch.no_grad(), Operators() as mode:
        module(x)
    return mode.names


# ---------------------------------------------------------------------------------------------------------------------
# The same model


def test_vit_tiny_within_the_rounding_error_of_the_plain_model():
    model = randomise(vit_preset("ti", num_classes=10))
    # with fewer images a LayerNorm's gradient is a sum of so few rows that one rounding decides: 3.5x was seen with one
    x, grad = images(4, 224), torch.randn(4, 10)
    gold = run(copy.deepcopy(model).double(), x.double(), grad.double())
    base = run(model, x, grad)
    fuse(model)
    assert operators(model, x).count("layer_norm_linear") == 24
    assert_alike(run(model, x, grad), base, gold)
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
    assert len(report.swapped) == 8 and not report.left
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
    assert operators(model, images()).count("layer_norm_linear") == 4 and not seen


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
        name for name, cls in classes(model).items() if cls in (FusedAttention, FusedFeedForward, FusedPreNorm)
    ]
    assert len(swapped) == 6
    text = str(report)
    assert text.startswith("fused 6 blocks: 3 vitriton.vit.reference.PreNorm, 1 vitriton.vit.reference.Attention, 2 ")
    assert "left as they are: 2 blocks" in text
    assert "  transformer.layers.1.0.fn (vitriton.vit.reference.Attention): to_qkv is" in text


def test_dry_run_changes_nothing():
    model = small_vit()
    before = classes(model)
    report = fuse(model, dry_run=True)
    assert classes(model) == before
    assert str(report).startswith("would fuse 8 blocks: ")
    assert report.swapped == fuse(model).swapped


def test_fusing_twice_changes_nothing_and_says_so():
    model = small_vit()
    fuse(model)
    before = classes(model)
    report = fuse(model, strict=True)
    assert classes(model) == before
    assert (report.swapped, report.left, report.already) == ([], [], 8)
    assert str(report) == "fused 0 blocks\nalready fused: 8 blocks"


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


# ---------------------------------------------------------------------------------------------------------------------
# The same form in people's own files: what vit-pytorch's vit.py was before 1.4, in the spellings that it had

USER_FILE = """
import torch
from einops import rearrange
from torch import nn, einsum

class PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn
    def forward(self, x, **kwargs):
        return self.fn(self.norm(x), **kwargs)

class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim, dropout=0.):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout)
        )
    def forward(self, x):
        return self.net(x)

class Attention(nn.Module):
    def __init__(self, dim, heads=8, dim_head=64, dropout=0.):
        super().__init__()
        inner_dim = dim_head * heads
        self.heads = heads
        self.scale = dim_head ** -0.5
        self.attend = nn.Softmax(dim=-1)
        self.to_qkv = nn.Linear(dim, inner_dim * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, dim), nn.Dropout(dropout))
    def forward(self, x):
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = map(lambda t: rearrange(t, 'b n (h d) -> b h n d', h=self.heads), qkv)
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        attn = self.attend(dots)
        out = torch.matmul(attn, v)
        out = rearrange(out, 'b h n d -> b n (h d)')
        return self.to_out(out)

class Transformer(nn.Module):
    def __init__(self, dim, depth, heads, dim_head, mlp_dim, dropout=0.):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            self.layers.append(nn.ModuleList([
                PreNorm(dim, Attention(dim, heads=heads, dim_head=dim_head, dropout=dropout)),
                PreNorm(dim, FeedForward(dim, mlp_dim, dropout=dropout))
            ]))
    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x
"""

EINSUM = [
    ("qkv = self.to_qkv(x)", "b, n, _, h = *x.shape, self.heads\n        qkv = self.to_qkv(x)"),
    ("h=self.heads)", "h=h)"),
    ("torch.matmul(q, k.transpose(-1, -2))", "einsum('b h i d, b h j d -> b h i j', q, k)"),
    ("torch.matmul(attn, v)", "einsum('b h i j, b h j d -> b h i d', attn, v)"),
]
ATTENTION_DROPOUT = [
    (
        "self.attend = nn.Softmax(dim=-1)",
        "self.attend = nn.Softmax(dim=-1)\n        self.dropout = nn.Dropout(dropout)",
    ),
    ("attn = self.attend(dots)", "attn = self.attend(dots)\n        attn = self.dropout(attn)"),
]
SPELLINGS = {
    "matmul": [],
    "einsum": EINSUM,
    "matmul, dropout": ATTENTION_DROPOUT,
    "einsum, dropout": EINSUM + ATTENTION_DROPOUT,
    "generator": [
        ("map(lambda t: rearrange", "(rearrange"),
        ("h=self.heads), qkv)", "h=self.heads) for t in qkv)"),
    ],
    "no keywords": [("x, **kwargs", "x"), ("self.norm(x), **kwargs", "self.norm(x)")],
    "a docstring and other names": [
        ("def forward(self, x):\n        qkv", 'def forward(self, x):\n        """Mine."""\n        qkv'),
        ("dots", "scores"),
        ("def forward(self, x):\n        return", "def forward(self, tokens: torch.Tensor):  # mine\n        return"),
        ("self.net(x)", "self.net(tokens)"),
    ],
    "other names of classes": [("Attention(", "MHSA("), ("FeedForward(", "MLP("), ("PreNorm(", "Normed(")],
}


@pytest.fixture
def user_file(monkeypatch):
    """Imports USER_FILE with some of its text replaced, as a module of its own."""

    def load(replacements=()):
        source = USER_FILE
        for old, new in replacements:
            assert old in source
            source = source.replace(old, new)
        module = types.ModuleType("user_file")
        monkeypatch.setitem(sys.modules, "user_file", module)
        exec(compile(source, "user_file.py", "exec"), vars(module))
        return module

    return load


def user_transformer(module, dropout=0.0):
    return randomise(module.Transformer(24, 2, 3, 8, 40, dropout))


@pytest.mark.parametrize("replacements", SPELLINGS.values(), ids=SPELLINGS)
def test_blocks_of_the_same_form_are_swapped(user_file, replacements):
    model, x = user_transformer(user_file(replacements), dropout=0.1).eval(), torch.randn(2, 17, 24)
    plain, before, grad = classes(model), model(x), torch.randn(2, 17, 24)
    gold = run(copy.deepcopy(model).double(), x.double(), grad.double())
    base = run(model, x, grad)

    report = fuse(model, strict=True)
    assert len(report.swapped) == 8
    assert {block.cls for block in report.swapped} <= {f"user_file.{cls.__qualname__}" for cls in plain.values()}
    names = operators(model, x)
    assert (names.count("layer_norm_linear"), names.count("qkv_attention")) == (4, 2)
    assert_alike(run(model, x, grad), base, gold)
    for name, module in model.named_modules():
        assert isinstance(module, plain[name])
        assert type(module) is plain[name] or isinstance(module, (FusedAttention, FusedFeedForward, FusedPreNorm))
    assert fuse(model).already == 8

    other = pickle.loads(pickle.dumps(copy.deepcopy(model), protocol=0))
    assert classes(other) == classes(model)
    assert torch.equal(other(x), model(x))

    for m in (model, other):
        unfuse(m)
        assert classes(m) == plain
        assert torch.equal(m(x), before)


@pytest.mark.parametrize("replacements", [[], ATTENTION_DROPOUT], ids=["dropout", "attention dropout"])
def test_dropout_of_the_same_form(user_file, replacements):
    model, x = user_transformer(user_file(replacements), dropout=0.5), torch.randn(2, 17, 24)
    grad = torch.randn(2, 17, 24)
    torch.manual_seed(1)
    expected = run(model, x, grad)
    report = fuse(model)
    torch.manual_seed(1)
    result = run(model, x, grad)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)
    remarks = [line.split()[0] for line in str(report).splitlines() if "it drops attention weights (p=0.5)" in line]
    assert remarks == (["layers.0.0.fn", "layers.1.0.fn"] if replacements else [])
    assert operators(model, x).count("qkv_attention") == (0 if replacements else 2)
    assert operators(model.eval(), x).count("qkv_attention") == 2


def test_hooks_on_attention_weights_still_see_them(user_file):
    """As vit-pytorch's Recorder does: find every Attention by its class, and hook its attend."""
    module = user_file()
    model, x, seen = user_transformer(module), torch.randn(2, 17, 24), []
    fuse(model)
    for block in model.modules():
        if isinstance(block, module.Attention):
            block.attend.register_forward_hook(lambda _, __, weights: seen.append(weights))
    model(x)
    assert [weights.shape for weights in seen] == [(2, 3, 17, 17)] * 2


LOOK_ALIKES = {
    "no scale": (" * self.scale", "", "Attention"),
    "another scale": ("* self.scale", "/ self.scale", "Attention"),
    "k not transposed on the right dims": ("k.transpose(-1, -2)", "k.transpose(-2, -3)", "Attention"),
    "other heads": ("'b n (h d) -> b h n d'", "'b n (d h) -> b h n d'", "Attention"),
    "q and k swapped": ("q, k, v = map", "k, q, v = map", "Attention"),
    "v and k swapped": ("q, k, v = map", "q, v, k = map", "Attention"),
    "a mask that may come": (
        "def forward(self, x):\n        qkv",
        "def forward(self, x, mask=None):\n        qkv",
        "Attention",
    ),
    "another rearrange": ("from einops import rearrange", "def rearrange(t, pattern, **sizes): return t", "Attention"),
    "another torch": ("class PreNorm", "class torch: matmul = torch.bmm\n\nclass PreNorm", "Attention"),
    "another map": ("class PreNorm", "map = lambda f, ts: [f(t) + 1 for t in ts]\n\nclass PreNorm", "Attention"),
    "two norms": ("self.fn(self.norm(x), **kwargs)", "self.norm(self.fn(self.norm(x), **kwargs))", "PreNorm"),
    "post norm": ("self.fn(self.norm(x), **kwargs)", "self.norm(self.fn(x, **kwargs))", "PreNorm"),
    "residual inside": ("return self.net(x)", "return self.net(x) + x", "FeedForward"),
    "another base": ("class FeedForward(nn.Module)", "class FeedForward(nn.Sequential)", "FeedForward"),
    "a default": (
        "def forward(self, x):\n        return self.net",
        "def forward(self, x=0):\n        return self.net",
        "FeedForward",
    ),
    "a call of its own": (
        "return self.net(x)",
        "return self.net(x)\n    def __call__(self, x): return x",
        "FeedForward",
    ),
}


@pytest.mark.parametrize(("old", "new", "name"), LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_left_alone(user_file, old, new, name):
    module = user_file([(old, new)])
    model = user_transformer(module)
    report = fuse(model)
    left = [block for block in report.left if block.cls == f"user_file.{name}"]
    assert [block.reason for block in left if "cannot be fused" not in block.reason] == [
        "its forward is none of the known spellings of the plain block's"
    ] * (4 if name == "PreNorm" else 2)
    for block in model.modules():
        if isinstance(block, getattr(module, name)) and name != "PreNorm":
            assert type(block) is getattr(module, name)
    assert report.swapped


def test_blocks_that_normalise_by_themselves_are_left_alone(user_file):
    """As vit-pytorch's do since 1.4."""
    module = user_file([
        ("self.heads = heads", "self.heads = heads\n        self.norm = nn.LayerNorm(dim)"),
        ("qkv = self.to_qkv(x)", "x = self.norm(x)\n        qkv = self.to_qkv(x)"),
        ("            nn.Linear(dim, hidden_dim),", "            nn.LayerNorm(dim), nn.Linear(dim, hidden_dim),"),
    ])  # fmt: skip
    with pytest.raises(ValueError, match="nothing to fuse") as error:
        fuse(user_transformer(module))
    assert "layers.0.0.fn (user_file.Attention): its forward is none of the known" in str(error.value)
    assert "it has a norm of its own, as vit-pytorch's since 1.4" in str(error.value)
    assert "layers.0.1.fn (user_file.FeedForward): net has 6 layers" in str(error.value)


def test_altered_blocks_are_mentioned_whatever_their_name(user_file):
    module = user_file(SPELLINGS["other names of classes"])
    model = user_transformer(module)
    for attn, _ in model.layers:
        attn.fn.to_qkv = nn.Linear(24, 72)
    left = {block.name: block.reason for block in fuse(model).left}
    assert left == {
        f"layers.{i}.0{fn}": "to_qkv has a bias"
        if fn
        else "its fn, user_file.MHSA, cannot be fused, so norm has no Linear to merge with"
        for i in range(2)
        for fn in ("", ".fn")
    }


def test_globals_of_inner_functions_count():
    sources = ("f = lambda x: x", "f = lambda x: x + 1")
    functions = []
    for source in sources:
        exec(source + "\ndef forward(self, x): return map(lambda t: f(t), x)", scope := {})
        functions.append(scope["forward"])
    assert _same_function(functions[0], functions[0])
    assert not _same_function(*functions)


def test_other_modules_with_that_forward_are_not_mentioned(user_file):
    module = user_file([("FeedForward", "Wrapper")])
    wrapper = module.Wrapper(24, 40)
    wrapper.net = nn.Conv2d(3, 3, 3)
    report = fuse(nn.ModuleList([wrapper, Attention(24)]))
    assert not report.left and type(wrapper) is module.Wrapper


def test_a_fused_user_model_compiles_to_one_graph(user_file, unguarded):
    model, x = user_transformer(user_file(ATTENTION_DROPOUT)).eval(), torch.randn(2, 17, 24)
    fuse(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    torch.compiler.reset()


def test_real_vit_pytorch():
    vit_pytorch = pytest.importorskip("vit_pytorch.vit")
    if not hasattr(vit_pytorch, "PreNorm"):
        pytest.skip("the vit-pytorch that is installed has another form: its blocks are of this one before 1.4")
    model, x = randomise(vit_pytorch.ViT(**SMALL, dim_head=8, dropout=0.1)).eval(), images()
    before = model(x)
    assert len(fuse(model, strict=True).swapped) == 8
    names = operators(model, x)
    assert (names.count("layer_norm_linear"), names.count("qkv_attention")) == (4, 2)
    torch.testing.assert_close(model(x), before)
    unfuse(model)
    assert torch.equal(model(x), before)
