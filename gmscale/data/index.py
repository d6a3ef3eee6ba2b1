"""An index of webdataset shards: where each image lies in which tar, and its label.

Only the tar headers and the labels are read, once: the index is kept beside the shards, or in the cache where that
cannot be written, and read again only of shards that have changed. Any sample is then one `os.pread`.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from gmscale.data.faults import Fault
from gmscale.data.source import LocalDirectory, Split
from gmscale.data.stored import Stored, load, open_table, save
from gmscale.data.survey import changed, check_lengths, stamps, survey, where
from gmscale.data.tars.scan import ROW
from gmscale.data.tars.tar import members, pread
from gmscale.errors import RunError, UsageError

# Descriptors kept open by each process; ImageNet's 1024 shards would exhaust the usual limit.
_MAX_OPEN = 64
_descriptors: OrderedDict[tuple[str, str, int, int], int] = OrderedDict()


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Every sample of one split, in shard order; those that must not be used have label -1 and a fault."""

    split: Split
    stored: Stored
    classes: list[str]

    def __len__(self) -> int:
        return len(self.stored.rows)

    @property
    def offset(self) -> NDArray[np.int64]:
        """Byte at which each encoded image begins in its shard."""
        return self.stored.rows["offset"]

    @property
    def size(self) -> NDArray[np.int32]:
        """Bytes of each encoded image."""
        return self.stored.rows["size"]

    @property
    def label(self) -> NDArray[np.int32]:
        return self.stored.rows["label"]

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self.stored.faults

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' names and their layout: equal where order and labels are equal."""
        return self.stored.fingerprint

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Samples per shard."""
        return np.array(self.stored.lengths, dtype=np.int64)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.lengths)

    def shard(self, i: int) -> int:
        """Return the number of the shard that sample `i` is in."""
        return int(np.searchsorted(self._ends, i, side="right"))

    def substitute(self, i: int) -> int:
        """Return the next usable sample of the same shard, after its last the first; `i` if it is the only one."""
        shard = self.shard(i)
        last = int(self._ends[shard])
        first = last - int(self.lengths[shard])
        usable = np.flatnonzero(np.roll(self.label[first:last], first - i - 1) >= 0)
        return first + (i + 1 - first + int(usable[0])) % (last - first)

    def __getstate__(self) -> dict[str, Any]:
        state = {field: getattr(self, field) for field in ("split", "stored", "classes")}
        if self.stored.table is not None:
            # The receiver maps the same file; else each would have its own copy, of 20 MB for ImageNet.
            state["stored"] = replace(self.stored, rows=np.empty(0, dtype=ROW))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state["stored"]
        if stored.table is not None:
            try:
                state["stored"] = replace(stored, rows=open_table(stored.table))
            except (OSError, ValueError) as error:
                raise RunError(f"{stored.table} cannot be read: {error}; it was there when the run began") from None
        self.__dict__.update(state)


def open_index(split: Split, label: str = "cls", cache_dir: Path | None = None) -> ShardIndex:
    """Index the shards of `split`, from what is kept of earlier scans where possible.

    `label` is an extension or json.FIELD. A missing or damaged shard, or one that is not as
    _info.json says, is a ShardError.
    """
    now, classes = stamps(split), None if split.classes is None else len(split.classes)
    stored, stale, lasting = None, list(range(len(split.names))), False
    for found, stays in kept(split, label, cache_dir):
        if (found.label, found.classes) == (label, classes):
            different = changed(split, now, found)
            if stored is None or len(different) < len(stale):
                stored, stale, lasting = found, different, stays
        if stored and not stale:
            break
    if stored is None or stale or stored.names != split.names:
        stored, lasting = survey(split, label, stored, stale), False
    check_lengths(split, stored)
    if not lasting:
        stored = _saved(stored, _stem(split, label), (split.directory.writable(), _cache_folder(split, cache_dir)))
    if split.classes is not None:
        return ShardIndex(split, stored, split.classes)
    # timm's own sets do not list their classes.
    return ShardIndex(split, stored, [str(number) for number in range(1 + int(stored.rows["label"].max()))])


def kept(split: Split, label: str = "cls", cache_dir: Path | None = None) -> Iterator[tuple[Stored, bool]]:
    """Yield what is kept of scans of such a split, perhaps of other files, and whether its own files will stay."""
    for fetch, stays in _places(split, _cache_folder(split, cache_dir)):
        stored = load(fetch, _stem(split, label))
        if stored is not None:
            yield stored, stays


def read(index: ShardIndex, i: int) -> bytes:
    """Return the encoded image of sample `i`. Safe after a fork: nothing depends on a file position."""
    size = int(index.size[i])
    shard = index.shard(i)
    descriptor = _descriptor(index, shard)
    try:
        data = pread(descriptor, size, int(index.offset[i]))
    except OSError as error:
        raise RunError(f"{where(index.split, shard)} cannot be read: {error.strerror or error}") from error
    if len(data) < size:
        raise RunError(f"{where(index.split, shard)} ends inside sample {i}; it was cut short after it was indexed")
    return data


def member_name(index: ShardIndex, i: int) -> str:
    """Return the name of sample `i`'s image, or else first member. It reads headers up to there: for messages."""
    shard, offset = index.shard(i), int(index.offset[i])
    for member in members(fetch_shard(index, shard)):
        if member.offset == offset:
            return member.name
    raise RunError(
        f"{where(index.split, shard)} has changed since it was indexed: no member begins at byte {offset}"
    )


def _descriptor(index: ShardIndex, shard: int) -> int:
    stored = index.stored
    identity = (str(index.split.directory), stored.names[shard], stored.bytes[shard], stored.mtime_ns[shard])
    if identity in _descriptors:
        _descriptors.move_to_end(identity)
        return _descriptors[identity]
    try:
        try:
            descriptor = os.open(fetch_shard(index, shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            if isinstance(error, UsageError):
                raise
            # Another process may have evicted a remote shard's copy just after it was fetched.
            descriptor = os.open(fetch_shard(index, shard), os.O_RDONLY | os.O_CLOEXEC)
    except UsageError:
        raise  # its server does not have it
    except OSError as error:
        raise RunError(f"{where(index.split, shard)} cannot be read: {error.strerror or error}") from error
    length = os.fstat(descriptor).st_size
    if length != stored.bytes[shard]:
        os.close(descriptor)
        raise RunError(
            f"{where(index.split, shard)} has {length} bytes; expected {stored.bytes[shard]}: it has changed since "
            "it was indexed"
        )
    if len(_descriptors) >= _MAX_OPEN:
        os.close(_descriptors.popitem(last=False)[1])
    _descriptors[identity] = descriptor
    return descriptor


def fetch_shard(index: ShardIndex, shard: int) -> Path:
    """Return a complete local file of a shard, fetched if it is remote."""
    hashes = index.split.sha256
    return index.split.directory.fetch(
        index.split.names[shard], size=index.stored.bytes[shard], sha256=hashes[shard] if hashes else None
    )


def _saved(stored: Stored, stem: str, folders: Iterable[Path | None]) -> Stored:
    """Save an index in the first folder that takes it; it works without."""
    for folder in folders:
        if folder:
            with suppress(OSError):
                return save(stored, folder, stem)
    return stored


def _places(split: Split, cache: Path | None) -> Iterator[tuple[Callable[[str], Path], bool]]:
    """Yield ways to fetch the files of an index, and whether those are here to stay."""
    if cache:
        yield LocalDirectory(cache).fetch, True
    yield split.directory.fetch, isinstance(split.directory, LocalDirectory)


def _stem(split: Split, label: str) -> str:
    """Return a name of its own for the index of each choice of shards and labels."""
    if label == "cls" and ".tar" not in split.name:
        return f"_index-{quote(split.name, safe='')}"
    return "_index-" + hashlib.sha256(json.dumps([split.names, label]).encode()).hexdigest()[:12]


def _cache_folder(split: Split, cache_dir: Path | None) -> Path | None:
    if cache_dir is None:
        return None
    directory = split.directory
    address = str(directory.path.resolve() if isinstance(directory, LocalDirectory) else directory)
    return cache_dir / "index" / hashlib.sha256(address.encode()).hexdigest()[:16]
