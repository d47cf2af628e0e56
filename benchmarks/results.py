"""Regenerate benchmarks/results/: measure this machine, draw the pictures, write the tables.

    python benchmarks/results.py                the whole of it, half an hour on two cores
    python benchmarks/results.py ti-1-fp32      these pieces again, the rest as it was
    python benchmarks/results.py --tables       measure nothing: all pictures and tables from the JSON that is there

Each processor has a folder there. Each piece is a run of `vitriton bench`, whose arguments stand below and in its JSON.
A piece that was measured with other versions is not mixed with those of today: it is named, and nothing is written.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from vitriton.vit.bench import charts
from vitriton.vit.bench.report import environment, source
from vitriton.vit.bench.sizes import SIZES
from vitriton.vit.cli import main as vitriton
from vitriton.vit.measure import quantiles

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("plain", "sdpa", "timm", "compile", "onnxruntime", "openvino")
GHOSTNET = "timm:ghostnet_100"
TOKENS = "50,197,257,577,1025"
MODELS, OTHER_SIZES = ("ti-", "s-", "b-"), ("size-",)
INFERENCE = f"--compare all,{GHOSTNET} --seconds 3"
PIECES = {
    **{
        f"{model}-{batch}-{dtype}": f"--model {model} --batch {batch} --dtype {dtype} {INFERENCE}"
        for model in ("ti", "s", "b")
        for batch in (1, 8)
        for dtype in ("fp32", "bf16")
    },
    **{
        f"size-{name}": f"--model {arguments} --dtype fp32,bf16 --seconds 3"
        for name, arguments in {
            "384px": "s --image-size 384 --batch 1",
            "patch14": "vit_s14 --batch 3",
            "large": "l --batch 1",
        }.items()
    },
    **{f"train-{m}": f"--model {m} --batch 16 --dtype fp32 --step train --seconds 6" for m in ("ti", "s")},
    **{
        f"functions-{dtype}": "--function attention,layer_norm_linear_gelu,block --model s --batch 4 "
        f"--tokens {TOKENS} --dtype {dtype} --seconds 0.6"
        for dtype in ("fp32", "bf16")
    },
    "cost": "--cost",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"of {', '.join(PIECES)} (default: all)")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if unknown := set(args.pieces) - set(PIECES):
        parser.error(f"no such piece: {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    if not args.tables:
        measure(args.pieces or PIECES)
    found = {folder: read(folder) for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir())}
    for folder, runs in found.items():
        pictures(folder, runs)
        (folder / "README.md").write_text(text(runs), encoding="utf-8")
        print(f"wrote {folder}/README.md")
    (RESULTS / "README.md").write_text(index(found), encoding="utf-8")


def measure(pieces):
    name = environment(torch.device("cpu"))["cpu"].split(",")[0]  # such as "Intel(R) Xeon(R) Processor, 2 threads"
    words = name.lower().replace("(r)", "").replace("(tm)", "").split()
    folder = RESULTS / "-".join(word for word in words if word not in ("processor", "cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    for piece in pieces:
        command = ["bench", *PIECES[piece].split(), "--plot", "", "--json", str(folder / f"{piece}.json")]
        print(f"\nvitriton {' '.join(command)}", flush=True)
        if code := vitriton(command):
            sys.exit(code)


def read(folder):
    """The pieces of a folder, of one machine and its versions. Exits with words where they are not."""
    files = {piece: folder / f"{piece}.json" for piece in PIECES}
    runs = {piece: json.loads(file.read_text(encoding="utf-8")) for piece, file in files.items() if file.exists()}
    if "cost" not in runs:
        sys.exit(f"not measured yet in {folder}: cost, without which there is no table")
    machines = {}
    for piece, run in runs.items():
        machines.setdefault(
            json.dumps([run["machine"][name] for name in ("device", "threads", "versions")]), []
        ).append(piece)
    if len(machines) > 1:
        sys.exit(f"measured on unlike machines or versions, measure again: {' | '.join(map(str, machines.values()))}")
    if absent := [piece for piece in PIECES if piece not in runs]:
        print(f"not measured yet in {folder}: {', '.join(absent)}")
    return runs


def records_of(runs, *beginnings):
    return [r for piece, run in runs.items() if piece.startswith(beginnings) for r in run["records"]]


def pictures(folder, runs):
    """Draw those for which there are figures; the others are taken away, as they are of an earlier run."""
    for picture in folder.glob("*.png"):
        picture.unlink()
    machine = runs["cost"]["machine"]
    timed = [r for r in records_of(runs, *MODELS, "train") if r["status"] == "timed" and r["rival"] != GHOSTNET]
    for name, found in (
        ("inference", [r for r in timed if r["what"] == "forward"]),
        ("training", [r for r in timed if r["what"] != "forward"]),
    ):
        if found:
            charts.models(folder / f"{name}.png", found, machine)
    functions = records_of(runs, "functions")
    roof = {"products": {}}
    for ceilings in (runs[piece]["ceilings"] for piece in runs if piece.startswith("functions")):
        roof |= {name: max(ceilings[name], roof.get(name, 0)) for name in ("copy", "cached copy")}
        roof["products"] |= ceilings["products"]
    charts.draw_all(folder, functions, machine, roof)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def index(found):
    """What there is, a paragraph a folder."""
    parts = ["# Results on CPUs", "Written by `python benchmarks/results.py`: a folder for each processor."]
    for folder, runs in found.items():
        machine, inference = runs["cost"]["machine"], records_of(runs, *MODELS)
        old = any(run["machine"].get("source") != source() for run in runs.values())
        parts.append(
            f"**[{machine['device']}]({folder.name}/README.md)**, {machine['date']}"
            f"{', with earlier sources of vitriton' if old else ''}. {summary(inference) if inference else ''}"
        )
    return "\n\n".join(parts) + "\n"


def text(runs):
    machine = runs["cost"]["machine"]
    dates = sorted(run["machine"]["date"] for run in runs.values())
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    absent = [piece for piece in PIECES if piece not in runs]
    old = [piece for piece, run in runs.items() if run["machine"].get("source") != source()]
    disturbed = [piece for piece, run in runs.items() if any(r.get("disturbed") for r in run["records"])]
    inference, sizes, training, functions = (
        records_of(runs, *names) for names in (MODELS, OTHER_SIZES, ("train",), ("functions",))
    )
    parts = [
        "# Results on a CPU",
        f"{machine['device']} of {machine['cores']} cores, Python {machine['python']}; {versions}. "
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.",
        "Regenerated by `python benchmarks/results.py`, which says what each piece runs. Every answer was held to the "
        "plain formula in float64 before it was timed; the rivals of a row took turns in one process. Times are "
        "medians in ms; bold is the fastest. No GPU was at hand.",
        f"Not measured yet, and missing below: {', '.join(absent)}." if absent else "",
        f"Measured with earlier sources of vitriton, so not figures of this checkout: {', '.join(old)}." if old else "",
        f"Disturbed by other programs, not to be trusted: {', '.join(disturbed)}." if disturbed else "",
    ]
    if inference:
        parts += [
            "## Whole ViTs, inference at 224 px",
            models_table(inference),
            summary(inference),
            not_timed(inference),
            "![Time of a call, for each model](inference.png)",
            "## Beside GhostNet at equal input",
            ghostnet_table(inference),
            ghostnet_sentence(inference),
        ]
    if sizes:
        parts += ["## Other sizes, inference", models_table(sizes), summary(sizes), not_timed(sizes)]
    if training:
        parts += [
            "## A training step: forward, cross-entropy, all gradients",
            training_table(training),
            "Memory: the most that PyTorch's allocator held at a time, beyond weights and images. " + noise(training),
            "![Time of a training step](training.png)",
        ]
    if functions:
        parts += [
            "## Functions against the number of tokens, ViT-S, 4 images",
            functions_table(functions),
            noise(functions),
            not_timed(functions),
            "![Speed against N](speed.png)",
            "![Memory against N](memory.png)",
            "![Roofline](roofline.png)",
        ]
    parts += [
        "## What a ViT costs, counted",
        cost_table(runs["cost"]["costs"]),
        "One image at 224 px. Kept: what the forward pass keeps in fp32 for its backward pass, besides parameters.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


CASE = "name", "tokens", "batch", "dtype"


def cells(records, *names):
    """{case: {rival: record}} of what was timed."""
    found = {}
    for record in records:
        if record["status"] == "timed":
            found.setdefault(tuple(record[name] for name in names), {})[record["rival"]] = record
    return found


def noise(records):
    """How far the calls of a row vary: the larger distance of p20 and p80 from the median, as a part of it."""
    spreads = [
        max(r["p80"] - r["seconds"], r["seconds"] - r["p20"]) / r["seconds"] for r in records if r["status"] == "timed"
    ]
    half, most = quantiles(spreads, [0.5, 0.9])
    return f"Noise: the middle 60% of calls lie within {half:.0%} of the median in half of the rows, {most:.0%} in 90%."


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ms(record, fastest):
    if record is None:
        return "-"
    time = f"{1e3 * record['seconds']:.4g}"
    return f"**{time}**" if record is fastest else time


def models_table(records):
    rows = []
    for (name, tokens, batch, dtype), rivals in cells(records, *CASE).items():
        rivals = {rival: record for rival, record in rivals.items() if rival != GHOSTNET}
        ours, fastest = rivals["vitriton"], min(rivals.values(), key=lambda r: r["seconds"])
        best_peer = min(r["seconds"] for rival, r in rivals.items() if rival != "vitriton")
        row = [f"{name}, {tokens} tokens, batch {batch}, {charts.BITS[dtype]}"]
        row += [ms(rivals.get(rival), fastest) for rival in ("vitriton", *PEERS)]
        row += [f"{rivals['plain']['seconds'] / ours['seconds']:.2f}x", f"{best_peer / ours['seconds']:.2f}x"]
        rows.append(row)
    return markdown(["", "vitriton", *PEERS, "to plain", "to the best other"], rows)


def summary(records):
    gains = {"plain": [], "best": []}
    for rivals in cells(records, *CASE).values():
        ours = rivals["vitriton"]["seconds"]
        others = {rival: r["seconds"] for rival, r in rivals.items() if rival not in ("vitriton", GHOSTNET)}
        gains["plain"].append(others["plain"] / ours)
        gains["best"].append(min(others.values()) / ours)
    lost = sum(gain < 1 for gain in gains["best"])
    mean = {name: math.exp(sum(map(math.log, found)) / len(found)) for name, found in gains.items()}
    return (
        f"Geometric mean over the {len(gains['best'])} rows: {mean['plain']:.2f} times as fast as the plain model, "
        f"{mean['best']:.2f} times as fast as the best of all others. In {lost} rows another one is faster. "
        + noise(records)
    )


def not_timed(records):
    """Who did not run or answered wrongly, each reason once."""
    reasons = {}
    for r in records:
        if r["status"] != "timed":
            where = f"{r['name']} {r['batch']}x{r['tokens']} {charts.BITS[r['dtype']]}"
            reasons.setdefault((r["rival"], r["status"], r["why"]), []).append(where)
    lines = [
        f"- {rival}, {'answers wrongly' if status == 'WRONG' else 'does not run'} ({', '.join(where[:3])}"
        f"{', ...' if len(where) > 3 else ''}): {why}"
        for (rival, status, why), where in reasons.items()
    ]
    return "Not timed:\n\n" + "\n".join(lines) if lines else ""


def training_table(records):
    rivals_of = cells(records, "name", "batch", "dtype")
    rows = []
    for (name, batch, dtype), rivals in rivals_of.items():
        fastest = min(rivals.values(), key=lambda r: r["seconds"])
        for rival, record in sorted(rivals.items(), key=lambda item: item[1]["seconds"]):
            rows.append(
                [
                    f"{name}, batch {batch}, {charts.BITS[dtype]}: {rival}",
                    ms(record, fastest),
                    f"{record['images_per_s']:.1f}",
                    f"{record['times_plain']:.2f}x",
                    f"{record['peak_bytes'] / 2**20:.0f} MiB",
                    f"{record['peak_bytes'] / rivals['plain']['peak_bytes']:.2f}x",
                ]
            )
    return markdown(["", "ms", "images/s", "to plain", "peak memory", "to plain"], rows)


def functions_table(records):
    rows = []
    for (question, dtype, tokens), rivals in cells(records, "question", "dtype", "tokens").items():
        ours, plain = rivals["vitriton"], rivals["plain"]
        others = {rival: r for rival, r in rivals.items() if rival not in ("vitriton", "plain")}
        best = min(others.items(), key=lambda item: item[1]["seconds"])
        fastest = min(rivals.values(), key=lambda r: r["seconds"])
        rows.append(
            [
                f"{question}, {charts.BITS[dtype]}, N = {tokens}",
                ms(ours, fastest),
                ms(plain, fastest),
                f"{ms(best[1], fastest)} {best[0]}",
                f"{plain['seconds'] / ours['seconds']:.2f}x",
                f"{best[1]['seconds'] / ours['seconds']:.2f}x",
                f"{ours['peak_bytes'] / 2**20:.1f} of {plain['peak_bytes'] / 2**20:.1f} MiB",
            ]
        )
    header = ["", "vitriton", "plain", "the best other", "to plain", "to it", "peak memory, of plain's"]
    return markdown(header, rows)


def cost_table(costs):
    rows = [
        [
            f"ViT-{record['model'].title()}/{SIZES[record['model']].patch_size}",
            f"{record['tokens']}",
            f"{record['parameters'] / 1e6:.1f} M",
            f"{record['multiply_adds'] / 1e9:.2f} G",
            f"{record['fused']['flops'] / 2e9:.2f} G",
            f"{record['plain']['activation_bytes'] / 2**20:.1f} MiB",
            f"{record['fused']['activation_bytes'] / 2**20:.1f} MiB",
            f"{record['fused']['activation_bytes'] / record['plain']['activation_bytes']:.2f}x",
        ]
        for record in costs
    ]
    header = ["", "tokens", "parameters", "multiply-adds, plain", "fused", "kept, plain", "fused", "of plain's"]
    return markdown(header, rows)


def ghostnet_table(records):
    rows = []
    for (name, batch, dtype), rivals in cells(records, "name", "batch", "dtype").items():
        if GHOSTNET not in rivals:
            continue
        ghost, ours, plain = rivals[GHOSTNET], rivals["vitriton"], rivals["plain"]
        rows.append(
            [
                f"{name}, batch {batch}, {charts.BITS[dtype]}",
                f"{ours['flops'] / 2e9 / batch:.2f} G",
                f"{ghost['flops'] / 2e9 / batch:.2f} G",
                f"{ours['flops'] / ghost['flops']:.0f}x",
                *(f"{1e3 * r['seconds']:.4g}" for r in (plain, ours, ghost)),
                f"{plain['seconds'] / ghost['seconds']:.1f}x",
                f"{ours['seconds'] / ghost['seconds']:.1f}x",
            ]
        )
    header = ["", "multiply-adds, ViT", "GhostNet", "ratio", "ms: plain ViT", "fused ViT", "GhostNet"]
    return markdown([*header, "plain to GhostNet", "fused to GhostNet"], rows)


def ghostnet_sentence(records):
    rates = {}
    for record in records:
        if record["status"] == "timed" and record["rival"] in ("vitriton", "plain", GHOSTNET):
            rates.setdefault(record["rival"], []).append(1e3 * record["tflops_per_s"])
    low_high = {rival: f"{min(found):.0f} to {max(found):.0f}" for rival, found in rates.items()}
    return (
        "GhostNet (Han et al. 2020) is built to need few operations. Over these rows it does "
        f"{low_high[GHOSTNET]} GFLOP/s, the plain ViTs {low_high['plain']}, the fused ones {low_high['vitriton']}: "
        "time differs by less than the counts do. Rates are by the plain model's operations; the fused one leaves out "
        "those of the last block that no logit depends on."
    )


if __name__ == "__main__":
    main()
