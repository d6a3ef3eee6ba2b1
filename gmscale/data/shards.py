"""An index of webdataset shards: where each image lies in which tar, and its label.

Only the tar headers and the labels are read, once; after that any sample is one `os.pread`. The shards must be
uncompressed tars beside timm's `_info.json`, whose sample counts expose a shard that was cut short.
"""

import hashlib
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gmscale.errors import RunError, UsageError, nearest

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

# webdataset's rule: the key of a sample ends at the first dot of the file name.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")

# Descriptors kept open by each process; ImageNet's 1024 shards would exhaust the usual limit.
_MAX_OPEN = 64
_descriptors: OrderedDict[Path, int] = OrderedDict()


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Every sample of one split, in shard order; the arrays have one entry a sample but for `lengths`."""

    paths: tuple[Path, ...]
    lengths: NDArray[np.int64]
    """Samples per shard, in the order of `paths`."""
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    """Byte at which the encoded image begins in its shard."""
    size: NDArray[np.int64]
    """Bytes of the encoded image."""
    label: NDArray[np.int64]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' names and their layout: equal where order and labels are equal."""
        digest = hashlib.sha256(json.dumps([path.name for path in self.paths]).encode())
        for array in (self.lengths, self.offset, self.size, self.label):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


def open_index(directory: Path, split: str) -> ShardIndex:
    """Index the shards of `split`; whatever is wrong with one of them is a UsageError that names it."""
    names, expected, classes = _read_info(directory, split)
    paths = tuple(directory / name for name in names)
    samples = [_read_shard(path, count) for path, count in zip(paths, expected, strict=True)]
    if classes is None:
        # timm's own sets do not list their classes.
        classes = [str(label) for label in range(1 + max(label for rows in samples for _, _, label, _ in rows))]
    for path, rows in zip(paths, samples, strict=True):
        for _, _, label, member in rows:
            if not 0 <= label < len(classes):
                raise UsageError(f"{path}: {member} holds label {label}; expected 0 to {len(classes) - 1}")
    table = np.array([row[:3] for rows in samples for row in rows], dtype=np.int64)
    return ShardIndex(
        paths=paths,
        lengths=np.array(expected, dtype=np.int64),
        shard=np.repeat(np.arange(len(paths), dtype=np.int32), expected),
        offset=table[:, 0].copy(),
        size=table[:, 1].copy(),
        label=table[:, 2].copy(),
        classes=classes,
    )


def read(index: ShardIndex, i: int) -> bytes:
    """Return the encoded image of sample `i`. Safe after a fork: nothing depends on a file position."""
    path, size = index.paths[index.shard[i]], int(index.size[i])
    try:
        data = os.pread(_descriptor(path), size, int(index.offset[i]))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) < size:
        raise RunError(f"{path} ends inside sample {i}; it was cut short after it was indexed")
    return data


def member_name(index: ShardIndex, i: int) -> str:
    """Return the name of sample `i`'s image within its shard, from the tar header before it."""
    header = os.pread(
        _descriptor(index.paths[index.shard[i]]), tarfile.BLOCKSIZE, int(index.offset[i]) - tarfile.BLOCKSIZE
    )
    return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name


def _descriptor(path: Path) -> int:
    if path in _descriptors:
        _descriptors.move_to_end(path)
        return _descriptors[path]
    if len(_descriptors) >= _MAX_OPEN:
        os.close(_descriptors.popitem(last=False)[1])
    _descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return _descriptors[path]


def _read_info(directory: Path, split: str) -> tuple[list[str], list[int], list[str] | None]:
    """Return the file names, samples per shard and classes of `split` from timm's _info.json."""
    if not directory.is_dir():
        raise UsageError(
            f"data.source: {directory} is not a directory; expected 'embedded' or a directory of shards"
        )
    path = directory / "_info.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; it lists the splits, shards and sample counts for timm") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    try:
        splits = {name: (entry["filenames"], entry["shard_lengths"]) for name, entry in info["splits"].items()}
    except (AttributeError, KeyError, TypeError):
        raise UsageError(f"{path} needs 'filenames' and 'shard_lengths' for each of its 'splits'") from None
    if split not in splits:
        raise UsageError(f"{path} has no split {split!r} (it has {', '.join(splits)}){nearest(split, splits)}")
    names, lengths = splits[split]
    if not names or len(names) != len(lengths):
        raise UsageError(f"{path}: split {split!r} has {len(names)} filenames and {len(lengths)} shard_lengths")
    return names, lengths, info.get("classes")


def _read_shard(path: Path, expected: int) -> list[tuple[int, int, int, str]]:
    """Return (offset, size, label, name of the label's member) of each sample of one shard."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tuple[int, str]] = {}
    try:
        with path.open("rb") as file:
            for member in _members(path, file):
                match = _MEMBER.fullmatch(member.name)
                if match is None:
                    continue
                key, extension = match[1], match[2].lower()
                if extension == "cls":
                    labels[key] = _read_label(path, file, member), member.name
                elif extension in IMAGE_EXTENSIONS:
                    if key in images:
                        raise UsageError(
                            f"{path}: {images[key].name} and {member.name} are images of one sample {key!r}"
                        )
                    images[key] = member
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    if not images:
        raise UsageError(f"{path} is empty: it holds no image ({', '.join(IMAGE_EXTENSIONS)})")
    for key, member in images.items():
        if key not in labels:
            raise UsageError(f"{path}: {member.name} has no label; expected a member {key}.cls")
    for key, (_, name) in labels.items():
        if key not in images:
            raise UsageError(f"{path}: {name} has no image; expected a member {key}.jpg")
    if len(images) != expected:
        raise UsageError(
            f"{path} holds {len(images)} samples, _info.json says {expected}: truncated or out of date"
        )
    return [(member.offset_data, member.size, *labels[key]) for key, member in images.items()]


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the files in a tar, reading headers only."""
    length = os.fstat(file.fileno()).st_size
    if length == 0:
        raise UsageError(f"{path} is empty: 0 bytes")
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > length:
                    raise UsageError(f"{path} is truncated: it ends inside {member.name}")
                if member.issparse():
                    raise UsageError(f"{path}: {member.name} is stored sparsely; write the shard without holes")
                if member.isreg():
                    yield member
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
    except tarfile.TarError as error:
        raise UsageError(f"{path} is not an uncompressed tar, or is damaged: {error}") from None
    if end.strip(b"\0"):
        # tarfile takes a header that it cannot read for the end of the tar.
        raise UsageError(f"{path} is damaged or truncated: no tar header at byte {tar.offset}")


def _read_label(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> int:
    text = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{path}: {member.name} holds {text[:20]!r}; expected a class number") from None
