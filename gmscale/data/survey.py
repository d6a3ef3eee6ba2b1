"""What is in the shards of a split: every shard is looked at, those that have changed are scanned."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from gmscale.data.faults import Fault, Reason, ShardError
from gmscale.data.source import LocalDirectory, Split
from gmscale.data.stored import Stored, fingerprint
from gmscale.data.tars.scan import Scan, scan
from gmscale.errors import UsageError

# Most of a scan is waiting where the shards are on a network.
_THREADS = 16
# Of a split. Each costs some 400 bytes in every process.
_MOST_FAULTS = 1 << 16

_T = TypeVar("_T")


class Stamp(NamedTuple):
    """What tells without reading a shard whether it has changed; None is not known."""

    bytes: int | None
    mtime_ns: int | None
    length: int | None


def stamps(split: Split) -> list[Stamp]:
    """Look at every shard that is here; for those elsewhere there is only what _info.json says."""
    sizes = split.sizes or (None,) * len(split.names)
    directory = split.directory
    if not isinstance(directory, LocalDirectory):
        lengths = split.lengths or (None,) * len(split.names)
        return [Stamp(size, None, length) for size, length in zip(sizes, lengths, strict=True)]

    def look(shard: int) -> Stamp | ShardError:
        try:
            status = os.stat(directory.path / split.names[shard])
        except OSError as error:
            return _unreadable(split, shard, error)
        size = sizes[shard]
        if size is not None and size != status.st_size:
            reason: Reason = "truncated shard" if status.st_size < size else "wrong size"
            return _bad(split, shard, reason, f"{status.st_size} bytes, _info.json says {size}")
        return Stamp(status.st_size, status.st_mtime_ns, None)

    return _all_good(split, look, range(len(split.names)))


def changed(split: Split, stamps: list[Stamp], stored: Stored) -> list[int]:
    """Return the numbers of the shards that `stored` does not hold as they are now."""
    known = dict(zip(stored.names, zip(stored.bytes, stored.mtime_ns, stored.lengths, strict=True), strict=True))
    return [
        shard
        for shard, (name, stamp) in enumerate(zip(split.names, stamps, strict=True))
        if name not in known or any(now not in (None, then) for now, then in zip(stamp, known[name], strict=True))
    ]


def survey(split: Split, label: str, old: Stored | None, stale: list[int]) -> Stored:
    """Scan the shards numbered in `stale`, and take the others from `old`."""
    classes = None if split.classes is None else len(split.classes)

    def look(shard: int) -> Scan | ShardError:
        name = split.names[shard]
        size = split.sizes[shard] if split.sizes else None
        sha256 = split.sha256[shard] if split.sha256 else None
        try:
            path = split.directory.fetch(name, size=size, sha256=sha256)
            return scan(path, name, where(split, shard), label, classes)
        except ShardError as error:
            return error
        except OSError as error:
            return _unreadable(split, shard, error)

    scans = dict(zip((split.names[shard] for shard in stale), _all_good(split, look, stale), strict=True))
    if old is not None:
        kept = set(split.names) - set(scans)
        scans |= {name: found for name, found in _as_scans(old) if name in kept}
    found = [scans[name] for name in split.names]
    faults = tuple(fault for one in found for fault in one.faults)
    lengths = tuple(len(one.rows) for one in found)
    if len(faults) > _MOST_FAULTS:
        raise UsageError(
            f"{split.directory}: {len(faults)} of {sum(lengths)} samples of split {split.name!r} cannot be used; "
            f"the first: {faults[0]}"
        )
    rows = np.concatenate([one.rows for one in found])
    return Stored(
        label=label,
        classes=classes,
        names=split.names,
        lengths=lengths,
        bytes=tuple(one.bytes for one in found),
        mtime_ns=tuple(one.mtime_ns for one in found),
        faults=faults,
        fingerprint=fingerprint(split.names, lengths, rows),
        rows=rows,
    )


def _as_scans(stored: Stored) -> Iterator[tuple[str, Scan]]:
    faults: dict[str, list[Fault]] = {name: [] for name in stored.names}
    for fault in stored.faults:
        faults[fault.shard].append(fault)
    ends = np.cumsum(stored.lengths)
    for name, length, end, size, mtime_ns in zip(
        stored.names, stored.lengths, ends, stored.bytes, stored.mtime_ns, strict=True
    ):
        yield name, Scan(stored.rows[end - length : end], tuple(faults[name]), size, mtime_ns)


def check_lengths(split: Split, stored: Stored) -> None:
    """Compare the samples found in each shard with what _info.json says."""
    detail = "holds {} samples, _info.json says {}: truncated or out of date"
    _raise_first(
        split,
        [
            _bad(split, shard, "wrong sample count", detail.format(length, expected))
            for shard, (length, expected) in enumerate(
                zip(stored.lengths, split.lengths or stored.lengths, strict=True)
            )
            if length != expected
        ],
    )


def where(split: Split, shard: int) -> str:
    """Return what errors call a shard."""
    return f"{split.directory}/{split.names[shard]}"


def _all_good(split: Split, look: Callable[[int], _T | ShardError], shards: Iterable[int]) -> list[_T]:
    """Look at each of the shards; raise the first ShardError of those found, and say how many more there are."""
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(look, shards))
    _raise_first(split, [result for result in results if isinstance(result, ShardError)])
    return [result for result in results if not isinstance(result, ShardError)]


def _raise_first(split: Split, bad: list[ShardError]) -> None:
    if bad:
        first = bad[0].fault
        more = f"; {len(bad) - 1} more of the {len(split.names)} shards cannot be used" if len(bad) > 1 else ""
        raise ShardError(first._replace(detail=first.detail + more))


def _unreadable(split: Split, shard: int, error: OSError) -> ShardError:
    if isinstance(error, FileNotFoundError):
        return _bad(split, shard, "missing shard", "there is no such file")
    return _bad(split, shard, "unreadable shard", f"cannot be read: {error.strerror or error}")


def _bad(split: Split, shard: int, reason: Reason, detail: str) -> ShardError:
    return ShardError(Fault(where(split, shard), None, reason, detail))
