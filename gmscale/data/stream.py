"""Batches from shards that are read from front to back, for those that cannot be indexed.

In each epoch the shards are permuted and their samples, laid end to end, are cut into equal runs, one for each
stream: a worker of a rank. So ranks have equal numbers of batches whatever the shards hold, no sample comes twice,
and the few that are left over, less than one global batch, are others in the next epoch. Where a run begins or ends
within a shard, two streams read that shard. A stream shuffles in a buffer of bounded size and holds nothing else.

The batches follow from the seed, the epoch, the world size, the batch sizes and data.workers. A resumed run reads
forward to its step without decoding.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gmscale.data import order
from gmscale.data.batch import Batch
from gmscale.data.config import AugmentConfig, DataConfig
from gmscale.data.faults import MOST_SUBSTITUTES, Fault, ImageError, SampleError
from gmscale.data.images.device import draw_late
from gmscale.data.images.transforms import eval_assembly, train_assembly
from gmscale.data.order import random_bits
from gmscale.data.sequence import Sample, pieces, read, replaced, shuffled
from gmscale.data.source import Split
from gmscale.data.tars.forward import PIPE, shown
from gmscale.data.workers import Requests, available_cores, data_loader, random_states_kept, results, seed_all
from gmscale.errors import RunError, UsageError

# Independent streams of random bits under one (seed, epoch), besides those of order.py.
_SHARDS, _LEFT_OUT, _SHUFFLE = range(100, 103)


class StreamLoader:
    """A rank's micro-batches of any step of any epoch. One epoch at a time: a new one ends the last."""

    faults: tuple[Fault, ...] = ()
    """None is known before the shards are read."""

    def __init__(
        self,
        split: Split,
        data: DataConfig,
        augment: AugmentConfig,
        seed: int,
        rank: int,
        world_size: int,
        grad_accum_steps: int,
    ) -> None:
        if augment.repeats > 1:
            raise UsageError(
                f"augment.repeats is {augment.repeats}, but data.access stream reads each sample once; use index"
            )
        lengths, self.classes = _known(split, data)
        self.samples = int(lengths.sum())
        self.global_batch_size = data.batch_size_per_device * world_size * grad_accum_steps
        self.steps_per_epoch = order.steps_per_epoch(self.samples, self.global_batch_size)
        self._grad_accum_steps = grad_accum_steps
        shards = int((lengths > 0).sum())
        # With less than a shard of its own, a stream would mostly read what others use.
        self._streams = max(1, min(data.workers, shards // world_size))
        if rank == 0 and self._streams < data.workers:
            warnings.warn(
                f"data.workers is {data.workers}, but {shards} streamed shards keep only {self._streams} busy on "
                f"each of {world_size} ranks",
                stacklevel=2,
            )
        division = (world_size, self._streams, data.batch_size_per_device, grad_accum_steps)
        self.fingerprint = _fingerprint(split, data.label, self.classes, division)
        self._requests = Requests[_Request]()
        samples = _TrainSamples(split, data, augment, seed, rank, self.steps_per_epoch, division)
        self._batches = data_loader(samples, self._requests, _workers(self._streams, data.workers))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield each step's list of micro-batches, from `start_step` as an undisturbed epoch would."""
        micro_batches = range(start_step * self._grad_accum_steps, self.steps_per_epoch * self._grad_accum_steps)
        self._requests.current = [_Request(epoch, i % self._streams, i // self._streams) for i in micro_batches]
        batches = results(self._batches)
        for _ in range(start_step, self.steps_per_epoch):
            yield list(islice(batches, self._grad_accum_steps))


class StreamValLoader:
    """A rank's share of the validation split: every sample once over all ranks, perhaps none on this one.

    Iterating yields (images, labels, indices), indices being the int64 [N] numbers of the samples in the split. The
    batches come from the rank's streams in turn, so the numbers do not rise throughout.
    """

    def __init__(self, split: Split, data: DataConfig, rank: int, world_size: int) -> None:
        lengths, self.classes = _known(split, data)
        share = order.rank_share(int(lengths.sum()), rank, world_size)
        samples = _ValSamples(split, data, share)
        self._requests = samples.requests()
        workers = _workers(samples.streams, data.workers) if self._requests else 0
        self._batches = data_loader(samples, self._requests, workers)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._requests)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        yield from results(self._batches)


def _known(split: Split, data: DataConfig) -> tuple[NDArray[np.int64], list[str]]:
    """Return the samples per shard and the classes, which streaming cannot find out."""
    for name in split.names:
        if name.startswith(PIPE) and not data.allow_pipe:
            raise UsageError(
                f"data.allow_pipe is off, and shard {name!r} would run a shell command; turn it on if you trust "
                f"whoever wrote that name"
            )
    if split.lengths is None:
        raise UsageError(
            f"data.access stream needs the number of samples in each shard of {split.name!r}: list the shards in "
            f"{split.directory}/_info.json, with 'filenames' and 'shard_lengths' for the split "
            f"(tar -tf SHARD | cut -d. -f1 | uniq | wc -l counts a shard's samples)"
        )
    if split.classes is None:
        raise UsageError(
            f"data.access stream needs the names of the classes: list them as 'classes' in "
            f"{split.directory}/_info.json"
        )
    return np.array(split.lengths, dtype=np.int64), split.classes


def _fingerprint(split: Split, label: str, classes: list[str], division: tuple[int, ...]) -> str:
    """SHA-256 of what the order and the labels follow from."""
    known = [split.names, split.lengths, split.sha256, label, classes, division]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _workers(streams: int, wanted: int) -> int:
    """Return the processes that read `streams` in turn: a stream must always meet the same one."""
    if wanted == 0:
        return 0
    return max(count for count in range(1, min(streams, available_cores()) + 1) if streams % count == 0)


class _Request(NamedTuple):
    """A micro-batch: the number `batch` of a stream."""

    epoch: int
    stream: int
    batch: int


class _Stream:
    """What is left of a stream."""

    def __init__(self, samples: Iterator[Sample], bits: np.random.Philox | None, batch_size: int) -> None:
        self.waiting: list[Sample] = []
        self.position = 0
        """Batches taken."""
        self._samples = shuffled(samples, bits, self.waiting) if bits else samples
        self._batch_size = batch_size

    def take(self) -> list[Sample]:
        self.position += 1
        return list(islice(self._samples, self._batch_size))


class _Samples(Dataset[Any]):
    """Answers requests from streams that it keeps open. Runs in a worker, or in the main process without them."""

    def __init__(self, split: Split, data: DataConfig, batch_size: int) -> None:
        self.lengths, self.classes = _known(split, data)
        self._split, self._label, self._batch_size = split, data.label, batch_size
        self._epoch = -1
        self._open: dict[int, _Stream] = {}

    def __getitem__(self, request: _Request) -> Any:
        # An error is handed over as a value: raised here, it would reach the user wrapped in a worker's traceback.
        try:
            with random_states_kept():
                return self._load(self._at(request), request.epoch)
        except (RunError, UsageError) as error:
            self._open.clear()
            return error

    def _located(self, fault: Fault) -> Fault:
        """Return a fault with its shard's whole address."""
        return fault._replace(shard=shown(self._split.directory, fault.shard))

    def _load(self, stream: _Stream, epoch: int) -> Any:
        """Return what the next samples of `stream` come to."""
        raise NotImplementedError

    def _begin(self, epoch: int, stream: int) -> _Stream:
        raise NotImplementedError

    def _at(self, request: _Request) -> _Stream:
        """Return the stream as it is before the batch asked for: opened and read forward if it is not there."""
        if request.epoch != self._epoch:
            self._open.clear()
            self._epoch = request.epoch
        stream = self._open.get(request.stream)
        if stream is None or stream.position != request.batch:
            stream = self._open[request.stream] = self._begin(request.epoch, request.stream)
            for _ in range(request.batch):
                stream.take()
        return stream

    def _read(self, begin: int, end: int, shards: NDArray[np.int64]) -> Iterator[Sample]:
        """Yield samples `begin` to `end` of all those in `shards` laid end to end."""
        first = np.cumsum(self.lengths) - self.lengths
        for piece in pieces(self.lengths, shards, begin, end):
            number = int(first[piece.shard]) + piece.start
            yield from read(self._split, piece, number, self._label, len(self.classes))


def _undecodable(sample: Sample, error: ImageError) -> Fault:
    return Fault(sample.shard, sample.key, error.reason, f"{sample.key} does not decode: {error}")


class _TrainSamples(_Samples):
    def __init__(
        self,
        split: Split,
        data: DataConfig,
        augment: AugmentConfig,
        seed: int,
        rank: int,
        steps: int,
        division: tuple[int, int, int, int],
    ) -> None:
        super().__init__(split, data, data.batch_size_per_device)
        self._world_size, self._streams, _, grad_accum_steps = division
        self._seed, self._rank, self._batches = seed, rank, steps * grad_accum_steps
        self._augment, self._image_size = augment, data.image_size
        self._assembly = train_assembly(data, augment)
        self._seeds = np.empty(0, dtype=np.uint64)

    def _begin(self, epoch: int, stream: int) -> _Stream:
        samples = int(self.lengths.sum())
        self._seeds = order.augmentation_seeds(samples, self._seed, epoch)
        shards = np.argsort(random_bits(self._seed, epoch, _SHARDS).random_raw(len(self.lengths)), kind="stable")
        left_out = samples - self._batches * self._world_size * self._batch_size
        before = self._rank * self._batches + sum(
            len(range(s, self._batches, self._streams)) for s in range(stream)
        )
        begin = (
            int(random_bits(self._seed, epoch, _LEFT_OUT).random_raw()) % (left_out + 1) + before * self._batch_size
        )
        end = begin + len(range(stream, self._batches, self._streams)) * self._batch_size
        bits = random_bits(self._seed, epoch, _SHUFFLE, self._rank, stream)
        return _Stream(replaced(self._read(begin, end, shards)), bits, self._batch_size)

    def _load(self, stream: _Stream, epoch: int) -> Batch:
        samples = stream.take()
        seeds = self._seeds[[sample.number for sample in samples]]
        faults = [self._located(sample.fault) for sample in samples if sample.fault]
        labels = np.empty(len(samples), dtype=np.int64)
        images = self._assembly.begin(len(samples))
        for row, seed in enumerate(seeds.tolist()):
            candidates = chain(samples[row:], samples[:row], stream.waiting)
            labels[row] = self._put(images, row, seed, islice(candidates, MOST_SUBSTITUTES), faults)
        late = draw_late(self._augment, self._image_size, seeds, epoch)
        return Batch(self._assembly.end(images), torch.from_numpy(labels), late, tuple(faults))

    def _put(self, images: Any, row: int, seed: int, candidates: Iterable[Sample], faults: list[Fault]) -> int:
        """Make an image of the first of `candidates` that decodes, whose place it is; return the label."""
        first: Fault | None = None
        for sample in candidates:
            seed_all(seed)
            try:
                self._assembly.put(images, row, sample.image)
            except ImageError as error:
                if first is None:
                    first = self._located(_undecodable(sample, error))
                    if not sample.fault:
                        faults.append(first)
                continue
            return sample.label
        raise RunError(f"no image could be put in the place of one that does not decode: {first}")


class _ValSamples(_Samples):
    def __init__(self, split: Split, data: DataConfig, share: NDArray[np.int64]) -> None:
        super().__init__(split, data, data.eval_batch_size_per_device)
        self._assembly = eval_assembly(data)
        self._begin_at, self._end_at = (int(share[0]), int(share[-1]) + 1) if len(share) else (0, 0)
        shards = pieces(self.lengths, np.arange(len(self.lengths)), self._begin_at, self._end_at)
        batches = -(-len(share) // self._batch_size)
        self.streams = max(1, min(data.workers, len(shards), batches))
        self._batches = np.array_split(np.arange(batches), self.streams)

    def requests(self) -> list[_Request]:
        """Every batch, from the streams in turn."""
        return [
            _Request(0, stream, i)
            for i in range(len(self._batches[0]))
            for stream, batches in enumerate(self._batches)
            if i < len(batches)
        ]

    def _begin(self, epoch: int, stream: int) -> _Stream:
        batches = self._batches[stream]
        begin = self._begin_at + int(batches[0]) * self._batch_size
        end = min(begin + len(batches) * self._batch_size, self._end_at)
        return _Stream(self._read(begin, end, np.arange(len(self.lengths))), None, self._batch_size)

    def _load(self, stream: _Stream, epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        samples = stream.take()
        images = self._assembly.begin(len(samples))
        for row, sample in enumerate(samples):
            if sample.fault:
                raise SampleError(self._located(sample.fault))
            try:
                self._assembly.put(images, row, sample.image)
            except ImageError as error:
                raise SampleError(self._located(_undecodable(sample, error))) from None
        decoded = self._assembly.end(images)
        assert isinstance(decoded, torch.Tensor)  # validation is decoded exactly, by the workers
        labels, numbers = torch.tensor([(sample.label, sample.number) for sample in samples]).unbind(1)
        return decoded, labels, numbers
