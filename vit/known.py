"""How fuse recognises what a class computes: by what its forward does, never by its name alone.

The forward of a class in somebody's own file is compared with known spellings, instruction for instruction. Of the
libraries' classes the table KNOWN holds the digest of each forward that was read and tested: a version of the library
with another forward has another digest, and is left alone until it was read, too. Nothing here imports a library: a
class that exists was imported by somebody else.
"""

import dis
import hashlib
import inspect
import sys
from functools import cache
from types import CodeType, FunctionType

from torch import nn

__all__ = [
    "KNOWN",
    "REFUSED",
    "gelu_of",
    "is_known",
    "is_layer_norm",
    "learn",
    "name_of",
    "same_function",
    "why_not_known",
]

# class -> {digest of its forward, and of the other methods that METHODS names: the version that was tested with it}
KNOWN = {
    "timm.layers.attention.Attention": {"45de08e8430ce097": "1.0.31"},
    "timm.layers.mlp.Mlp": {"bccd9e3f0abdbfb8": "1.0.31"},
    "timm.models.vision_transformer.Block": {"abf59d07b493816f": "1.0.31"},
    "timm.layers.norm.LayerNorm": {"17aaae6231b7e6af": "1.0.31"},
    "timm.layers.norm.LayerNormFp32": {"7206470df8b39feb": "1.0.31"},
    "timm.layers.activations.GELU": {"2afe4004c965f362": "1.0.31"},
    "timm.layers.activations.GELUTanh": {"88ab3a6460f999bb": "1.0.31"},
    "timm.layers.activations.QuickGELU": {"5c766eb1598c8a0d": "1.0.31"},
    "transformers.activations.GELUActivation": {"4b5e15cae074702b": "5.24.0"},
    "transformers.activations.GELUTanh": {"78826bdeaa019f1a": "5.24.0"},
    "transformers.activations.QuickGELUActivation": {"7cc553985c0665ee": "5.24.0"},
    "torchvision.models.vision_transformer.EncoderBlock": {"871ffebda4c7275b": "0.29.1"},
    "open_clip.transformer.ResidualAttentionBlock": {"e56e05ca186b424c": "3.3.0"},
    "open_clip.transformer.LayerNorm": {"a2777c89358a6286": "3.3.0"},
    "open_clip.transformer.LayerNormFp32": {"42215c0b40aa8eb1": "3.3.0"},
    "open_clip.transformer.QuickGELU": {"946d2d1ec8f732bd": "3.3.0"},
    "torch.nn.modules.activation.MultiheadAttention": {},  # documented, and tested with each PyTorch that is supported
}
for _prefix, _layer, _digests in (  # of transformers: Attention, MLP, Layer
    ("vit.modeling_vit.ViT", "Layer", "007c98ace6455ea2 701fd61c1356a6dc c403f923a1109d3a"),
    ("vit_mae.modeling_vit_mae.ViTMAE", "Layer", "007c98ace6455ea2 701fd61c1356a6dc c403f923a1109d3a"),
    ("vit_msn.modeling_vit_msn.ViTMSN", "Layer", "007c98ace6455ea2 701fd61c1356a6dc c403f923a1109d3a"),
    ("ijepa.modeling_ijepa.IJepa", "Layer", "007c98ace6455ea2 701fd61c1356a6dc c403f923a1109d3a"),
    ("deit.modeling_deit.DeiT", "Layer", "007c98ace6455ea2 701fd61c1356a6dc c403f923a1109d3a"),
    ("dinov2.modeling_dinov2.Dinov2", "Layer", "007c98ace6455ea2 701fd61c1356a6dc 6e75b6e2cc418a1b"),
    (
        "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters",
        "Layer",
        "007c98ace6455ea2 701fd61c1356a6dc 6e75b6e2cc418a1b",
    ),
    ("dinov3_vit.modeling_dinov3_vit.DINOv3ViT", "Layer", "a4680041295cfa84 d8163648a64c08d6 e7d6b90b2d8e5782"),
    ("clip.modeling_clip.CLIP", "EncoderLayer", "b219d7d02b6d2157 701fd61c1356a6dc 1fb361bbf5b9cff2"),
    ("siglip.modeling_siglip.Siglip", "EncoderLayer", "8725ff177921d74b 701fd61c1356a6dc 1633a0d49d006ec8"),
):
    for _kind, _digest in zip(("Attention", "MLP", _layer), _digests.split(), strict=True):
        KNOWN[f"transformers.models.{_prefix}{_kind}"] = {_digest: "5.24.0"}
METHODS = {
    "open_clip.transformer.ResidualAttentionBlock": ("attention",),
    "transformers.activations.GELUActivation": ("__init__", "_gelu_python"),
    "transformers.activations.GELUTanh": ("__init__", "_gelu_tanh_python"),
}

# class -> why it is left as it is, of classes that look as if they could be fused
_ONE = "its attention is not one softmax of scaled q kᵀ"
REFUSED = {
    "timm.layers.diff_attention.DiffAttention": f"{_ONE}: it subtracts a second softmax from the first",
    "timm.layers.attention.AttentionRope": "it turns q and k by RoPE, which vitriton does not know in timm's models",
    "timm.models.eva.EvaAttention": "it turns q and k by RoPE, which vitriton does not know in timm's models",
    "timm.models.eva.EvaBlock": "it holds EVA's attention and MLP, which vitriton does not know",
    "timm.models.eva.EvaBlockPostNorm": "it normalises behind attention and MLP, so there is no Linear to merge with",
    "timm.models.beit.Attention": f"{_ONE}: it adds a bias of relative positions",
    "timm.models.beit.Block": "it holds BEiT's attention, which adds a bias of relative positions",
    "timm.models.vision_transformer.ResPostBlock": (
        "it normalises behind attention and MLP, so there is no Linear to merge with (its attention is fused by itself)"
    ),
    "timm.models.vision_transformer.ParallelScalingBlock": (
        "one Linear makes q, k, v and the MLP's input, and its attention is part of its own forward"
    ),
    "timm.models.vision_transformer.DiffParallelScalingBlock": f"{_ONE}: it subtracts a second softmax from the first",
    "timm.models.vision_transformer.ParallelThingsBlock": (
        "its LayerNorms are in parallel branches (its attentions are fused by themselves)"
    ),
    "timm.models.vision_transformer_relpos.RelPosAttention": f"{_ONE}: it adds a bias of relative positions",
    "timm.layers.attention_pool.AttentionPoolLatent": "it pools by learned queries, once a model: nothing to gain",
    "open_clip.transformer.Attention": "of open_clip, vitriton knows the ResidualAttentionBlock alone",
    "open_clip.transformer.CustomResidualAttentionBlock": (
        "of open_clip, vitriton knows the ResidualAttentionBlock alone, and this is the custom one"
    ),
    "open_clip.transformer.AttentionalPooler": "it pools by learned queries, once a model: nothing to gain",
    "transformers.models.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead": (
        "it pools by a learned query, once a model: nothing to gain"
    ),
}

# what does the work of nn.LayerNorm, nn.GELU and QuickGELU in a library's blocks; `learn` looks for it
SAME_AS_LAYER_NORM = (
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
    "open_clip.transformer.LayerNorm",
    "open_clip.transformer.LayerNormFp32",
)
SAME_AS_GELU = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
}
SAME_AS_QUICK_GELU = (
    "timm.layers.activations.QuickGELU",
    "transformers.activations.QuickGELUActivation",
    "open_clip.transformer.QuickGELU",
)
LAYER_NORMS = {nn.LayerNorm}
GELUS = {}  # class -> activation of layer_norm_linear
QUICK_GELUS = set()


SHARDED = "fully_shard has given it a class of its own"


def is_sharded(cls):
    return any(base.__name__ == "FSDPModule" for base in cls.__mro__)  # by name: its import takes half a second


def name_of(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def is_known(cls):
    """Whether `cls` is a class of KNOWN with a forward that was verified."""
    return why_not_known(cls) is None


def why_not_known(cls):
    """Why `cls` is no class of KNOWN with a forward that was verified, in words; None if it is."""
    return _why_not_known(cls, cls.forward)


@cache
def _why_not_known(cls, forward):
    name = name_of(cls)
    if name not in KNOWN:
        return "its class is none that is known"
    if getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls:
        return f"it is not the class that {cls.__module__} has under this name"
    if not KNOWN[name]:
        return None if forward.__module__ == cls.__module__ else "its forward was replaced"
    found = digest(forward, *(getattr(cls, method) for method in METHODS.get(name, ())))
    if found is None:
        return "the source of its forward cannot be read, so what it computes cannot be told"
    if found not in KNOWN[name]:
        library = cls.__module__.partition(".")[0]
        return (
            f"its forward is not the one that was verified (that of {library} {', '.join(KNOWN[name].values())}): "
            "this version has another, or somebody replaced it"
        )
    return None


def learn():
    """Look for the classes of SAME_AS_LAYER_NORM, _GELU and _QUICK_GELU among what is imported."""
    for name in SAME_AS_LAYER_NORM:
        if (cls := _imported(name)) is not None and is_known(cls):
            LAYER_NORMS.add(cls)
    for name, activation in SAME_AS_GELU.items():
        if (cls := _imported(name)) is not None and is_known(cls):
            GELUS[cls] = activation
    for name in SAME_AS_QUICK_GELU:
        if (cls := _imported(name)) is not None and is_known(cls):
            QUICK_GELUS.add(cls)


def _imported(name):
    module, _, cls = name.rpartition(".")
    return getattr(sys.modules.get(module), cls, None)


def is_layer_norm(module):
    """Whether `module` is an nn.LayerNorm, or of a library's class that does the same up to rounding."""
    return type(module) in LAYER_NORMS and not module.__dict__.get("_fast_norm")  # timm's, which Apex may compute


def gelu_of(module):
    """Which activation of layer_norm_linear `module` is, "gelu" or "gelu_tanh"; None if it is none of them."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    return GELUS.get(type(module))


# ---------------------------------------------------------------------------------------------------------------------
# The same text


def digest(*functions):
    """Of the source of these functions, white space aside; None where one cannot be read."""
    try:
        # not of the function itself: that would look behind any wrapper
        sources = [inspect.getsource(unwrapped(function).__code__) for function in functions]
    except (AttributeError, OSError, TypeError):
        return None
    return hashlib.sha256("".join("".join(sources).split()).encode()).hexdigest()[:16]


WRAPPER = ("forward_with_checkpointing", "transformers.modeling_layers")


def unwrapped(function):
    """What transformers' layers wrap, in order to checkpoint it or not; any other function as it is."""
    name = getattr(getattr(function, "__code__", None), "co_name", None)
    if (name, getattr(function, "__globals__", {}).get("__name__")) == WRAPPER:
        return function.__wrapped__
    return function


# ---------------------------------------------------------------------------------------------------------------------
# The same instructions


def same_function(function, spelling):
    """Whether two functions do the same: the same instructions on the same globals, without default arguments."""
    if type(function) is not FunctionType or function.__defaults__ or function.__kwdefaults__:
        return False
    if _instructions(function.__code__) != _instructions(spelling.__code__):
        return False
    names = _global_names(spelling.__code__)  # a builtin is in neither's globals
    return all(function.__globals__.get(name) is spelling.__globals__.get(name) for name in names)


def _instructions(code):
    """What `code` takes and does; local variables by number, so that what they are called does not matter."""
    steps = []
    for step in dis.get_instructions(code):
        value = step.argval
        if isinstance(value, CodeType):
            value = _instructions(value)
        elif step.opcode in dis.haslocal or step.opcode in dis.hasfree:
            value = step.arg
        elif isinstance(value, str) and "<locals>" in value:  # what Python 3.10 calls a lambda: it names the class
            value = None
        steps.append((step.opname, type(value), value))
    variadic = code.co_flags & (0x04 | 0x08)  # *args, **kwargs
    return code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, variadic, tuple(steps)


def _global_names(code):
    nested = [_global_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}.union(*nested)


if __name__ == "__main__":  # python -m vitriton.vit.known timm.layers.mlp.Mlp ...: their digests, for KNOWN
    import importlib

    for _name in sys.argv[1:]:
        _module, _, _cls = _name.rpartition(".")
        _cls = getattr(importlib.import_module(_module), _cls)
        print(_name, digest(_cls.forward, *(getattr(_cls, method) for method in METHODS.get(_name, ()))))
