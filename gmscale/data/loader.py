"""Batches of images for one rank, from processes that decode and augment them.

The main process decides who loads what (order.py) and sends each worker the sample numbers of a micro-batch with
one augmentation seed a sample. A worker keeps no state between requests, so the batches are the same for any
number of workers and after a resume at any step.
"""

import atexit
import io
import os
import random
import signal
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from gmscale.data import embedded, order, shards
from gmscale.data.config import DataConfig
from gmscale.data.shards import ShardIndex
from gmscale.data.transforms import Transform, eval_transform, train_transform
from gmscale.errors import RunError


class Batch(NamedTuple):
    """One micro-batch: images uint8 [N, 3, H, W] in channels_last memory, labels int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor


class TrainLoader:
    """A rank's micro-batches of any step of any epoch. One epoch at a time: a new one ends the last."""

    def __init__(
        self, index: ShardIndex, config: DataConfig, seed: int, rank: int, world_size: int, grad_accum_steps: int
    ) -> None:
        self.index = index
        self.classes = index.classes
        self.global_batch_size = config.batch_size_per_device * world_size * grad_accum_steps
        self.steps_per_epoch = order.steps_per_epoch(len(index), self.global_batch_size)
        self._division = (rank, world_size, config.batch_size_per_device, grad_accum_steps)
        self._seed = seed
        self._requests = _Requests()
        samples = _Samples(index, train_transform(config), config.image_size)
        self._batches = _data_loader(samples, self._requests, config.workers)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield each step's list of micro-batches, from `start_step` as an undisturbed epoch would."""
        self._requests.current = self._epoch_requests(epoch, start_step)
        batches = _results(self._batches)
        *_, grad_accum_steps = self._division
        for _ in range(start_step, self.steps_per_epoch):
            yield list(islice(batches, grad_accum_steps))

    def _epoch_requests(self, epoch: int, start_step: int) -> Iterator["_Request"]:
        samples = order.epoch_order(self.index.lengths, self._seed, epoch)
        seeds = order.augmentation_seeds(len(self.index), self._seed, epoch)
        for step in range(start_step, self.steps_per_epoch):
            for indices in order.micro_batches(samples, step, *self._division):
                yield _Request(indices, seeds[indices])


class ValLoader:
    """A rank's share of the validation split: every sample once over all ranks, perhaps none on this one.

    Iterating yields (images, labels, indices): a Batch and the int64 [N] numbers of its samples in `index`.
    """

    def __init__(self, index: ShardIndex, config: DataConfig, rank: int, world_size: int) -> None:
        self.index = index
        self.classes = index.classes
        share, size = order.rank_share(len(index), rank, world_size), config.eval_batch_size_per_device
        self._requests = _Requests()
        self._requests.current = [_Request(share[i : i + size], None) for i in range(0, len(share), size)]
        samples = _Samples(index, eval_transform(config), config.image_size)
        self._batches = _data_loader(samples, self._requests, min(config.workers, len(self._requests.current)))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for request, batch in zip(self._requests.current, _results(self._batches), strict=True):
            yield batch.images, batch.labels, torch.from_numpy(request.indices)


def train_loader(config: DataConfig, seed: int, rank: int, world_size: int, grad_accum_steps: int) -> TrainLoader:
    """Open the training split, building the embedded set if it is asked for and missing."""
    index = shards.open_index(_directory(config), config.train_split)
    return TrainLoader(index, config, seed, rank, world_size, grad_accum_steps)


def val_loader(config: DataConfig, rank: int, world_size: int) -> ValLoader:
    """Open the validation split, building the embedded set if it is asked for and missing."""
    return ValLoader(shards.open_index(_directory(config), config.val_split), config, rank, world_size)


def _directory(config: DataConfig) -> Path:
    return embedded.ensure(config) if config.source == "embedded" else Path(config.source)


class _Request(NamedTuple):
    """The samples of one micro-batch and an augmentation seed for each; no seeds where nothing is random."""

    indices: NDArray[np.int64]
    seeds: NDArray[np.uint64] | None


class _Requests:
    """What a DataLoader asks its workers for in its next pass; replaced between passes, which workers outlive."""

    current: Iterable[_Request] = ()

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.current)


class _Samples(Dataset[Batch]):
    """Answers a request with a Batch. Runs in a worker, or in the main process when there are none."""

    def __init__(self, index: ShardIndex, transform: Transform, image_size: int) -> None:
        self.index = index
        self.transform = transform
        self.image_size = image_size

    def __getitem__(self, request: _Request) -> Batch | RunError:
        # An error is handed over as a value: raised here, it would reach the user wrapped in a worker's traceback.
        try:
            with _random_states_kept():
                return self._load(request)
        except RunError as error:
            return error

    def _load(self, request: _Request) -> Batch:
        shape = (len(request.indices), 3, self.image_size, self.image_size)
        images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        for row, i in enumerate(request.indices):
            if request.seeds is not None:
                _seed_all(int(request.seeds[row]))
            images[row] = self.transform(_decode(self.index, int(i)))
        return Batch(images, torch.from_numpy(self.index.label[request.indices]))


def _decode(index: ShardIndex, i: int) -> Image.Image:
    data = shards.read(index, i)
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything, from OSError to struct.error
        path, name = index.paths[index.shard[i]], shards.member_name(index, i)
        raise RunError(f"{path}: {name} does not decode: {error}") from error


def _seed_all(seed: int) -> None:
    # timm's transforms draw from all three. torch.manual_seed would take 300 us to visit every device.
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Leave the random states as they were: without workers, they are the training process's own."""
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)


def _data_loader(samples: _Samples, requests: _Requests, workers: int) -> DataLoader[Batch]:
    workers = min(workers, _available_cores())
    loader = DataLoader(
        samples,
        sampler=requests,  # type: ignore[arg-type]  # one request is one batch
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a seed from it, by default from the training process's generator.
        generator=torch.Generator(),
    )
    if workers:
        atexit.register(_stop_workers, weakref.ref(loader))
    return loader


def _results(loader: DataLoader[Batch]) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, RunError):
            raise batch
        yield batch


def _as_is(batch: Batch) -> Batch:
    return batch


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(_worker_id: int) -> None:
    # A scheduler signals every process of a job; the main process decides when to stop and needs its workers until then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _stop_workers(reference: "weakref.ref[DataLoader[Batch]]") -> None:
    """End a loader's workers before multiprocessing tries to, at exit, with the SIGTERM that they ignore."""
    shutdown = getattr(getattr(reference(), "_iterator", None), "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()
