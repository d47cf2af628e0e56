"""Photographs: from a file or a sample, upright, cut and scaled to what a model takes, and to what a picture shows."""

from pathlib import Path

import torch

from .console import Problem, require

__all__ = ["dark_on_light", "open_photo", "pixels", "prepared"]

SHOWN = 512  # pixels of the longer side in the picture


def open_photo(path):
    """The photograph, upright and in RGB, and its name."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path.startswith("sample:"):
        return sample(path.removeprefix("sample:")), f"scikit-learn's {path.removeprefix('sample:')}"
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB"), Path(path).name
    except FileNotFoundError as error:
        raise Problem(f"there is no file {path}; sample:china and sample:flower are photographs to try") from error
    except UnidentifiedImageError as error:
        raise Problem(f"{path} is no image that Pillow can read") from error
    except OSError as error:
        raise Problem(f"cannot read {path}: {error}") from error


def sample(name):
    """scikit-learn's photographs, and the first of its held-out images of a digit."""
    from PIL import Image

    require("demo", ("sklearn", "scikit-learn"))
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    if name.isdecimal() and len(name) == 1:
        from .demo import digits

        *_, images, labels = digits(torch.device("cpu"))
        ink = (images[labels == int(name)][0, 0] + 1) / 2
        return Image.fromarray((255 * (1 - ink)).round().byte().numpy()).convert("RGB")
    raise Problem(f"there is no sample:{name}, but sample:china, sample:flower and the digits sample:0 to sample:9")


def cropped(photo, height, width):
    """The largest part in the middle of the photograph that has the shape height x width."""
    scale = min(photo.width / width, photo.height / height)
    wide, high = round(width * scale), round(height * scale)
    left, top = (photo.width - wide) // 2, (photo.height - high) // 2
    return photo.crop((left, top, left + wide, top + high))


def prepared(photo, shape, mean, std):
    """The image (channels, height, width) for the model, and what to show of it (height, width, 3) in [0, 1]."""
    from PIL import Image

    channels, height, width = shape
    photo = cropped(photo, height, width)
    small = pixels(photo.resize((width, height), Image.Resampling.BICUBIC))
    shrink = max(1, max(photo.size) / SHOWN)
    shown = photo.resize((round(photo.width / shrink), round(photo.height / shrink)), Image.Resampling.LANCZOS)
    small = small if channels == 3 else small.mean(dim=-1, keepdim=True).expand(-1, -1, channels)
    return ((small - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1), pixels(shown).numpy()


def pixels(image):
    """(height, width, 3) in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).float() / 255


def dark_on_light(photo):
    """The photograph of something drawn or written, turned into its negative where it is light on dark."""
    from PIL import ImageOps

    grey = pixels(photo).mean(dim=-1)
    return ImageOps.invert(photo) if grey.median() < (grey.min() + grey.max()) / 2 else photo
