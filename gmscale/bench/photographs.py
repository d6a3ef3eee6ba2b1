"""JPEGs for the input pipelines to read, and the same ones in the form that each pipeline reads."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gmscale.data import DataConfig, open_index, open_split
from gmscale.data.index import read
from gmscale.data.order import epoch_order
from gmscale.data.tars.writer import write_shard
from gmscale.errors import UsageError

Sample = tuple[bytes, int]
"""An encoded image and its class."""

# ImageNet's images are 469 x 387 on average and take 0.6 bytes a pixel, which smooth crops of a few photographs
# reach with some grain. The bytes matter: undoing the Huffman code is a good part of decoding.
_SIZES = ((500, 375), (500, 375), (500, 333), (375, 500), (400, 350))
_CROPPED = (0.6, 1.0)  # share of the photograph's width or height
_QUALITY = 95
_GRAIN = 8.0  # standard deviation of the luminance, out of 255
_CLASSES = 10
_SHARDS = 4  # each copy of a set has as many shards


def photographs(count: int) -> list[Sample]:
    """Return `count` JPEGs of random parts of scikit-image's and scikit-learn's photographs, always the same."""
    try:
        from skimage import data as skimage_data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise UsageError(
            f'{error.name} has the photographs and is missing; pip install "gmscale[embedded]", or name a --source'
        ) from error
    whole = [getattr(skimage_data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    whole += [skimage_data.stereo_motorcycle()[0], *map(load_sample_image, ("china.jpg", "flower.jpg"))]
    images = [Image.fromarray(pixels).convert("RGB") for pixels in whole]
    rng = np.random.default_rng(0)
    return [(_jpeg(_part(images[rng.integers(len(images))], rng)), number % _CLASSES) for number in range(count)]


def _part(image: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    width, height = _SIZES[rng.integers(len(_SIZES))]
    scale = min(image.width / width, image.height / height) * rng.uniform(*_CROPPED)
    w, h = int(width * scale), int(height * scale)
    x, y = int(rng.integers(image.width - w + 1)), int(rng.integers(image.height - h + 1))
    part = image.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + w, y + h))
    grain = _GRAIN * rng.standard_normal((height, width, 1), dtype=np.float32)
    return (np.asarray(part) + grain).clip(0, 255).astype(np.uint8)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def from_shards(source: str, split: str, count: int) -> list[Sample]:
    """Return the first `count` JPEGs of a random order of a split; raise UsageError if it has fewer."""
    config = DataConfig(source=source, train_split=split)
    index = open_index(open_split(config, split), config.label, Path(config.cache_dir))
    found: list[Sample] = []
    for i in epoch_order(index.lengths, seed=0, epoch=0):
        encoded = read(index, int(i)) if index.label[i] >= 0 else b""
        if encoded.startswith(b"\xff\xd8"):  # not all of the pipelines read anything else
            found.append((encoded, int(index.label[i])))
        if len(found) == count:
            return found
    raise UsageError(f"--size is {count}, but split {split!r} of {source} has {len(found)} JPEGs")


def facts(samples: list[Sample]) -> dict[str, Any]:
    """Return how many images there are, and their mean size."""
    sizes = [Image.open(io.BytesIO(encoded)).size for encoded, _ in samples]
    return {
        "images": len(samples),
        "mean_kb": mean(len(encoded) for encoded, _ in samples) / 1e3,
        "mean_width": mean(width for width, _ in sizes),
        "mean_height": mean(height for _, height in sizes),
    }


class Copies:
    """Copies of the same JPEGs in one directory, each made when a pipeline first asks for it."""

    def __init__(self, samples: list[Sample], directory: Path) -> None:
        self._samples, self._directory = samples, directory

    @cached_property
    def shards(self) -> Path:
        """Webdataset shards with timm's _info.json; the split is `train`."""
        directory = self._new("shards")
        parts = np.array_split(np.arange(len(self._samples)), _SHARDS)
        names = [f"train-{number:04}.tar" for number in range(_SHARDS)]
        for name, part in zip(names, parts, strict=True):
            write_shard(directory / name, (self._webdataset_sample(i) for i in part.tolist()))
        lengths = [len(part) for part in parts]
        entry = {"name": "train", "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
        (directory / "_info.json").write_text(json.dumps({"name": "bench", "splits": {"train": entry}}))
        return directory

    @cached_property
    def folders(self) -> Path:
        """A folder for each class."""
        directory = self._new("folders")
        for i, (encoded, label) in enumerate(self._samples):
            folder = directory / f"{label:05}"
            folder.mkdir(exist_ok=True)
            (folder / f"{i:07}.jpg").write_bytes(encoded)
        return directory

    @cached_property
    def litdata(self) -> Path:
        """litdata's chunks."""
        from litdata.streaming import Cache

        directory = self._new("litdata")
        with _quiet():
            cache = Cache(input_dir=str(directory), chunk_bytes=64 * 2**20)
            for i, sample in enumerate(self._samples):
                cache[i] = sample
            cache.done()
            cache.merge()
        return directory

    @cached_property
    def ffcv(self) -> Path:
        """ffcv's file of JPEGs; it encodes them again."""
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        path = self._new("ffcv") / "images.beton"
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=_QUALITY), "label": IntField()}
        with _quiet():
            DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(_Decoded(self._samples))
        return path

    def _new(self, name: str) -> Path:
        directory = self._directory / name
        directory.mkdir()
        return directory

    def _webdataset_sample(self, i: int) -> dict[str, str | bytes]:
        encoded, label = self._samples[i]
        return {"__key__": f"{i:07}", "jpg": encoded, "cls": str(label)}


class _Decoded:
    """The samples as ffcv's writer wants them."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        encoded, label = self._samples[i]
        return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")), label


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop progress bars and advertisements."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
