"""The libraries whose Vision Transformers fuse knows, one file each. None of them is imported here.

`form_of` finds the form of a module's class, among the plain blocks and copies of them by what their forward does,
among the libraries' classes by the table of ../known.py.
"""

from torch import nn

from ..forms import unlike, unlike_layer_norm, why_not_swap
from ..known import KNOWN, REFUSED, SHARDED, is_sharded, name_of, why_not_known
from ..modules import untouched
from . import multihead, open_clip, timm, torchvision, transformers, vit_pytorch
from .blocks import TakesNorm

__all__ = ["FORMS", "form_of", "handed", "looks_like_a_block", "remark", "why_not", "why_unknown"]

FORMS = {**multihead.FORMS, **timm.FORMS, **transformers.FORMS, **torchvision.FORMS, **open_clip.FORMS}
NAMES = ("Attention", "Attn", "FeedForward", "PreNorm")


def form_of(module):
    """The Form of the module's class, None if it has none that is known."""
    cls = type(module)
    name = name_of(cls)
    if name in FORMS:
        return FORMS[name] if why_not_known(cls) is None else None
    return vit_pytorch.form_of(module)


def why_not(module, form):
    """Why `module`, whose class has `form`, cannot be swapped, in words; None if it can."""
    why = why_not_swap(module, form)
    if why is None and form.norms:
        whys = [_why_not_hand(module, *pair) for pair in form.norms]
        if None not in whys:
            why = "; ".join(whys)
    return why


def remark(module, form):
    """What a user should know of a module that is swapped; "" if nothing."""
    remarks = [_why_not_hand(module, *pair) for pair in form.norms] + [form.remark(module), _watched(module, form)]
    return "; ".join(filter(None, remarks))


def _watched(module, form):
    children = {name: module.get_submodule(name) for name in form.skips}
    names = ", ".join(name for name, child in children.items() if not untouched(child, type(child)))
    if names:
        why = "a hook (as a pruned Linear has) or a forward of its own"
        return f"{names} has {why}: it is called, and not merged, while that is there"
    return None


def handed(module, form):
    """The children to which a swapped `module` hands a LayerNorm."""
    return [module._modules[child] for _, child in form.norms if _why_not_child(module, child) is None]


def why_unknown(module):
    """Why `module`, whose class has no form, is left as it is."""
    cls = type(module)
    name = name_of(cls)
    if is_sharded(cls):
        return f"{SHARDED}: fuse the model before it is sharded"
    if name in REFUSED:
        return REFUSED[name]
    if name in FORMS:
        return why_not_known(cls)
    for base in cls.__mro__[1:]:
        if "plain" in vars(base) or name_of(base) in FORMS or vit_pytorch.has_form(base):
            return f"a subclass of {name_of(base)} may mean something else"
    if name in KNOWN:
        return "it is fused where a block that is known holds it"
    why = "its forward is none of the known spellings of the plain block's"
    if any(name.partition(".")[0] == known.partition(".")[0] for known in FORMS):
        why = f"vitriton does not know this class of {name.partition('.')[0]}"
    return why


def looks_like_a_block(module, form):
    """Whether a user may expect that a module is fused which is not."""
    if form not in (None, vit_pytorch.FEED_FORWARD, vit_pytorch.NORM_FEED_FORWARD, vit_pytorch.TRANSFORMER):
        return True  # many a class that is no FeedForward has that forward, self.net(x)
    cls = type(module)
    return name_of(cls) in REFUSED or any(
        base.__name__.endswith(NAMES) or name_of(base) in FORMS for base in cls.__mro__
    )


def _why_not_hand(module, norm, child):
    return unlike_layer_norm(norm, module._modules[norm]) or _why_not_child(module, child, norm)


def _why_not_child(module, child, norm="its LayerNorm"):
    fn = module._modules[child]
    if isinstance(fn, TakesNorm):
        return None
    if type(fn).forward is nn.Sequential.forward and len(fn) > 1:
        return unlike(f"{child}.0", fn[0], nn.Linear)
    form = form_of(fn)
    if form is not None and issubclass(form.fused, TakesNorm) and why_not(fn, form) is None:
        return None
    return f"its {child}, {name_of(type(fn))}, cannot be fused, so {norm} has no Linear to merge with"
