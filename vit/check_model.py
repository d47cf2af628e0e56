"""`vitriton check --model`: build a model of some library with random weights, fuse it, and hold it against itself."""

import importlib
import time

import torch

from ..kernels import use_backend
from ..kernels.backend import why_not_triton
from .console import Console, Problem
from .measure import check_runs, describe, gpu
from .reference import PRESETS, vit_preset
from .verify import verify

__all__ = ["build", "check_model"]

KINDS = "timm:NAME, torchvision:NAME, open_clip:NAME, transformers:TYPE or transformers:FOLDER, or vitriton:ti to h"
IMAGES = 4


def check_model(args):
    """Run `verify` with the arguments of cli.add_check; returns the exit code."""
    started = time.perf_counter()
    console = Console(args.json)
    torch.manual_seed(args.seed)
    model, shape = build(args.model)
    images = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(args.seed))
    console.say(f"{args.model}, random weights, {IMAGES} random images of {'x'.join(map(str, shape))}")
    results = []
    for backend, device in _places(args.only, console):
        for dtype in (torch.float32, torch.bfloat16):
            if backend == "triton" and (why_not := why_not_triton(device, dtype)):
                console.say(f"\n{describe(device)}, {str(dtype)[6:]}: not checked: {why_not}")
                continue
            console.say(f"\n{backend}, on {describe(device)}, {str(dtype)[6:]}:")
            try:
                with use_backend(backend):
                    check_runs(device, dtype)
                    verdict = verify(model.to(device, dtype), images.to(device, dtype))
            except ValueError as error:  # nothing to fuse: the message says what was left, and why
                raise Problem(str(error)) from error
            console.say("\n".join(f"  {line}" for line in str(verdict).splitlines()))
            results.append(_record(verdict, backend, device, dtype))
    if not results:
        raise Problem("nothing was checked: --only left nothing that takes a whole model")
    ok, seconds = all(result["ok"] for result in results), time.perf_counter() - started
    console.say(f"\n{'OK' if ok else 'FAILED'}: {args.model}, {len(results)} verdicts in {seconds:.0f} s")
    return console.finish(
        "check", ok, seconds, torch=torch.__version__, seed=args.seed, model=args.model, results=results
    )


def _places(only, console):
    only = only or ("native", "gpu")
    if "native" in only:
        yield "native", torch.device("cpu")
    if "gpu" in only:
        if gpu() is None:
            console.say("\nTriton, on a GPU: not checked: PyTorch finds no GPU here")
        else:
            yield "triton", gpu()
    if "interpreter" in only:
        console.say("\nTriton, in its interpreter: not checked: a whole model would take hours")


def _record(verdict, backend, device, dtype):
    layers = {name: [_error(error) for error in errors] for name, errors in verdict.layers.items()}
    return {
        "backend": backend,
        "device": describe(device),
        "dtype": str(dtype)[6:],
        "ok": bool(verdict),
        "verdict": verdict.sentence(),
        "report": str(verdict.report),
        "explanation": str(verdict.explanation),
        "layers": layers,
        "whole": [_error(error) for error in verdict.whole],
        "unfuse_restores": verdict.unfuse_restores,
    }


def _error(error):
    return vars(error) | {"ok": bool(error)}


# ---------------------------------------------------------------------------------------------------------------------
# The model


def build(name):
    """The model that `name` means, with random weights, in eval mode, and the shape (channels, height, width) it takes.

    Nothing is downloaded. Raises Problem for a name of an unknown kind, of a library that is not installed, and of a
    model that the library does not have.
    """
    kind, _, which = name.partition(":")
    if kind not in BUILDERS or not which:
        raise Problem(f"--model {name!r} is none of {KINDS}; say, timm:vit_small_patch16_224")
    try:
        model, shape = BUILDERS[kind](which)
    except ImportError as error:
        raise Problem(f"--model {name} needs {kind}: pip install 'vitriton[integrations]' ({error})") from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise Problem(f"--model {name}: {kind} cannot build it: {error}") from error
    return model.eval(), tuple(shape)


def _timm(name):
    timm = importlib.import_module("timm")
    model = timm.create_model(name, pretrained=False)
    return model, model.default_cfg["input_size"]


def _torchvision(name):
    model = importlib.import_module("torchvision.models").get_model(name, weights=None)
    size = getattr(model, "image_size", 224)
    return model, (3, size, size)


def _open_clip(name):
    model = importlib.import_module("open_clip").create_model(name, pretrained=None).visual
    size = model.image_size
    return model, (3, *(size if isinstance(size, tuple) else (size, size)))


def _transformers(name):
    library = importlib.import_module("transformers")
    if "/" in name or "." in name:
        config = library.AutoConfig.from_pretrained(name, local_files_only=True)
    else:
        config = library.AutoConfig.for_model(name)
    config = getattr(config, "vision_config", config)
    model = library.AutoModel.from_config(config)
    size = config.image_size
    return model, (getattr(config, "num_channels", 3), *(size if isinstance(size, (tuple, list)) else (size, size)))


def _vitriton(name):
    if name not in PRESETS:
        raise ValueError(f"the presets are {', '.join(PRESETS)}")
    return vit_preset(name), (3, 224, 224)


BUILDERS = {
    "timm": _timm,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
    "transformers": _transformers,
    "vitriton": _vitriton,
}
