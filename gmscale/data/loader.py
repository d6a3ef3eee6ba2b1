"""Batches of images for one rank, from processes that decode and augment them.

The main process decides who loads what (order.py) and sends each worker the sample numbers of a micro-batch with
one augmentation seed a sample. A worker keeps no state between requests, so the batches are the same for any
number of workers and after a resume at any step.
"""

import gc
import io
import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

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
        samples = order.epoch_order(self.index.lengths, self._seed, epoch)
        seeds = order.augmentation_seeds(len(self.index), self._seed, epoch)
        steps, division = range(start_step, self.steps_per_epoch), self._division
        self._requests.current = (
            _Request(indices, seeds[indices])
            for step in steps
            for indices in order.micro_batches(samples, step, *division)
        )
        batches = _results(self._batches)
        *_, grad_accum_steps = division
        for _ in steps:
            yield list(islice(batches, grad_accum_steps))


class ValLoader:
    """A rank's share of the validation split: every sample once over all ranks, perhaps none on this one.

    Iterating yields (images, labels, indices): a Batch and the int64 [N] numbers of its samples in `index`.
    """

    def __init__(self, index: ShardIndex, config: DataConfig, rank: int, world_size: int) -> None:
        self.index = index
        self.classes = index.classes
        share, size = order.rank_share(len(index), rank, world_size), config.eval_batch_size_per_device
        self._requests = _Requests()
        self._share = [_Request(share[i : i + size], None) for i in range(0, len(share), size)]
        self._requests.current = self._share
        samples = _Samples(index, eval_transform(config), config.image_size)
        self._batches = _data_loader(samples, self._requests, min(config.workers, len(self._share)))

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._share)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for request, batch in zip(self._share, _results(self._batches), strict=True):
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


class _Samples(Dataset[Batch | RunError]):
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


def _data_loader(samples: _Samples, requests: _Requests, workers: int) -> DataLoader[Batch | RunError]:
    workers = min(workers, _available_cores())
    return DataLoader(
        samples,
        sampler=requests,  # one request is one batch
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a seed from it, by default from the training process's generator.
        generator=torch.Generator(),
    )


def _results(loader: DataLoader[Batch | RunError]) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, RunError):
            try:
                raise batch
            finally:
                # Else the error, its traceback and this frame would hold each other, and with them the workers.
                del batch
        yield batch


def _as_is(batch: Any) -> Any:
    return batch


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(_worker_id: int) -> None:
    # A scheduler signals every process of a job, but it is the main process that decides when to stop, and it needs
    # its workers until then. Of SIGTERM the sender matters: the main process ends its workers with it.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_termination, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    # Were a worker to collect another loader that it inherited as garbage, it would shut that one's workers down.
    gc.freeze()


def _await_termination(main_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
