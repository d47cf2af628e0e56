"""open_clip: the ResidualAttentionBlock of its vision and text towers. Towers from timm are timm's."""

from ..forms import Form
from ..notes import note
from .blocks import Fused, sequence_with_norm
from .multihead import attend_to_itself

__all__ = ["FORMS", "FusedResidualAttentionBlock"]


class FusedResidualAttentionBlock(Fused):
    """open_clip's ResidualAttentionBlock, batch first or sequence first. (B,N,C) -> (B,N,C)."""

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        if k_x is not None or v_x is not None:
            note(self, "it was called with keys and values of another sequence")
            return self.plain.forward(self, q_x, k_x, v_x, attn_mask)
        if attn_mask is not None:
            attn_mask = attn_mask.to(q_x.dtype)
        x = q_x + self.ls_1(attend_to_itself(self.attn, self.ln_1, q_x, attn_mask))
        return x + self.ls_2(sequence_with_norm(self, self.mlp, self.ln_2, x))


FORMS = {
    "open_clip.transformer.ResidualAttentionBlock": Form(
        FusedResidualAttentionBlock,
        ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"),
        ("ln_1_kv",),
        norms=(("ln_1", "attn"), ("ln_2", "mlp")),
        skips=("ln_1", "attn", "ln_2", "mlp", "mlp.c_fc", "mlp.gelu"),
    )
}
