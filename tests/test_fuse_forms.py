"""Classes of the same form as the plain blocks in people's own files: which of them fuse swaps, and which it leaves.

USER_FILE is what vit-pytorch's vit.py was before 1.4. The tests change its text: to the other spellings that it had,
which are swapped, and to look-alikes, which are not. Numbers run on the native path.
"""

import copy
import pickle
import sys
import types

import pytest
import torch
from fused_blocks import assert_within_rounding, called, randomise, run
from torch import nn
from vitriton.vit import Attention, fuse, unfuse
from vitriton.vit.fuse import FUSED
from vitriton.vit.known import same_function

FUSED_CALLS = {"layer_norm_linear": 4, "qkv_attention": 2}  # of a model with two layers

pytestmark = pytest.mark.usefixtures("native")


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


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
    assert len(report.swapped) == 9
    assert {block.cls for block in report.swapped} <= {f"user_file.{cls.__qualname__}" for cls in plain.values()}
    assert called(model, x) == FUSED_CALLS
    assert_within_rounding(run(model, x, grad), base, gold)
    for name, module in model.named_modules():
        assert isinstance(module, plain[name])
        assert type(module) is plain[name] or isinstance(module, FUSED)
    assert fuse(model).already == 9

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
    assert ("qkv_attention" in called(model, x)) is not bool(replacements)
    assert called(model.eval(), x)["qkv_attention"] == 2


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


def test_blocks_that_normalise_by_themselves(user_file):
    """As vit-pytorch's do since 1.4: they are swapped, and a PreNorm around them has nothing to hand them."""
    module = user_file([
        ("self.heads = heads", "self.heads = heads\n        self.norm = nn.LayerNorm(dim)"),
        ("qkv = self.to_qkv(x)", "x = self.norm(x)\n        qkv = self.to_qkv(x)"),
        ("            nn.Linear(dim, hidden_dim),", "            nn.LayerNorm(dim), nn.Linear(dim, hidden_dim),"),
    ])  # fmt: skip
    model, draws = user_transformer(module), torch.randn(8, 2, 2, 17, 24)  # the rms of 24 rounding errors is chance
    gold = run_all(copy.deepcopy(model).double(), draws.double())
    base = run_all(model, draws)
    report = fuse(model)
    assert [block.name for block in report.swapped] == [f"layers.{i}.{j}.fn" for i in range(2) for j in range(2)]
    assert [block.name for block in report.left] == [f"layers.{i}.{j}" for i in range(2) for j in range(2)]
    assert all("has no Linear to merge with" in block.reason for block in report.left)
    assert called(model, draws[0, 0]) == FUSED_CALLS | {"native_layer_norm": 4}  # the PreNorms'
    assert_within_rounding(run_all(model, draws), base, gold)


def run_all(model, draws):
    """What `run` gives for each x and grad in draws, as one."""
    results = [run(model, x, grad) for x, grad in draws]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


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
    assert same_function(functions[0], functions[0])
    assert not same_function(*functions)


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
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "heads": 3, "mlp_dim": 40}
    model = randomise(vit_pytorch.ViT(**sizes, dim_head=8, dropout=0.1)).eval()
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    assert len(fuse(model, strict=True).swapped) == 9
    assert called(model, x) == FUSED_CALLS
    torch.testing.assert_close(model(x), before)
    unfuse(model)
    assert torch.equal(model(x), before)
