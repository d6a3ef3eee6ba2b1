"""The samples of a stream: cut out of the shards, read, replaced where they cannot be used, and shuffled."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmscale.data.faults import MOST_SUBSTITUTES, Fault
from gmscale.data.source import Split
from gmscale.data.tars.forward import ForwardTar, open_forward
from gmscale.data.tars.scan import IMAGE_EXTENSIONS, KeyedMembers, key_and_kind, read_label, sample_fault
from gmscale.data.tars.tar import Member
from gmscale.errors import RunError

# A stream shuffles among so many samples, or fewer if they take more bytes.
_MOST_SAMPLES = 1000
_MOST_BYTES = 128 << 20

# ImageNet's largest image has 15 MB.
_LARGEST_IMAGE = 256 << 20


class Piece(NamedTuple):
    """Samples `start` to `stop` of a shard."""

    shard: int
    start: int
    stop: int


class Sample(NamedTuple):
    """What a stream hands out in the place of sample `number` of the split."""

    number: int
    shard: str
    key: str
    image: bytes
    """Encoded."""
    label: int
    fault: Fault | None
    """Why another sample stands in that place."""


def pieces(lengths: NDArray[np.int64], shards: NDArray[np.int64], begin: int, end: int) -> list[Piece]:
    """Return where the samples `begin` to `end` are, of all those in `shards` laid end to end."""
    ends = np.cumsum(lengths[shards])
    found = []
    for place in range(int(np.searchsorted(ends, begin, side="right")), len(shards)):
        length = int(lengths[shards[place]])
        first = int(ends[place]) - length
        if first >= end:
            break
        if length:
            found.append(Piece(int(shards[place]), max(begin - first, 0), min(end - first, length)))
    return found


def read(split: Split, piece: Piece, number: int, label: str, classes: int) -> Iterator[Sample]:
    """Yield the samples of a piece, numbered from `number`; ShardError for whatever is wrong with the shard.

    `label` is an extension or json.FIELD, and labels are below `classes`. A shard's last sample is yielded when the
    whole of it has been found in order; its first samples come before that.
    """
    name, length = split.names[piece.shard], (split.lengths or ())[piece.shard]
    with open_forward(split.directory, name) as tar:
        seen: set[int] = set()  # hashes, because a name may have a megabyte
        count = 0
        ready: Sample | None = None
        for key, group in groupby(_parts(tar), key=lambda part: part[0]):
            if hash(key) in seen:
                detail = f"{key!r} comes again after other samples; expected the members of a sample in a row"
                tar.fail("interleaved sample", detail)
            if count == length:
                tar.fail("wrong sample count", f"holds more samples than the {length} of _info.json")
            if ready:
                yield ready
                ready = None
            if count == piece.stop:
                return
            if count >= piece.start:
                ready = _sample(tar, name, key, group, label, classes)._replace(number=number)
                number += 1
            seen.add(hash(key))
            count += 1
        if count < length:
            tar.fail("wrong sample count", f"holds {count} samples, _info.json says {length}")
        if ready:
            yield ready


def shuffled(samples: Iterable[Sample], bits: np.random.Philox, waiting: list[Sample]) -> Iterator[Sample]:
    """Yield `samples` in an order drawn from `bits`, holding those that are `waiting` for their turn."""
    held = 0
    for sample in samples:
        waiting.append(sample)
        held += len(sample.image)
        while len(waiting) >= _MOST_SAMPLES or held > _MOST_BYTES:
            drawn = _draw(bits, waiting)
            held -= len(drawn.image)
            yield drawn
    while waiting:
        yield _draw(bits, waiting)


def replaced(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Put the next usable sample in the place of each that is not, or the last one at the end."""
    unusable: list[Sample] = []
    usable: Sample | None = None
    for sample in samples:
        if sample.fault:
            unusable.append(sample)
            if len(unusable) > MOST_SUBSTITUTES:
                raise _none_usable(unusable)
            continue
        usable = sample
        yield from (usable._replace(number=bad.number, fault=bad.fault) for bad in unusable)
        unusable.clear()
        yield usable
    if unusable and not usable:
        raise _none_usable(unusable)
    for bad in unusable:
        assert usable
        yield usable._replace(number=bad.number, fault=bad.fault)


def _draw(bits: np.random.Philox, waiting: list[Sample]) -> Sample:
    place = int(bits.random_raw()) % len(waiting)
    waiting[place], waiting[-1] = waiting[-1], waiting[place]
    return waiting.pop()


def _none_usable(bad: list[Sample]) -> RunError:
    return RunError(f"none of {len(bad)} samples in a row can be used; the first: {bad[0].fault}")


def _parts(tar: ForwardTar) -> Iterator[tuple[str, str, Member]]:
    """Yield key, extension and member of what belongs to a sample."""
    for member in tar.members():
        named = key_and_kind(member.name)
        if named:
            yield *named, member


def _sample(
    tar: ForwardTar, name: str, key: str, group: Iterator[tuple[str, str, Member]], label: str, classes: int
) -> Sample:
    extension, _, field = label.partition(".")
    members, images, labels, image = [], [], [], b""
    for _, kind, member in group:
        members.append(member)
        if kind in IMAGE_EXTENSIONS:
            images.append(member)
            if len(images) == 1 and member.size <= _LARGEST_IMAGE:
                image = tar.read(member)
        elif kind == extension:
            labels.append(read_label(tar, member, field, classes))
    wrong = sample_fault(KeyedMembers(key, members[0], images, labels), extension)
    if not wrong and images[0].size > _LARGEST_IMAGE:
        detail = f"{images[0].name!r} has {images[0].size} bytes; expected at most {_LARGEST_IMAGE}"
        wrong = "oversized image", detail
    if wrong:
        return Sample(-1, name, key, b"", -1, Fault(name, key, *wrong))
    assert isinstance(labels[0], int)
    return Sample(-1, name, key, image, labels[0], None)
