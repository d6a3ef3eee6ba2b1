"""Made data: batches as the loaders would hand them over, for when the real data need not be there."""

import io
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gmscale.config import TrainConfig
from gmscale.data import Batch, DataConfig
from gmscale.data.images.device import draw_late
from gmscale.data.images.gpu import EncodedImages
from gmscale.data.images.mixing import check_mixing
from gmscale.data.images.transforms import Assembly, eval_assembly, train_assembly
from gmscale.data.workers import random_states_kept, seed_all

PHOTOGRAPH = (500, 375)  # width and height of the made photograph: ImageNet's most frequent size
_DISTINCT = 64  # images of a batch that are made one by one; the others are copies, which no step can tell


class MadeBatches:
    """Training batches of one rank: a made photograph, decoded, cut and varied as the real ones would be."""

    loading_s: float
    """Seconds that one core took for one image, all that a loader process does to it but reading."""

    def __init__(self, config: TrainConfig, rank: int, classes: int) -> None:
        check_mixing(config.augment, config.data.batch_size_per_device)
        self._augment, self._image_size = config.augment, config.data.image_size
        self._seeds = (
            np.random.SeedSequence((config.run.seed, rank))
            .generate_state(config.data.batch_size_per_device, np.uint64)
            .astype(np.uint64)
        )
        with random_states_kept():
            self._images, self.loading_s = _assembled(train_assembly(config.data, config.augment), self._seeds)
        self._labels = torch.from_numpy((self._seeds % np.uint64(classes)).astype(np.int64))
        self._micro_batches = config.optim.grad_accum_steps

    def step(self) -> list[Batch]:
        """Return the micro-batches of a step."""
        late = draw_late(self._augment, self._image_size, self._seeds, epoch=0)
        return [Batch(self._images, self._labels, late)] * self._micro_batches


class MadeValidation:
    """One validation batch of a rank, as ValLoader yields them."""

    def __init__(self, data: DataConfig, images: int) -> None:
        size = max(1, min(data.eval_batch_size_per_device, images))
        with random_states_kept():
            pixels, _ = _assembled(eval_assembly(data), np.zeros(size, np.uint64))
        assert isinstance(pixels, Tensor)  # validation is decoded exactly
        self.images = size
        self._batch = pixels, torch.zeros(size, dtype=torch.int64), torch.arange(size)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield self._batch


def _assembled(assembly: Assembly, seeds: NDArray[np.uint64]) -> tuple[Tensor | EncodedImages, float]:
    """Return a batch of images, one for each seed, and the seconds that one of them took."""
    photograph = _photograph()
    images = assembly.begin(len(seeds))
    distinct = min(len(seeds), _DISTINCT)
    started = time.perf_counter()
    for row in range(distinct):
        seed_all(int(seeds[row]))
        assembly.put(images, row, photograph)
    seconds = (time.perf_counter() - started) / distinct
    for row in range(distinct, len(seeds)):
        images[row] = images[row % distinct]
    return assembly.end(images), seconds


def _photograph() -> bytes:
    """Return a JPEG of coloured clouds with a little noise, about as large as a photograph's."""
    random = np.random.default_rng(0)
    width, height = PHOTOGRAPH
    clouds = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        PHOTOGRAPH, Image.Resampling.BICUBIC
    )
    noisy = np.asarray(clouds, np.int16) + random.normal(0, 8, (height, width, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()
