"""Checkpoints of the plain ViT, which is vit-pytorch's before 1.4, in vit-pytorch's form since, and back.

What has another name and place in the two forms, of layer i:

    before 1.4                            since 1.4
    layers.i.0.norm, .0.fn.to_qkv         layers.i.0.norm, .0.to_qkv        attention
    layers.i.0.fn.to_out                  layers.i.0.to_out
    layers.i.1.norm, .1.fn.net.{0,3}      layers.i.1.net.{0,1,4}            MLP
    mlp_head.0 (behind the pooling)       transformer.norm (before it)      last LayerNorm
    mlp_head.1                            mlp_head                          classifier
    cls_token (1,1,D), positions (1,N,D)  (1,D), (N,D)

With the CLS token that is the same function. With mean pooling it is not, and `load_checkpoint` refuses.
"""

import re

from torch import nn

__all__ = ["load_checkpoint"]

LAYER = r"^(transformer\.layers\.\d+)\."
TO_NEW = (
    (LAYER + r"0\.fn\.(to_qkv|to_out)\.", r"\1.0.\2."),
    (LAYER + r"1\.norm\.", r"\1.1.net.0."),
    (LAYER + r"1\.fn\.net\.0\.", r"\1.1.net.1."),
    (LAYER + r"1\.fn\.net\.3\.", r"\1.1.net.4."),
    (r"^mlp_head\.0\.", "transformer.norm."),
    (r"^mlp_head\.1\.", "mlp_head."),
)
TO_OLD = (
    (LAYER + r"0\.(to_qkv|to_out)\.", r"\1.0.fn.\2."),
    (LAYER + r"1\.net\.0\.", r"\1.1.norm."),
    (LAYER + r"1\.net\.1\.", r"\1.1.fn.net.0."),
    (LAYER + r"1\.net\.4\.", r"\1.1.fn.net.3."),
    (r"^mlp_head\.", "mlp_head.1."),
    (r"^transformer\.norm\.", "mlp_head.0."),
)
NO_MEAN = (
    "the checkpoint is of a model with mean pooling, and in the other form that is another function: before 1.4 "
    "vit-pytorch takes the mean of all tokens, the CLS token among them, and normalises that; since, it normalises "
    "each token and takes the mean without a CLS token. Load it into a model of the form that it was trained in"
)
PATCH_NORMS = (
    "the {has} normalises the patches before and behind the first Linear, and the {lacks} does not; no weights make "
    "up for that. If the checkpoint is the one without, drop the two LayerNorms from the model: "
    "model.to_patch_embedding = nn.Sequential(model.to_patch_embedding[0], model.to_patch_embedding[2])"
)


def load_checkpoint(model: nn.Module, state_dict: dict, *, pool: str = "cls") -> None:
    """Load `state_dict` into the ViT `model`, each of them of vitriton's or of any of vit-pytorch's forms.

    `pool` is that of the model which the checkpoint is of, "cls" or "mean": the tensors do not tell. Where the forms
    differ, names and shapes are changed; values never. Raises ValueError, before anything is loaded, where the model
    would compute another function than the one that was trained, and says why; RuntimeError, as load_state_dict does,
    for sizes that differ.
    """
    if pool not in ("cls", "mean"):
        raise ValueError(f"pool is {pool!r}: it must be 'cls' or 'mean', that of the model which the checkpoint is of")
    if getattr(model, "pool", pool) != pool:
        raise ValueError(f"the checkpoint pools by {pool!r}, the model by {model.pool!r}: build it with pool={pool!r}")
    expected = model.state_dict()
    form, wanted = _form(state_dict, "state_dict"), _form(expected, "model")
    if form != wanted:
        if pool == "mean":
            raise ValueError(NO_MEAN)
        state_dict = _renamed(state_dict, TO_NEW if wanted == "since 1.4" else TO_OLD)
    norms = ["to_patch_embedding.3.weight" in which for which in (state_dict, expected)]
    if norms[0] != norms[1]:
        has, lacks = ("checkpoint", "model") if norms[0] else ("model", "checkpoint")
        raise ValueError(PATCH_NORMS.format(has=has, lacks=lacks))
    state_dict = dict(state_dict)
    for name in ("cls_token", "pos_embedding"):
        if (name in state_dict) != (name in expected):
            which = "checkpoint" if name in state_dict else "model"
            raise ValueError(f"only the {which} has {name}: the two do not have the same kind of position embedding")
        if name in state_dict and state_dict[name].numel() == expected[name].numel():
            state_dict[name] = state_dict[name].reshape(expected[name].shape)  # (1,N,D) and (N,D) alike
    model.load_state_dict(state_dict)


def _form(state_dict, what):
    if any(re.match(LAYER + r"0\.fn\.to_qkv\.", name) for name in state_dict):
        return "before 1.4"
    if any(re.match(LAYER + r"0\.to_qkv\.", name) for name in state_dict):
        return "since 1.4"
    names = ", ".join(list(state_dict)[:3])
    raise ValueError(
        f"{what} is none of a ViT of vitriton or vit-pytorch: it has no transformer.layers.0.0.to_qkv.weight and no "
        f"transformer.layers.0.0.fn.to_qkv.weight, but {names or 'nothing'}, ..."
    )


def _renamed(state_dict, rules):
    def rename(name):
        for pattern, replacement in rules:
            new, count = re.subn(pattern, replacement, name)
            if count:
                return new
        return name

    return {rename(name): tensor for name, tensor in state_dict.items()}
