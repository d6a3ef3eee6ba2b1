"""Shards as a user names them on a command line, and their samples as the source of a build."""

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmscale.data.config import DataConfig
from gmscale.data.faults import Fault, Reason, ShardError
from gmscale.data.source import Split, open_split
from gmscale.data.tars.scan import scan
from gmscale.data.tars.tar import Tar
from gmscale.errors import UsageError
from gmscale.shards.items import split_name
from gmscale.shards.listing import Listing, unknown_class
from gmscale.shards.manifest import read_info
from gmscale.shards.processes import spread

_BLOCK = 512
_REMOTE = ("http://", "https://", "s3://")


class _Task(NamedTuple):
    path: Path
    name: str
    label: str
    classes: int | None


class _Samples(NamedTuple):
    """Of one shard, in its order."""

    name: str
    keys: list[str]
    offsets: NDArray[np.int64]
    """Where the headers of each sample begin."""
    sizes: NDArray[np.int64]
    """Bytes from there to the end of the sample."""
    labels: NDArray[np.int64]
    faults: dict[str, Fault]


def is_shards(source: str) -> bool:
    """Whether `source` names shards, a directory or a pattern, rather than a folder of images."""
    path = Path(source)
    if not path.is_dir() and (".tar" in source or source.startswith(_REMOTE)):
        return True
    return any((path / name).is_file() for name in ("_info.json", "info.json")) or any(path.glob("*.tar"))


def open_given(source: str, split: str | None, cache_dir: str = DataConfig.cache_dir) -> list[Split]:
    """Open `split` of a directory of shards, by default every one that it has, or the shards of a pattern.

    A pattern stands in place of the directory: 'DIR/train-{0000..0003}.tar'.
    """
    if ".tar" in source and not Path(source).is_dir():
        # The last slash before any brace ends the directory.
        directory = re.match(r"(?:[^{]*/)?", source)[0]  # type: ignore[index]
        config = DataConfig(source=directory.rstrip("/") or ("/" if directory else "."), cache_dir=cache_dir)
        return [open_split(config, source[len(directory) :])]
    config = DataConfig(source=source, cache_dir=cache_dir)
    if split is None and source.startswith(_REMOTE):
        raise UsageError(f"{source}: name the --split")
    if not source.startswith(_REMOTE) and not Path(source).is_dir():
        raise UsageError(f"{source} is not a directory of shards, nor a pattern such as 'DIR/a-{{0000..0003}}.tar'")
    splits = [split] if split else list(read_info(Path(source)).get("splits", {}))
    return [open_split(config, name) for name in splits or ["train"]]


def list_samples(source: str, split: str, label: str, workers: int, pinned: Sequence[str] | None) -> Listing:
    """List the samples of shards, to be shuffled and divided anew.

    A damaged shard is a ShardError. Classes are matched by name with `pinned`.
    Bad samples are listed with their fault.
    """
    if source.startswith(_REMOTE):
        raise UsageError(f"{source}: new shards are built from local ones only; copy them first")
    (found,) = open_given(source, split)
    root = Path(str(found.directory))
    count = len(found.classes) if found.classes else None
    tasks = [_Task(root / name, name, label, count) for name in found.names]
    with closing(spread(_scan, tasks, min(workers, len(tasks)))) as messages:
        scanned = {part.name: part for part in messages}
    parts = [scanned[name] for name in found.names]
    labels = np.concatenate([part.labels for part in parts])
    classes = found.classes or [str(number) for number in range(1 + int(labels.max()))]
    known = list(pinned or classes)
    number = {name: i for i, name in enumerate(known)}
    for name in classes:
        if name not in number:
            raise UsageError(f"{root}: {unknown_class(name, known)}")
    names: list[str] = []
    faults: dict[int, tuple[Reason, str]] = {}
    for part in parts:
        for key in part.keys:
            if fault := part.faults.get(key):
                faults[len(names)] = fault.reason, fault.detail
            names.append(f"{part.name}/{key}")
    renumbered = np.array([*(number[name] for name in classes), -1])[labels]
    used = set(renumbered.tolist())
    return Listing(
        root=root,
        names=names,
        sizes=np.concatenate([part.sizes for part in parts]),
        labels=renumbered,
        classes=known,
        unused=[name for i, name in enumerate(known) if i not in used],
        shards=[str(task.path) for task in tasks],
        shard=np.repeat(np.arange(len(parts)), [len(part.keys) for part in parts]),
        offsets=np.concatenate([part.offsets for part in parts]),
        faults=faults,
    )


def _scan(task: _Task) -> Iterator[_Samples]:
    found = scan(task.path, task.name, str(task.path), task.label, task.classes)
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    position = 0
    with Tar(task.path) as tar:
        for member in tar.members():
            end = member.offset + -(-member.size // _BLOCK) * _BLOCK
            if named := split_name(member.name):
                begins.setdefault(named[0], position)
                ends[named[0]] = end
            position = end
    if len(begins) != len(found.rows):
        raise ShardError(Fault(str(task.path), None, "unsafe name", "holds members that belong to no sample"))
    offsets = np.array(list(begins.values()), dtype=np.int64)
    yield _Samples(
        task.name,
        list(begins),
        offsets,
        np.array(list(ends.values()), dtype=np.int64) - offsets,
        found.rows["label"].astype(np.int64),
        {fault.key: fault for fault in found.faults if fault.key is not None},
    )
