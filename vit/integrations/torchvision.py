"""torchvision: the EncoderBlock of its VisionTransformer."""

from torch import nn

from ..forms import Form, unlike
from ..modules import apply
from .blocks import Fused, sequence_with_norm
from .multihead import attend_to_itself

__all__ = ["FORMS", "FusedEncoderBlock"]


class FusedEncoderBlock(Fused):
    """torchvision's EncoderBlock. (B,N,C) -> (B,N,C)."""

    def forward(self, input):
        if input.dim() != 3:
            return self.plain.forward(self, input)  # which says what is wrong
        x = attend_to_itself(self.self_attention, self.ln_1, input)
        if self.training and self.dropout.p:
            # nn.MultiheadAttention gives a tensor that lies as (N,B,C), and Dropout draws in the order of the memory
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        x = apply(self.dropout, x) + input
        return x + sequence_with_norm(self, self.mlp, self.ln_2, x)


def _why_not(module):
    return unlike("dropout", module.dropout, nn.Dropout)


FORMS = {
    "torchvision.models.vision_transformer.EncoderBlock": Form(
        FusedEncoderBlock,
        ("ln_1", "self_attention", "dropout", "ln_2", "mlp"),
        why_not=_why_not,
        norms=(("ln_1", "self_attention"), ("ln_2", "mlp")),
        skips=("ln_1", "self_attention", "ln_2", "mlp", "mlp.0", "mlp.1"),
    )
}
