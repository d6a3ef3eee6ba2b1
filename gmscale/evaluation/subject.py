"""What is measured: a model, the images that it is measured on, and the processes that share the work."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gmscale import data, parallel
from gmscale.config import TrainConfig
from gmscale.data import DataConfig, ShardIndex, StreamLoader, StreamValLoader, TrainLoader, ValLoader, normalize
from gmscale.errors import UsageError
from gmscale.parallel import World


class OnPixels(nn.Module):
    """`model` as a function of pixels in [0, 1], [N, data.channels, H, W]: it normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, config: DataConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config
        device = next(model.parameters()).device
        for name, values in zip(("mean", "std"), config.statistics, strict=True):
            self.register_buffer(name, torch.tensor(values, device=device)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model((pixels - self.mean) / self.std)
        return logits

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images [N, 3, H, W] of a loader as the pixels that `forward` takes."""
        return (normalize(images, self._config) * self.std + self.mean).clamp(0, 1)


class PixelBatch(NamedTuple):
    """Images of a batch, on the subject's device."""

    pixels: Tensor
    """float32 [N, data.channels, H, W] in [0, 1]"""
    labels: Tensor
    """int64 [N]"""
    indices: Tensor
    """int64 [N]: the samples' numbers in the loader's index, by which whatever is drawn for them is seeded."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in evaluation mode whose weights need no gradient, with the images it is measured on.

    Every rank has the whole model and a share of the images. Measurements leave the model as it is.
    """

    model: nn.Module
    """Bare: takes normalised images."""
    config: TrainConfig
    """How it was trained, or would be; section data says where the images are."""
    loader: ValLoader | StreamValLoader
    world: World
    classes: tuple[str, ...]
    """Names of the model's outputs; empty if nobody knows them."""
    surrogates: tuple[nn.Module, ...] = ()
    """Other bare models, from which attacks are transferred."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Hears how much of a measurement this rank has done."""
    _spread: dict[int, ValLoader] = field(default_factory=dict, init=False)

    @property
    def seed(self) -> int:
        """Seed of whatever a measurement draws."""
        return self.config.run.seed

    @property
    def on_pixels(self) -> OnPixels:
        """The model as a function of pixels."""
        return OnPixels(self.model, self.config.data)

    def of(self, model: nn.Module) -> "Subject":
        """Return another model, bare, on the same images."""
        return replace(self, model=model.eval())

    def batches(self, images: int | None = None) -> Iterator[PixelBatch]:
        """Yield this rank's share of the split, each sample once over all ranks, or of `images` spread over it.

        Raises UsageError if a part of a stream is asked for.
        """
        loader = self.loader if images is None else self._loader_of(images)
        on_pixels, device = self.on_pixels, self.world.device
        share = -(-self.count(images) // self.world.size)
        numbers = None if loader is self.loader else torch.from_numpy(spread_over(self.count(), self.count(images)))
        done = 0
        for uint8, labels, indices in loader:
            indices = indices if numbers is None else numbers[indices]
            pixels = on_pixels.pixels(uint8.to(device, non_blocking=True))
            yield PixelBatch(pixels, labels.to(device, non_blocking=True), indices.to(device, non_blocking=True))
            done += len(labels)
            self.progress(done, share)

    def count(self, images: int | None = None) -> int:
        """Return how many images `batches` yields over all ranks; 0 where a stream does not know."""
        if isinstance(self.loader, StreamValLoader):
            return 0
        total = len(self.loader.index)
        return total if images is None else min(images, total)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of each rank's `values` as float64 on the CPU, the same on every rank; a collective."""
        return parallel.sum_over_ranks(values.detach().double().cpu(), self.world)

    def training(self) -> TrainLoader | StreamLoader:
        """Open the training split as the run had it, of which this rank has its share."""
        config = self.config
        return data.train_loader(
            config.data,
            config.augment,
            config.run.seed,
            self.world.rank,
            self.world.size,
            config.optim.grad_accum_steps,
        )

    def _loader_of(self, images: int) -> ValLoader | StreamValLoader:
        if isinstance(self.loader, StreamValLoader):
            raise UsageError("a part of the images needs data.access index; this run's is stream")
        if images >= len(self.loader.index):
            return self.loader
        if images not in self._spread:
            index = spread(self.loader.index, images)
            self._spread[images] = ValLoader(index, self.config.data, self.world.rank, self.world.size)
        return self._spread[images]


def spread_over(total: int, images: int) -> NDArray[np.int64]:
    """Return `images` numbers below `total`, evenly spread: shards are often sorted by class."""
    return np.arange(images) * total // images


def spread(index: ShardIndex, images: int) -> ShardIndex:
    """Return an index of `images` samples of another, evenly spread."""
    chosen = spread_over(len(index), images)
    per_shard = np.bincount([index.shard(int(i)) for i in chosen], minlength=len(index.lengths))
    stored = replace(index.stored, rows=index.stored.rows[chosen], lengths=tuple(per_shard.tolist()), table=None)
    return replace(index, stored=stored)
