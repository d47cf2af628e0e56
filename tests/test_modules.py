"""The fused blocks against the plain ones: numbers, gradients, dropout, hooks, and what makes them step aside.

Numbers are judged by `compare`: golden is the plain block in fp64, the measure of rounding is the plain block itself.
Blocks run on the native path and, small ones, on the kernels.
"""

import copy
import inspect
from contextlib import contextmanager

import pytest
import torch
from fused_blocks import assert_within_rounding, called, randomise, run
from torch import nn
from torch.nn.utils import parametrize
from vitriton.kernels import use_backend
from vitriton.kernels.reference import compare
from vitriton.vit.modules import FusedAttention, FusedFeedForward, FusedPreNorm
from vitriton.vit.reference import Attention, FeedForward, PreNorm

FUSED = {Attention: FusedAttention, FeedForward: FusedFeedForward, PreNorm: FusedPreNorm}


def attention(dim=24, heads=3, dim_head=8, dropout=0.0):
    return randomise(PreNorm(dim, Attention(dim, heads, dim_head, dropout)))


def feed_forward(dim=24, hidden_dim=40, dropout=0.0):
    return randomise(PreNorm(dim, FeedForward(dim, hidden_dim, dropout)))


def fused(plain):
    """A copy of `plain` with fused blocks, made by their constructors' inheritance alone: the class is replaced."""
    module = copy.deepcopy(plain)
    for child in module.modules():
        child.__class__ = FUSED.get(type(child), type(child))
    return module


def assert_alike(module, plain, x):
    """`module` is as near to `plain` in fp64 as `plain` in its own dtype is, by the tolerance rule."""
    grad = torch.randn_like(plain(x))
    gold = run(copy.deepcopy(plain).double(), x.double(), grad.double())
    assert_within_rounding(run(module, x, grad), run(plain, x, grad), gold)


# ---------------------------------------------------------------------------------------------------------------------
# The same block


@pytest.mark.parametrize("plain", FUSED, ids=lambda cls: cls.__name__)
def test_takes_the_same_arguments(plain):
    assert issubclass(FUSED[plain], plain)
    assert inspect.signature(FUSED[plain]) == inspect.signature(plain)


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_checkpoints_cross_both_ways(make):
    plain = make()
    module = FusedPreNorm(24, FusedAttention(24, 3, 8) if make is attention else FusedFeedForward(24, 40))
    assert list(module.state_dict()) == list(plain.state_dict())
    module.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 24)
    with use_backend("native"):
        torch.testing.assert_close(module(x), plain(x))
    other = make()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), plain(x))


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_fuses_layer_norm_into_the_first_linear(make):
    expected = {"layer_norm_linear": 1, "qkv_attention": 1} if make is attention else {"layer_norm_linear": 1}
    plain, x = make(dropout=0.5), torch.randn(2, 5, 24)
    assert called(fused(plain), x) == expected
    assert called(fused(plain).eval(), x) == expected
    assert not expected.keys() & called(plain, x).keys()


def test_without_a_norm():
    x = torch.randn(2, 5, 24)
    assert called(FusedAttention(24, 3, 8), x) == {"qkv_attention": 1}
    assert called(FusedFeedForward(24, 40), x) == {"gelu": 1}


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers

BLOCKS = {
    "attention": attention,
    "attention, one head of size dim": lambda: attention(24, 1, 24),
    "attention, one head of another size": lambda: attention(24, 1, 40),
    "attention, head dim 59": lambda: attention(40, 2, 59),
    "attention alone": lambda: Attention(24, 3, 8),
    "mlp": feed_forward,
    "mlp, tanh": lambda: with_tanh(feed_forward()),
    "mlp alone": lambda: FeedForward(24, 40),
}


def with_tanh(block):
    block.fn.net[1].approximate = "tanh"
    return block


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 50])
def test_parity_native(make, dtype, tokens):
    plain = make().to(dtype)
    dim = plain.norm.normalized_shape[0] if hasattr(plain, "norm") else 24
    with use_backend("native"):
        assert_alike(fused(plain), plain, torch.randn(2, tokens, dim, dtype=dtype))


@pytest.mark.parametrize("make", [BLOCKS["attention"], BLOCKS["mlp"]], ids=["attention", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parity_of_the_kernels(make, dtype, device):
    plain = make().to(device, dtype)
    with use_backend("triton"):
        assert_alike(fused(plain), plain, torch.randn(2, 17, 24, device=device, dtype=dtype))


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_parity_under_autocast(make):
    plain, x = make(), torch.randn(2, 17, 24)
    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        result, base = (run(module, x, torch.ones_like(x)) for module in (fused(plain), plain))
    gold = run(copy.deepcopy(plain).double(), x.double(), torch.ones_like(x).double())
    for name in gold:
        assert result[name].dtype == base[name].dtype, name
        # gradients of fp32 parameters carry the rounding of bfloat16
        error = compare(name, result[name].bfloat16(), base[name], gold[name], k=2 if name == "output" else 3)
        assert error, str(error)


def test_mlp_takes_any_rank():
    plain = feed_forward()
    with use_backend("native"):
        for shape in ((24,), (7, 24), (2, 3, 5, 24), (0, 5, 24)):
            x = torch.randn(shape)
            torch.testing.assert_close(fused(plain)(x), plain(x))


def test_a_head_dim_that_no_kernel_takes_raises():
    with pytest.raises(ValueError, match="head dim is 4"):
        FusedAttention(24, 3, 4)(torch.randn(2, 5, 24))


# ---------------------------------------------------------------------------------------------------------------------
# The same dropout


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_dropout_draws_the_same_masks(make):
    plain, x = make(dropout=0.5), torch.randn(2, 50, 24)
    module, grad = fused(plain), torch.randn(2, 50, 24)
    with use_backend("native"):
        torch.manual_seed(1)
        expected = run(plain, x, grad)
        torch.manual_seed(1)
        result = run(module, x, grad)
        assert 0.4 < (expected["output"] == 0).float().mean() < 0.6
        assert torch.equal(result["output"] == 0, expected["output"] == 0)
        for name in expected:
            torch.testing.assert_close(result[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.equal(module(x), result["output"])


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_dropout_is_off_in_eval(make):
    plain, x = make(dropout=0.5), torch.randn(2, 5, 24)
    module = fused(plain).eval()
    with use_backend("native"):
        assert torch.equal(module(x), module(x))
        torch.testing.assert_close(module(x), plain.eval()(x))


# ---------------------------------------------------------------------------------------------------------------------
# Hooks see what they see in the plain block


def record_hooks(module, kind, names):
    """Register hooks of `kind` on the submodules in `names`: the list of what they will see, and their handles."""
    seen, handles = [], []
    for name in names:
        if kind == "forward":
            see = lambda _, args, output, name=name: seen.append((name, *args, output))  # noqa: E731
            handle = module.get_submodule(name).register_forward_hook(see)
        elif kind == "forward_pre":
            see = lambda _, args, name=name: seen.append((name, *args))  # noqa: E731
            handle = module.get_submodule(name).register_forward_pre_hook(see)
        else:
            see = lambda _, grads, more=(), name=name: seen.append((name, *grads, *more))  # noqa: E731
            handle = getattr(module.get_submodule(name), f"register_full_{kind}_hook")(see)
        handles.append(handle)
    return seen, handles


def assert_same_seen(seen, expected):
    assert [name for name, *_ in seen] == [name for name, *_ in expected]
    for (name, *tensors), (_, *others) in zip(seen, expected, strict=True):
        assert len(tensors) == len(others)
        for t, other in zip(tensors, others, strict=True):
            torch.testing.assert_close(t, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre"])
@pytest.mark.parametrize("make", [attention, feed_forward])
def test_hooks_on_submodules(make, kind):
    plain, x = make(), torch.randn(2, 5, 24, requires_grad=True)
    module = fused(plain)
    names = [name for name, _ in plain.named_modules()]
    with use_backend("native"):
        for chosen in [[name] for name in names] + [names]:
            reference = copy.deepcopy(plain)
            seen, handles = record_hooks(module, kind, chosen)
            expected, _ = record_hooks(reference, kind, chosen)
            module(x).sum().backward()
            reference(x).sum().backward()
            assert len(expected) == len(chosen)
            assert_same_seen(seen, expected)
            for handle in handles:
                handle.remove()
    assert "layer_norm_linear" in called(module, x)


@pytest.mark.parametrize("make", [attention, feed_forward])
def test_a_hook_on_every_module(make):
    plain, x, seen = make(), torch.randn(2, 5, 24), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append((str(m), *args, out)))
    with handle, use_backend("native"):
        plain(x)
        expected = seen.copy()
        seen.clear()
        fused(plain)(x)
    assert len(expected) == len(list(plain.modules()))
    assert_same_seen([(name.replace("Fused", ""), *rest) for name, *rest in seen], expected)


def test_a_hook_may_change_what_it_sees():
    plain = feed_forward()
    plain.norm.register_forward_hook(lambda _, __, output: output * 2)
    x = torch.randn(2, 5, 24)
    with use_backend("native"):
        torch.testing.assert_close(fused(plain)(x), plain(x))


# ---------------------------------------------------------------------------------------------------------------------
# What is not plain is called as a module


class Other(nn.Linear):
    """Stands for LoRA and other Linears that compute something else."""

    def forward(self, x):
        return super().forward(x) + 1


class Scaled(torch.Tensor):
    """Stands for quantised weights: a tensor whose products are not those of its values."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        output = super().__torch_function__(func, types, args, kwargs)
        twice = func in (nn.functional.linear, nn.functional.layer_norm)
        return (output * 2).as_subclass(torch.Tensor) if twice else output


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def first_linear(block):
    return block.fn.to_qkv if isinstance(block.fn, Attention) else block.fn.net[0]


def replace_first_linear(block):
    other = Other(24, first_linear(block).out_features, bias=first_linear(block).bias is not None)
    if isinstance(block.fn, Attention):
        block.fn.to_qkv = other
    else:
        block.fn.net[0] = other


def replace_weight(module):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Scaled))


def normalise_weight(linear):
    nn.utils.weight_norm(linear).weight_g.data *= 2


def replace_forward(module):
    plain_forward = module.forward
    module.forward = lambda x: 3 * plain_forward(x)


ALTERATIONS = {
    "another Linear": replace_first_linear,
    "a weight of another class": lambda block: replace_weight(first_linear(block)),
    "a LayerNorm's weight of another class": lambda block: replace_weight(block.norm),
    "parametrized Linear": lambda block: parametrize.register_parametrization(first_linear(block), "weight", Doubled()),
    "parametrized LayerNorm": lambda block: parametrize.register_parametrization(block.norm, "weight", Doubled()),
    "weight norm by hooks": lambda block: normalise_weight(first_linear(block)),
    "Linear with a forward of its own": lambda block: replace_forward(first_linear(block)),
    "LayerNorm with a forward of its own": lambda block: replace_forward(block.norm),
    "RMSNorm": lambda block: setattr(block, "norm", nn.RMSNorm(24)),
    "LayerNorm without bias": lambda block: setattr(block, "norm", nn.LayerNorm(24, bias=False)),
    "LayerNorm without parameters": lambda block: setattr(block, "norm", nn.LayerNorm(24, elementwise_affine=False)),
    "LayerNorm over two dims": lambda block: setattr(block, "norm", nn.LayerNorm((5, 24))),
    "no norm": lambda block: setattr(block, "norm", nn.Identity()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("alter", ALTERATIONS.values(), ids=ALTERATIONS.keys())
@pytest.mark.parametrize("make", [attention, feed_forward])
def test_steps_aside(make, alter):
    plain, x = make(), torch.randn(2, 5, 24)
    module = fused(plain)
    before = plain(x)
    torch.manual_seed(1)
    alter(plain)
    torch.manual_seed(1)
    alter(module)
    assert not torch.allclose(plain(x), before)
    with use_backend("native"):
        torch.testing.assert_close(module(x), plain(x))
    assert "layer_norm_linear" not in called(module, x)


MORE_ALTERATIONS = {
    "another activation": (feed_forward, lambda block: block.fn.net.__setitem__(1, nn.ReLU()), {}),
    "a forward of GELU's own": (feed_forward, lambda block: replace_forward(block.fn.net[1]), {"gelu": 1}),
    "a forward of net's own": (feed_forward, lambda block: replace_forward(block.fn.net), {"gelu": 1}),
    "another fn": (feed_forward, lambda block: setattr(block, "fn", nn.Linear(24, 24)), {}),
    "a forward of fn's own": (feed_forward, lambda block: replace_forward(block.fn), {"gelu": 1}),
    "softmax over another dim": (attention, lambda block: setattr(block.fn.attend, "dim", -2), {"_softmax": 1}),
    "another attend": (attention, lambda block: setattr(block.fn, "attend", nn.Sigmoid()), {}),
    "a forward of attend's own": (attention, lambda block: replace_forward(block.fn.attend), {"_softmax": 1}),
}


@pytest.mark.parametrize(("make", "alter", "calls"), MORE_ALTERATIONS.values(), ids=MORE_ALTERATIONS.keys())
def test_steps_aside_within(make, alter, calls):
    plain, x = make(), torch.randn(2, 5, 24)
    module = fused(plain)
    before = plain(x)
    for block in (plain, module):
        torch.manual_seed(1)
        alter(block)
    assert not torch.allclose(plain(x), before)
    with use_backend("native"):
        torch.testing.assert_close(module(x), plain(x))
    assert called(module, x) == {"native_layer_norm": 1, **calls}


def test_extra_layers_of_the_mlp_are_called():
    plain, x = feed_forward(), torch.randn(2, 5, 24)
    plain.fn.net.append(Doubled())
    with use_backend("native"):
        torch.testing.assert_close(fused(plain)(x), plain(x))


def test_a_bias_of_to_qkv_counts():
    plain, x = attention(), torch.randn(2, 5, 24)
    plain.fn.to_qkv.bias = nn.Parameter(torch.randn(72))
    with use_backend("native"):
        torch.testing.assert_close(fused(plain)(x), plain(x))


def test_scale_and_eps_are_those_of_the_block():
    plain, x = attention(), torch.randn(2, 5, 24)
    plain.fn.scale, plain.norm.eps = 2.0, 0.5
    with use_backend("native"):
        torch.testing.assert_close(fused(plain)(x), plain(x))
    assert "layer_norm_linear" in called(fused(plain), x)


def test_keywords_go_to_fn():
    class Fn(FusedFeedForward):
        def forward(self, x, factor=1.0):
            return factor * super().forward(x)

    block, x = FusedPreNorm(24, Fn(24, 40)), torch.randn(2, 5, 24)
    with use_backend("native"):
        torch.testing.assert_close(block(x, factor=3.0), 3 * block(x))
    with pytest.raises(TypeError, match="factor"):
        FusedPreNorm(24, FusedFeedForward(24, 40))(x, factor=3.0)


def test_functional_call_uses_the_parameters_it_is_given():
    plain, other, x = attention(), attention(), torch.randn(2, 5, 24)
    with use_backend("native"):
        result = torch.func.functional_call(fused(plain), dict(other.named_parameters()), (x,))
        torch.testing.assert_close(result, other(x))


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile and torch.export


@contextmanager
def fresh_compiler():
    torch.compiler.reset()
    with use_backend("native"):
        yield
    torch.compiler.reset()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = fused(attention()), fused(feed_forward())

    def forward(self, x):
        x = self.attention(x) + x
        return self.mlp(x) + x


def test_compiles_to_one_graph(unguarded):
    layer, graphs = Layer(), []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    with fresh_compiler():
        compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
        for tokens in (5, 6, 17):
            x = torch.randn(2, tokens, 24)
            torch.testing.assert_close(compiled(x), layer(x))
    (graph,) = graphs
    assert [t for t in graph if "softmax" in str(t) or "layer_norm" in str(t).replace("layer_norm_linear", "")] == []


@pytest.mark.parametrize("strict", [False, True])
def test_exports_the_fused_operators(strict, unguarded):
    layer, x = Layer().eval(), torch.randn(2, 5, 24)
    with fresh_compiler():
        program = torch.export.export(layer, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), layer(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("vitriton.layer_norm_linear.default") == 2
    assert targets.count("vitriton.qkv_attention.default") == 1
