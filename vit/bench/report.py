"""What a benchmark measured, as records, as a table for people, as CSV, and beside an earlier run.

A record is one rival in one case: the case's parameters, "rival", "status" and, if that is "timed", "seconds" (the
median), "p20", "p80", "calls" and what follows from them. Other statuses have a "why".
"""

import csv
import hashlib
import json
import os
import platform
import time
from pathlib import Path

import torch

from ..console import Problem, version
from ..measure import describe, quantiles
from .peers import version as version_of

__all__ = ["compare_runs", "environment", "load", "records_of", "source", "table", "write_csv"]

KEY = ("kind", "name", "image_size", "tokens", "batch", "dtype", "device", "what", "rival")
LEAST = 0.02  # a change below this part of the time is never called one
PACKAGES = ("torch", "triton", "timm", "onnx", "onnxruntime", "openvino", "flash-attn", "xformers", "transformers")


ON_A_GPU = ("attention*", "prenorm*", "gelu", "tiles", "configs", "tun*", "aot", "survey", "counts", "sass", "targets")


def source(device="cpu"):
    """A hash of what is measured: vitriton's own files but those of bench/, on a CPU those but the GPU's."""
    vit = Path(__file__).parents[1]
    kernels = vit.parent / "kernels"
    patterns = {kernels: ("*.py", "*.cpp", "*.h"), vit: ("*.py", "integrations/*.py")}
    files = {file for folder, globs in patterns.items() for glob in globs for file in folder.glob(glob)}
    if torch.device(device).type == "cpu":
        files -= {file for name in ON_A_GPU for file in kernels.glob(f"{name}.py")}
    files = sorted(files)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def environment(device):
    """What a reader must know to judge the figures: hardware, threads and versions."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "source": source(device),
        "device": describe(device),
        "cpu": describe(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"vitriton": version()} | {name: version_of(name) for name in PACKAGES},
        "settings": {
            name: value for name, value in os.environ.items() if name.startswith(("VITRITON_", "OMP_", "MKL_", "KMP_"))
        },
    }


def records_of(params, contest, times, peaks, counts):
    """The records of a contest that was run. counts: {rival: (operations or None, bytes that must move or None)}."""
    records = []
    plain = quantiles(times["plain"], [0.5])[0] if "plain" in times else None
    for rival, wrong in contest.wrong.items():
        record = params | {"rival": rival}
        if wrong:
            status = "not run" if rival in contest.raised else "WRONG"
            records.append(record | {"status": status, "why": wrong})
            continue
        p20, p50, p80 = quantiles(times[rival], [0.2, 0.5, 0.8])
        record |= {"status": "timed", "seconds": p50, "p20": p20, "p80": p80, "calls": len(times[rival])}
        record |= {"disturbed": not contest.undisturbed, "times_plain": plain / p50 if plain else None}
        record |= {"images_per_s": params["batch"] / p50, "peak_bytes": peaks.get(rival)}
        flops, moved = counts[rival]
        record |= {"flops": flops, "tflops_per_s": flops and flops / p50 / 1e12}
        record |= {"bytes": moved, "gb_per_s": moved and moved / p50 / 1e9}
        records.append(record)
    return records


HEADER = ("", "p50 ms", "p20", "p80", "images/s", "TFLOP/s", "GB/s", "peak MiB", "to plain")


def table(records):
    """Rows of strings below HEADER, the fastest first, and sentences on those that were not timed."""
    timed = sorted((r for r in records if r["status"] == "timed"), key=lambda r: r["seconds"])
    rows = [
        (
            record["rival"],
            *(f"{1e3 * record[name]:.4g}" for name in ("seconds", "p20", "p80")),
            f"{record['images_per_s']:.4g}",
            _number(record["tflops_per_s"], ".3g"),
            _number(record["gb_per_s"], ".3g"),
            _number(record["peak_bytes"] and record["peak_bytes"] / 2**20, ".1f"),
            _number(record["times_plain"], ".2f", "x"),
        )
        for record in timed
    ]
    others = [f"{r['rival']} is not timed, {_status(r)}: {r['why']}" for r in records if r["status"] != "timed"]
    return rows, others


def _status(record):
    return "its answer is WRONG" if record["status"] == "WRONG" else "as it does not run here"


def _number(value, form, unit=""):
    return "-" if value is None else f"{value:{form}}{unit}"


def write_csv(path, records, machine):
    """One line a record, with hardware and versions in columns of their own."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    extra = {"hardware": machine["device"], "threads": machine["threads"]}
    extra |= {f"version of {name}": number for name, number in machine["versions"].items()}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *extra], restval="")
        writer.writeheader()
        writer.writerows(record | extra for record in records)


# ---------------------------------------------------------------------------------------------------------------------
# Beside an earlier run


def load(path):
    """The JSON that an earlier run wrote. Raises Problem if it is none."""
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Problem(f"cannot read --compare {path}: {error.strerror}") from error
    except ValueError as error:
        raise Problem(f"--compare {path} is no JSON: {error}") from error
    if not isinstance(run, dict) or not isinstance(run.get("records"), list) or "machine" not in run:
        raise Problem(f"--compare {path} was not written by `vitriton bench --json`")
    return run


def compare_runs(records, machine, old):
    """[{the key, "before", "now", "ratio", "verdict"}] of what both runs timed, and sentences on why to doubt it.

    "slower" and "faster" are said where the middle 60% of the calls of both runs do not overlap and the medians differ
    by more than 2%; everything else is "as before". What other programs disturbed is "not judged".
    """
    before = {_key(record): record for record in old["records"] if record.get("status") == "timed"}
    changes = []
    for now in records:
        was = before.get(_key(now))
        if was is None or now["status"] != "timed":
            continue
        ratio = now["seconds"] / was["seconds"]
        if now["disturbed"] or was["disturbed"]:
            verdict = "not judged"
        elif now["p20"] > was["p80"] and ratio > 1 + LEAST:
            verdict = "SLOWER"
        elif now["p80"] < was["p20"] and ratio < 1 - LEAST:
            verdict = "faster"
        else:
            verdict = "as before"
        named = dict(zip(KEY, _key(now), strict=True))
        changes.append(named | {"before": was["seconds"], "now": now["seconds"], "ratio": ratio, "verdict": verdict})
    doubts = []
    for name in ("device", "cpu", "threads"):
        if machine[name] != old["machine"].get(name):
            doubts.append(f"another {name}: {old['machine'].get(name)} then, {machine[name]} now")
    for name, number in machine["versions"].items():
        if number != (was := old["machine"].get("versions", {}).get(name)) and name != "vitriton":
            doubts.append(f"another {name}: {was} then, {number} now")
    plain = [change["ratio"] for change in changes if change["rival"] == "plain"]
    if plain and not 0.95 < (middle := quantiles(plain, [0.5])[0]) < 1.05:
        doubts.append(f"the plain formulas, which did not change, take {middle:.2f} times as long as then")
    return changes, doubts


def _key(record):
    return tuple(record.get(name) for name in KEY)
