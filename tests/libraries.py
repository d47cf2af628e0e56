"""Small models of the libraries that people have, with what their attention maps must be.

`library_model(name)` -> (model in eval mode, input, maps (b, layers, heads, n, n)). The maps are what the library says
itself where it does, or computed here from the q and k that its modules give, caught by hooks on them.
"""

import copy

import pytest
import torch
from fused_blocks import randomise

__all__ = ["LIBRARIES", "library_model"]

SMALL = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "heads": 3, "mlp_dim": 40}
CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
}


def vit_pytorch(module="vit", **kwargs):
    module = _import(f"vit_pytorch.{module}", "vit-pytorch")
    model = getattr(module, "ViT", None) or module.SimpleViT
    return model(**SMALL | kwargs, dim_head=8), ("to_qkv",)


def timm(fused_attn=True, **kwargs):
    models = _import("timm.models.vision_transformer", "timm")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = models.VisionTransformer(**sizes | kwargs)
    for block in model.blocks:
        block.attn.fused_attn = fused_attn
    return model, ("q_norm", "k_norm")


def transformers(name, attention="sdpa", **kwargs):
    library = _import("transformers", "transformers")
    config = getattr(library, f"{name}Config")(**CONFIG | kwargs, attn_implementation=attention)
    return getattr(library, f"{name}Model")(config), ()


def torchvision():
    models = _import("torchvision.models.vision_transformer", "torchvision")
    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 40}
    return models.VisionTransformer(**sizes, num_classes=5), ("self_attention",)


def open_clip():
    models = _import("open_clip.transformer", "open_clip_torch")
    model = models.VisionTransformer(
        image_size=16, patch_size=4, width=24, layers=2, heads=3, mlp_ratio=2.0, output_dim=8
    )
    return model, ("attn",)


LIBRARIES = {
    "vit-pytorch": vit_pytorch,
    "vit-pytorch, mean": lambda: vit_pytorch(pool="mean"),
    "vit-pytorch, SimpleViT": lambda: vit_pytorch("simple_vit"),
    "vit-pytorch, registers": lambda: vit_pytorch("simple_vit_with_register_tokens"),
    "timm": timm,
    "timm, mean": lambda: timm(class_token=False, global_pool="avg"),
    "timm, own softmax": lambda: timm(fused_attn=False),
    "timm, q/k norm, registers": lambda: timm(qk_norm=True, reg_tokens=2, init_values=0.1),
    "transformers, ViT": lambda: transformers("ViT"),
    "transformers, ViT, eager": lambda: transformers("ViT", "eager"),
    "transformers, DeiT": lambda: transformers("DeiT"),
    "transformers, DINOv2": lambda: transformers("Dinov2"),
    "transformers, DINOv2 with registers": lambda: transformers("Dinov2WithRegisters"),
    "transformers, DINOv3": lambda: transformers("DINOv3ViT", num_register_tokens=2, pos_embed_rescale=None),
    "transformers, CLIP": lambda: transformers("CLIPVision"),
    "transformers, SigLIP": lambda: transformers("SiglipVision", vision_use_head=False),
    "torchvision": torchvision,
    "open_clip": open_clip,
}


def library_model(name):
    model, children = LIBRARIES[name]()
    randomise(model).eval()
    x = torch.randn(2, 3, 16, 16)
    if name.startswith("transformers"):
        return model, x, _told(model, x)
    maps = []
    with torch.no_grad():
        for module in model.modules():
            if children[0] in module._modules:
                maps.append(_expected(model, module, children, x))
    return model, x, torch.stack(maps, dim=1)


@torch.no_grad()
def _told(model, x):
    """The maps that a model of transformers gives itself, in fp64."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = copy.deepcopy(model).double()(x.double(), output_attentions=True).attentions
    model.set_attn_implementation(attention)
    return torch.stack(maps, dim=1).float()


def _expected(model, module, children, x):
    caught = {}
    hooks = [
        module._modules[child].register_forward_hook(
            lambda _, args, kwargs, out, child=child: caught.__setitem__(child, (args, kwargs, out)), with_kwargs=True
        )
        for child in children
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    attention = module._modules[children[0]]
    if isinstance(attention, torch.nn.MultiheadAttention):
        args, kwargs, _ = caught[children[0]]
        x = args[0] if args else kwargs["query"]
        return attention(x, x, x, need_weights=True, average_attn_weights=False)[1]
    outs = [out for _, _, out in caught.values()]
    if len(outs) == 1:
        outs = outs[0].chunk(3, dim=-1)[:2]
    if outs[0].ndim == 3:
        outs = [out.unflatten(-1, (3, 8)).transpose(1, 2) for out in outs]
    q, k = outs
    return (q.double() @ k.double().transpose(-1, -2) * 8**-0.5).softmax(dim=-1).float()


def _import(module, distribution):
    return pytest.importorskip(module, reason=f"{distribution} is not installed")
