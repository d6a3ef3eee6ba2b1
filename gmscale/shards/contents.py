"""gmscale shards info: what shards hold, from _info.json and the index alone."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gmscale.data.faults import ShardError
from gmscale.data.index import kept
from gmscale.data.source import LocalDirectory, Split
from gmscale.data.stored import Stored
from gmscale.data.survey import changed, stamps


@dataclass(frozen=True)
class Contents:
    """What a split holds; None where only a look into the shards could tell."""

    split: str
    shards: int
    samples: int | None
    shortest_shard: int | None
    longest_shard: int | None
    bytes: int | None
    classes: int | None
    per_class: tuple[int, float, int] | None
    """Fewest, median and most samples of one class."""
    bad_samples: int | None
    hashes: bool
    """Whether _info.json has the SHA-256 of each shard."""
    index: str
    """`fits`, `out of date`, or `missing`."""
    fault: str | None
    """The first shard that is missing or has the wrong size."""

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return asdict(self)


def contents(split: Split, label: str = "cls", cache_dir: Path | None = None) -> Contents:
    """Describe a split without reading its shards."""
    stored, state, fault = _index(split, label, cache_dir)
    lengths = stored.lengths if stored else split.lengths
    sizes = stored.bytes if stored else split.sizes
    if sizes is None and isinstance(split.directory, LocalDirectory) and not fault:
        sizes = tuple(os.stat(split.directory.path / name).st_size for name in split.names)
    per_class, classes = None, len(split.classes) if split.classes else None
    if stored:
        label_of = stored.rows["label"]
        counts = np.bincount(label_of[label_of >= 0], minlength=classes or 0)
        classes = len(counts)
        per_class = int(counts.min()), float(np.median(counts)), int(counts.max())
    return Contents(
        split=split.name,
        shards=len(split.names),
        samples=sum(lengths) if lengths else None,
        shortest_shard=min(lengths) if lengths else None,
        longest_shard=max(lengths) if lengths else None,
        bytes=sum(sizes) if sizes else None,
        classes=classes,
        per_class=per_class,
        bad_samples=len(stored.faults) if stored else None,
        hashes=split.sha256 is not None,
        index=state,
        fault=fault,
    )


def _index(split: Split, label: str, cache_dir: Path | None) -> tuple[Stored | None, str, str | None]:
    """Return the kept index if it fits the shards, how it is with it, and what is wrong with the shards."""
    try:
        now = stamps(split)
    except ShardError as error:
        return None, "out of date", str(error)
    state = "missing"
    for stored, _ in kept(split, label, cache_dir):
        if stored.names == split.names and not changed(split, now, stored):
            return stored, "fits", None
        state = "out of date"
    return None, state, None
