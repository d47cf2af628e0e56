"""What `vitriton train` trains on: a folder of class folders, or scikit-learn's digits, and in which order.

Everything is a function of the seed, the epoch and the number of the picture: which pictures are held out, the order of
an epoch, how a picture is cropped and turned over. So a training goes on after a kill from two numbers, whatever
processes and loaders share the work. A picture that cannot be read becomes a blank one with the label BLANK, which
counts for nothing in loss and accuracy, and its name and the reason come with it.
"""

import hashlib
import math
import random
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .console import Problem
from .demo import digits, moved

__all__ = ["BLANK", "Data", "Digits", "Pictures", "digits_data", "folder_data", "held_out_plan", "training_plan"]

BLANK = -100  # F.cross_entropy ignores it
CROP, RATIO = 0.35, 4 / 3  # a crop has at least this share of the area, and sides at most so different


class Data:
    """The pictures to train on and those that are held out: two Datasets, the names of the classes, what was ignored.

    An item of either is asked for by (epoch, index), and is (image (channels, height, width) in [-1, 1], label, name of
    the picture and why it cannot be read, or None). Index -1 is a blank, which fills a batch up.
    """

    def __init__(self, training, held_out, classes, names, ignored=""):
        self.training, self.held_out, self.classes, self.ignored = training, held_out, classes, ignored
        self.fingerprint = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# A folder of class folders


def folder_data(folder, held_out, size, seed, augment, flip):
    """`folder` holds a folder of pictures for each class. `held_out` is the share of each class that is held out, or
    another folder of the same classes. `size` is (height, width). Raises Problem, saying what is amiss.
    """
    classes, pictures, ignored = scan(folder)
    if isinstance(held_out, float):
        rest, held = split(pictures, held_out)
    else:
        others, held, more = scan(held_out)
        if others != classes:
            differing = sorted(set(classes) ^ set(others))
            raise Problem(
                f"{folder} and --held-out {held_out} have other classes: {', '.join(differing)} are in one only"
            )
        rest, ignored = pictures, ignored + more
    names = [f"{label} {path}" for part in (rest, held) for path, label in part]
    return Data(
        Pictures(folder, rest, size, seed if augment else None, flip),
        Pictures(folder if isinstance(held_out, float) else held_out, held, size),
        classes,
        names,
        ignored,
    )


def scan(folder):
    """The names of the class folders in `folder`, its pictures as (path from there, number of the class), both sorted,
    and what was ignored, in words. Whether a picture can be read is seen when it is."""
    from PIL import Image

    root = Path(folder)
    if not root.is_dir():
        raise Problem(f"{folder} is no folder: give a folder with one folder of pictures for each class, or digits")
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    try:
        classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        files = [
            [path for path in sorted((root / name).rglob("*")) if path.is_file() and not path.name.startswith(".")]
            for name in classes
        ]
    except OSError as error:
        raise Problem(f"cannot read {error.filename}: {error.strerror}") from error
    pictures = [
        (path.relative_to(root).as_posix(), label)
        for label, paths in enumerate(files)
        for path in paths
        if path.suffix.lower() in endings
    ]
    if not pictures:
        raise Problem(
            f"{folder} has no pictures in class folders: each class needs a folder of its own with pictures that "
            "Pillow opens (.jpg, .png, .webp, ...)"
        )
    if empty := [name for label, name in enumerate(classes) if label not in {label for _, label in pictures}]:
        raise Problem(f"{folder} has class folders without a picture: {', '.join(empty)}; fill or remove them")
    if len(classes) == 1:
        raise Problem(
            f"{folder} has one class only, {classes[0]}: there is nothing to tell apart; at least 2 are needed"
        )
    if {name.lower() for name in classes} <= {"train", "training", "val", "valid", "validation", "test"}:
        raise Problem(
            f"the class folders of {folder} are {' and '.join(classes)}, which looks like a split: give the folder to "
            "train on, and the other as --held-out"
        )
    others = [path for paths in files for path in paths if path.suffix.lower() not in endings]
    kinds = sorted({path.suffix.lower() or path.name for path in others})
    count = f"{len(others)} file" + ("s that are no pictures" if len(others) > 1 else " that is no picture")
    ignored = f"ignored in {folder}: {count} by the name ({', '.join(kinds[:8])})"
    return classes, pictures, ignored if others else ""


def split(pictures, share):
    """Those to train on and those to hold out: of each class that share, at least one, chosen by the hashes of their
    paths, so that neither the order on the disk nor pictures that are added later change the choice for the others."""
    by_class, held_out = {}, set()
    for path, label in pictures:
        by_class.setdefault(label, []).append(path)
    for paths in by_class.values():
        paths.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
        held_out.update(paths[: min(max(1, round(share * len(paths))), len(paths) - 1)])
    parts = [], []
    for path, label in pictures:
        parts[path in held_out].append((path, label))
    return parts


class Pictures(Dataset):
    """Pictures (path from `root`, label), read when they are asked for; with a `seed`, cropped and turned at random."""

    def __init__(self, root, pictures, size, seed=None, flip=True):
        self.root, self.pictures, self.size, self.seed, self.flip = str(root), pictures, tuple(size), seed, flip

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, key):
        epoch, index = key
        blank = torch.zeros(3, *self.size)
        if index < 0:
            return blank, BLANK, None
        path, label = self.pictures[index]
        draw = None if self.seed is None else random.Random(f"{self.seed} {epoch} {path}")
        try:
            return read(Path(self.root, path), self.size, draw, self.flip), label, None
        except Exception as error:  # decoders raise whatever they like
            return blank, BLANK, (path, str(error) or type(error).__name__)


def read(path, size, draw, flip):
    """The picture in the file `path`, (3, height, width) in [-1, 1]: the largest part in its middle that has that
    shape; with a random.Random `draw`, some other part of it, and if `flip` every other time its mirror image."""
    from PIL import Image, ImageOps

    height, width = size
    with Image.open(path) as file:
        file.draft("RGB", (2 * width, 2 * height))  # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16"):
            image = image.point(lambda value: value / 256).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    w, h = min(image.width, image.height * width / height), min(image.height, image.width * height / width)
    if draw is None:
        left, top = (image.width - w) / 2, (image.height - h) / 2
    else:
        area, ratio = draw.uniform(CROP, 1), math.exp(draw.uniform(-math.log(RATIO), math.log(RATIO)))
        w = min(image.width, w * math.sqrt(area * ratio))
        h = min(image.height, h * math.sqrt(area / ratio))
        left, top = draw.uniform(0, image.width - w), draw.uniform(0, image.height - h)
    box = left, top, min(left + w, image.width), min(top + h, image.height)
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if draw is not None and draw.random() < 0.5 and flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Scikit-learn's digits


class Digits(Dataset):
    """Images (n,1,8,8) and labels; with a `seed`, moved a little as in the demo."""

    def __init__(self, images, labels, seed=None):
        self.images, self.labels, self.seed = images, labels.tolist(), seed

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        epoch, index = key
        if index < 0:
            return torch.zeros_like(self.images[0]), BLANK, None
        image = self.images[index]
        if self.seed is not None:
            image = moved(image[None], _generator(self.seed, epoch, index))[0]
        return image, self.labels[index], None


def digits_data(seed, augment):
    """The demo's digits and its held-out fifth."""
    images, labels, held_out, held_out_labels = digits(torch.device("cpu"))
    training = Digits(images, labels, seed if augment else None)
    return Data(training, Digits(held_out, held_out_labels), [str(digit) for digit in range(10)], ["digits"])


# ---------------------------------------------------------------------------------------------------------------------
# The order


def training_plan(pictures, batch, seed, first_step, last_step, rank=0, processes=1, accumulate=1):
    """The micro-batches of this process, lists of (epoch, index): `accumulate` for each optimizer step from
    `first_step` until before `last_step`. An epoch has pictures // batch steps, in an order of its own; the few
    pictures that it leaves over are others each time."""
    steps = pictures // batch
    for step in range(first_step, last_step):
        epoch, start = step // steps, step % steps * batch
        if step == first_step or start == 0:
            order = torch.randperm(pictures, generator=_generator(seed, epoch))
        parts = order[start : start + batch].view(accumulate, processes, -1)
        for part in parts[:, rank].tolist():
            yield [(epoch, index) for index in part]


def held_out_plan(pictures, batch, rank=0, processes=1):
    """The batches of this process over all pictures, equally many for each process: the last are filled with blanks."""
    batch = min(batch, -(-pictures // processes))
    indices = torch.arange(-(-pictures // (batch * processes)) * batch * processes)
    indices[pictures:] = -1
    return [[(0, index) for index in part] for part in indices.view(-1, processes, batch)[:, rank].tolist()]


def collate(items):
    """Images (b, channels, height, width), labels (b,), and [(name, why it cannot be read)]."""
    images, labels, problems = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), [problem for problem in problems if problem is not None]


def _generator(*numbers):
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
