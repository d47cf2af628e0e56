"""The cost of each kernel's hot loop, kept in a file, so that no change makes a kernel dearer unnoticed.

The file holds, by `Record.name`: `slots`, the issue slots, and `bound`, the cycles of the pipe that binds, of the hot
loop per 1024 (query, key) pairs or per 1024 multiply-adds (of an iteration where the loop multiplies no matrices);
`registers`; and `per_pair`, attention's executed instructions per needed pair by sequence length. Figures of one
Triton do not hold for another, whose name stands in the file.
"""

import json
from pathlib import Path

__all__ = ["TOLERANCE", "accept", "dearer", "figures", "read"]

TOLERANCE = 0.02


def figures(record):
    """What the file keeps of a Record."""
    found = {"registers": record.registers}
    if record.hot is not None:
        cycles = record.hot.per_1024 if record.tensor and record.hot.per_1024 else record.hot.cycles
        found |= {"slots": cycles["issue"], "bound": max(cycles.values())}
    per_pair = {n: executed.per_pair for n, executed in record.executed.items() if executed.per_pair is not None}
    return found | ({"per_pair": per_pair} if per_pair else {})


def dearer(kept, now):
    """Figures that are over `TOLERANCE` above those kept -> lines of text. More registers alone cost nothing."""
    kept, now = (
        {name: value for name, value in found.items() if name not in ("registers", "per_pair")}
        | {f"per_pair at N = {n}": value for n, value in found.get("per_pair", {}).items()}
        for found in (kept, now)
    )
    return [
        f"{name}: {kept[name]:g} kept, {now[name]:g} now ({now[name] / kept[name] - 1:+.1%})"
        for name in sorted(kept.keys() & now.keys())
        if now[name] > kept[name] * (1 + TOLERANCE)
    ] + [f"{name}: {kept[name]:g} kept, not known now" for name in sorted(kept.keys() - now.keys())]


def read(path):
    """(the version of Triton, {name: figures}) of a file; (None, {}) where there is none."""
    path = Path(path)
    content = json.loads(path.read_text()) if path.exists() else {"triton": None, "kernels": {}}
    return content["triton"], content["kernels"]


def accept(path, records, triton_version):
    """Write the figures of `records` into a file; those of other kernels stay if they are of the same Triton."""
    version, kernels = read(path)
    kernels = (kernels if version == triton_version else {}) | {record.name: figures(record) for record in records}
    lines = ",\n".join(f'  "{name}": {json.dumps(kernels[name])}' for name in sorted(kernels))
    Path(path).write_text(f'{{"triton": "{triton_version}", "kernels": {{\n{lines}\n}}}}\n')
