"""The file in which `vitriton tune` keeps what it found best on a card, and from which launches take it.

A file holds for one card, one version of Triton and one table of configs.py: its name and its content say which. What
cannot be read, or is of another card or version, is passed over with a warning, and the table holds.
"""

import hashlib
import json
import os
import re
import tempfile
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from . import configs
from .launch import chip_of, triton

__all__ = ["ALLOWED", "allowed", "folder", "identity", "path", "read", "trying", "write"]

FORMAT = 1
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
FIELDS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")

# {kernel: (least, most) of FIELDS}. tl.dot takes no less than 16, and offsets within a tile count on at most 256 rows.
# In attention's backward pass in one kernel a thread reads back the sums that it stored itself, which holds for these
# tiles and warps: there only the stages are free.
_FORWARD = ((16, 256), (16, 128), (0, 0), (2, 16), (1, 4))
_BACKWARD = ((16, 128), (16, 128), (0, 0), (2, 16), (1, 4))
_PRODUCT = ((32, 256), (32, 256), (16, 128), (2, 16), (1, 5))
ALLOWED = {
    "attention_fwd": _FORWARD,
    "attention_fwd_short": ((64, 128), (64, 256), (0, 0), (4, 8), (1, 2)),
    "attention_fwd_unaligned": _FORWARD,
    "attention_bwd": ((64, 64), (64, 64), (0, 0), (4, 4), (1, 4)),
    "attention_bwd_dq": _BACKWARD,
    "attention_bwd_dq_unaligned": _BACKWARD,
    "attention_bwd_dkdv": _BACKWARD,
    "attention_bwd_dkdv_unaligned": _BACKWARD,
    "prenorm": _PRODUCT,
    "prenorm_unaligned": _PRODUCT,
}


def allowed(kernel, tiles):
    """Whether the kernel can run with these tiles, as far as can be said without compiling it."""
    values = [getattr(tiles, field) for field in FIELDS]
    return kernel in ALLOWED and all(
        isinstance(value, int)
        and least <= value <= most
        and (field == "num_stages" or value & (value - 1) == 0)  # a power of two
        for field, value, (least, most) in zip(FIELDS, values, ALLOWED[kernel], strict=True)
    )


def folder():
    """Where the files are: VITRITON_CACHE_DIR, or `vitriton` in the user's cache folder."""
    chosen = os.environ.get("VITRITON_CACHE_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(cache, "vitriton")


def identity(device, chip):
    """What a file holds for."""
    properties = torch.get_device_module(device).get_device_properties(device)
    card = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    table = hashlib.sha256(repr(configs.TABLE).encode()).hexdigest()[:12]
    return {"format": FORMAT, "card": card, "chip": str(chip), "triton": triton.__version__, "table": table}


def path(who):
    """The file of an `identity`."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{who['card']} triton {who['triton']} {who['table']}")
    return folder() / f"tuned-{name}.json"


def read(device, chip):
    """{(kernel, dtype, head dim): Tiles, ("split", dtype, weight's shape): True} for this card; {} if there is none."""
    who = identity(device, chip)
    file = path(who)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return _decoded(content, who)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"what `vitriton tune` kept in {file} is passed over: {type(error).__name__}: {error}; tune again, or "
            "remove the file",
            stacklevel=2,
        )
        return {}


def _decoded(content, who):
    """Raises ValueError, TypeError, KeyError or AttributeError for what `write` does not write."""
    for name, value in who.items():
        if content[name] != value:
            raise ValueError(f"its {name} is {content[name]!r}, not {value!r}")
    winners = {}
    for entry in content["winners"]:
        tiles = configs.Tiles(**entry["tiles"])
        if not allowed(entry["kernel"], tiles):
            raise ValueError(f"{entry['kernel']} cannot run with {tiles}")
        winners[entry["kernel"], DTYPES[entry["dtype"]], int(entry["head_dim"])] = tiles
    for entry in content["splits"]:
        n, k = entry["weight"]
        winners["split", DTYPES[entry["dtype"]], (int(n), int(k))] = True
    return winners


def write(device, chip, winners):
    """Write the winners for this card, in place of those that were there -> the path. A reader sees the old file or the
    new one. Raises OSError."""
    who = identity(device, chip)
    file = path(who)
    entries = {"winners": [], "splits": []}
    for key, value in winners.items():
        kernel, dtype, rest = key
        entry = {"dtype": str(dtype)[6:]}
        if kernel == "split":
            entries["splits"].append(entry | {"weight": list(rest)})
        else:
            entries["winners"].append(entry | {"kernel": kernel, "head_dim": rest, "tiles": asdict(value)})
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as temporary:
            json.dump(who | entries, temporary, indent=1)
        os.replace(name, file)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(name)
        raise
    return file


@contextmanager
def trying(device, winners):
    """Within this context launches on `device` take `winners`, a dict as `read` gives it."""
    chip = chip_of(device)
    before, chip.winners = chip.winners, winners
    try:
        yield
    finally:
        chip.winners = before
