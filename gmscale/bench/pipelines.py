"""The input pipelines that are compared: a training image's JPEG, cropped at random to a square and mirrored.

Each is put together the way its own documentation shows, without worker processes, with the same distribution of
crops (timm's RandomResizedCrop, areas of 0.08 to 1, ratios of 3/4 to 4/3), and drops a last incomplete batch. How
they resize differs: Pillow's antialiased bilinear in timm and `exact`, OpenCV's bilinear or area average elsewhere.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from timm.data import create_transform
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import RandomResizedCrop

from gmscale import data
from gmscale.bench.photographs import Copies
from gmscale.data import AugmentConfig, DataConfig, to_device

_MEAN, _STD = DataConfig.mean, DataConfig.std
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_HFLIP = 0.5
_RAND_AUGMENT = "rand-m9-mstd0.5"

Batch = tuple[Tensor, Tensor]
"""Images [N, 3, S, S], uint8 or normalised float32, and labels [N]."""
Epoch = Callable[[int], Iterator[Batch]]
"""One pass over the data, given the number of the epoch."""


@dataclass(frozen=True)
class Shape:
    """What a batch looks like."""

    batch_size: int
    image_size: int


@dataclass(frozen=True)
class Pipeline:
    """One way from JPEGs to batches."""

    open: Callable[[Copies, Shape], Epoch]
    dtype: torch.dtype
    packages: tuple[str, ...] = ()
    """What it needs that gmscale does not install."""
    against: str = "webdataset + PIL + timm, float"
    """The pipeline that its ratio is to."""
    note: str = ""

    def missing(self) -> str | None:
        """Return why it cannot be measured, or None."""
        try:
            for package in self.packages:
                importlib.import_module(package)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except ImportError as error:
            return f"{package} does not import: {' '.join(str(error).split())[:200]}"
        return None


def _timm(shape: Shape, *, normalised: bool, auto_augment: str | None = None) -> Any:
    return create_transform(
        shape.image_size,
        is_training=True,
        scale=_SCALE,
        ratio=_RATIO,
        hflip=_HFLIP,
        color_jitter=None,  # type: ignore[arg-type]  # timm's word for none
        auto_augment=auto_augment,
        interpolation="bilinear",
        mean=_MEAN,
        std=_STD,
        use_prefetcher=not normalised,
    )


def _webdataset(*, normalised: bool, auto_augment: str | None = None) -> Callable[[Copies, Shape], Epoch]:
    def open_pipeline(copies: Copies, shape: Shape) -> Epoch:
        import webdataset

        transform = _timm(shape, normalised=normalised, auto_augment=auto_augment)
        shards = sorted(map(str, copies.shards.glob("*.tar")))
        collate = {} if normalised else {"collation_fn": fast_collate}
        dataset = (
            webdataset.WebDataset(shards, shardshuffle=len(shards))
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg", "cls")
            .map_tuple(transform, int)
            .batched(shape.batch_size, partial=False, **collate)
        )
        return lambda _: iter(DataLoader(dataset, batch_size=None))

    return open_pipeline


def _image_folder(copies: Copies, shape: Shape) -> Epoch:
    dataset = ImageFolder(str(copies.folders), _timm(shape, normalised=True))
    loader = DataLoader(dataset, shape.batch_size, shuffle=True, drop_last=True)
    return lambda _: iter(loader)


def _litdata(copies: Copies, shape: Shape) -> Epoch:
    import cv2
    import litdata

    cv2.setNumThreads(0)

    def crop(pixels: NDArray[np.uint8]) -> Any:
        """Return a random square of an image [H, W, 3], mirrored or not."""
        area = torch.empty(3, *pixels.shape[:2], device="meta")
        y, x, height, width = RandomResizedCrop.get_params(area, list(_SCALE), list(_RATIO))
        side = (shape.image_size, shape.image_size)
        found = cv2.resize(pixels[y : y + height, x : x + width], side, interpolation=cv2.INTER_LINEAR)
        return found[:, ::-1] if torch.rand(()) < _HFLIP else found

    def sample(entry: tuple[bytes, int]) -> tuple[NDArray[np.uint8], int]:
        return crop(simplejpeg.decode_jpeg(entry[0])), entry[1]

    def collate(entries: list[tuple[bytes, int]]) -> Batch:
        images, labels = zip(*map(sample, entries), strict=True)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)

    dataset = litdata.StreamingDataset(str(copies.litdata), shuffle=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=shape.batch_size, drop_last=True, collate_fn=collate)
    return lambda _: iter(loader)


def _ffcv(*, normalised: bool) -> Callable[[Copies, Shape], Epoch]:
    def open_pipeline(copies: Copies, shape: Shape) -> Epoch:
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

        size = (shape.image_size, shape.image_size)
        images = [RandomResizedCropRGBImageDecoder(size, scale=_SCALE, ratio=_RATIO), RandomHorizontalFlip(_HFLIP)]
        if normalised:
            images.append(NormalizeImage(255 * np.array(_MEAN), 255 * np.array(_STD), np.float32))
        loader = Loader(
            str(copies.ffcv),
            batch_size=shape.batch_size,
            num_workers=1,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            pipelines={
                "image": [*images, ToTensor(), ToTorchImage()],
                "label": [IntDecoder(), ToTensor(), Squeeze()],
            },
        )
        return lambda _: iter(loader)

    return open_pipeline


def _ours(decode: str, auto_augment: str = "", *, normalised: bool = False) -> Callable[[Copies, Shape], Epoch]:
    def open_pipeline(copies: Copies, shape: Shape) -> Epoch:
        config = DataConfig(
            source=str(copies.shards),
            image_size=shape.image_size,
            batch_size_per_device=shape.batch_size,
            workers=0,
            decode=decode,  # type: ignore[arg-type]
        )
        augment = AugmentConfig(
            crop_scale=_SCALE, crop_ratio=_RATIO, hflip=_HFLIP, color_jitter=0.0, auto_augment=auto_augment
        )
        loader = data.train_loader(config, augment, seed=0, rank=0, world_size=1, grad_accum_steps=1)
        cpu = torch.device("cpu")

        def epoch(number: int) -> Iterator[Batch]:
            for (batch,) in loader.epoch(number):
                if normalised:
                    yield to_device(batch, config, augment, len(loader.classes), cpu)
                else:
                    assert isinstance(batch.images, Tensor)
                    yield batch.images, batch.labels

        return epoch

    return open_pipeline


BASELINE = Pipeline.against
_FFCV_NOTE = "reads its own file of the JPEGs, which it has encoded again"
_WITH_RAND_AUGMENT = "webdataset + timm RandAugment, float"
PIPELINES: dict[str, Pipeline] = {
    BASELINE: Pipeline(
        _webdataset(normalised=True), torch.float32, note="its ratio is that of a second one beside it: the noise"
    ),
    "webdataset + PIL + timm, uint8": Pipeline(_webdataset(normalised=False), torch.uint8),
    "ImageFolder + PIL + timm, float": Pipeline(_image_folder, torch.float32),
    "litdata + simplejpeg + cv2, uint8": Pipeline(
        _litdata, torch.uint8, ("litdata", "cv2"), note="decoded whole, cv2's linear resize without antialiasing"
    ),
    "ffcv JPEG, float": Pipeline(_ffcv(normalised=True), torch.float32, ("ffcv",), note=_FFCV_NOTE),
    "ffcv JPEG, uint8": Pipeline(_ffcv(normalised=False), torch.uint8, ("ffcv",), note=_FFCV_NOTE),
    "gmscale exact": Pipeline(_ours("exact"), torch.uint8, note="the baseline's pixels: Pillow's"),
    "gmscale fast": Pipeline(_ours("fast"), torch.uint8, note="large JPEGs decoded at reduced size"),
    "gmscale exact, normalised": Pipeline(
        _ours("exact", normalised=True), torch.float32, note="with the normalising that is usually the GPU's work"
    ),
    _WITH_RAND_AUGMENT: Pipeline(_webdataset(normalised=True, auto_augment=_RAND_AUGMENT), torch.float32),
    "gmscale exact + RandAugment": Pipeline(
        _ours("exact", _RAND_AUGMENT), torch.uint8, against=_WITH_RAND_AUGMENT, note=f"policy {_RAND_AUGMENT}"
    ),
}
