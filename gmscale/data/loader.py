"""Batches of images for one rank, from processes that decode and augment them.

The main process decides who loads what (order.py) and sends each worker the sample numbers of a micro-batch with
one augmentation seed a sample. A worker keeps no state between requests, so the batches are the same for any
number of workers and after a resume at any step.
"""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gmscale.data import embedded, order
from gmscale.data.batch import Batch
from gmscale.data.config import AugmentConfig, DataConfig
from gmscale.data.faults import MOST_SUBSTITUTES, Fault, ImageError, SampleError, check_bad_share
from gmscale.data.images.device import draw_late
from gmscale.data.images.mixing import check_mixing
from gmscale.data.images.transforms import Assembly, eval_assembly, train_assembly
from gmscale.data.index import ShardIndex, member_name, open_index, read
from gmscale.data.remote.directory import RemoteDirectory
from gmscale.data.source import Split, open_split
from gmscale.data.stream import StreamLoader, StreamValLoader
from gmscale.data.survey import where
from gmscale.data.tars.scan import key_and_kind
from gmscale.data.workers import Failure, Requests, data_loader, random_states_kept, results, seed_all
from gmscale.errors import RunError, UsageError


class TrainLoader:
    """A rank's micro-batches of any step of any epoch. One epoch at a time: a new one ends the last."""

    def __init__(
        self,
        index: ShardIndex,
        data: DataConfig,
        augment: AugmentConfig,
        seed: int,
        rank: int,
        world_size: int,
        grad_accum_steps: int,
    ) -> None:
        self.index = index
        self.classes = index.classes
        self.faults = _faults(index)
        self.samples = len(index)
        self.fingerprint = index.fingerprint
        self.global_batch_size = data.batch_size_per_device * world_size * grad_accum_steps
        self.steps_per_epoch = order.steps_per_epoch(len(index), self.global_batch_size)
        self._division = (rank, world_size, data.batch_size_per_device, grad_accum_steps)
        self._seed, self._repeats = seed, augment.repeats
        self._requests = Requests[_Request]()
        samples = _Samples(index, train_assembly(data, augment), augment, data.image_size)
        self._batches = data_loader(samples, self._requests, data.workers)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield each step's list of micro-batches, from `start_step` as an undisturbed epoch would."""
        plan = order.epoch_plan(self.index.lengths, self._seed, epoch, self._repeats, self.global_batch_size)
        self._prefetch(plan.samples[start_step * self.global_batch_size :])
        steps, division = range(start_step, self.steps_per_epoch), self._division
        self._requests.current = (
            _Request(indices, seeds, epoch)
            for step in steps
            for indices, seeds in zip(
                order.micro_batches(plan.samples, step, *division),
                order.micro_batches(plan.seeds, step, *division),
                strict=True,
            )
        )
        batches = results(self._batches)
        *_, grad_accum_steps = division
        for _ in steps:
            yield list(islice(batches, grad_accum_steps))

    def _prefetch(self, samples: NDArray[np.int64]) -> None:
        """Let one process of each node fetch remote shards ahead, in the order in which they will be read."""
        directory = self.index.split.directory
        if isinstance(directory, RemoteDirectory) and os.environ.get("LOCAL_RANK", "0") == "0":
            found = np.searchsorted(np.cumsum(self.index.lengths), samples, side="right")
            shards, first = np.unique(found, return_index=True)
            directory.prefetch([self.index.split.names[shard] for shard in shards[np.argsort(first)]])


class ValLoader:
    """A rank's share of the validation split: every sample once over all ranks, perhaps none on this one.

    Iterating yields (images, labels, indices): a Batch and the int64 [N] numbers of its samples in the split.
    """

    def __init__(self, index: ShardIndex, data: DataConfig, rank: int, world_size: int) -> None:
        self.index = index
        self.classes = index.classes
        share, size = order.rank_share(len(index), rank, world_size), data.eval_batch_size_per_device
        self._requests = Requests[_Request]()
        self._share = [_Request(share[i : i + size], None, 0) for i in range(0, len(share), size)]
        self._requests.current = self._share
        samples = _Samples(index, eval_assembly(data), AugmentConfig(), data.image_size)
        self._batches = data_loader(samples, self._requests, min(data.workers, len(self._share)))

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._share)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for request, batch in zip(self._share, results(self._batches), strict=True):
            assert isinstance(batch.images, torch.Tensor)  # validation is decoded exactly, by the workers
            yield batch.images, batch.labels, torch.from_numpy(request.indices)


def train_loader(
    data: DataConfig, augment: AugmentConfig, seed: int, rank: int, world_size: int, grad_accum_steps: int
) -> TrainLoader | StreamLoader:
    """Open the training split, building the embedded set if it is asked for and missing."""
    check_mixing(augment, data.batch_size_per_device)
    split = _open(data, data.train_split)
    if data.access == "stream":
        return StreamLoader(split, data, augment, seed, rank, world_size, grad_accum_steps)
    index = open_index(split, data.label, Path(data.cache_dir))
    check_bad_share(_faults(index), len(index), data.max_bad_share, "data.train_split")
    return TrainLoader(index, data, augment, seed, rank, world_size, grad_accum_steps)


def val_loader(data: DataConfig, rank: int, world_size: int) -> ValLoader | StreamValLoader:
    """Open the validation split, building the embedded set if it is asked for and missing."""
    split = _open(data, data.val_split)
    if data.access == "stream":
        return StreamValLoader(split, data, rank, world_size)
    index = open_index(split, data.label, Path(data.cache_dir))
    check_bad_share(_faults(index), len(index), 0.0, "data.val_split")
    return ValLoader(index, data, rank, world_size)


def _open(data: DataConfig, split: str) -> Split:
    return open_split(data, split, embedded.ensure(data) if data.source == "embedded" else None)


def _faults(index: ShardIndex) -> tuple[Fault, ...]:
    """Return the faults that were found with the index, with their shards' whole addresses."""
    return tuple(fault._replace(shard=f"{index.split.directory}/{fault.shard}") for fault in index.faults)


class _Request(NamedTuple):
    """The samples of one micro-batch and an augmentation seed for each; no seeds where nothing is random."""

    indices: NDArray[np.int64]
    seeds: NDArray[np.uint64] | None
    epoch: int


class _Samples(Dataset[Batch | Failure]):
    """Answers a request with a Batch. Runs in a worker, or in the main process when there are none."""

    def __init__(self, index: ShardIndex, assembly: Assembly, augment: AugmentConfig, image_size: int) -> None:
        self.index, self.assembly, self.augment, self.image_size = index, assembly, augment, image_size

    def __getitem__(self, request: _Request) -> Batch | Failure:
        # An error is handed over as a value: raised here, it would reach the user wrapped in a worker's traceback.
        try:
            with random_states_kept():
                return self._load(request)
        except (RunError, UsageError) as error:
            return error

    def _load(self, request: _Request) -> Batch:
        used = request.indices.copy()
        faults: list[Fault] = []
        images = self.assembly.begin(len(used))
        for row in range(len(used)):
            if request.seeds is None:  # validation takes no substitutes
                self._put(images, row, int(used[row]))
            else:
                used[row] = self._put_usable(images, row, int(used[row]), int(request.seeds[row]), faults)
        labels = torch.from_numpy(self.index.label[used].astype(np.int64))
        late = None
        if request.seeds is not None:
            late = draw_late(self.augment, self.image_size, request.seeds, request.epoch)
        return Batch(self.assembly.end(images), labels, late, tuple(faults))

    def _put_usable(self, images: Any, row: int, i: int, seed: int, faults: list[Fault]) -> int:
        """Put sample `i`, or the first usable one after it in its shard, into its row; return which."""
        first: Fault | None = None
        for _ in range(MOST_SUBSTITUTES):
            if self.index.label[i] >= 0:  # else it was found bad, and counted, when the shards were indexed
                seed_all(seed)
                try:
                    self._put(images, row, i)
                except SampleError as bad:
                    first = first or bad.fault
                else:
                    if first:
                        faults.append(first)  # those after it are counted in their own places
                    return i
            i = self.index.substitute(i)
        raise RunError(f"{first}; and the {MOST_SUBSTITUTES - 1} samples after it cannot be used either")

    def _put(self, images: Any, row: int, i: int) -> None:
        try:
            self.assembly.put(images, row, read(self.index, i))
        except ImageError as error:
            name = member_name(self.index, i)
            sample, _ = key_and_kind(name) or (name, "")
            shard = where(self.index.split, self.index.shard(i))
            raise SampleError(Fault(shard, sample, error.reason, f"{name} does not decode: {error}")) from None
