"""Fused models under what people train with: autocast and a scaler, checkpointing, compilers, EMA, LoRA and the like.

Where the same operations are computed, results are equal to the last bit; else the fused model's losses are held to
those of the plain model in the same dtype, both beside fp64. All on the native path: the kernels are judged elsewhere.
"""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from fused_blocks import called
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from vitriton.kernels import packed, use_backend
from vitriton.vit import FusedPreNorm, ViT, fuse, unfuse

pytestmark = pytest.mark.usefixtures("unguarded", "native")

BATCH = 64


@pytest.fixture
def linears_by_pytorch(monkeypatch):
    """The products that a graph of torch.compile or torch.export has, so that bits can be compared."""
    monkeypatch.setattr(packed, "forced", "pytorch")


@pytest.fixture(scope="module")
def digits():
    """Images (n,1,8,8) and labels to train on, then those that are held out."""
    pytest.importorskip("sklearn", reason="scikit-learn, which holds the digits, is not installed")
    from vitriton.vit.demo import digits

    return digits(torch.device("cpu"))


def vit(fused=False, depth=2, **kwargs):
    """The demo's small ViT with fewer layers, the same weights every time."""
    torch.manual_seed(0)
    model = ViT(
        **{"image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 10, "dim": 64, "depth": depth},
        **{"heads": 4, "dim_head": 16, "mlp_dim": 128},
        **kwargs,
    )
    if fused:
        fuse(model)
    return model


def images(n=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def gradients(model, x, labels):
    model.zero_grad()
    F.cross_entropy(model(x).float(), labels).backward()
    return [p.grad.clone() for p in model.parameters()]


def losses(model, data, steps, autocast=None):
    """Train with AdamW, in the same order every time; the losses, in fp64."""
    x, labels = data[0].to(next(model.parameters()).dtype), data[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=autocast == torch.float16)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    result = []
    for step in range(steps):
        batch = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)]
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = model(x[batch])
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[batch])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        result.append(loss.detach().double())
    return torch.stack(result)


def assert_same_training(result, base, gold, autocast=False):
    """Step by step, the fused model's loss is as near to that of fp64 training as the plain model's is.

    Both trainings start from the same weights and see the same batches, and rounding is all that tells them apart. It
    adds up from step to step (AdamW divides each gradient by its own size, so that what is near zero counts as much as
    what is not), so no fixed bound is right at every step. The measure is what the plain model's own rounding has done
    up to there: at most three times (kernels/reference.py's rule for gradients) its largest difference so far, and one
    rounding of the loss itself. Under autocast it is the largest of all steps: each loss is the mean of logits rounded
    to half precision, and in the first steps, where no other is there to be larger, these may cancel by chance.
    """
    largest = (base - gold).abs()
    largest = largest.max() if autocast else largest.cummax(dim=0).values
    allowed = 3 * largest + torch.finfo(torch.float32).eps * gold.abs()
    error = (result - gold).abs()
    assert (error <= allowed).all(), torch.stack([error, allowed], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The same losses


def test_digits_step_by_step(digits):
    """32 steps of plain and of fused training from the same seed, and the accuracy that they reach."""
    plain, fused = vit(depth=4), vit(fused=True, depth=4)
    gold = losses(vit(depth=4).double(), digits, 32)
    base, result = losses(plain, digits, 32), losses(fused, digits, 32)
    assert gold[-1] < 0.5 * gold[0]
    assert_same_training(result, base, gold)
    with torch.no_grad():
        right = [(model(digits[2]).argmax(dim=1) == digits[3]).double().mean().item() for model in (plain, fused)]
    assert right[0] > 0.8 and abs(right[0] - right[1]) <= 0.005


@pytest.mark.slow
def test_digits_to_the_end(digits):
    """20 epochs, in which any rounding parts trainings: the fused model's accuracy is within 0.5% of those that plain
    ones reach from weights that are off by one rounding."""

    def accuracy(model, seed=None):
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in model.parameters():
                    p *= 1 + torch.finfo(p.dtype).eps * torch.randint(-1, 2, p.shape, generator=generator)
        losses(model, digits, 20 * len(digits[0]) // BATCH)
        with torch.no_grad():
            return (model(digits[2]).argmax(dim=1) == digits[3]).double().mean().item()

    plain = [accuracy(vit(depth=4), seed) for seed in (None, 0, 1, 2)]
    assert min(plain) > 0.95
    assert min(plain) - 0.005 <= accuracy(vit(fused=True, depth=4)) <= max(plain) + 0.005, plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(digits, dtype):
    """A GradScaler for float16, as people have it."""
    gold = losses(vit().double(), digits, 8)
    base, result = (losses(vit(fused), digits, 8, dtype) for fused in (False, True))
    assert_same_training(result, base, gold, autocast=True)


def test_a_scaler_skips_what_overflows():
    model, (x, labels) = vit(fused=True), images()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x).float(), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpointing, compilers, EMA: equal to the last bit


class Checkpointed(nn.Module):
    def __init__(self, module, use_reentrant):
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


def checkpointed(model, use_reentrant=False):
    for layer in model.transformer.layers:
        layer[0], layer[1] = Checkpointed(layer[0], use_reentrant), Checkpointed(layer[1], use_reentrant)
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, dtype):
    """Blocks that are computed again for their backward pass: the same dropout, the same autocast."""
    results = []
    for wrap in (lambda model: model, lambda model: checkpointed(model, use_reentrant)):
        model = wrap(vit(fused=True, dropout=0.1, emb_dropout=0.1))
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            results.append(gradients(model, *images()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("wrap", "dtype"), [(lambda model: model, None), (checkpointed, torch.bfloat16)])
def test_compiled_training_has_no_graph_break(wrap, dtype, linears_by_pytorch):
    torch.compiler.reset()
    model = wrap(vit(fused=True))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for n in (8, 5):  # another batch size: dynamic
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            expected = gradients(model, *images(n))
            result = gradients(compiled, *images(n))
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    torch.compiler.reset()


def test_fusing_what_was_compiled(linears_by_pytorch):
    """fuse and unfuse inside a model that has been compiled and called: it is compiled again."""
    torch.compiler.reset()
    model, (x, _) = vit(), images()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        before = compiled(x)
        fuse(compiled)
        assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), before)
        unfuse(compiled)
        assert torch.equal(compiled(x), before)
    torch.compiler.reset()


@pytest.mark.parametrize("training", [False, True])
def test_export_of_a_model(training, linears_by_pytorch):
    model, (x, _) = vit(fused=True).train(training), images()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"img": {0: batch}})
    targets = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert targets.count("vitriton.layer_norm_linear.default") == 4
    assert targets.count("vitriton.qkv_attention.default") == 2
    assert torch.equal(program.module()(x[:3]), model(x[:3]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_model_that_is_traced(differentiable):
    """By torch.jit.trace, as torch.onnx does without dynamo: what is called past the operators it would not see."""
    model, (x, _) = vit(fused=True).eval(), images()
    with torch.set_grad_enabled(differentiable), use_backend("native"):
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x + 1), model(x + 1))


def test_averaged_model():
    """An exponential moving average: a fused copy, whose weights load into the plain model."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, (x, labels) = vit(fused=True), images()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        average.update_parameters(model)
    assert type(average.module.transformer.layers[0][0]) is FusedPreNorm
    assert not torch.equal(average(x), model(x))
    plain = vit()
    plain.load_state_dict(average.module.state_dict())
    assert "layer_norm_linear" in called(average, x)
    torch.testing.assert_close(average(x), plain(x))


# ---------------------------------------------------------------------------------------------------------------------
# Linears that are not what they were: whichever comes first, they or fuse, the numbers are the plain model's


def pruned(model):
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        prune.l1_unstructured(linear, "weight", amount=0.5)
    return model


def parametrized(model):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        parametrize.register_parametrization(linear, "weight", Doubled())
    return model


def quantized(model):
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(model, {nn.Linear})


def lora(model, *targets):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    import peft

    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=targets or ["to_qkv", "net.0", "net.3"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


ALTERATIONS = {  # and what fuse says of to_qkv then
    "pruned": (pruned, r"to_qkv has a hook (as a pruned Linear has) or a forward of its own: it is called, and not"),
    "parametrized": (parametrized, "to_qkv is torch.nn.utils.parametrize.ParametrizedLinear, not nn.Linear"),
    "quantized": (quantized, "to_qkv is torch.ao.nn.quantized.dynamic.modules.linear.Linear, not nn.Linear"),
    "LoRA": (lora, "to_qkv is peft.tuners.lora.layer.Linear, not nn.Linear"),
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize(("alter", "reason"), ALTERATIONS.values(), ids=ALTERATIONS.keys())
def test_altered_linears(alter, reason):
    plain, (x, labels) = alter(vit()), images()
    assert not torch.allclose(plain(x), vit()(x), atol=1e-3)

    fused_before = alter(vit(fused=True))
    altered_before = alter(vit())
    try:
        report = str(fuse(altered_before))
    except ValueError as error:  # nothing is left to fuse
        report = str(error)
    assert reason in report
    for model in (fused_before, altered_before):
        assert "layer_norm_linear" not in called(model, x)
        torch.testing.assert_close(model(x), plain(x))
        wanted = [p for p in plain.parameters() if p.requires_grad]
        if alter is not quantized:  # which has none
            expected = torch.autograd.grad(F.cross_entropy(plain(x), labels), wanted)
            wanted = [p for p in model.parameters() if p.requires_grad]
            result = torch.autograd.grad(F.cross_entropy(model(x), labels), wanted)
            torch.testing.assert_close(result, expected)


def test_what_lora_leaves_is_fused():
    """LoRA in the MLPs alone: attention is fused; and merged into the weights all is again."""
    model, (x, _) = lora(vit(), "net.0"), images()
    expected = model(x)
    report = fuse(model)
    assert (len(report.swapped), len(report.left)) == (5, 4)
    assert called(model, x)["layer_norm_linear"] == 2
    torch.testing.assert_close(model(x), expected)

    merged = lora(vit(fused=True), "net.0").merge_and_unload()
    assert called(merged, x)["layer_norm_linear"] == 4
    torch.testing.assert_close(merged(x), expected)


def test_pruning_that_is_made_permanent_is_fused_again():
    model, (x, _) = vit(), images()
    fuse(pruned(model))
    expected = model(x)
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        prune.remove(linear, "weight")
    assert called(model, x)["layer_norm_linear"] == 4
    torch.testing.assert_close(model(x), expected)
