"""`vitriton doctor`: what is installed, what runs where and why, and what is in the way."""

import getpass
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

from .. import kernels
from ..kernels import compiled, explain, gradients, native_attention, packed, tuned
from ..kernels.backend import chosen_backend
from ..kernels.launch import triton
from .console import Console, version
from .measure import cpu_name, describe

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FAST_CPU = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "sve", "i8mm", "bf16")
SETTINGS = (
    "VITRITON_BACKEND",
    packed.VARIABLE,
    gradients.VARIABLE,
    native_attention.VARIABLE,
    compiled.VARIABLE,
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "VITRITON_CACHE_DIR",
    "CXX",
)


class Doctor:
    """Collects what is found: `found` for programs, `broken` for what is wrong and what to do about it."""

    def __init__(self, console):
        self.console = console
        self.found = {}
        self.broken = []

    def title(self, text):
        self.console.say(f"\n{text}")

    def say(self, text):
        self.console.say(f"  {text}")

    def wrong(self, text):
        self.broken.append(text)
        self.console.say(f"  BROKEN: {text}")


def doctor(args):
    """Run the examination with the arguments of cli.add_doctor; returns the exit code."""
    started = time.perf_counter()
    console = Console(args.json)
    here = Doctor(console)
    for section in (versions, settings, devices, implementations, names, caches):
        section(here)
    verdict = f"BROKEN: {len(here.broken)} of the above" if here.broken else "OK: nothing is broken"
    console.say(f"\n{verdict}")
    seconds = time.perf_counter() - started
    return console.finish("doctor", not here.broken, seconds, broken=here.broken, **here.found)


def versions(here):
    """Python, vitriton, what it needs and its extras, from vitriton's own metadata."""
    here.title("Versions")
    here.say(f"Python {platform.python_version()} at {sys.executable}, {platform.platform()}")
    here.say(f"vitriton {version()}")
    found = here.found["versions"] = {"python": platform.python_version(), "vitriton": version()}
    extras = {}
    try:
        requirements = metadata.requires("vitriton") or []
    except metadata.PackageNotFoundError:
        here.wrong("vitriton is not installed, only found on the path: run `pip install -e .` in its repository")
        return
    for requirement in [*requirements, "numpy"]:  # which Triton's interpreter needs
        name, least, extra = re.match(r"([\w.-]+)(?:>=([\d.]+))?(?:.*extra == [\"'](\w+))?", requirement).groups()
        installed = installed_version(name)
        if extra is not None:
            extras.setdefault(extra, {})[name] = installed
            continue
        found[name] = installed
        if installed is None:
            if name in ("triton", "numpy"):
                note = "the kernels" if name == "triton" else "Triton's interpreter"
                here.say(f"{name} is missing: {note} cannot run without it, all else can")
            else:
                here.wrong(f"{name} is missing: pip install {name}")
        elif least and numbers(installed) < numbers(least):
            here.wrong(f"{name} {installed} is too old: pip install '{name}>={least}'")
        else:
            here.say(f"{name} {installed}")
    here.title("Extras")
    here.found["extras"] = extras
    for extra, packages in extras.items():
        there = [f"{name} {installed}" for name, installed in packages.items() if installed]
        missing = [name for name, installed in packages.items() if not installed]
        here.say(f"{extra}: {', '.join(there) or 'nothing installed'}")
        if missing:
            here.say(f"  missing: {', '.join(missing)} (pip install 'vitriton[{extra}]')")


def installed_version(distribution):
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def numbers(text):
    """The leading numbers of a version: "2.15.0+cu132" gives (2, 15, 0)."""
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", text).group().split(".")))


def settings(here):
    """The environment variables that change what runs."""
    here.title("Settings")
    found = here.found["settings"] = {}
    for name in SETTINGS:
        found[name] = os.environ.get(name)
        here.say(f"{name} is {'not set' if found[name] is None else repr(found[name])}")


def devices(here):
    """The CPU, with a measurement of what it does fast, and the GPUs that PyTorch sees."""
    here.title("Devices")
    cpu = torch.device("cpu")
    features = [name for name in FAST_CPU if capabilities().get(name)]
    speeds = {str(dtype)[6:]: gflops(dtype) for dtype in DTYPES}
    here.say(f"cpu: {describe(cpu)}, {torch.backends.cpu.get_cpu_capability()}; {', '.join(features)}".rstrip("; "))
    speed = ", ".join(f"{dtype} {speed:.0f}" for dtype, speed in speeds.items())
    here.say(f"  GFLOP/s of a 512x512x512 product, measured now: {speed}")
    here.found["cpu"] = {
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "features": features,
        "gflops": speeds,
    }
    gpus = here.found["gpus"] = []
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        for index in range(module.device_count() if module.is_available() else 0):
            properties = module.get_device_properties(index)
            capability = getattr(properties, "gcnArchName", None)
            if capability is None and kind == "cuda":
                capability = f"compute capability {properties.major}.{properties.minor}"
            gpus.append(
                {
                    "device": f"{kind}:{index}",
                    "name": properties.name,
                    "capability": capability,
                    "bytes": properties.total_memory,
                }
            )
            here.say(
                f"{kind}:{index}: {properties.name}, {capability or 'no capability'}, "
                f"{properties.total_memory / 2**30:.0f} GiB"
            )
    if not gpus:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        built = f"ROCm {torch.version.hip}" if torch.version.hip else built
        here.say(f"no GPU that PyTorch can use (this PyTorch is built with {built})")


def capabilities():
    """What instructions the CPU has, as far as this PyTorch tells."""
    get = getattr(torch.cpu, "get_capabilities", None)
    return get() if get is not None else {}


def gflops(dtype):
    """The best of three products of 512x512 matrices, in 1e9 floating-point operations per second."""
    a, times = torch.randn(512, 512).to(dtype), []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 512**3 / min(times[1:]) / 1e9


def implementations(here):
    """Which implementation each function takes on each device for each dtype; each function is called once."""
    here.title(f"Implementations (the backend is {chosen_backend()!r})")
    calls = {
        "attention": lambda x: kernels.attention(*x.view(3, 1, 1, 4, 16)),
        "qkv_attention": lambda x: kernels.qkv_attention(x.view(1, 4, 48), 1),
        "layer_norm_linear": lambda x: kernels.layer_norm_linear(x.view(12, 16), x[:16], x[16:32], x.view(12, 16)),
    }
    found = here.found["implementations"] = []
    can_run, why_not = [], {}
    for device in ["cpu", *(gpu["device"] for gpu in here.found["gpus"])]:
        answers = {}
        for dtype in DTYPES:
            try:
                answer = explain(torch.zeros(1, dtype=dtype, device=device))
                can_run += [device] if dtype == torch.float32 else []
            except RuntimeError as error:
                answer = f"raises RuntimeError: {error}"
                why_not.setdefault(device, error)
            answers.setdefault(answer, []).append(str(dtype)[6:])
        for answer, dtypes in answers.items():
            here.say(f"{device}, {', '.join(dtypes)}: {', '.join(calls)}: {answer}")
            found.append({"device": device, "dtypes": dtypes, "functions": list(calls), "answer": answer})
    copies, size = packed.packed_bytes()
    here.found["packed"] = {"copies": copies, "bytes": size}
    here.say(
        f"copies of weights for Linear on a CPU: {copies} in this process, {size / 2**20:.1f} MiB; where Linear is "
        f"'packed', a weight that is used twice without a change, by {packed.PACKED_ROWS} rows or more, gets one"
    )
    if not can_run and chosen_backend() == "triton":
        here.wrong("the backend 'triton' can run on no device here: unset VITRITON_BACKEND")
    elif "cpu" not in can_run and chosen_backend() != "triton":
        here.wrong(f"{why_not['cpu']}; unset it")
    for device in can_run:
        worked = [name for name, call in calls.items() if works(here, f"{name} on {device} in float32", call, device)]
        if worked:
            here.say(f"called once on {device} in float32, and worked: {', '.join(worked)}")


def works(here, what, call, device):
    """Whether the function gives finite numbers; whether they are the right ones is for `vitriton check` to say."""
    try:
        finite = call(torch.randn(192, device=device)).isfinite().all().item()
    except Exception as error:
        here.wrong(f"{what} raises {type(error).__name__}: {error}")
        return False
    if not finite:
        here.wrong(f"{what} gives NaN or Inf: run `vitriton check`")
    return finite


def names(here):
    """Where vitriton is imported from, and others of the name."""
    here.title("Names")
    loaded = {"vitriton.vit": Path(__file__).parent, "vitriton.kernels": Path(kernels.__file__).parent}
    here.found["imported_from"] = {name: str(path) for name, path in loaded.items()}
    for name, path in loaded.items():
        expected = installed_at(name.split(".")[1])
        if expected is not None and path.resolve() != expected.resolve():
            here.wrong(
                f"{name} is imported from {path}, but installed at {expected}: start Python in another folder, or take "
                "that path out of PYTHONPATH"
            )
        else:
            here.say(f"{name} is imported from {path}")
    for place in dict.fromkeys(Path(entry or os.curdir).absolute() for entry in [os.curdir, *sys.path]):
        shadows = [shadow for shadow in (place / "vitriton" / "__init__.py", place / "vitriton.py") if shadow.exists()]
        for shadow in shadows:
            here.wrong(f"{shadow} hides the vitriton that is installed from Python started in {place}: rename it")
        for name, path in loaded.items():
            package = name.split(".")[1]
            local = place / "vitriton" / package
            if (local / "__init__.py").exists() and local.resolve() not in (path.resolve(), installed_at(package)):
                here.wrong(f"Python started in {place} imports {local} instead of {path}: rename {local.parent}")
    for name in ("kernels", "vit"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            here.say(f"no other package is called {name}")
            continue
        origin = Path(spec.origin).parent if spec.origin else next(iter(spec.submodule_search_locations or ["?"]))
        whose = "vitriton's own folder, seen from here" if origin == loaded[f"vitriton.{name}"] else "another package"
        here.say(f"a top-level {name} is at {origin}: {whose}; no clash, as vitriton's is vitriton.{name}")


def installed_at(package):
    """The folder of vitriton.`package` that pip installed, resolved; None if that is not known."""
    try:
        distribution = metadata.distribution("vitriton")
    except metadata.PackageNotFoundError:
        return None
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        folder = Path(url2pathname(urlparse(origin["url"]).path), package)
    else:
        folder = Path(distribution.locate_file("vitriton"), package)
    return folder.resolve() if folder.is_dir() else None


def caches(here):
    """The folders where compiled kernels are kept, and (vitriton's) the tiles that were found fastest."""
    here.title("Caches")
    folders = {"torch.compile": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductor_default()}
    if triton is not None:
        folders = {"Triton": triton.knobs.cache.dir} | folders
    folders["vitriton"] = tuned.folder()
    found = here.found["caches"] = {}
    for name, folder in folders.items():
        folder = Path(folder)
        exists, writable = folder.is_dir(), is_writable(folder)
        size = sum(map(size_of, folder.rglob("*"))) if exists else 0
        found[name] = {"folder": str(folder), "exists": exists, "bytes": size, "writable": writable}
        state = f"{size / 2**20:.1f} MiB" if exists else "not made yet"
        here.say(f"{name}: {folder}, {state}, {'writable' if writable else 'NOT writable'}")
        if name == "Triton" and not writable and here.found["gpus"]:
            here.wrong(
                f"no kernel can be compiled, as {folder} is not writable: set TRITON_CACHE_DIR to another folder"
            )


def size_of(path):
    """Bytes of a file; 0 for a folder, and for a file that has just been removed."""
    with suppress(OSError):
        return path.stat().st_size if path.is_file() else 0
    return 0


def inductor_default():
    """Where torch.compile keeps its cache; asking PyTorch takes seconds, and makes the folder."""
    user = "unknown_user"
    with suppress(KeyError, ModuleNotFoundError, OSError):
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")


def is_writable(folder):
    """Whether a file can be made in `folder`, or, if it does not exist, in the first of its parents that does."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False
