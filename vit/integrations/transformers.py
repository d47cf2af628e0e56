"""transformers: the layers of its ViT (MAE, MSN, I-JEPA), DeiT, DINOv2, DINOv3, CLIP's and SigLIP's vision towers.

There are two ways. `fuse(model)` swaps attention, and the layer with its MLP. Or attention alone, for every model that
goes through transformers' AttentionInterface, by name:

>>> from vitriton.vit.integrations.transformers import register
>>> register()
>>> model.set_attn_implementation("vitriton")

q, k and v come from Linears of their own, which stay so: nothing is concatenated.
"""

import torch
from torch import nn

from ...kernels import attention
from .. import record
from ..forms import Form, drops, unlike, unlike_heads
from ..known import gelu_of, name_of
from ..modules import apply
from ..notes import note
from .blocks import Fused, TakesNorm, attend, feed_forward, not_plain, with_norm

__all__ = ["FORMS", "attention_forward", "register"]

IMPLEMENTATIONS = ("eager", "sdpa", "vitriton", None)  # all of them compute what a fused attention does
WEIGHTS = "its attention weights were asked for"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class FusedAttention(Fused):
    """The attention of ViT, DeiT and DINOv2. (B,N,C) -> ((B,N,C), None)."""

    OUT, SCALE, DROPOUT, ROPE = "o_proj", "scaling", "attention_dropout", False

    def forward(self, hidden_states, *args, **kwargs):
        why = not_plain(hidden_states) or self._why_plain(args, kwargs)
        if why is not None:
            note(self, why)
            return self.plain.forward(self, hidden_states, *args, **kwargs)
        b, n, _ = hidden_states.shape
        q, k, v = (
            apply(self._modules[name], hidden_states).view(b, n, -1, self.head_dim).transpose(1, 2)
            for name in PROJECTIONS
        )
        if self.ROPE:
            rotate = type(self).plain.forward.__globals__["apply_rotary_pos_emb"]
            q, k = rotate(q, k, *kwargs["position_embeddings"])
        out = attend(self, q, k, v, getattr(self, self.SCALE))
        return apply(self._modules[self.OUT], out), None

    def _why_plain(self, args, kwargs):
        if (args and args[0] is not None) or kwargs.get("attention_mask") is not None:
            return "it was called with a mask"
        if len(args) > 1:
            return "it was called with more than a mask by position"
        if kwargs.get("is_causal"):
            return "it was called with is_causal=True"
        if kwargs.get("output_attentions") or self.config.output_attentions:
            return WEIGHTS
        if self.training and getattr(self, self.DROPOUT):
            return "it drops attention weights"
        if self.config._attn_implementation not in IMPLEMENTATIONS:
            return f"its attention implementation is {self.config._attn_implementation}"
        if self.ROPE and kwargs.get("position_embeddings") is None:
            return "it was called without position_embeddings"
        return None


class FusedRopeAttention(FusedAttention):
    """DINOv3's, which turns q and k of all tokens but the prefix."""

    DROPOUT, ROPE = "dropout", True


class FusedCLIPAttention(FusedAttention):
    """CLIP's and SigLIP's."""

    OUT, SCALE, DROPOUT = "out_proj", "scale", "dropout"


class FusedMLP(TakesNorm):
    """The MLP of all of them but DINOv3. (...,C) -> (...,C)."""

    LAYERS = ("fc1", "activation_fn", "fc2")

    def forward(self, hidden_states, norm=None):
        if norm is None:
            return self.plain.forward(self, hidden_states)
        return feed_forward(self, hidden_states, norm, [self._modules[name] for name in self.LAYERS])


class FusedRopeMLP(FusedMLP):
    """DINOv3's."""

    LAYERS = ("up_proj", "act_fn", "down_proj")


class FusedViTLayer(Fused):
    """The layer of ViT and DeiT. (B,N,C) -> (B,N,C)."""

    def forward(self, hidden_states, *args, **kwargs):
        x, _ = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        hidden_states = self.dropout(x) + hidden_states
        x = with_norm(self.mlp, self.layernorm_after, hidden_states)
        return self.dropout(x) + hidden_states


class FusedDinoLayer(Fused):
    """The layer of DINOv2 and DINOv3. (B,N,C) -> (B,N,C)."""

    def forward(self, hidden_states, *args, **kwargs):
        x, _ = self.attention(self.norm1(hidden_states), *args, **kwargs)
        hidden_states = self.drop_path(self.layer_scale1(x)) + hidden_states
        x = with_norm(self.mlp, self.norm2, hidden_states)
        return self.drop_path(self.layer_scale2(x)) + hidden_states


class FusedCLIPLayer(Fused):
    """The layer of CLIP and SigLIP. (B,N,C) -> (B,N,C)."""

    def forward(self, hidden_states, *args, **kwargs):
        x, _ = self.self_attn(self.layer_norm1(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + x
        return hidden_states + with_norm(self.mlp, self.layer_norm2, hidden_states)


# ---------------------------------------------------------------------------------------------------------------------
# Which modules


def _why_not_attention(module):
    for name in (*PROJECTIONS, FORMS[name_of(type(module))].fused.OUT):
        if why_not := unlike(name, module._modules[name], nn.Linear):
            return why_not
    heads = getattr(module, "num_attention_heads", None) or module.num_heads
    features = {module._modules[name].out_features for name in PROJECTIONS}
    if features != {heads * module.head_dim}:
        return f"q_proj, k_proj and v_proj have {features} features, not {heads} heads of {module.head_dim} each"
    if module.is_causal:
        return "it is causal"
    if type(module.config).__name__ == "CLIPTextConfig":
        return "the text tower's attention is causal"
    if module.config._attn_implementation not in IMPLEMENTATIONS:
        return f"its attention implementation is {module.config._attn_implementation}: set 'sdpa' or 'eager' first"
    return unlike_heads(heads, "q_proj", module.q_proj.out_features, "heads")


def _why_not_mlp(module):
    first = FORMS[name_of(type(module))].fused.LAYERS[0]
    return unlike(first, module._modules[first], nn.Linear)


def _remark(module):
    act = module._modules[FORMS[name_of(type(module))].fused.LAYERS[1]]
    return f"its activation, {name_of(type(act))}, runs by itself" if gelu_of(act) is None else None


def _drops(module):
    return drops(getattr(module, FORMS[name_of(type(module))].fused.DROPOUT))


def _forms(prefix, attention, mlp, layer, children, norm, layer_name="Layer"):
    attention_children = (*PROJECTIONS, attention.OUT)
    return {
        f"{prefix}Attention": Form(attention, attention_children, (), _why_not_attention, _drops),
        f"{prefix}MLP": Form(mlp, mlp.LAYERS, (), _why_not_mlp, _remark, skips=mlp.LAYERS[:2], in_block=True),
        f"{prefix}{layer_name}": Form(layer, children, norms=((norm, "mlp"),), skips=(norm, "mlp")),
    }


VIT = ("attention", "layernorm_before", "layernorm_after", "mlp", "dropout")
DINO = ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")
CLIP = ("self_attn", "layer_norm1", "mlp", "layer_norm2")
_vit = (FusedAttention, FusedMLP, FusedViTLayer, VIT, "layernorm_after")
_dino = (FusedAttention, FusedMLP, FusedDinoLayer, DINO, "norm2")
_clip = (FusedCLIPAttention, FusedMLP, FusedCLIPLayer, CLIP, "layer_norm2", "EncoderLayer")
_models = "transformers.models"
FORMS = {
    **_forms(f"{_models}.vit.modeling_vit.ViT", *_vit),
    **_forms(f"{_models}.vit_mae.modeling_vit_mae.ViTMAE", *_vit),
    **_forms(f"{_models}.vit_msn.modeling_vit_msn.ViTMSN", *_vit),
    **_forms(f"{_models}.ijepa.modeling_ijepa.IJepa", *_vit),
    **_forms(f"{_models}.deit.modeling_deit.DeiT", *_vit),
    **_forms(f"{_models}.dinov2.modeling_dinov2.Dinov2", *_dino),
    **_forms(f"{_models}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters", *_dino),
    **_forms(
        f"{_models}.dinov3_vit.modeling_dinov3_vit.DINOv3ViT",
        *(FusedRopeAttention, FusedRopeMLP, FusedDinoLayer, DINO, "norm2"),
    ),
    **_forms(f"{_models}.clip.modeling_clip.CLIP", *_clip),
    **_forms(f"{_models}.siglip.modeling_siglip.Siglip", *_clip),
}


# ---------------------------------------------------------------------------------------------------------------------
# By name, through AttentionInterface


def register():
    """Make "vitriton" an attention implementation of transformers, for `model.set_attn_implementation("vitriton")`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("vitriton", attention_forward)
    AttentionMaskInterface.register("vitriton", sdpa_mask)


def attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    """What AttentionInterface asks for: q (B,H,Nq,D), k and v (B,H,Nk,D) -> (out (B,Nq,H,D), None).

    With a mask, dropout, causality, key heads that several query heads share, or anything else that the fused attention
    has not, it is transformers' "sdpa". Where attention weights are asked for they are computed and returned.
    """
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        why = WEIGHTS
    elif attention_mask is not None:
        why = "it was called with a mask"
    elif dropout:
        why = "it drops attention weights"
    elif is_causal or (is_causal is None and getattr(module, "is_causal", True)):
        why = "it is causal"
    elif getattr(module, "num_key_value_groups", 1) != 1 or query.shape[1] != key.shape[1]:
        why = "several of its query heads share a key head"
    elif kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        why = "its scores are capped or biased"
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if record.active:
            record.observe(module, query, key, scale)
        return attention(query, key, value, scale=scale).transpose(1, 2), None
    note(module, why)
    if why == WEIGHTS:
        return _with_weights(module, query, key, value, attention_mask, scaling, dropout, is_causal)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    masks = {"attention_mask": attention_mask, "is_causal": is_causal, "scaling": scaling, "dropout": dropout}
    out, _ = sdpa_attention_forward(module, query, key, value, **masks, **kwargs)
    return out, None


def _with_weights(module, q, k, v, mask, scale, dropout, is_causal):
    """The plain formula, which has the weights to return. A mask is True where a key is looked at, or is added."""
    if is_causal or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"output_attentions: {name_of(type(module))} is causal or shares key heads, and the implementation "
            "'vitriton' has weights for full attention only: model.set_attn_implementation('eager') has them"
        )
    scores = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return torch.matmul(weights, v).transpose(1, 2).contiguous(), weights
