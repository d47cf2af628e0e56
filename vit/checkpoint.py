"""The models that `vitriton train` makes, its checkpoints, and how to get the plain model back from one.

A checkpoint is a file of torch.save with nothing but tensors, numbers and strings in it, so torch.load reads it with
weights_only. Its "model" is the state_dict of the plain model, whatever was fused, wrapped or sharded in training.
"""

import difflib
import math
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from ..kernels import compiled, gradients, native_attention, packed
from .console import Problem, require
from .reference import ViT, vit_preset

__all__ = ["build", "load", "load_trained", "read_checkpoint", "restore_training", "save", "training_state"]

FORMAT = 1
TINY = {"patch_size": 2, "dim": 64, "depth": 4, "heads": 4, "dim_head": 16, "mlp_dim": 128}  # the demo's


def build(name, *, image_size, channels, num_classes, patch_size=None, dim=None, depth=None, heads=None, dropout=0.0):
    """The plain model called `name`: a preset, "tiny" or "timm:NAME", its sizes changed by those that are given.

    Raises Problem, saying which sizes do not fit.
    """
    sizes = {"patch_size": patch_size, "dim": dim, "depth": depth, "heads": heads}
    sizes = {size: value for size, value in sizes.items() if value is not None}
    common = {"image_size": image_size, "channels": channels, "num_classes": num_classes, "dropout": dropout}
    if name.startswith("timm:"):
        return _build_timm(name.removeprefix("timm:"), sizes, **common)
    try:
        if name != "tiny":
            if "dim" in sizes:
                sizes["mlp_dim"] = 4 * sizes["dim"]
            return vit_preset(name, **common, **sizes)
        if "dim" in sizes:
            sizes["mlp_dim"] = 2 * sizes["dim"]
        sizes = TINY | sizes
        if sizes["dim"] % sizes["heads"] == 0:
            sizes["dim_head"] = sizes["dim"] // sizes["heads"]
        return ViT(**common, **sizes)
    except ValueError as error:
        raise Problem(f"--model {name}: {error}") from error


def _build_timm(name, sizes, *, image_size, channels, num_classes, dropout):
    require("integrations", ("timm", "timm"))
    import timm

    names = {"dim": "embed_dim", "heads": "num_heads"}
    sizes = {names.get(size, size): value for size, value in sizes.items()}
    if dropout:
        sizes["proj_drop_rate"] = dropout
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=4))
        raise Problem(f"timm has no model {name!r}" + (f"; it has {near}" if near else ""))
    try:
        model = timm.create_model(name, img_size=image_size, in_chans=channels, num_classes=num_classes, **sizes)
    except (TypeError, ValueError, AssertionError) as error:
        raise Problem(
            f"timm cannot make {name} with images of {image_size} and {sizes or 'its own sizes'}: {error}"
        ) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and any(side % p for side, p in zip(image_size, patch, strict=True)):
        raise Problem(
            f"--model timm:{name}: images of {image_size[0]}x{image_size[1]} do not divide into patches of "
            f"{patch[0]}x{patch[1]}: give an --image-size that does, or another --patch-size"
        )
    return model


def load_trained(path):
    """The model that `vitriton train` left in the file `path`, plain and in eval mode, and the names of its classes.

    >>> model, classes = load_trained("vitriton-train/model.pt")
    """
    saved = read_checkpoint(path)
    model = build(**saved["build"])
    model.load_state_dict(saved["model"])
    return model.eval(), saved["classes"]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def save(path, content):
    """Write `content` to the file `path` so that a crash, a kill or a full disk leaves either the old file or the new:
    into a file beside it, through to the disk, and then under its name. Raises OSError; `path` is then as it was."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            try:
                torch.save({"format": FORMAT} | content, file)
            except RuntimeError as error:  # PyTorch's own, of a file that is too short because a write() failed
                failure = error.__context__
                raise failure if isinstance(failure, OSError) else OSError(str(error)) from error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # that it has this name is to last as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path):
    """What torch.save wrote, on the CPU. Raises OSError, and ValueError, in a sentence, if it is nothing of that."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling raises whatever it likes
        why = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"{type(error).__name__}: {why}".removesuffix(": ")) from error


def read_checkpoint(path):
    """What `save` wrote, on the CPU. Raises Problem if it cannot be read."""
    try:
        content = load(path)
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Problem(f"{path} is no checkpoint of `vitriton train`, or is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Problem(f"{path} is no checkpoint of this version of `vitriton train`")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# The state of a training, by the names of parameters: the same for one process, DistributedDataParallel and FSDP2


def training_state(model, optimizer, scheduler, scaler, processes):
    """All that a step depends on but data: to be called in all processes, of use in the first."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    sharded = processes.mode == "fsdp"
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    rng = {"cpu": torch.get_rng_state()}
    if processes.device.type != "cpu":
        rng["device"] = torch.get_device_module(processes.device).get_rng_state()
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": processes.gather(rng),
    }


def restore_training(state, model, optimizer, scheduler, scaler, processes):
    """The opposite of training_state. Other processes than those that saved draw other dropouts from here on."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=processes.mode == "fsdp"),
    )
    scheduler.load_state_dict(state["scheduler"])
    scaler.load_state_dict(state["scaler"])
    if len(state["rng"]) == processes.count:
        rng = state["rng"][processes.rank]
        torch.set_rng_state(rng["cpu"])
        if "device" in rng and processes.device.type != "cpu":
            torch.get_device_module(processes.device).set_rng_state(rng["device"])


# ---------------------------------------------------------------------------------------------------------------------
# The ways of kernels/packed.py, gradients.py, native_attention.py and compiled.py on a CPU, which give other bits


WAYS = packed, gradients, native_attention, compiled


def ways(model, dtype):
    """Which of the ways that come to the same, but for rounding, are the fastest on this CPU, or were chosen."""
    dtype = dtype or torch.float32
    n, k = max((m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)), key=math.prod)
    chosen = native_attention.choice(dtype)
    attention = "compiled" if chosen.compiled else "products" if chosen.products else "flash"
    found = {
        packed.VARIABLE: packed.choice(dtype, 192, n, k).linear,
        gradients.VARIABLE: gradients.choice(dtype, n, k).way,
        native_attention.VARIABLE: attention,
    }
    if dtype == torch.bfloat16 and "compiled" in found.values():
        found[compiled.VARIABLE] = compiled.bf16()[0]
    return found


def same_ways(found, before):
    """The ways of the training that goes on, where none was chosen: measured again, others might be the fastest."""
    auto = {module.VARIABLE for module in WAYS if module.forced == "auto" and packed.HAS_ONEDNN}
    ways = {name: before.get(name, way) if name in auto else way for name, way in found.items()}
    for module in (native_attention, packed, gradients):
        if ways.get(module.VARIABLE) == "compiled" and compiled.why_not(torch.float32):
            ways[module.VARIABLE] = found[module.VARIABLE]
    if ways.get(compiled.VARIABLE) == "pairs" and not compiled.multiplies_pairs():
        ways[compiled.VARIABLE] = "fp32"
    return ways


@contextmanager
def fixed_ways(chosen):
    """Take these ways, whatever would be measured: a training that goes on in another process takes the same."""
    modules = [module for module in WAYS if module.VARIABLE in chosen]
    before = [module.forced for module in modules]
    for module in modules:
        module.forced = chosen[module.VARIABLE]
    try:
        yield
    finally:
        for module, forced in zip(modules, before, strict=True):
            module.forced = forced
