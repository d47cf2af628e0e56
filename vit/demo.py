"""`vitriton demo`: train a small plain ViT on real images, fuse it, and compare answers, time and memory."""

import copy
import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from ..kernels import explain, use_backend
from ..kernels.backend import chosen_backend
from ..kernels.launch import INTERPRET
from ..kernels.reference import compare
from .console import Console, Problem, check_writable, progress_bar, require, version
from .costs import cost_table
from .fuse import fuse, unfuse
from .measure import MEMORY, check_runs, describe, pick_device
from .picture import draw
from .reference import ViT
from .rollout import patch_rollout

EXTRAS = (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("PIL", "Pillow"), ("rich", "rich"))

TARGET = 0.97  # of the held-out images
HELD_OUT = 360  # a fifth
PATCHES = (4, 4)
EPOCHS, QUICK_EPOCHS = 40, 2
BATCH, LEARNING_RATE, WARM_UP = 64, 2e-3, 0.15  # warm-up: that part of the training


def demo(args):
    """Run the demo with the arguments of cli.add_demo; returns the exit code."""
    started = time.perf_counter()
    require("demo", *EXTRAS)
    check_picture(args.out)
    console = Console(args.json)
    device = pick_device(args.device)
    console.say(f"vitriton {version()}, PyTorch {torch.__version__}, on {describe(device)}")
    with usable_backend(console, device):
        return run(args, console, device, started)


@contextmanager
def usable_backend(console, device):
    """The backend that was chosen, but not Triton's interpreter. Raises Problem if it cannot run."""
    backend = chosen_backend()
    if INTERPRET and backend != "native":
        backend = "native"
        console.say("TRITON_INTERPRET is set: Triton's interpreter would take hours here, so this is the native path")
    with use_backend(backend):
        check_runs(device)
        yield


def run(args, console, device, started):
    console.say("\n1. Train a plain ViT on real images")
    images, labels, held_out, held_out_labels = digits(device)
    model = small_vit(args.seed).to(device)
    console.say(
        f"  {len(images)} of scikit-learn's digits, {len(held_out)} more held out; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {math.prod(PATCHES)} patches and a CLS token"
    )
    training = train(model, images, labels, args, console)
    gold = evaluate(copy.deepcopy(model).cpu().double(), held_out.cpu().double(), held_out_labels.cpu())
    plain = evaluate(model, held_out, held_out_labels)
    right = (plain["logits"].argmax(dim=1) == held_out_labels).sum().item()
    training |= {"right": right, "held_out": len(held_out), "accuracy": right / len(held_out)}
    enough = training["accuracy"] >= TARGET
    console.say(
        f"  right on {right} of the {len(held_out)} held-out images, {training['accuracy']:.1%}, after "
        f"{training['epochs']:.3g} epochs in {training['seconds']:.0f} s"
    )

    console.say("\n2. Fuse it, in place")
    report = str(fuse(model))
    implementation = explain(held_out)
    console.say("\n".join(f"  {line}" for line in report.splitlines()))
    console.say(f"  it runs on: {implementation}")

    console.say("\n3. The same answers, up to rounding")
    fused = evaluate(model, held_out, held_out_labels)
    sameness = judge(plain, fused, gold, console)
    unfuse(model)
    restored = evaluate(model, held_out, held_out_labels)
    restored = all(torch.equal(plain[name], restored[name]) for name in plain)
    console.say(
        f"  after unfuse, logits and gradients are {'' if restored else 'NOT '}bit for bit the plain model's again"
    )

    dtype = "float32" if device.type == "cpu" else "bfloat16 (training: float32 weights under autocast)"
    console.say(f"\n4. At another cost: ViTs at 224 px in {dtype}")
    costs = []
    console.table(*cost_table(costs, device, args.quick))
    console.say("  time: medians, measured in turns in this process; under 1.00x the fused model is slower")
    if disturbed := rows_that_are(costs, "disturbed"):
        console.say(
            f"  DO NOT TRUST the times of {disturbed}: other programs kept the processors busy, "
            "which may have made them many times as long. End those programs and run it again"
        )
    if noisy := rows_that_are(costs, "noisy"):
        console.say(f"  noisy: the times of {noisy} vary by a third or more")
    console.say(f"  memory: {MEMORY}")

    console.say("\n5. Where it looks")
    picture(args.out, model, held_out, held_out_labels, fused["logits"])
    console.say(f"  wrote {args.out}: test images, predictions, and what the CLS token is made of")

    failures = []
    if not (enough or args.quick):
        failures.append(f"the model is right on {training['accuracy']:.1%}, not {TARGET:.0%}, of the held-out images")
    if not (sameness["ok"] and restored and all(row["ok"] for row in costs)):
        failures.append("the fused model does not give the plain model's answers (see the lines with WRONG or NOT)")
    seconds = time.perf_counter() - started
    if failures:
        console.say(f"\nFAILED after {seconds:.0f} s: {'; '.join(failures)}")
    else:
        note = ""
        if not enough:
            note = f"; accuracy was not judged: --quick trains too little for {TARGET:.0%}"
        console.say(f"\nOK in {seconds:.0f} s: the same answers from the fused model{note}")
    return console.finish(
        "demo",
        not failures,
        seconds,
        failures=failures,
        quick=args.quick,
        seed=args.seed,
        device=describe(device),
        torch=torch.__version__,
        implementation=implementation,
        training=training,
        report=report,
        sameness=sameness | {"restored_by_unfuse": restored},
        costs=costs,
        picture=args.out,
    )


def rows_that_are(costs, what):
    return "; ".join(f"{row['model']}, {row['what']}" for row in costs if row[what])


def check_picture(path):
    """Raise Problem if no picture can be written there: now, not after the training."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise Problem(f"--out {path} must end in one of {', '.join('.' + ending for ending in sorted(formats))}")
    check_writable(path, "--out")


# ---------------------------------------------------------------------------------------------------------------------
# Images, model, training


def digits(device):
    """Scikit-learn's digits: images (n,1,8,8) in [-1, 1] and labels to train on, then those that are held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.long, device=device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(device)
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    return images[rest], labels[rest], images[held_out], labels[held_out]


def small_vit(seed):
    torch.manual_seed(seed)
    return ViT(
        image_size=8, patch_size=2, channels=1, num_classes=10, dim=64, depth=4, heads=4, dim_head=16, mlp_dim=128
    )


def train(model, images, labels, args, console):
    """Train with AdamW, a cosine schedule, and images moved a little; the held-out ones are not looked at."""
    epochs = args.epochs or (QUICK_EPOCHS if args.quick else EPOCHS)
    steps = epochs * math.ceil(len(images) / BATCH)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    model.train()
    step, done, started = 0, 0.0, time.perf_counter()
    with few_threads(images.device), progress_bar(console, "training") as show:
        while done < 1:
            right = 0
            order = torch.randperm(len(images), generator=generator).to(images.device)
            for batch in order.split(BATCH):
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * schedule(done)
                logits = model(moved(images[batch], generator))
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[batch], label_smoothing=0.1).backward()
                optimizer.step()
                right += (logits.argmax(dim=1) == labels[batch]).sum()
                step += 1
                done = step / steps
                if args.seconds:
                    done = max(done, (time.perf_counter() - started) / args.seconds)
                if done >= 1:
                    break
                show(done, None)
            show(done, f"epoch {math.ceil(step / steps * epochs)} of {epochs}, right on {right / len(images):.0%}")
    model.eval()
    return {"epochs": step / steps * epochs, "seconds": round(time.perf_counter() - started, 1)}


def schedule(done, warm_up=WARM_UP):
    """The share of the learning rate at this point in [0, 1] of the training: up in a line, down in a cosine."""
    if done < warm_up:
        return 0.05 + 0.95 * done / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (done - warm_up) / (1 - warm_up))


def moved(images, generator):
    """Each image (b,1,h,w) shifted by up to 0.7 pixels, turned by up to 10 degrees and scaled by up to 10%."""
    angle, scale, *shift = (2 * torch.rand(4, len(images), generator=generator) - 1).unbind()
    angle, scale = angle * math.radians(10), torch.exp(0.1 * scale)
    dx, dy = (0.7 * 2 / images.shape[-1] * s for s in shift)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, dx], dim=1), torch.stack([sin, cos, dy], dim=1)], dim=1)
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # + 1: outside the image is paper, 0


@contextmanager
def few_threads(device):
    """One thread on a CPU: the model is so small that threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# The same answers


def evaluate(model, images, labels):
    """The logits, and the gradients of the mean cross-entropy over all parameters, end to end."""
    logits = model(images)
    grads = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
    return {"logits": logits.detach(), "gradients": torch.cat([grad.flatten() for grad in grads])}


def judge(plain, fused, gold, console):
    """Say how far the fused model's answers are from the plain model's, and those from the exact ones."""
    same = (fused["logits"].argmax(dim=1) == plain["logits"].argmax(dim=1)).sum().item()
    total = len(plain["logits"])
    console.say(f"  predictions: {same} of {total} the same" + ("" if same == total else "  WRONG"))
    record = {"predictions_same": same, "predictions": total}
    rows, ok = [], same == total
    for name, k in (("logits", 2), ("gradients", 3)):
        error = compare(name, fused[name], plain[name], gold[name], k=k)
        exact = gold[name]
        record[name] = {
            "fused_from_plain": largest(fused[name], plain[name]),
            "plain_from_float64": largest(plain[name], exact),
            "fused_from_float64": error.max,
            "allowed_from_float64": error.max_allowed,
            "largest_value": exact.abs().max().item(),
            "ok": bool(error),
        }
        rows.append(
            [name, *(f"{number:.2g}" for number in list(record[name].values())[:5]), "ok" if error else "WRONG"]
        )
        ok = ok and bool(error)
    header = [
        "largest differences",
        "fused - plain",
        "plain - float64",
        "fused - float64",
        "allowed",
        "largest value",
        "verdict",
    ]
    console.table(header, rows)
    return {"ok": ok} | record


def largest(a, b):
    return (a.cpu().double() - b.cpu().double()).abs().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def picture(path, model, images, labels, logits):
    """Draw sixteen held-out images: the first of each digit, then up to six that the model gets wrong, then others."""
    confidence, predictions = logits.softmax(dim=1).max(dim=1)
    wrong = (predictions != labels).nonzero().flatten().tolist()
    first = [(labels == digit).nonzero()[0].item() for digit in range(10)]
    chosen = list(dict.fromkeys([*first, *wrong[:6], *range(len(images))]))[:16]
    captions = []
    for i in chosen:
        text = f"{predictions[i].item()}  ({confidence[i].item():.0%})"
        captions.append((text if i not in wrong else f"{text}, is {labels[i].item()}", i not in wrong))
    draw(
        path,
        (images[chosen, 0] + 1) / 2,
        patch_rollout(model, images[chosen]).unflatten(1, PATCHES),
        captions,
        title="Handwritten digits that the ViT had not seen",
        subtitle=f"Right on {len(labels) - len(wrong)} of {len(labels)}. "
        "Above, what it says and how sure it is (red: wrong). "
        "Below, where its CLS token looks (attention rollout over all layers).",
    )
