"""timm: the blocks of its VisionTransformer, with all that they may carry.

LayerScale, DropPath and dropouts are called as the modules that they are, so they draw the random numbers that they
always drew. q and k are normalised before they meet; a gate and a norm behind attention act where they did.
"""

from torch import nn

from ..forms import Form, drops, unlike, unlike_heads
from ..known import gelu_of, name_of
from ..modules import apply, idle, untouched
from ..notes import note
from .blocks import (
    Fused,
    TakesNorm,
    asked_for,
    attend,
    attend_at_once,
    attend_packed,
    feed_forward,
    lone_linear,
    not_plain,
    project,
    traced,
    with_norm,
)

__all__ = ["FORMS", "FusedAttention", "FusedBlock", "FusedMlp", "attention_layer"]


class FusedAttention(TakesNorm):
    """timm.layers.Attention. (B,N,C) -> (B,N,C')."""

    def forward(self, x, *args, norm=None, **kwargs):
        if traced(x):
            return self.plain.forward(self, x, *args, **kwargs)
        why = (
            not_plain(x)
            or asked_for(args, kwargs)
            or (None if idle(self.attn_drop) else "attn_drop drops, or has a hook")
        )
        if why is not None:
            note(self, why)
            return self.plain.forward(self, x if norm is None else norm(x), *args, **kwargs)
        gate = self.gate
        if gate is not None:
            x, norm = x if norm is None else norm(x), None
            gate = gate(x).sigmoid()
        q_norm, k_norm = self.q_norm, self.k_norm
        packed = untouched(q_norm, nn.Identity) and untouched(k_norm, nn.Identity)
        if packed and gate is None:
            y = attend_at_once(x, norm, self._linears, self.num_heads, self.scale)
            if y is not None:
                return y
        qkv = project(self, x, norm, self.qkv)
        if packed:
            x = attend_packed(self, qkv, self.num_heads, self.scale)
        else:
            b, n, _ = qkv.shape
            q, k, v = qkv.view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            x = attend(self, q_norm(q), k_norm(k), v, self.scale)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        return apply(self.proj_drop, apply(self.proj, x))

    def _linears(self):
        return lone_linear(self.qkv), lone_linear(self.norm, self.proj, self.proj_drop)


class FusedMlp(TakesNorm):
    """timm.layers.Mlp. (...,C) -> (...,C'). Without `norm` there is nothing to fuse."""

    def forward(self, x, norm=None):
        if norm is None:
            return self.plain.forward(self, x)
        return feed_forward(self, x, norm, (self.fc1, self.act, self.drop1, self.norm, self.fc2, self.drop2))


class FusedBlock(Fused):
    """timm's Block, which hands norm1 to attn, and norm2 to mlp. (B,N,C) -> (B,N,C)."""

    def forward(self, x, *args, **kwargs):
        y = with_norm(self.attn, self.norm1, x, *args, **kwargs)
        x = x + self.drop_path1(self.ls1(y))
        y = with_norm(self.mlp, self.norm2, x)
        return x + self.drop_path2(self.ls2(y))


def attention_layer():
    """The class to hand to timm's models as `attn_layer`.

    >>> timm.create_model("vit_small_patch16_224", attn_layer=attention_layer())
    """
    import timm.layers

    from ..fuse import fused_class

    return fused_class(timm.layers.Attention, FusedAttention)


def _why_not_attention(module):
    if why_not := unlike("qkv", module.qkv, nn.Linear) or unlike("attn_drop", module.attn_drop, nn.Dropout):
        return why_not
    if module.scale != module.head_dim**-0.5:  # of which timm's own fused attention knows nothing
        return f"scale is {module.scale}, not head_dim ** -0.5"
    return unlike_heads(module.num_heads, "qkv", module.qkv.out_features)


def _why_not_mlp(module):
    return unlike("fc1", module.fc1, nn.Linear)


def _mlp_remark(module):
    if gelu_of(module.act) is None:
        return f"its activation, {name_of(type(module.act))}, runs by itself"
    return None


FORMS = {
    "timm.layers.attention.Attention": Form(
        FusedAttention,
        ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"),
        ("gate",),
        _why_not_attention,
        lambda module: drops(module.attn_drop.p),
        skips=("qkv", "attn_drop"),
    ),
    "timm.layers.mlp.Mlp": Form(
        FusedMlp,
        ("fc1", "act", "drop1", "norm", "fc2", "drop2"),
        (),
        _why_not_mlp,
        _mlp_remark,
        skips=("fc1", "act"),
        in_block=True,
    ),
    "timm.models.vision_transformer.Block": Form(
        FusedBlock,
        ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"),
        norms=(("norm1", "attn"), ("norm2", "mlp")),
        skips=("norm1", "attn", "norm2", "mlp"),
    ),
}
