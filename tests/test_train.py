"""`vitriton train`: what it learns and writes, that it goes on after a kill to the last bit, what it says of trouble.

Its pictures are drawn here: noise around one colour a class, a few of them broken.
"""

import json
import os
import subprocess
import sys
import time
from io import StringIO
from itertools import chain
from pathlib import Path

import pytest
import torch
from vitriton.kernels import packed
from vitriton.vit import ViT, checkpoint, train
from vitriton.vit.checkpoint import load_trained, read_checkpoint, save
from vitriton.vit.cli import main
from vitriton.vit.console import Console, progress_bar
from vitriton.vit.data import BLANK, Pictures, held_out_plan, read, scan, split, training_plan

pytestmark = pytest.mark.usefixtures("unguarded", "native")

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
for _package in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(_package, reason=f"{_package}, which `vitriton train` needs, is not installed")

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}
BROKEN = {"red/03.jpg": 300, "blue/04.png": 40, "green/05.jpg": 0}  # and how many bytes are left of them
SMALL = ["--image-size", "16", "--patch-size", "4", "--dim", "32", "--depth", "2", "--heads", "2", "--model", "tiny"]
SHORT = ["--batch", "8", "--epochs", "3", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of three class folders with 12 pictures each, three of which are broken, and a file that is none."""
    root, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(12):
            noise = torch.randn(20, 26, 3, generator=generator) * 40 + torch.tensor(colour)
            image = Image.frombytes("RGB", (26, 20), bytes(noise.clamp(0, 255).byte().flatten().tolist()))
            image.save(root / name / f"{i:02}.{'jpg' if i % 2 else 'png'}")
    for name, size in BROKEN.items():
        (root / name).write_bytes((root / name).read_bytes()[:size])
    (root / "blue" / "notes.txt").write_text("no picture")
    return root


def run(capsys, *args):
    """The exit code and what was written to stdout and stderr."""
    code = main(["train", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# processes that measure what is faster while others run may each find another, and then not give the same bits
CHOSEN = {
    "VITRITON_CPU_LINEAR": "pytorch",
    "VITRITON_CPU_LINEAR_BACKWARD": "pytorch",
    "VITRITON_CPU_ATTENTION": "flash",
}


def in_a_process(*args, torchrun=False):
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VITRITON_BACKEND")}
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if torchrun else []
    return {
        "args": [sys.executable, *starter, "-m", "vitriton.vit.cli", "train", *map(str, args)],
        "env": kept | {"OMP_NUM_THREADS": "1"} | CHOSEN,
        "text": True,
    }


def equal(a, b):
    """Whether two checkpoints are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_gradients(out, other):
    """That AdamW has the same averages of gradients: steps and losses do not tell if all are twice as large."""
    states = [read_checkpoint(folder / "checkpoint.pt")["optimizer"]["state"] for folder in (out, other)]
    averages = [{name: state["exp_avg"] for name, state in each.items()} for each in states]
    assert max(average.abs().max() for average in averages[1].values()) > 1e-3
    torch.testing.assert_close(*averages, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What it learns and writes


def test_trains_on_pictures(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    code, text, _ = run(capsys, pictures, "--out", out, "--json", tmp_path / "log.json", *SMALL, *SHORT)
    assert code == 0
    record = json.loads((tmp_path / "log.json").read_text())
    assert record["ok"] and record["classes"] == list(COLOURS) and record["training"] == 30
    assert len(record["losses"]) == 9 and record["losses"][-1] < 0.8 * record["losses"][0]
    assert record["accuracy"] > 0.8
    assert "8 PreNorm" not in text and "fused 10 blocks" in text
    assert "ignored in" in text and "1 file that is no picture by the name (.txt)" in text
    assert record["skipped"].keys() == BROKEN.keys()
    assert all(text.count(f"skipped {name}: ") == 1 for name in BROKEN) and "skipped 3 pictures" in text
    assert Image.open(out / "curve.png").width > 500
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "curve.png", "model.pt"]

    plain = ViT(
        **{"image_size": 16, "patch_size": 4, "num_classes": 3, "dim": 32, "depth": 2, "heads": 2},
        mlp_dim=64,
        dim_head=16,
    )
    plain.load_state_dict(torch.load(out / "checkpoint.pt")["model"])
    model, classes = load_trained(out / "model.pt")
    assert type(model) is ViT and classes == list(COLOURS)
    _, held_out = split(scan(pictures)[1], 0.2)
    held_out = Pictures(pictures, held_out, (16, 16))
    images, labels, problems = zip(*(held_out[0, i] for i in range(len(held_out))), strict=True)
    with torch.no_grad():
        logits = model(torch.stack(images))
        assert torch.equal(logits, plain.eval()(torch.stack(images)))
    right = (logits.argmax(dim=1) == torch.tensor(labels)).sum().item()
    assert [right, sum(problem is None for problem in problems)] == record["epochs"][-1]["held_out"]


def test_fused_and_plain_have_the_same_losses(tmp_path, capsys):
    """On digits, step by step: 44 steps, in which rounding adds up; test_training.py says how much it may."""
    losses = []
    for how in ([], ["--plain"]):
        log = tmp_path / "log.json"
        args = ("digits", "--out", tmp_path / f"out{how}", "--json", log, "--epochs", "2", "--depth", "1", *how)
        assert run(capsys, *args)[0] == 0
        losses.append(torch.tensor(json.loads(log.read_text())["losses"]))
    assert len(losses[0]) == 44
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert not torch.equal(*losses)  # or both were plain


def test_accumulation_and_half_precision(pictures, tmp_path, capsys):
    losses = {}
    for name, more in {"": [], "parts": ["--accumulate", "4"], "bf16": ["--dtype", "bf16"]}.items():
        log = tmp_path / f"{name}.json"
        args = (pictures, "--out", tmp_path / f"out{name}", "--json", log, *SMALL, *SHORT, *more)
        assert run(capsys, *args)[0] == 0
        losses[name] = torch.tensor(json.loads(log.read_text())["losses"])
    torch.testing.assert_close(losses["parts"], losses[""], rtol=1e-4, atol=1e-5)
    assert_same_gradients(tmp_path / "outparts", tmp_path / "out")
    torch.testing.assert_close(losses["bf16"], losses[""], rtol=0.05, atol=0.05)
    assert not torch.equal(losses["bf16"], losses[""])


def test_timm(pictures, tmp_path, capsys):
    pytest.importorskip("timm", reason="timm is not installed")
    args = ("--model", "timm:vit_tiny_patch16_224", "--plain", *SMALL[:-2], *SHORT, "--out", tmp_path)
    code, text, _ = run(capsys, pictures, *args)
    assert code == 0 and "timm:vit_tiny_patch16_224, " in text
    model, _ = load_trained(tmp_path / "model.pt")
    assert type(model).__module__ == "timm.models.vision_transformer" and len(model.blocks) == 2


def test_every_option_of_the_sizes():
    sizes = {"image_size": (32, 32), "channels": 3, "num_classes": 5}
    assert (
        checkpoint.build("ti", **sizes, patch_size=8, depth=1, dim=48, heads=3).transformer.layers[0][0].fn.heads == 3
    )
    assert checkpoint.build("s", **sizes, depth=1).transformer.layers[0][1].fn.net[0].out_features == 1536


# ---------------------------------------------------------------------------------------------------------------------
# After a kill


def test_a_killed_training_goes_on_to_the_last_bit(pictures, tmp_path):
    """Killed with SIGKILL: with dropout, a scaler's scale, micro-batches and other numbers of loaders, everything in
    the last checkpoint is what it is without the kill."""
    how = [
        *SMALL,
        *SHORT[:2],
        "--epochs",
        "8",
        "--dropout",
        "0.1",
        "--dtype",
        "fp16",
        "--accumulate",
        "2",
        "--lr",
        "0.01",
    ]
    how += ["--device", "cpu", "--save-every", "2"]
    whole = subprocess.Popen(**in_a_process(pictures, "--out", tmp_path / "whole", *how, "--workers", "0"))
    file, log = tmp_path / "killed" / "checkpoint.pt", tmp_path / "log"
    with open(log, "w") as stdout:
        killed = in_a_process(pictures, "--out", file.parent, *how, "--workers", "1")
        process = subprocess.Popen(**killed, stdout=stdout)
        deadline = time.monotonic() + 600
        while "epoch 3/8" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.wait()
    stopped_at = read_checkpoint(file)["step"]
    assert 0 < stopped_at < 24
    (file.parent / "checkpoint.pt.tmp").write_bytes(b"what a kill in the middle of writing leaves")
    resume = in_a_process(pictures, "--out", file.parent, *how, "--resume", "--workers", "0")
    resumed = subprocess.run(**resume, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert f"after step {stopped_at} of 24" in resumed.stdout and "last bit" not in resumed.stdout
    assert whole.wait(600) == 0
    expected, result = read_checkpoint(tmp_path / "whole" / "checkpoint.pt"), read_checkpoint(file)
    assert [name for name in expected if not equal(expected[name], result[name])] == []
    assert sorted(path.name for path in file.parent.iterdir()) == ["checkpoint.pt", "curve.png", "model.pt"]


def test_resume_from_the_beginning_and_at_the_end(pictures, tmp_path, capsys):
    args = (pictures, "--out", tmp_path, *SMALL, *SHORT, "--resume")
    code, text, _ = run(capsys, *args)
    assert code == 0 and "yet: starting from the beginning" in text
    (tmp_path / "model.pt").unlink()
    code, text, _ = run(capsys, *args)
    assert code == 0 and "after step 9 of 9" in text and (tmp_path / "model.pt").exists()


def test_resume_takes_the_same_ways_on_a_cpu(pictures, tmp_path, capsys, monkeypatch):
    """Which product of matrices is the fastest is measured in each process, and each gives other bits."""
    args, variable = (pictures, "--out", tmp_path, *SMALL, *SHORT), "VITRITON_CPU_LINEAR"
    taken, chosen = [], packed._choice
    monkeypatch.setattr(packed, "_choice", lambda *a: taken.append(a[-1]) or chosen(*a))
    monkeypatch.setattr(packed, "forced", "pytorch")
    monkeypatch.setattr(train, "save", lambda path, content: content.get("step") == 3 and save(path, content))
    monkeypatch.setattr(train.Training, "finish", lambda *_: 0)
    assert run(capsys, *args)[0] == 0
    assert read_checkpoint(tmp_path / "checkpoint.pt")["circumstances"][variable] == "pytorch"
    monkeypatch.setattr(packed, "forced", "auto")
    monkeypatch.setattr(packed, "choice", lambda *_: packed.Choice("onednn", False, "it was faster this time"))
    code, text, _ = run(capsys, *args, "--resume")
    assert code == 0 and "after step 3 of 9" in text and "last bit" not in text
    assert set(taken) == {"pytorch"} and packed.forced == "auto"
    monkeypatch.setattr(packed, "forced", "onednn")
    code, text, _ = run(capsys, *args, "--resume")
    assert code == 0 and f"not to the last bit what it would have been without the break: {variable} was " in text


def test_resume_with_other_settings_is_refused(pictures, tmp_path, capsys):
    args = (pictures, "--out", tmp_path, *SMALL, *SHORT)
    assert run(capsys, *args)[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    code, _, error = run(capsys, *args)
    assert code == 2 and "checkpoint.pt is there already: go on from it with --resume" in error
    code, _, error = run(capsys, *args, "--resume", "--lr", "0.5", "--depth", "3", "--plain", "--held-out", "0.3")
    assert code == 2
    for text in (
        "lr was 0.001 and is 0.5",
        "depth was 2 and is 3",
        "fused was True and is False",
        "pictures are others",
    ):
        assert text in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    (tmp_path / "checkpoint.pt").write_bytes(before[: len(before) // 2])
    code, _, error = run(capsys, *args, "--resume")
    assert code == 2 and "checkpoint.pt is no checkpoint of `vitriton train`, or is damaged" in error


# ---------------------------------------------------------------------------------------------------------------------
# Disks that are full


FILL = """
import resource, signal, sys, torch
from vitriton.vit.checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(sys.argv[1], {"x": torch.zeros(10**6)})
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on the size of files to set on Windows")
def test_a_write_that_fails_midway_leaves_the_file_before(tmp_path):
    save(tmp_path / "a.pt", {"x": torch.ones(3)})
    process = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path / "a.pt")], capture_output=True, text=True, timeout=100
    )
    assert process.stdout == "File too large\n", process.stderr
    assert torch.equal(read_checkpoint(tmp_path / "a.pt")["x"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_an_interruption_anywhere_leaves_the_file_before(where, tmp_path, monkeypatch):
    save(tmp_path / "a.pt", {"x": torch.ones(3)})

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((torch, "save") if where == "write" else (os, where)), stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.pt", {"x": torch.zeros(3)})
    assert torch.equal(read_checkpoint(tmp_path / "a.pt")["x"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_training_goes_on_while_the_disk_is_full(pictures, tmp_path, capsys, monkeypatch):
    args, full = (pictures, "--out", tmp_path, *SMALL, *SHORT), [False, True, True]

    def maybe_full(path, content):
        if full.pop(0):
            raise OSError(28, "No space left on device")
        save(path, content)

    monkeypatch.setattr(train, "save", maybe_full)
    code, text, _ = run(capsys, *args)
    assert code == 1 and text.count("NOT SAVED") == 2 and "NOT SAVED after step 6" in text
    assert "FAILED" in text and "No space left on device" in text and "wrote" not in text
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    monkeypatch.undo()
    code, text, _ = run(capsys, *args, "--resume")
    assert code == 0 and "after step 3 of 9" in text
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 9


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(parallel, pictures, tmp_path, capsys):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no torch.distributed with gloo")
    how = (pictures, *SMALL, *SHORT, "--accumulate", "2", "--json")
    two = subprocess.run(
        **in_a_process(*how, tmp_path / "two.json", "--out", tmp_path / "two", "--parallel", parallel, torchrun=True),
        capture_output=True,
        timeout=300,
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("epoch 3/3") == 1 and f"2 processes, {parallel}" in two.stdout
    assert run(capsys, *how, tmp_path / "one.json", "--out", tmp_path / "one")[0] == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]))
    assert two["skipped"] == one["skipped"] and two["accuracy"] == one["accuracy"]
    (one, _), (two, _) = (load_trained(tmp_path / name / "model.pt") for name in ("one", "two"))
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=1e-4, atol=1e-5)
    assert_same_gradients(tmp_path / "two", tmp_path / "one")
    # and the checkpoint of two processes loads into one
    code, text, _ = run(capsys, *how, tmp_path / "one.json", "--out", tmp_path / "two", "--resume")
    assert code == 0 and "not to the last bit what it would have been without the break: " in text
    assert "processes was 2 and is 1" in text


def flat(lists):
    return list(chain.from_iterable(lists))


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_plan(processes, accumulate):
    """Whatever shares the work, a step has the same pictures, each once in an epoch; and it can start anywhere."""
    expected = list(training_plan(21, 8, 0, 0, 6))
    assert all(len(set(indices)) == 16 for indices in (flat(expected[:2]), flat(expected[2:4])))
    assert [{epoch for epoch, _ in batch} for batch in expected] == [{0}, {0}, {1}, {1}, {2}, {2}]
    assert expected[0] != [(0, index) for _, index in expected[2]]
    parts = [list(training_plan(21, 8, 0, 3, 6, rank, processes, accumulate)) for rank in range(processes)]
    for step in range(3):
        own = slice(step * accumulate, (step + 1) * accumulate)
        assert sorted(flat(flat(part[own]) for part in parts)) == sorted(expected[3 + step])
    held_out = [held_out_plan(21, 8, rank, processes) for rank in range(processes)]
    assert len({tuple(map(len, part)) for part in held_out}) == 1
    indices = [index for part in held_out for batch in part for _, index in batch]
    assert sorted(set(indices)) == [*([-1] if len(indices) > 21 else []), *range(21)]
    assert list(training_plan(21, 8, 1, 0, 1)) != expected[:1]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_split_is_stable():
    """Every class gives its share, whatever the order; pictures that are added later change nothing for the others."""
    pictures = [(f"{name}/{i}.jpg", label) for label, name in enumerate("ab") for i in range(50)]
    training, held_out = split(pictures, 0.2)
    assert sorted(training + held_out) == sorted(pictures)
    assert [sum(label == c for _, label in held_out) for c in (0, 1)] == [10, 10]
    assert sorted(split(pictures[::-1], 0.2)[1]) == sorted(held_out)
    more = split([*pictures, ("a/new.jpg", 0)], 0.2)[1]
    assert len(set(held_out) - set(more)) <= 1
    assert split([("a/1.jpg", 0), ("b/1.jpg", 1), ("b/2.jpg", 1)], 0.9)[0][0] == ("a/1.jpg", 0)


def make(mode, pixel, size=(40, 20)):
    return Image.new(mode, size, pixel)


FORMS = {
    "grey": (make("L", 128), "png", (128, 128, 128)),
    "16 bits": (make("I;16", 32768), "png", (128, 128, 128)),
    "palette": (make("RGB", (255, 0, 0)).convert("P"), "png", (255, 0, 0)),
    "transparent": (make("RGBA", (0, 0, 0, 0)), "png", (255, 255, 255)),
    "half transparent": (make("RGBA", (0, 0, 0, 128)), "png", (127, 127, 127)),
    "CMYK": (make("CMYK", (0, 255, 255, 0)), "tiff", (255, 0, 0)),
    "bilevel": (make("1", 1), "png", (255, 255, 255)),
}


@pytest.mark.parametrize(("image", "ending", "expected"), FORMS.values(), ids=FORMS.keys())
def test_reads_every_form_of_picture(image, ending, expected, tmp_path):
    path = tmp_path / f"a.{ending}"
    image.save(path)
    pixels = read(path, (4, 6), None, False)
    assert pixels.shape == (3, 4, 6)
    torch.testing.assert_close((pixels[:, 1, 1] + 1) * 127.5, torch.tensor(expected).float(), atol=1.5, rtol=0)


def test_middle_and_orientation(tmp_path):
    """The middle of a wide picture; and a picture that a camera took on its side stands upright."""
    image = make("RGB", "blue", (60, 20))
    image.paste("red", (20, 0, 40, 20))
    image.save(tmp_path / "wide.png")
    middle = read(tmp_path / "wide.png", (20, 20), None, False)
    assert (middle[0] == 1).all() and (middle[2] == -1).all()

    image = make("RGB", "blue", (20, 40))
    image.paste("red", (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read(tmp_path / "turned.png", (40, 20), None, False)
    assert (turned[2, :15] == 1).all() and (turned[0, 25:] == 1).all()


def test_crops_are_drawn_by_seed_epoch_and_picture(pictures):
    files = scan(pictures)[1]
    plain, one, same, other = (Pictures(pictures, files, (16, 16), seed) for seed in (None, 0, 0, 1))
    assert torch.equal(plain[0, 0][0], plain[1, 0][0])
    assert torch.equal(one[0, 0][0], same[0, 0][0])
    for image in (one[1, 0][0], other[0, 0][0], plain[0, 0][0]):
        assert not torch.equal(one[0, 0][0], image)
    image, label, problem = plain[0, [path for path, _ in files].index("red/03.jpg")]
    assert not image.any() and label == BLANK and problem[0] == "red/03.jpg"
    assert plain[0, -1][1:] == (BLANK, None)


# ---------------------------------------------------------------------------------------------------------------------
# Trouble


def folder(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make("RGB", "red").save(path) if path.suffix == ".png" else path.write_text("")
    return root


TROUBLE = [
    ((), [], "has no pictures in class folders"),
    (("a.png",), [], "has no pictures in class folders"),
    (("a/1.txt", "b/2.txt"), [], "has no pictures in class folders"),
    (("a/1.png", "a/2.png"), [], "has one class only, a: there is nothing to tell apart"),
    (("a/1.png", "b/x.txt"), [], "class folders without a picture: b"),
    (("train/1.png", "val/1.png"), [], "are train and val, which looks like a split: give the folder"),
    (("a/1.png", "b/1.png"), [], "--batch 64 is more than the 2 pictures to train on: give less"),
    (("a/1.png", "b/1.png"), ["--batch", "3", "--accumulate", "2"], "--batch 3 does not divide into --accumulate 2"),
    (
        ("a/1.png", "b/1.png"),
        ["--batch", "1", "--image-size", "30"],
        "image_size 30x30 does not divide into patches of patch_size 16x16",
    ),
    (("a/1.png", "b/1.png"), ["--held-out", "nowhere"], "nowhere is no folder"),
    (("a/1.png", "b/1.png"), ["--batch", "1", "--device", "gpu"], "--device gpu is none of"),
    (("a/1.png", "b/1.png"), ["--batch", "1", "--parallel", "ddp"], "torchrun has not started this one"),
    (("a/1.png", "b/1.png"), ["--batch", "1", *SMALL, "--out", "a/1.png/x"], "cannot make the folder --out"),
    (("a/1.png", "b/1.png"), ["--json", "no/such/folder/a.json"], "cannot write --json"),
    (("a/1.png", "b/1.png"), ["--batch", "1", "--model", "timm:vit_tiny_patch16"], "timm has no model"),
    (
        ("a/1.png", "b/1.png"),
        ["--batch", "1", "--model", "timm:vit_tiny_patch16_224", "--image-size", "40"],
        "images of 40x40 do not divide into patches of 16x16",
    ),
]


@pytest.mark.parametrize(("files", "args", "message"), TROUBLE, ids=[message[:40] for *_, message in TROUBLE])
def test_finds_what_is_wrong_before_it_trains(files, args, message, tmp_path, capsys, monkeypatch):
    if "timm" in str(args):
        pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.chdir(folder(tmp_path / "data", *files) if files else tmp_path)
    monkeypatch.setattr(train.Training, "run", lambda _: pytest.fail("it trained"))
    code, _, error = run(capsys, ".", "--out", "out", *args)
    assert code == 2 and error.startswith("vitriton train: error: ") and message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--held-out", "1.5", "1.5 is not between 0 and 1"),
        ("--warm-up", "1", "1 is not from 0 to 1, or is 1"),
        ("--weight-decay", "-1", "-1 is less than 0"),
        ("--model", "tinier", "'tinier' is none of tiny, ti"),
        ("--workers", "-1", "-1 is less than 0"),
    ],
)
def test_bad_arguments(option, value, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits", f"{option}={value}"])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_no_picture_can_be_read(tmp_path, capsys):
    data = folder(tmp_path / "data", *(f"{name}/{i}.jpg" for name in "ab" for i in range(8)))
    code, text, error = run(capsys, data, "--out", tmp_path / "out", *SMALL, *SHORT)
    assert code == 2 and "no picture of an epoch could be read" in error and text.count("skipped") == 12


def test_a_loss_that_is_no_number_ends_the_training(pictures, tmp_path, capsys):
    code, _, error = run(capsys, pictures, "--out", tmp_path, *SMALL, *SHORT, "--lr", "1e30")
    assert code == 2 and "give a lower --lr" in error
    assert not (tmp_path / "checkpoint.pt").exists()


def test_what_is_said_goes_above_the_bar():
    class Terminal(StringIO):
        def isatty(self):
            return True

    console = Console()
    console.stream = Terminal()
    with progress_bar(console, "training") as show:
        show(0.5, "half of it")
        console.say("meanwhile [this]")
    console.say("after")
    text = console.stream.getvalue()
    assert "meanwhile [this]\n" in text and "half of it" in text and text.endswith("after\n")
