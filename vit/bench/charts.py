"""The pictures of a benchmark: models side by side, speed and memory against N, and a roofline. PNG, for print too:
lines differ by marker and dash as well as by colour."""

import importlib.util
from pathlib import Path

__all__ = ["draw_all", "memory", "models", "roofline", "speed", "why_not"]

INK, GREY, LIGHT = "#1f2328", "#6e7781", "#d0d7de"
OURS = "#c2410c"
# colours of Okabe and Ito 2008, told apart by the colour-blind too
STYLES = {
    "vitriton": {"color": OURS, "marker": "o", "linestyle": "-", "linewidth": 2.4, "zorder": 5},
    "plain": {"color": INK, "marker": "s", "linestyle": "--"},
    "SDPA": {"color": "#0072b2", "marker": "^", "linestyle": "-"},
    "SDPA math": {"color": "#56b4e9", "marker": "v", "linestyle": ":"},
    "SDPA flash": {"color": "#0072b2", "marker": "<", "linestyle": ":"},
    "SDPA efficient": {"color": "#56b4e9", "marker": ">", "linestyle": "-."},
    "SDPA cuDNN": {"color": "#56b4e9", "marker": "d", "linestyle": "--"},
    "compile": {"color": "#009e73", "marker": "D", "linestyle": "-."},
    "FlexAttention": {"color": "#cc79a7", "marker": "P", "linestyle": "-"},
    "flash-attn": {"color": "#e69f00", "marker": "X", "linestyle": "-"},
    "xformers": {"color": "#8a6d00", "marker": "*", "linestyle": "-"},
}
BITS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def why_not():
    """Why no picture can be drawn here, or ""."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib cannot be imported here: pip install 'vitriton[bench]'"
    return ""


def draw_all(folder, records, machine, roof=None):
    """Write into `folder` each picture for which there are records -> their paths."""
    timed = [record for record in records if record["status"] == "timed"]
    functions = [record for record in timed if record["kind"] == "function"]
    wanted = []
    if any(record["kind"] == "model" for record in timed):
        wanted.append(("models.png", models, [r for r in timed if r["kind"] == "model"]))
    if len({record["tokens"] for record in functions}) > 1:
        wanted += [("speed.png", speed, functions), ("memory.png", memory, functions)]
    if functions and roof:
        wanted.append(("roofline.png", lambda path, rows, machine: roofline(path, rows, machine, roof), functions))
    paths = []
    for name, draw, rows in wanted:
        paths.append(Path(folder, name))
        draw(paths[-1], rows, machine)
    return paths


def _figure(width, height, rows=1, columns=1, **kwargs):
    # no pyplot: it has state, and may look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.tick_params(labelsize=8, colors=INK, length=3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(GREY)
    return figure, axes


def _titles(figure, title, machine, note):
    """Title and note at the top, in inches from it."""
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.12 / height, title, fontsize=13, weight="bold", color=INK, va="top")
    where = f"{machine['device']}, PyTorch {machine['versions']['torch']}. {note}"
    figure.text(0.012, 1 - 0.42 / height, where, fontsize=8.5, color=GREY, va="top")


def _groups(records, *names):
    groups = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


# ---------------------------------------------------------------------------------------------------------------------


def models(path, records, machine):
    """Bars of the time of a call, a panel for each case, the fastest at the top."""
    cases = _groups(records, "name", "image_size", "batch", "dtype", "what")
    columns = min(len(cases), 4)
    rows = -(-len(cases) // columns)
    most = max(map(len, cases.values()))
    height = rows * (0.21 * most + 0.62) + 0.75
    figure, axes = _figure(max(3.1 * columns, 7), height, rows, columns)
    for axis in list(axes.flat)[len(cases) :]:
        axis.set_visible(False)
    for axis, ((name, size, batch, dtype, what), found) in zip(axes.flat, cases.items(), strict=False):
        found = sorted(found, key=lambda record: record["seconds"])
        times = [1e3 * record["seconds"] for record in found]
        colors = [OURS if r["rival"] == "vitriton" else INK if r["rival"] == "plain" else "#9aa4af" for r in found]
        axis.barh(range(len(found)), times, color=colors, height=0.72)
        spread = [[t - 1e3 * r["p20"] for t, r in zip(times, found, strict=True)]]
        spread.append([1e3 * r["p80"] - t for t, r in zip(times, found, strict=True)])
        axis.errorbar(times, range(len(found)), xerr=spread, fmt="none", ecolor=GREY, elinewidth=0.8)
        for i, (t, record) in enumerate(zip(times, found, strict=True)):
            bold = {"weight": "bold"} if record["rival"] == "vitriton" else {}
            edge = max(1e3 * record["p80"], t)
            axis.text(
                edge + 0.015 * max(times),
                i,
                f"{t:.0f}" if t >= 100 else f"{t:.3g}",
                fontsize=7.5,
                va="center",
                color=INK,
                **bold,
            )
        axis.set_yticks(range(len(found)), [record["rival"].removeprefix("timm:") for record in found], fontsize=7.5)
        axis.set_ylim(most - 0.5, -0.5)  # bars are as wide in every panel
        axis.set_xlim(0, 1.2 * max(max(times), max(1e3 * record["p80"] for record in found)))
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        pixels = "" if size == 224 else f" {size} px"
        step = "" if what == "forward" else ", training"
        axis.set_title(f"{name}{pixels}, batch {batch}, {BITS[dtype]}{step}", fontsize=9, color=INK, loc="left", pad=4)
    _titles(figure, "Time of one call, ms", machine, "Medians; thin lines: the middle 60% of calls.")
    figure.subplots_adjust(
        left=0.95 / figure.get_figwidth(), right=0.985, top=1 - 0.95 / height, bottom=0.08 / height,
        wspace=1.0 / 3.1 * 1.45, hspace=0.35,
    )  # fmt: skip
    figure.savefig(path)


def speed(path, records, machine):
    """FLOP/s against N: a panel for each function, dtype and direction."""
    giga = max(record["tflops_per_s"] or 0 for record in records) < 5
    unit, scale = ("GFLOP/s", 1e3) if giga else ("TFLOP/s", 1.0)
    _against_n(
        path, records, machine, lambda r: r["tflops_per_s"] and scale * r["tflops_per_s"], unit,
        "Speed against the number of tokens",
        "Operations of the plain formula over the median time: higher is faster.", log=False,
    )  # fmt: skip


def memory(path, records, machine):
    """Peak memory against N."""
    _against_n(
        path, records, machine, lambda r: r["peak_bytes"] and r["peak_bytes"] / 2**20, "MiB",
        "Memory against the number of tokens",
        "The most that PyTorch's allocator held during a call, its inputs not counted.", log=True,
    )  # fmt: skip


def _against_n(path, records, machine, value, unit, title, note, log):
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    panels = _groups(records, "name", "batch", "dtype", "what")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    height = 2.75 * rows + 1.3
    figure, axes = _figure(max(4.6 * columns, 5.5), height, rows, columns)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    handles = {}
    for axis, ((name, batch, dtype, what), found) in zip(axes.flat, panels.items(), strict=False):
        tokens = sorted({record["tokens"] for record in found})
        for rival, line in _groups(found, "rival").items():
            points = sorted((r["tokens"], value(r)) for r in line if value(r))
            if not points:
                continue
            style = {"markersize": 5, "linewidth": 1.3} | STYLES.get(rival[0], {"color": GREY, "marker": "."})
            (handles[rival[0]],) = axis.plot(*zip(*points, strict=True), **style)
        axis.set_xscale("log")
        axis.set_xticks(tokens, [str(n) for n in tokens])
        axis.xaxis.set_minor_locator(NullLocator())
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        axis.grid(axis="y", color=LIGHT, linewidth=0.6)
        axis.set_axisbelow(True)
        function, model = name.split(", ")
        axis.set_title(
            f"{function}, {what}: ViT-{model.title()}, batch {batch}, {BITS[dtype]}", fontsize=9, color=INK, loc="left"
        )
        axis.set_ylabel(unit, fontsize=8.5, color=INK)
        axis.set_xlabel("tokens N", fontsize=8.5, color=INK)
    _titles(figure, title, machine, note)
    order = [rival for rival in STYLES if rival in handles] + [rival for rival in handles if rival not in STYLES]
    figure.legend(
        [handles[rival] for rival in order], order, loc="lower center", ncols=min(len(order), 4 * columns),
        fontsize=8.5, frameon=False, bbox_to_anchor=(0.5, 0.0), handlelength=2.8, columnspacing=1.4,
    )  # fmt: skip
    width = figure.get_figwidth()
    figure.subplots_adjust(
        left=0.62 / width, right=1 - 0.15 / width, top=1 - 0.98 / height, bottom=0.98 / height, wspace=0.2, hspace=0.48
    )
    figure.savefig(path)


def roofline(path, records, machine, roof):
    """Each function's FLOP/s over its FLOP per byte, under the ceilings of this machine; a panel for each dtype."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    panels = _groups([r for r in records if r["rival"] in ("vitriton", "plain") and r["flops"]], "dtype")
    height = 4.9
    figure, axes = _figure(4.9 * len(panels), height, 1, len(panels), sharey=True)
    markers = dict(zip(sorted({r["question"] for r in records}), "os^Dv", strict=False))
    for axis, ((dtype,), found) in zip(axes.flat, panels.items(), strict=True):
        peak = roof["products"][dtype]
        intensity = [r["flops"] / r["bytes"] for r in found]
        widest = roof["cached copy"] or roof["copy"]
        low, high = 0.3 * min(*intensity, peak / widest), 2.5 * max(*intensity, peak / roof["copy"])
        for name, bandwidth, dash in (("memory", roof["copy"], "-"), ("cache", roof["cached copy"], ":")):
            if bandwidth is None:
                continue
            axis.plot([low, peak / bandwidth, high], [low * bandwidth, peak, peak], color=INK, linestyle=dash, lw=1.3)
            at = (0.75 if name == "cache" else 0.2) * peak / bandwidth
            axis.annotate(
                f"{name} {bandwidth / 1e9:.0f} GB/s ", (at, at * bandwidth), fontsize=7.5, color=INK,
                va="center", xytext=(6, 0), textcoords="offset points",
            )  # fmt: skip
        axis.annotate(
            f"products {peak / 1e9:.0f} GFLOP/s", (high, peak), fontsize=7.5, color=INK, ha="right",
            xytext=(-2, 4), textcoords="offset points",
        )  # fmt: skip
        for record in found:
            ours = record["rival"] == "vitriton"
            axis.plot(
                record["flops"] / record["bytes"], record["flops"] / record["seconds"], markers[record["question"]],
                markersize=7 if ours else 6, color=OURS if ours else INK, markerfacecolor=OURS if ours else "white",
                markeredgewidth=1.1, alpha=0.9, zorder=4 if ours else 3,
            )  # fmt: skip
            if ours:
                axis.annotate(
                    str(record["tokens"]), (record["flops"] / record["bytes"], record["flops"] / record["seconds"]),
                    fontsize=6.5, color=OURS, ha="center", va="bottom", xytext=(0, 4), textcoords="offset points",
                )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(low, high)
        axis.set_ylim(0.6 * min(r["flops"] / r["seconds"] for r in found), 1.6 * peak)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e9:g}"))
        axis.grid(color=LIGHT, linewidth=0.5)
        axis.set_axisbelow(True)
        axis.set_title(BITS[dtype], fontsize=10, color=INK, loc="left")
        axis.set_xlabel("FLOP per byte that must move", fontsize=8.5, color=INK)
    axes.flat[0].set_ylabel("GFLOP/s", fontsize=8.5, color=INK)
    legend = [Line2D([], [], color=OURS, marker="o", linestyle="", label="vitriton")]
    legend.append(Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="", label="plain"))
    legend += [Line2D([], [], color=GREY, marker=m, linestyle="", label=name) for name, m in markers.items()]
    figure.legend(handles=legend, loc="lower center", ncols=min(len(legend), 7), fontsize=8.5, frameon=False)
    _titles(
        figure,
        "Roofline: each function under what this machine can do",
        machine,
        "Ceilings measured here; figures: tokens.",
    )
    width = figure.get_figwidth()
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.2 / width, top=1 - 0.95 / height, bottom=0.95 / height, wspace=0.08
    )
    figure.savefig(path)
