"""Small randomly initialised models of the libraries that fuse knows: no download, two layers, a few seconds for all.

FAMILIES: name -> (library, build, options). `build(**options)` gives a module that takes images (B,3,16,16) and gives
one tensor.
"""

import importlib

import pytest
import torch
from torch import nn
from vitriton.vit.integrations import FORMS
from vitriton.vit.known import is_layer_norm, learn, name_of, why_not_known

SIZE = {"image_size": 16, "patch_size": 4}
HF = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "num_labels": 5, **SIZE,
}  # fmt: skip


class Tensors(nn.Module):
    """A model of which one tensor of the output is wanted."""

    def __init__(self, model, pick, seed=None):
        super().__init__()
        self.model, self.pick, self.seed = model, pick, seed

    def forward(self, images):
        if self.seed is not None:
            torch.manual_seed(self.seed)
        out = self.model(images)
        return getattr(out, self.pick) if isinstance(self.pick, str) else out


def timm_vit(**options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes | options)


def timm_gated(**options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm_vit(**options)
    for block in model.blocks:  # arguments of Attention that VisionTransformer does not pass on
        block.attn = timm.layers.Attention(32, 2, attn_head_dim=24, qkv_bias=True, gated=True)
    return model


def transformers(model, pick, seed=None, **options):
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    prefix = {"CLIPVision": "CLIPVision", "SiglipVision": "SiglipVision"}.get(model.removesuffix("Model"))
    config = prefix or model.replace("ForImageClassification", "").replace("Model", "")
    config = getattr(library, f"{config}Config")(**HF | options)
    return Tensors(getattr(library, model)(config), pick, seed)


def torchvision_vit(**options):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
    return models.VisionTransformer(**sizes | {"num_classes": 5} | options)


def open_clip_vit(**options):
    library = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
    sizes = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 1.5}
    if options.pop("quick_gelu", False):
        options["act_layer"] = library.QuickGELU
    if options.pop("sequence_first", False):
        model = open_clip_vit(**options)
        model.transformer = library.Transformer(32, 2, 2, 1.5, batch_first=False)
        return model
    if options.pop("fp32_norm", False):
        options["norm_layer"] = library.LayerNormFp32
    return library.VisionTransformer(**sizes | {"output_dim": 5} | options)


def vit_pytorch(name="vit.ViT", **options):
    module, _, cls = name.partition(".")
    library = importlib.import_module(f"vit_pytorch.{module}") if _has("vit_pytorch") else None
    if library is None:
        pytest.skip("vit-pytorch is not installed")
    sizes = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 12, "mlp_dim": 48, "num_classes": 5, **SIZE}
    return getattr(library, cls)(**sizes | options)


def _has(name):
    return importlib.util.find_spec(name) is not None


CALLS = {"layer_norm_linear": 4, "qkv_attention": 2}  # two layers, everything fused
QK_NORM = {"layer_norm_linear": 4, "attention": 2}
SEPARATE = {"layer_norm_linear": 2, "attention": 2}  # q, k and v from Linears of their own

FAMILIES = {
    "timm": (timm_vit, {}, CALLS),
    "timm, no qkv bias": (timm_vit, {"qkv_bias": False}, CALLS),
    "timm, LayerScale": (timm_vit, {"init_values": 0.5}, CALLS),
    "timm, q and k norm": (timm_vit, {"qk_norm": True}, QK_NORM),
    "timm, register tokens": (timm_vit, {"reg_tokens": 3, "no_embed_class": True}, CALLS),
    "timm, mean pooling": (timm_vit, {"class_token": False, "global_pool": "avg"}, CALLS),
    "timm, norms inside": (timm_vit, {"scale_attn_norm": True, "scale_mlp_norm": True}, CALLS),
    "timm, tanh GELU": (timm_vit, {"act_layer": "gelu_tanh"}, CALLS),
    "timm, QuickGELU": (timm_vit, {"act_layer": "quick_gelu"}, CALLS),
    "timm, fp32 norms": (timm_vit, {"norm_layer": "layernormfp32"}, CALLS),
    "timm, a gate": (timm_gated, {}, {"layer_norm_linear": 2, "qkv_attention": 2}),
    "transformers ViT": (transformers, {"model": "ViTForImageClassification", "pick": "logits"}, SEPARATE),
    "transformers ViT, no qkv bias": (
        transformers, {"model": "ViTModel", "pick": "pooler_output", "qkv_bias": False}, SEPARATE,
    ),
    "transformers DeiT": (transformers, {"model": "DeiTForImageClassification", "pick": "logits"}, SEPARATE),
    "transformers DINOv2": (
        transformers, {"model": "Dinov2ForImageClassification", "pick": "logits", "mlp_ratio": 2}, SEPARATE,
    ),
    "transformers DINOv2, SwiGLU": (
        transformers, {"model": "Dinov2Model", "pick": "pooler_output", "use_swiglu_ffn": True}, {"attention": 2},
    ),
    "transformers DINOv2 with registers": (
        transformers, {"model": "Dinov2WithRegistersModel", "pick": "pooler_output", "mlp_ratio": 2}, SEPARATE,
    ),
    "transformers MAE": (
        transformers, {"model": "ViTMAEModel", "pick": "last_hidden_state", "mask_ratio": 0.5, "seed": 0}, SEPARATE,
    ),
    "transformers MSN": (transformers, {"model": "ViTMSNForImageClassification", "pick": "logits"}, SEPARATE),
    "transformers I-JEPA": (transformers, {"model": "IJepaForImageClassification", "pick": "logits"}, SEPARATE),
    "transformers CLIP, GELU": (
        transformers, {"model": "CLIPVisionModel", "pick": "pooler_output", "hidden_act": "gelu_python"}, SEPARATE,
    ),
    "transformers DINOv3": (
        transformers, {"model": "DINOv3ViTModel", "pick": "last_hidden_state", "num_register_tokens": 2}, SEPARATE,
    ),
    "transformers DINOv3, gated MLP": (
        transformers, {"model": "DINOv3ViTModel", "pick": "pooler_output", "use_gated_mlp": True}, {"attention": 2},
    ),
    "transformers CLIP": (transformers, {"model": "CLIPVisionModel", "pick": "pooler_output"}, SEPARATE),
    "transformers SigLIP": (
        transformers, {"model": "SiglipVisionModel", "pick": "last_hidden_state", "vision_use_head": False}, SEPARATE,
    ),
    "torchvision": (torchvision_vit, {}, CALLS),
    "open_clip": (open_clip_vit, {}, CALLS),
    "open_clip, QuickGELU": (open_clip_vit, {"quick_gelu": True}, CALLS),
    "open_clip, LayerScale": (open_clip_vit, {"ls_init_value": 0.5}, CALLS),
    "open_clip, sequence first": (open_clip_vit, {"sequence_first": True}, CALLS),
    "open_clip, fp32 norms": (open_clip_vit, {"fp32_norm": True}, CALLS),
    "vit-pytorch": (vit_pytorch, {}, CALLS),
    "vit-pytorch, mean pooling": (vit_pytorch, {"pool": "mean"}, CALLS),
    "vit-pytorch SimpleViT": (vit_pytorch, {"name": "simple_vit.SimpleViT"}, CALLS),
}  # fmt: skip

# with all their dropouts: what draws random numbers in training
DROPOUTS = {
    "timm, DropPath": (timm_vit, {"drop_path_rate": 0.5}, True),
    "timm, dropout": (timm_vit, {"proj_drop_rate": 0.3, "pos_drop_rate": 0.2}, True),
    "timm, attention dropout": (timm_vit, {"attn_drop_rate": 0.3}, False),
    "transformers ViT, dropout": (
        transformers, {"model": "ViTForImageClassification", "pick": "logits", "hidden_dropout_prob": 0.3}, True,
    ),
    "transformers ViT, attention dropout": (
        transformers,
        {"model": "ViTForImageClassification", "pick": "logits", "attention_probs_dropout_prob": 0.3}, False,
    ),
    "transformers DINOv2, DropPath": (
        transformers, {"model": "Dinov2Model", "pick": "pooler_output", "drop_path_rate": 0.5}, True,
    ),
    "transformers DINOv3, DropPath": (
        transformers, {"model": "DINOv3ViTModel", "pick": "pooler_output", "drop_path_rate": 0.5}, True,
    ),
    "transformers DINOv3, attention dropout": (
        transformers, {"model": "DINOv3ViTModel", "pick": "pooler_output", "attention_dropout": 0.3}, False,
    ),
    "transformers CLIP, attention dropout": (
        transformers, {"model": "CLIPVisionModel", "pick": "pooler_output", "attention_dropout": 0.3}, False,
    ),
    "torchvision, dropout": (torchvision_vit, {"dropout": 0.3}, True),
    "torchvision, attention dropout": (torchvision_vit, {"attention_dropout": 0.3}, False),
    "vit-pytorch, dropout": (vit_pytorch, {"dropout": 0.3, "emb_dropout": 0.2}, False),
}  # fmt: skip


def build(family):
    """The model of FAMILIES or DROPOUTS, with parameters that hide no error."""
    make, options, _ = (FAMILIES | DROPOUTS)[family]
    torch.manual_seed(0)
    model = make(**options)
    for module in model.modules():
        if name_of(type(module)) in FORMS and (why_not := why_not_known(type(module))):
            pytest.skip(f"fuse leaves {name_of(type(module))} alone in the version that is installed: {why_not}")
    learn()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "token" in name:  # biases, scales: many are 0 or 1 at first
                parameter.normal_(std=0.5)
            elif parameter.dim() == 2:  # often 0 or nearly so, which makes attention flat
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        for module in model.modules():
            if is_layer_norm(module) and module.weight is not None:
                module.weight.normal_()
    return model.eval()


def run(model, images, grad):
    """The output, and the gradient of the images and of each parameter that has one, by name."""
    images = images.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(images)
    output.backward(grad.to(output.dtype))
    grads = {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "gradient of x": images.grad, **grads}
