"""load_checkpoint: checkpoints from one form of the ViT into the other and back, and what is refused."""

import pytest
import torch
from library_models import SIZE
from torch import nn
from vitriton.vit import ViT, fuse, load_checkpoint

SIZES = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 12, "mlp_dim": 48, "num_classes": 5, **SIZE}
X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


def noisy(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def new_vit(patch_norms=False, **options):
    library = pytest.importorskip("vit_pytorch.vit", reason="vit-pytorch is not installed")
    model = library.ViT(**SIZES | options)
    if not patch_norms:
        model.to_patch_embedding = nn.Sequential(model.to_patch_embedding[0], model.to_patch_embedding[2])
    return noisy(model)


def old_vit(**options):
    return noisy(ViT(**SIZES | options))


@pytest.mark.parametrize("options", [{}, {"heads": 1, "dim_head": 32}], ids=["", "to_out is Identity"])
@pytest.mark.parametrize(("source", "target"), [(old_vit, new_vit), (new_vit, old_vit), (old_vit, old_vit)])
def test_the_same_function_in_the_other_form(source, target, options):
    source, target = source(**options), target(**options)
    assert not torch.allclose(source(X), target(X), atol=0.1)
    load_checkpoint(target, source.state_dict())
    torch.testing.assert_close(target(X), source(X))


def test_there_and_back_restores_every_bit():
    source, between, back = old_vit(), new_vit(), old_vit()
    load_checkpoint(between, source.state_dict())
    load_checkpoint(back, between.state_dict())
    assert back.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_into_a_fused_model():
    source, target = old_vit(), new_vit()
    fuse(target)
    load_checkpoint(target, source.state_dict())
    torch.testing.assert_close(target(X), source(X))


def test_refused():
    new, old = new_vit(), old_vit()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    mean = old_vit(pool="mean").state_dict()
    with pytest.raises(ValueError, match="mean pooling, and in the other form that is another function"):
        load_checkpoint(new_vit(pool="mean"), mean, pool="mean")
    with pytest.raises(ValueError, match="pools by 'mean', the model by 'cls'"):
        load_checkpoint(new, mean, pool="mean")
    with pytest.raises(ValueError, match=r"the model normalises the patches .* and the checkpoint does not"):
        load_checkpoint(new_vit(patch_norms=True), old.state_dict())
    with pytest.raises(ValueError, match=r"the checkpoint normalises the patches .* and the model does not"):
        load_checkpoint(old, new_vit(patch_norms=True).state_dict())
    with pytest.raises(ValueError, match="only the model has pos_embedding"):
        load_checkpoint(new, old_vit(pos_embed="axial").state_dict())
    with pytest.raises(ValueError, match=r"state_dict is none of a ViT .* but weight, bias"):
        load_checkpoint(new, nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match="pool is 'max'"):
        load_checkpoint(new, old.state_dict(), pool="max")
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())


def test_mean_pooling_in_one_form():
    source, target = old_vit(pool="mean"), old_vit(pool="mean")
    load_checkpoint(target, source.state_dict(), pool="mean")
    assert torch.equal(target(X), source(X))
