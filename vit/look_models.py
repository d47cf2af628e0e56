"""The models that `vitriton look` can look with: timm's, our presets, `vitriton train`'s, and the demo's."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from .checkpoint import load, load_trained, read_checkpoint
from .console import Problem, require
from .photo import dark_on_light, prepared
from .reference import PRESETS, vit_preset

__all__ = ["Looker", "load_looker"]

DEMO_EPOCHS, DEMO_SECONDS = 12, 30
HALF = (0.5, 0.5, 0.5)
TOP = 3  # answers


@dataclass
class Looker:
    """A model, with what it takes to show it a photograph and to understand its answer."""

    net: nn.Module
    name: str
    prepare: Callable  # photograph -> image (channels, height, width), and what to show of it (height, width, 3)
    classes: Callable | None = None  # index -> name; None where nobody knows
    untrained: bool = False

    def answers(self, probabilities):
        """The likeliest classes by name and probability; none where the model is untrained or its classes unknown."""
        if self.untrained or self.classes is None:
            return []
        p, index = probabilities.topk(min(TOP, len(probabilities)))
        return [(self.classes(i), q) for i, q in zip(index.tolist(), p.tolist(), strict=True)]


def load_looker(args, console):
    """The Looker that --model, --checkpoint, --random-weights and --size ask for. Raises Problem."""
    if args.checkpoint and args.random_weights:
        raise Problem("--checkpoint and --random-weights exclude each other: give one of them")
    if args.model == "demo":
        if args.checkpoint or args.random_weights or args.size:
            raise Problem("--model demo trains its own model: it takes no --checkpoint, --random-weights and --size")
        return _demo(args, console)
    if Path(args.model).is_file():
        if args.checkpoint or args.random_weights or args.size:
            raise Problem("--model FILE has all in it: it takes no --checkpoint, --random-weights and --size")
        return _trained(args.model)
    torch.manual_seed(args.seed)
    if args.model.startswith("timm:"):
        return _timm(args.model.removeprefix("timm:"), args, console)
    if args.model.lower() in PRESETS:
        return _preset(args.model.lower(), args)
    raise Problem(
        f"--model {args.model} is none of timm:NAME, {', '.join(PRESETS)} (with --checkpoint FILE), demo, and a file "
        "of `vitriton train`; say, timm:vit_small_patch16_224"
    )


def parse_size(text):
    """(height, width) of "384" or "384x256"."""
    try:
        height, _, width = text.partition("x")
        size = int(height), int(width or height)
    except ValueError:
        size = (0, 0)
    if min(size) < 1:
        raise Problem(f"--size is {text!r}: it must be a number of pixels, such as 384, or HEIGHTxWIDTH")
    return size


# ---------------------------------------------------------------------------------------------------------------------
# timm


def _timm(name, args, console):
    require("integrations", ("timm", "timm"))
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5] or timm.list_models("vit_*_patch16_224")[:5]
        raise Problem(f"timm has no model {name!r}; it has {', '.join(near)}, ... (timm.list_models() names all)")
    options = {"img_size": parse_size(args.size)} if args.size else {}
    pretrained = not (args.checkpoint or args.random_weights)
    if pretrained:
        console.say(f"loading timm's weights of {name}: from its cache, or over the network, which can take a while")
    try:
        if args.checkpoint:  # timm then fits positions to another --size, as it does with its own weights
            options |= _timm_checkpoint(args.checkpoint, timm.get_pretrained_cfg(name))
        net = timm.create_model(name, pretrained=not args.random_weights, **options)
    except Exception as error:  # whatever the hub, the network, the disk and the model's own checks raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if args.checkpoint:
            raise Problem(f"cannot load --checkpoint {args.checkpoint} into timm:{name}: {why}") from error
        if pretrained:
            raise Problem(
                f"cannot get the pretrained weights of timm:{name}: {why} Without a network, give weights that you "
                "have as --checkpoint FILE, or --random-weights to see the maps of an untrained model"
            ) from error
        raise Problem(f"timm cannot make {name}{f' with --size {args.size}' if args.size else ''}: {why}") from error
    data = timm.data.resolve_model_data_config(net)
    shape = (data["input_size"][0], *parse_size(args.size)) if args.size else data["input_size"]
    return Looker(
        net,
        f"timm:{name}",
        lambda photo: prepared(photo, shape, data["mean"], data["std"]),
        _imagenet(net, timm),
        args.random_weights,
    )


def _timm_checkpoint(path, config):
    """What timm.create_model needs to load the file: its weights, and how many classes they are of."""
    from timm.models import load_state_dict

    state = load_state_dict(path)
    weight = state.get(f"{config.classifier}.weight")
    classes = 0 if weight is None else len(weight)
    return {"num_classes": classes, "pretrained_cfg_overlay": {"state_dict": state, "num_classes": classes}}


def _imagenet(net, timm):
    """Index -> name, where the model was trained on a part of ImageNet that timm knows."""
    subset = timm.data.infer_imagenet_subset(net) if getattr(net, "num_classes", 0) == 1000 else None
    if subset is None:
        return None
    info = timm.data.ImageNetInfo(subset)
    return lambda index: info.index_to_description(index).split(",")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def _preset(name, args):
    if not (args.checkpoint or args.random_weights):
        raise Problem(
            f"--model {name} needs its weights: --checkpoint FILE, a state_dict; or --random-weights to see the maps "
            "of an untrained model"
        )
    state = read_state(args.checkpoint) if args.checkpoint else {}
    options = _sizes(state, PRESETS[name], args)
    try:
        net = vit_preset(name, **options)
        if state:
            net.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        what = f"--checkpoint {args.checkpoint} does not fit --model {name}" if state else f"--model {name}"
        raise Problem(f"{what}: {' '.join(str(error).split())[:300]}") from error
    return Looker(
        net, f"ViT-{name}", lambda photo: prepared(photo, net.image_shape, HALF, HALF), None, args.random_weights
    )


def read_state(path):
    """The state_dict in a file of torch.save, by itself or as "model" or "state_dict" in a dict."""
    try:
        state = load(path)
    except FileNotFoundError as error:
        raise Problem(f"there is no file --checkpoint {path}") from error
    except (OSError, ValueError) as error:
        raise Problem(f"--checkpoint {path} cannot be read as weights: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not (isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise Problem(f"--checkpoint {path} holds no state_dict, by itself or as 'model' or 'state_dict' in a dict")
    return state


def _sizes(state, preset, args):
    """What the weights tell of the model that they are of: classes, channels, positions, and the size of the images."""
    side = preset.patch_size
    options = {"image_size": parse_size(args.size) if args.size else 224}
    if "mlp_head.1.weight" in state:
        options["num_classes"] = len(state["mlp_head.1.weight"])
    if "to_patch_embedding.1.weight" in state:
        options["channels"] = state["to_patch_embedding.1.weight"].shape[1] // side**2
    if "pos_embedding" in state:
        root = math.isqrt(state["pos_embedding"].shape[-2] - 1)
        if not args.size:
            options["image_size"] = root * side
    elif "pos_embedding_rows" in state:
        options["pos_embed"] = "axial"
        rows, cols = state["pos_embedding_rows"].shape[0], state["pos_embedding_cols"].shape[1]
        options["image_size"] = (rows * side, cols * side)
    elif state:
        options["pos_embed"] = "sincos"
    return options


def _trained(path):
    """What `vitriton train` left in a file: pictures in colour, or the digits, which have one channel."""
    saved = read_checkpoint(path)
    net, classes = load_trained(path)
    shape = (saved["build"]["channels"], *saved["build"]["image_size"])

    def prepare(photo):
        return prepared(photo, shape, HALF[: shape[0]], HALF[: shape[0]])

    return Looker(net, path, _ink(shape) if shape[0] == 1 else prepare, classes.__getitem__)


def _demo(args, console):
    require("demo", ("sklearn", "scikit-learn"), ("rich", "rich"))
    from .demo import digits, small_vit, train

    console.say("training the demo's model on scikit-learn's digits, half a minute at most")
    images, labels, held_out, held_out_labels = digits(torch.device("cpu"))
    net = small_vit(args.seed)
    plan = SimpleNamespace(epochs=DEMO_EPOCHS, quick=False, seconds=DEMO_SECONDS, seed=args.seed)
    train(net, images, labels, plan, console)
    with torch.no_grad():
        right = (net(held_out).argmax(dim=1) == held_out_labels).float().mean().item()

    name = f"the demo's model (handwritten digits of 8 x 8 pixels, right on {right:.0%} of those it had not seen)"
    return Looker(net, name, _ink((1, 8, 8)), str)


def _ink(shape):
    """How a photograph is made one of scikit-learn's digits, in which ink is 1 and paper -1."""

    def prepare(photo):
        image, _ = prepared(dark_on_light(photo), shape, HALF[:1], HALF[:1])
        return -image, ((1 + image) / 2).permute(1, 2, 0).expand(-1, -1, 3).numpy()

    return prepare
