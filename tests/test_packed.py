"""Linear's copies of weights on a CPU: the same bits, never stale, never kept longer than the weight; and its choice.

Blocks run with "packed" forced, so that nothing depends on what is faster here. What is expected comes from the same
block without copies, to the last bit.
"""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from vitriton.kernels import compiled, gradients, layer_norm_linear, native_attention, packed, use_backend
from vitriton.kernels.direct import linear
from vitriton.kernels.reference import compare
from vitriton.vit import Attention, FeedForward, PreNorm, fuse

ROWS = packed.PACKED_ROWS
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = [
    pytest.mark.skipif(packed.why_not_onednn(torch.float32) is not None, reason="oneDNN's Linear cannot run here"),
    pytest.mark.usefixtures("unguarded"),
]


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setattr(packed, "forced", "packed")
    packed.forget()
    with use_backend("native"), torch.no_grad():
        yield
    packed.forget()


def skip_unless(dtype):
    if packed.why_not_onednn(dtype) is not None:
        pytest.skip(packed.why_not_onednn(dtype))


def blocks(dtype=torch.float32):
    """An attention and an mlp block, fused: four weights."""
    model = nn.Sequential(PreNorm(24, Attention(24, 3, 8)), PreNorm(24, FeedForward(24, 40))).to(dtype).eval()
    fuse(model)
    return model


def tokens(dtype=torch.float32):
    return torch.randn(2, ROWS // 2, 24).to(dtype)


def without_copies(model, x):
    """What a copy of the model gives at its first use, when no weight has a copy."""
    count = packed.packed_bytes()[0]
    y = copy.deepcopy(model)(x)
    assert packed.packed_bytes()[0] == count
    return y


def with_copies(model, x):
    """The model's third output; by then every weight has a copy."""
    model(x)
    model(x)
    assert packed.packed_bytes()[0] == 4
    return model(x)


# ---------------------------------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_change_no_bit(dtype):
    skip_unless(dtype)
    model, x = blocks(dtype), tokens(dtype)
    assert torch.equal(with_copies(model, x), without_copies(model, x))


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_and_inference_give_the_same_bits(dtype, activation):
    skip_unless(dtype)
    x, norm, weight, bias = (torch.randn(*s).to(dtype) for s in ((ROWS, 64), (64,), (96, 64), (96,)))
    arguments = x, norm, norm, weight.requires_grad_(), bias
    outputs = [layer_norm_linear(*arguments, activation=activation) for _ in range(3)]
    assert packed.packed_bytes()[0] == 1
    with torch.enable_grad():
        outputs.append(layer_norm_linear(*arguments, activation=activation))
    assert outputs[-1].requires_grad
    assert all(torch.equal(outputs[0], other.detach()) for other in outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Never stale


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(tokens()).square().sum().backward()
    optimizer.step()


def load(model):
    model.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()})


def load_assigned(model):
    model.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()}, assign=True)


def replace_parameter(model):
    model[1].fn.net[0].weight = nn.Parameter(torch.randn(40, 24))


def replace_module(model):
    model[1].fn.net[3] = nn.Linear(40, 24)


def cast_and_back(model):
    model.bfloat16().float()


def each_weight(change):
    def alter(model):
        for p in model.parameters():
            if p.dim() == 2:
                change(p)

    return alter


def swap(p, first, second):
    """Swap two indices' values past PyTorch's counter of changes."""
    kept = p.data[first].clone()
    p.data[first] = p.data[second]
    p.data[second] = kept


CHANGES = {
    "in place": each_weight(lambda p: p.mul_(2)),
    "in place, one element": each_weight(lambda p: p[3, 5].add_(1)),
    "in place, two words of a row swapped": each_weight(lambda p: p[4, 8:16].copy_(p[4, 8:16].roll(4))),
    "through a view": each_weight(lambda p: p.view(-1)[70:71].zero_()),
    "an optimizer's step": optimizer_step,
    "load_state_dict": load,
    "load_state_dict(assign=True)": load_assigned,
    "another Parameter": replace_parameter,
    "another Linear": replace_module,
    "cast and back": cast_and_back,
    ".data replaced": each_weight(lambda p: setattr(p, "data", torch.randn_like(p))),
    # PyTorch's counter of changes does not see these
    ".data in place": each_weight(lambda p: p.data.mul_(2)),
    ".data, one element": each_weight(lambda p: p.data[3, 5].add_(1)),
    ".data, the last element": each_weight(lambda p: p.data[-1, -1].add_(1)),
    ".data, one bit": each_weight(lambda p: p.data[7, 8].mul_(1 + torch.finfo(p.dtype).eps)),
    ".data, two rows swapped": each_weight(lambda p: swap(p, 2, 5)),
    ".data, rows in another order": each_weight(lambda p: p.data.copy_(p.data.flip(0))),
    ".data, columns in another order": each_weight(lambda p: p.data.copy_(p.data.flip(1))),
    ".data, columns swapped": each_weight(lambda p: swap(p, (slice(None), slice(0, 2)), (slice(None), slice(6, 8)))),
    "through NumPy": each_weight(lambda p: p.numpy().__setitem__((1, 1), 3.0)),
    "by a tensor that shares the storage": each_weight(lambda p: p.new_empty(0).set_(p.data.untyped_storage()).mul_(2)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_noticed(change):
    model, x = blocks(), tokens()
    before = with_copies(model, x)
    change(model)
    expected = without_copies(model, x)
    assert not torch.equal(before, expected)
    for _ in range(3):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", [name for name in CHANGES if ".data," not in name and "NumPy" not in name])
def test_a_changed_weight_is_noticed_by_its_version(name, monkeypatch):
    """With "trusted", which reads no weight to find out; but for what PyTorch does not count."""
    monkeypatch.setattr(packed, "forced", "trusted")
    model, x = blocks(), tokens()
    before = with_copies(model, x)
    CHANGES[name](model)
    counted = name not in (".data in place", "by a tensor that shares the storage")
    expected = without_copies(model, x) if counted else before
    assert torch.equal(model(x), expected)


def test_trusted_makes_copies_for_few_rows(monkeypatch):
    monkeypatch.setattr(packed, "forced", "trusted")
    model, x = blocks(), torch.randn(1, packed.FEW_ROWS, 24)
    assert torch.equal(with_copies(model, x), without_copies(model, x))


def test_a_cast_is_noticed():
    skip_unless(torch.bfloat16)
    model, x = blocks(), tokens()
    with_copies(model, x)
    model.bfloat16()
    assert packed.packed_bytes() == (0, 0)
    for _ in range(3):
        assert torch.equal(model(x.bfloat16()), without_copies(model, x.bfloat16()))


@pytest.mark.parametrize("change", ["mul_", "data.mul_"])
def test_weights_that_have_no_version(change):
    """Those made in inference mode."""
    with torch.inference_mode():
        model, x = blocks(), tokens()
        before = with_copies(model, x)
        for p in model.parameters():
            (p.data if "data" in change else p).mul_(2)
        expected = without_copies(model, x)
        assert not torch.equal(before, expected) and torch.equal(model(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_has_weights_of_its_own(copied):
    model, x = blocks(), tokens()
    y = with_copies(model, x)
    other = copied(model)
    for p in other.parameters():
        p.mul_(2)
    expected = without_copies(other, x)
    for _ in range(3):
        assert torch.equal(other(x), expected) and not torch.equal(expected, y)
    assert torch.equal(model(x), y)


# ---------------------------------------------------------------------------------------------------------------------
# Made and kept no longer than they serve


def test_copies_are_in_no_checkpoint_and_no_pickle():
    model, x = blocks(), tokens()
    keys, size = list(model.state_dict()), len(pickle.dumps(model))
    own = {name: set(vars(module)) for name, module in model.named_modules()}
    with_copies(model, x)
    assert list(model.state_dict()) == keys and len(pickle.dumps(model)) == size
    assert {name: set(vars(module)) for name, module in model.named_modules()} == own
    torch.save(model.state_dict(), buffer := io.BytesIO())
    assert buffer.tell() < 4 * sum(p.nbytes for p in model.parameters())


def test_bytes_are_counted_and_given_back():
    model, x = blocks(), tokens()
    with_copies(model, x)
    count, size = packed.packed_bytes()
    exact = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    assert count == 4 and exact <= size <= 4 * exact  # oneDNN pads to blocks
    model.to("meta")  # as to a GPU
    assert packed.packed_bytes() == (0, 0)
    model = blocks()
    with_copies(model, x)
    del model
    gc.collect()
    assert packed.packed_bytes() == (0, 0) and not packed._known


def test_training_makes_no_copies():
    model, x = blocks(), tokens()
    with torch.enable_grad():
        for _ in range(3):  # as when gradients are accumulated
            model(x).sum().backward()
    assert packed.packed_bytes() == (0, 0)


def test_weights_that_change_before_each_use_get_no_copies():
    model, x = blocks(), tokens()
    for _ in range(3):
        model(x)
        for p in model.parameters():
            p.mul_(1.5)
    assert packed.packed_bytes() == (0, 0)


@pytest.mark.parametrize("k", [24, 2 * packed.LONGEST + 40])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_in_training(k, bias):
    """Values and gradients, and gradients of gradients, of a Linear that stands alone; K in one piece and in three."""
    x, weight = torch.randn(5, 40, k), torch.randn(48, k)
    inputs = [x, weight, torch.randn(48)] if bias else [x, weight]
    grad, direction = torch.randn(5, 40, 48), torch.randn(5, 40, k)

    def run(function, dtype):
        with torch.enable_grad():
            leaves = [t.to(dtype).requires_grad_() for t in inputs]
            y = function(*leaves, *([] if bias else [None]))
            first = torch.autograd.grad(y, leaves, grad.to(dtype))
            (dx,) = torch.autograd.grad(function(*leaves, *([] if bias else [None])).square().sum(), leaves[0],
                                        create_graph=True)  # fmt: skip
            second = torch.autograd.grad((dx * direction.to(dtype)).sum(), leaves[:2])
        return [y.detach(), *first, *second]

    result, base, gold = (
        run(f, dtype)
        for f, dtype in ((linear, torch.float32), (nn.functional.linear, torch.float32), (linear, torch.float64))
    )
    with torch.enable_grad():
        assert "_Linear" in type(linear(x, weight.requires_grad_(), None).grad_fn).__name__
    for i, tensors in enumerate(zip(result, base, gold, strict=True)):
        error = compare(str(i), *tensors, k=3)
        assert error, str(error)
    for some in ((True, False), (False, True)):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(need) for t, need in zip((x, weight), some, strict=True)]
            linear(*leaves, None).backward(grad)
        assert [t.grad is not None for t in leaves] == list(some)


def test_long_sums_are_made_in_pieces():
    """One product by oneDNN would err twice as much as PyTorch's own."""
    x, weight = torch.randn(ROWS, 4 * packed.LONGEST), torch.randn(64, 4 * packed.LONGEST)
    gold, base = x.double() @ weight.double().t(), x @ weight.t()
    for may_pack in (False, True, True):
        y = packed.linear(x, weight, None, may_pack=may_pack)
        assert (y - gold).square().mean().sqrt() < 1.6 * (base - gold).square().mean().sqrt()


def test_few_rows_make_no_copies():
    model = blocks()
    for _ in range(3):
        model(torch.randn(1, ROWS - 1, 24))
    assert packed.packed_bytes() == (0, 0)


@pytest.mark.parametrize("weight", [torch.randn(40, 23), torch.randn(24, 40).t(), torch.randn(40, 48)[:, ::2]])
def test_weights_that_cannot_be_copied(weight):
    k = weight.shape[1]
    x, norm = torch.randn(ROWS, k), torch.randn(k)
    outputs = [layer_norm_linear(x, norm, norm, weight) for _ in range(3)]
    assert packed.packed_bytes() == (0, 0)
    expected = layer_norm_linear(x.double(), norm.double(), norm.double(), weight.double())
    for y in outputs:
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_threads_share_copies():
    model, x = blocks(), tokens()
    expected, results = without_copies(model, x), []

    def run():
        with torch.inference_mode(), use_backend("native"):
            results.extend(torch.equal(model(x), expected) for _ in range(8))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 32 and all(results)
    assert packed.packed_bytes()[0] == 4


# ---------------------------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_choice_is_made_once_and_says_why(dtype, monkeypatch):
    monkeypatch.setattr(packed, "forced", "auto")
    choice = packed.choice(dtype, 197, 768, 192)
    assert choice.linear in ("pytorch", "onednn", "packed", "compiled") and choice.why
    assert packed.choice(dtype, 394, 192, 192) is choice  # of the same class
    if packed.why_not_onednn(dtype) is not None:
        assert choice.linear == "pytorch" and choice.why == packed.why_not_onednn(dtype)
    else:
        assert all(name in choice.why for name in ("pytorch", "onednn", "packed", " us"))


def test_the_slower_product_is_passed_over(monkeypatch):
    monkeypatch.setattr(packed, "forced", "auto")
    names = ("pytorch", "packed", "compiled")
    for fast in names if compiled.why_no_blocks(torch.float32) is None else names[:2]:
        monkeypatch.setattr(packed, "fastest", lambda fast=fast, **calls: {n: 2 - (n == fast) for n in calls})
        packed._choice.cache_clear()
        assert packed.choice(torch.float32, 197, 768, 192).linear == fast
    packed._choice.cache_clear()


@pytest.mark.parametrize("name", ["pytorch", "onednn", "packed"])
def test_a_forced_choice(name, monkeypatch):
    monkeypatch.setattr(packed, "forced", name)
    model, x = blocks(), tokens()
    y = [model(x) for _ in range(3)][-1]
    assert packed.packed_bytes()[0] == (4 if name == "packed" else 0)
    gold = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(y.double(), gold, rtol=1e-4, atol=1e-4)
    assert name in packed.choice(torch.float32, 197, 768, 192).why
    assert packed.choice(torch.float64, 197, 768, 192).linear == "pytorch"


def test_a_forced_choice_that_cannot_run_raises(monkeypatch):
    monkeypatch.setattr(packed, "forced", "packed")
    monkeypatch.setattr(packed, "HAS_ONEDNN", False)
    packed.why_not_onednn.cache_clear()
    packed._choice.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="'packed', which cannot run: this PyTorch has no oneDNN"):
            blocks()(tokens())
        monkeypatch.setattr(packed, "forced", "auto")
        assert packed.choice(torch.float32, 197, 768, 192).linear == "pytorch"
        assert blocks()(tokens()).isfinite().all()
    finally:
        packed.why_not_onednn.cache_clear()
        packed._choice.cache_clear()


@pytest.mark.parametrize(
    ("module", "value", "allowed"),
    [
        (packed, "onednn", "'auto', 'pytorch', 'onednn', 'packed', 'trusted'"),
        (gradients, "onednn", "'auto', 'pytorch', 'onednn', 'compiled'"),
        (native_attention, "flash", "'auto', 'flash', 'products', 'compiled'"),
        (compiled, "fp32", "'auto', 'pairs', 'fp32'"),
    ],
)
def test_the_environment_variable_chooses(module, value, allowed):
    name = module.__name__.rpartition(".")[2]
    code = f"from vitriton.kernels import backend, {name}; backend.chosen_backend(); print({name}.forced)"

    def python(value):
        environment = os.environ | {module.VARIABLE: value}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert python(value).stdout == f"{value}\n"
    assert f"is 'mkl'; allowed are {allowed}" in python("mkl").stderr
