"""The curve of a training as a picture: losses and the share of right answers over the epochs."""

import math
from itertools import accumulate

__all__ = ["draw_curve"]

TRAINING, HELD_OUT, GREY = "#8250df", "#1a7f37", "#57606a"


def draw_curve(path, losses, steps_per_epoch, epochs, *, title, training="training"):
    """Write a picture to `path`.

    `losses` has one of each step, None where no picture could be read, and is called `training`; `epochs` has a record
    (a dict of train.py) of each epoch that has ended.
    """
    # no pyplot: it has state, and may look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.8), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    loss, right = figure.subplots(1, 2)
    times = [(step + 1) / steps_per_epoch for step in range(len(losses))]
    ends = [record["epoch"] for record in epochs]
    dots = "o" if len(ends) == 1 else ""  # one point makes no line

    losses = [math.nan if loss is None else loss for loss in losses]
    loss.plot(times, losses, color=TRAINING, alpha=0.25, linewidth=0.8)
    loss.plot(times, smoothed(losses), color=TRAINING, label=training)
    loss.plot(ends, [record["held_out_loss"] for record in epochs], color=HELD_OUT, marker=dots, label="held out")
    loss.set_ylabel("loss (cross-entropy)")
    right.plot(ends, [record["training_right"] for record in epochs], color=TRAINING, marker=dots, label="training")
    right.plot(ends, [record["held_out_right"] for record in epochs], color=HELD_OUT, marker=dots, label="held out")
    right.set_ylabel("right answers")
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (loss, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#d0d7de", linewidth=0.5)
        axes.tick_params(labelsize=8, colors=GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def smoothed(losses):
    """The mean over a fiftieth of all steps around each."""
    half = len(losses) // 100
    known = [not math.isnan(loss) for loss in losses]
    sums = [0.0, *accumulate(loss if k else 0.0 for loss, k in zip(losses, known, strict=True))]
    counts = [0, *accumulate(known)]
    ranges = [(max(0, step - half), min(len(losses), step + half + 1)) for step in range(len(losses))]
    return [(sums[b] - sums[a]) / (counts[b] - counts[a]) if counts[b] > counts[a] else math.nan for a, b in ranges]
