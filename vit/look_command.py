"""`vitriton look`: a photograph, a model, and a picture of where the model looks."""

import textwrap
import time

import torch

from .console import Console, Problem, require
from .demo import check_picture
from .fuse import fuse
from .look import draw_look, look
from .look_models import load_looker
from .measure import check_runs, describe, pick_device
from .photo import open_photo
from .record import attention_layers
from .tokens import tokens_of

EXTRAS = (("matplotlib", "matplotlib"), ("PIL", "Pillow"))


def look_at(args):
    """Run the subcommand with the arguments of cli.add_look; returns the exit code."""
    started = time.perf_counter()
    require("demo", *EXTRAS)
    check_picture(args.out)
    console = Console(args.json)
    device = pick_device(args.device)
    check_runs(device)
    photo, name = open_photo(args.photo)
    model = load_looker(args, console)
    layers, heads = numbers(args.layers, "--layers"), numbers(args.heads, "--heads")
    model.net.eval().to(device)
    try:
        depth = len(attention_layers(model.net))
    except ValueError as error:
        raise Problem(f"--model {args.model}: {error}") from error
    blocks = fused_blocks(model.net, args.fuse, console)
    image, shown = model.prepare(photo)
    image = image.to(device)
    try:
        panels = look(
            model.net,
            image,
            method=args.method,
            layers=layers,
            heads=heads,
            head_fusion=args.head_fusion,
            discard_ratio=args.discard_ratio,
        )
    except (ValueError, IndexError) as error:
        raise Problem(f"{error}{hint(args, model.net)}") from error
    with torch.no_grad():
        answers = model.answers(model.net(image.unsqueeze(0))[0].float().softmax(dim=0).cpu())

    tokens = tokens_of(model.net)
    title, meaning = explanation(args, depth, tokens.cls is not None)
    says = "" if not answers else "The model says: " + ", ".join(f"{what} ({p:.0%})" for what, p in answers) + "."
    lines = [f"{model.name}, {blocks}, {name}. {says}".rstrip(), meaning]
    if model.untrained:
        lines.append("THE MODEL IS NOT TRAINED: its weights are random, and these maps say nothing about the image.")
    draw_look(args.out, shown, panels, title, "\n".join(lines))
    console.say("\n".join([title, *(line for text in lines for line in wrap(text))]))
    header = ["map", "row", "column", "times the average", "on patches"]
    rows = [[p.title, *(str(i) for i in p.place), f"{p.peak:.1f}", f"{p.on_patches:.0%}"] for p in panels]
    columns = 5 if args.method == "cls" else 4
    console.table(header[:columns], [row[:columns] for row in rows])
    seconds = time.perf_counter() - started
    console.say(f"wrote {args.out}: {len(panels)} {'map' if len(panels) == 1 else 'maps'} in {seconds:.1f} s")
    return console.finish(
        "look",
        True,
        seconds,
        photo=args.photo,
        model=model.name,
        untrained=model.untrained,
        blocks=blocks,
        device=describe(device),
        method=args.method,
        head_fusion=args.head_fusion if args.method == "rollout" else None,
        discard_ratio=args.discard_ratio if args.method == "rollout" else None,
        answers=[{"class": what, "probability": p} for what, p in answers],
        picture=args.out,
        maps=[
            {
                "layer": panel.layer,
                "head": panel.head,
                "on_patches": panel.on_patches,
                "times_the_average": panel.peak,
                "map": panel.map.tolist(),
            }
            for panel in panels
        ],
    )


def fused_blocks(net, wanted, console):
    """Fuse the model if it is wanted and can be; what its blocks are, in words."""
    if not wanted:
        return "plain blocks"
    try:
        report = fuse(net)
    except ValueError as error:
        console.say(f"not fused: {str(error).splitlines()[0]}")
        return "plain blocks"
    if report.left:
        console.say(f"left plain: {len(report.left)} of its blocks, such as {report.left[0]}")
    return "fused blocks"


def hint(args, net):
    if args.method == "cls" and tokens_of(net).cls is None:
        return "; with --method rollout the mean of all patches is shown instead"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Words


def explanation(args, depth, has_cls):
    """A title, and what the maps are."""
    if args.method == "cls":
        return "Where the CLS token looks", (
            "Each map shows how the attention of the CLS token, which gathers what the model will answer, is spread "
            f"over the image, in one layer (0 is the first, {depth - 1} the last) and one head, or averaged over heads."
        )
    what = "CLS token, which gathers what the model will answer," if has_cls else "mean of all patches"
    heads = {"mean": "averaged", "max": "fused by their maximum", "min": "fused by their minimum"}[args.head_fusion]
    left_out = f", without the smallest {args.discard_ratio:.0%} of their weights" if args.discard_ratio else ""
    return f"What the {'CLS token' if has_cls else 'mean of all patches'} is made of", (
        f"Attention rollout: how much of the {what} comes from each place of the image after so many layers, if each "
        "layer leaves half of a token as it was, and makes the other half of what it attends to; heads "
        f"{heads}{left_out}."
    )


def wrap(text):
    return textwrap.wrap(text, 116, initial_indent="  ", subsequent_indent="  ")


def numbers(text, option):
    """None, "all", or the indices in "0,3,-1" and "2:5"."""
    if text is None or text == "all":
        return text
    chosen = []
    for part in text.split(","):
        try:
            first, colon, last = part.partition(":")
            chosen += range(int(first), int(last)) if colon else [int(part)]
        except ValueError:
            chosen = []
        if not chosen:
            raise Problem(f"{option} is {text!r}: it must be all, or indices such as 0,3,-1 or 2:5 (2, 3 and 4)")
    return chosen
