"""32 training steps on scikit-learn's digits, plain and fused from one seed: the same losses, the same accuracy."""

import pytest
import torch
import torch.nn.functional as F
from library_models import FAMILIES
from vitriton.kernels import use_backend
from vitriton.vit import fuse

LIBRARIES = (
    "timm", "timm, LayerScale", "transformers ViT", "transformers DINOv2", "torchvision", "open_clip", "vit-pytorch",
    "vit-pytorch SimpleViT",
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    """Images (n,3,16,16) and labels, of which there are 5: the digits from 0 to 4."""
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits(n_class=5)
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return F.interpolate(images, scale_factor=2).expand(-1, 3, -1, -1), torch.tensor(data.target)


def train(family, digits, swap):
    torch.manual_seed(0)
    make, options, _ = FAMILIES[family]
    model = make(**options)
    swap(model)
    # an eps beside which rounding is small: with 1e-8, Adam makes whole steps of gradients that are rounding alone
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-5)
    images, labels = digits
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(32):
        batch = order[:-200].roll(-64 * step)[:64]
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        right = model.eval()(images[order[-200:]]).argmax(dim=1) == labels[order[-200:]]
    return torch.tensor(losses), right.float().mean().item()


def nudge(model):
    """Change each weight by about one rounding: how far two runs of the plain model then come apart is rounding."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.finfo(torch.float32).eps * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", LIBRARIES)
def test_losses_agree(family, digits):
    with use_backend("native"):
        losses, accuracy = train(family, digits, lambda model: None)
        fused_losses, fused_accuracy = train(family, digits, fuse)
        nudged_losses, _ = train(family, digits, nudge)
    assert losses[-8:].mean() < losses[0] - 0.05 and accuracy > 0.2  # there was something to learn
    error, rounding = (fused_losses - losses).abs(), (nudged_losses - losses).abs().cummax(0).values
    assert (error <= 1e-5 + 1e-4 * losses + 3 * rounding).all(), (error, rounding)
    assert (error[:8] <= 1e-5).all()
    assert abs(fused_accuracy - accuracy) <= 0.005
