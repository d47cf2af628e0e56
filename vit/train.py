"""`vitriton train`: train a ViT, fused or plain, on one's own pictures, on one device or many.

A step is the same whatever shares the work: its batch is a function of the seed and the step (data.py), the loss is the
sum over the pictures that could be read divided by the size of the whole batch, and gradients are added up over
micro-batches and processes. All that a step depends on is in the checkpoint.
"""

import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from ..kernels import explain
from .checkpoint import build, fixed_ways, read_checkpoint, restore_training, same_ways, save, training_state, ways
from .console import Console, Problem, check_writable, progress_bar, require, version
from .curve import draw_curve
from .data import BLANK, collate, digits_data, folder_data, held_out_plan, training_plan
from .demo import few_threads, schedule, usable_backend
from .fuse import fuse
from .measure import describe
from .parallel import processes

PACKAGES = (("matplotlib", "matplotlib"), ("PIL", "Pillow"), ("rich", "rich"))
DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
FETCH = 50  # steps between two looks at the losses, for which a GPU has to wait
CURVE_EVERY = 60  # seconds


def train(args):
    """Train with the arguments of cli.add_train; returns the exit code."""
    started = time.perf_counter()
    require("demo", *PACKAGES, *([("sklearn", "scikit-learn")] if args.data == "digits" else []))
    with processes(args.parallel, args.device) as shared:
        console = Console(args.json, silent=not shared.first)
        console.say(f"vitriton {version()}, PyTorch {torch.__version__}, on {describe(shared.device)}")
        if shared.mode is not None:
            console.say(f"{shared.count} processes, {shared.mode}")
        threads = few_threads(shared.device) if args.data == "digits" else nullcontext()
        with usable_backend(console, shared.device), threads:
            training = Training(args, shared, console, started)
            with fixed_ways(training.ways):
                return training.run()


class Training:
    def __init__(self, args, shared, console, started):
        self.args, self.shared, self.console, self.started = args, shared, console, started
        self.device, self.file = shared.device, Path(args.out, "checkpoint.pt")
        self.saved = self.earlier()
        self.dtype = args.dtype or ("fp32" if self.device.type == "cpu" else "bf16")
        self.data = self.read_data()
        self.per_step = args.batch // (args.accumulate * shared.count)
        self.steps_per_epoch = len(self.data.training) // args.batch
        self.check_batch()
        self.steps = args.epochs * self.steps_per_epoch
        self.build_arguments = {
            "name": args.model or ("tiny" if args.data == "digits" else "ti"),
            "image_size": self.size,
            "channels": 1 if args.data == "digits" else 3,
            "num_classes": len(self.data.classes),
            **{name: getattr(args, name) for name in ("patch_size", "dim", "depth", "heads", "dropout")},
        }
        self.make_model()
        prepare_folder(args.out, shared)
        self.step, self.skipped, self.not_saved, self.curve_at = 0, {}, [], 0.0
        self.history = {"losses": [], "right": [], "read": [], "epochs": []}
        self.pending, self.new_problems = [], []
        if self.saved is not None:
            self.resume()

    # -----------------------------------------------------------------------------------------------------------------
    # Before the first step

    def earlier(self):
        """The checkpoint to go on from, or None."""
        if self.file.exists():
            if not self.args.resume:
                raise Problem(
                    f"{self.file} is there already: go on from it with --resume, or give another folder to --out"
                )
            return read_checkpoint(self.file)
        if self.args.resume:
            self.console.say(f"there is no {self.file} yet: starting from the beginning")
        return None

    def read_data(self):
        args = self.args
        if args.data == "digits":
            if args.held_out != 0.2 or args.image_size not in (None, 8):
                raise Problem(
                    "digits have their own held-out fifth and 8x8 pixels: leave --held-out and --image-size out"
                )
            self.size = (8, 8)
            return digits_data(args.seed, args.augment)
        self.size = (args.image_size or 224,) * 2
        return folder_data(args.data, args.held_out, self.size, args.seed, args.augment, args.flip)

    def check_batch(self):
        args, count = self.args, self.shared.count
        if args.batch % (args.accumulate * count):
            raise Problem(
                f"--batch {args.batch} does not divide into --accumulate {args.accumulate} times {count} processes: "
                f"give a multiple of {args.accumulate * count}"
            )
        if not self.steps_per_epoch:
            raise Problem(
                f"--batch {args.batch} is more than the {len(self.data.training)} pictures to train on: give less"
            )

    def make_model(self):
        args, device = self.args, self.device
        torch.manual_seed(args.seed)
        model = build(**self.build_arguments).to(device)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.report = None
        if args.fused:
            try:
                self.report = str(fuse(model))
            except ValueError as error:
                raise Problem(f"{str(error).splitlines()[0]}: give --plain to train it as it is") from error
        self.model = self.shared.share(model)
        self.ways = self.shared.gather(ways(model, DTYPES[self.dtype]) if device.type == "cpu" else {})[0]
        torch.manual_seed(args.seed + self.shared.rank)  # each process draws dropouts of its own
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(min(step / self.steps, 1), args.warm_up)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == "fp16")

    def settings(self):
        """What must be the same for a training to go on, as the command line has it."""
        names = ("batch", "accumulate", "epochs", "lr", "warm_up", "weight_decay", "label_smoothing", "seed")
        chosen = {name: getattr(self.args, name) for name in (*names, "augment", "flip", "fused")}
        sizes = {"model" if name == "name" else name: value for name, value in self.build_arguments.items()}
        sizes["image_size"] = "x".join(map(str, sizes["image_size"]))
        return sizes | chosen | {"dtype": self.dtype, "pictures": self.data.fingerprint}

    def circumstances(self):
        """What may be another when a training goes on, at the cost of other rounding."""
        shared = self.shared
        return {
            "device": self.device.type,
            "processes": shared.count,
            "parallel": shared.mode or "no",
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            **self.ways,
        }

    def resume(self):
        saved, differing = self.saved, []
        for name, value in self.settings().items():
            if (before := saved["settings"].get(name)) != value:
                option = "the pictures are others" if name == "pictures" else f"{name} was {before} and is {value}"
                differing.append(option)
        if differing:
            raise Problem(
                f"{self.file} is of a training with other settings: {'; '.join(differing)}. Give what it was, or "
                "another folder to --out"
            )
        restore_training(saved, self.model, self.optimizer, self.scheduler, self.scaler, self.shared)
        self.step, self.history, self.skipped = saved["step"], saved["history"], saved["skipped"]
        self.console.say(f"going on from {self.file}, after step {self.step} of {self.steps}")
        before = saved["circumstances"]
        self.ways = same_ways(self.ways, before)
        now = self.circumstances()
        if differing := [
            f"{name} was {before.get(name)} and is {now[name]}" for name in now if before.get(name) != now[name]
        ]:
            self.console.say(f"  not to the last bit what it would have been without the break: {'; '.join(differing)}")
        self.saved = None

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def run(self):
        console, data = self.console, self.data
        console.say(
            f"{len(data.training)} pictures to train on, {len(data.held_out)} held out, {len(data.classes)} classes; "
            f"{self.build_arguments['name']}, {self.parameters:,} parameters, {self.dtype}, "
            f"{self.steps_per_epoch} steps an epoch"
        )
        if data.ignored:
            console.say(data.ignored)
        if self.report is not None:
            console.say(self.report + f"\nit runs on: {explain(torch.empty(0, device=self.device))}")
        first_step = self.step
        if first_step == self.steps:  # of which the last file may be missing
            self.save()
        with progress_bar(console, "training", lines=min(self.args.epochs, 200)) as show:
            for batches in self.training_batches():
                self.one_step(batches)
                end_of_epoch = self.step % self.steps_per_epoch == 0
                if end_of_epoch or self.step % FETCH == 0:
                    self.fetch()
                show(self.step / self.steps, None)
                if end_of_epoch:
                    show(self.step / self.steps, self.end_epoch())
                if end_of_epoch or (self.args.save_every and self.step % self.args.save_every == 0):
                    self.save()
        return self.finish(first_step)

    def loader(self, dataset, plan):
        return DataLoader(
            dataset,
            batch_sampler=plan,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.device.type != "cpu",
            generator=torch.Generator(),  # or it would draw from the one that dropouts come from
        )

    @property
    def workers(self):
        if self.args.workers is not None:
            return self.args.workers
        return 0 if self.args.data == "digits" else min(4, os.cpu_count() or 1)

    def training_batches(self):
        """For each step to come, its micro-batches."""
        args, shared = self.args, self.shared
        position = (self.step, self.steps, shared.rank, shared.count, args.accumulate)
        plan = training_plan(len(self.data.training), args.batch, args.seed, *position)
        loader = iter(self.loader(self.data.training, plan))
        for _ in range(self.step, self.steps):
            yield [next(loader) for _ in range(args.accumulate)]

    def forward(self, images, labels, problems, smoothing):
        """The sum of the losses, and of the pictures that could be read and those that were right, in one tensor."""
        self.new_problems += problems
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        dtype = DTYPES[self.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=BLANK, label_smoothing=smoothing)
        right = (logits.argmax(dim=1) == labels).sum()
        return loss, torch.stack([loss.detach(), (labels != BLANK).sum().float(), right.float()])

    def one_step(self, batches):
        self.model.train()
        sums = 0
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else self.shared.without_exchange(self.model):
                loss, numbers = self.forward(*batch, self.args.label_smoothing)
                # the processes' gradients are averaged, and are to be summed
                self.scaler.scale(loss * self.shared.count / self.args.batch).backward()
            sums = sums + numbers
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.pending.append(self.shared.sum(sums))
        self.step += 1

    def fetch(self):
        """Bring what the last steps have summed into the history, and name pictures that could not be read."""
        if self.pending:
            for loss, read, right in torch.stack(self.pending).tolist():
                self.history["losses"].append(loss / read if read else None)
                self.history["read"].append(int(read))
                self.history["right"].append(int(right))
                if read and not math.isfinite(loss):
                    raise Problem(
                        f"the loss of step {len(self.history['losses'])} is {loss}: give a lower --lr, a longer "
                        "--warm-up, or --dtype bf16 or fp32; the last checkpoint is of before that"
                    )
            self.pending.clear()
        for problems in self.shared.gather(self.new_problems):
            for name, why in problems:
                if name not in self.skipped:
                    self.skipped[name] = why
                    self.console.say(f"  skipped {name}: {why}")
        self.new_problems = []

    @torch.no_grad()
    def end_epoch(self):
        """Judge the model on the held-out pictures; the record of the epoch, in words."""
        self.model.eval()
        sums = torch.zeros(3, device=self.device)
        plan = held_out_plan(len(self.data.held_out), self.per_step, self.shared.rank, self.shared.count)
        for batch in self.loader(self.data.held_out, plan):
            sums += self.forward(*batch, 0.0)[1]
        loss, read, right = self.shared.sum(sums).tolist()
        self.fetch()
        of_training = sum(self.history["read"][-self.steps_per_epoch :])
        if not (read and of_training):
            raise Problem(f"no {'held-out ' if of_training else ''}picture of an epoch could be read")
        losses = [loss for loss in self.history["losses"][-self.steps_per_epoch :] if loss is not None]
        record = {
            "epoch": self.step // self.steps_per_epoch,
            "training_loss": sum(losses) / len(losses),
            "training_right": sum(self.history["right"][-self.steps_per_epoch :]) / of_training,
            "held_out_loss": loss / read,
            "held_out_right": right / read,
            "held_out": [int(right), int(read)],
        }
        self.history["epochs"].append(record)
        return (
            f"epoch {record['epoch']}/{self.args.epochs}, loss {record['training_loss']:.3f}, "
            f"held out {record['held_out_loss']:.3f}, {record['held_out_right']:.1%} right"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Files

    def save(self):
        """Write the checkpoint. Where that fails the one before it stays; training goes on and tries again."""
        self.fetch()
        state = training_state(self.model, self.optimizer, self.scheduler, self.scaler, self.shared)
        if not self.shared.first:
            return
        about = {"build": self.build_arguments, "classes": self.data.classes, "history": self.history}
        try:
            save(
                self.file,
                state
                | about
                | {"settings": self.settings(), "circumstances": self.circumstances()}
                | {"step": self.step, "skipped": self.skipped},
            )
            if self.step == self.steps:
                save(self.file.with_name("model.pt"), about | {"model": state["model"]})
            self.not_saved = []
        except OSError as error:
            self.not_saved.append(f"{self.file}: {error.strerror or error}")
            self.console.say(f"  NOT SAVED after step {self.step}, {self.not_saved[-1]}; the last checkpoint is kept")
        if self.step == self.steps or time.perf_counter() - self.curve_at > CURVE_EVERY:
            self.curve_at = time.perf_counter()
            self.draw()

    def draw(self):
        kind = "fused" if self.args.fused else "plain"
        title = f"{self.build_arguments['name']}, {kind}, on {self.args.data}: {self.step} of {self.steps} steps"
        path, smoothing = self.file.with_name("curve.png"), self.args.label_smoothing
        try:
            draw_curve(
                path,
                self.history["losses"],
                self.steps_per_epoch,
                self.history["epochs"],
                title=title,
                training=f"training (labels smoothed by {smoothing:g})" if smoothing else "training",
            )
        except OSError as error:
            self.console.say(f"  cannot write {path}: {error.strerror or error}")

    def finish(self, first_step):
        seconds, last = time.perf_counter() - self.started, self.history["epochs"][-1]
        right, read = last["held_out"]
        if self.skipped:
            self.console.say(f"skipped {len(self.skipped)} pictures that could not be read, named above or in --json")
        out = Path(self.args.out)
        failures = [f"the end of the training could not be saved: {self.not_saved[-1]}"] if self.not_saved else []
        if failures:
            self.console.say(f"FAILED after {seconds:.0f} s: {failures[0]}")
        else:
            self.console.say(
                f"right on {right} of the {read} held-out pictures, {right / read:.1%}, in {seconds:.0f} s"
            )
            self.console.say(f"wrote {out / 'model.pt'}, {out / 'checkpoint.pt'} and {out / 'curve.png'}")
        return self.console.finish(
            "train",
            not failures,
            seconds,
            failures=failures,
            settings=self.settings(),
            circumstances=self.circumstances(),
            classes=self.data.classes,
            parameters=self.parameters,
            training=len(self.data.training),
            first_step=first_step,
            steps=self.steps,
            losses=self.history["losses"],
            epochs=self.history["epochs"],
            accuracy=right / read,
            skipped=self.skipped,
            report=self.report,
        )


def prepare_folder(out, shared):
    """Make the folder `out`. Raises Problem if it cannot be made or written to."""
    if not shared.first:
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"cannot make the folder --out {out}: {error.strerror}") from error
    check_writable(Path(out, "checkpoint.pt.tmp"), "--out")
