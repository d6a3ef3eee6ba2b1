"""One shard's samples: where each image lies, its label, and what is wrong with it."""

import json
import re
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmscale.data.faults import Fault, Reason, ShardError
from gmscale.data.tars.tar import Member, Tar, TarReader

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

ROW = np.dtype([("offset", "<i8"), ("size", "<i4"), ("label", "<i4")])

# webdataset's rules: the key of a sample ends at the first dot of the file name, and __meta__ names are no samples.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/]*__(?:$|/)")

_LARGEST_TEXT, _LARGEST_JSON = 64, 1 << 20
_LARGEST_IMAGE = 2**31 - 1
# Where nothing says how many classes there are, a number beyond this is damage.
MOST_CLASSES = 1 << 20


class Scan(NamedTuple):
    """What a shard holds."""

    rows: NDArray[np.void]
    """Of dtype ROW, one for each key in the order of the shard. A sample that must not be used has label -1 and a
    fault; if it has no image, its size is 0 and its offset that of its first member."""
    faults: tuple[Fault, ...]
    bytes: int
    mtime_ns: int


def scan(path: Path, name: str, where: str, label: str, classes: int | None) -> Scan:
    """Read headers and labels of a shard; ShardError if it is damaged or has no sample that can be used.

    The samples' faults name the shard `name`, ShardError names it `where`. `label` is an extension or json.FIELD,
    and labels are below `classes`.
    """
    extension, _, field = label.partition(".")
    with Tar(path, where) as tar:
        table, sample = _Table(name, extension), None
        for member in tar.members():
            named = key_and_kind(member.name)
            if named is None:
                continue
            key, kind = named
            if sample is None or key != sample.key:
                if sample:
                    table.add(sample)
                sample = KeyedMembers(key, member, [], [])
            if kind in IMAGE_EXTENSIONS:
                sample.images.append(member)
            elif kind == extension:
                sample.labels.append(read_label(tar, member, field, classes or MOST_CLASSES))
        if sample is None:
            raise ShardError(
                Fault(where, None, "empty shard", "holds no sample: no member has a name such as 0000.jpg")
            )
        table.add(sample)
        faults = tuple(table.faults[row] for row in sorted(table.faults))
        if len(faults) == len(table.label):
            detail = f"none of its {len(faults)} samples can be used; the first: {faults[0].detail}"
            raise ShardError(Fault(where, None, faults[0].reason, detail))
        return Scan(table.rows(), faults, tar.length, tar.mtime_ns)


class KeyedMembers(NamedTuple):
    """The members of one key that follow each other."""

    key: str
    first: Member
    images: list[Member]
    labels: list[int | str]
    """A class number, or what is wrong with it."""


def key_and_kind(name: str) -> tuple[str, str] | None:
    """Return the sample's key and the extension in a member's name, or None if it belongs to no sample."""
    match = _MEMBER.fullmatch(name)
    return None if match is None or _META.match(name) else (match[1], match[2].lower())


class _Table:
    """Rows and their faults, as compact while they grow as they are in the end."""

    def __init__(self, shard: str, extension: str) -> None:
        self.faults: dict[int, Fault] = {}
        self.label = array("i")
        self._offset, self._size = array("q"), array("i")
        self._shard, self._extension = shard, extension
        self._row_of: dict[str, int] = {}

    def add(self, sample: KeyedMembers) -> None:
        """Add the next sample, or find that an earlier one was not over."""
        row = self._row_of.setdefault(sample.key, len(self.label))
        if row < len(self.label):
            detail = f"{sample.first.name!r} comes after other samples; expected the members of a sample in a row"
            self._reject(row, sample.key, "interleaved sample", detail)
            return
        label = sample.labels[0] if sample.labels else -1
        image = sample.images[0] if sample.images else sample.first._replace(size=0)
        self._offset.append(image.offset)
        self._size.append(min(image.size, _LARGEST_IMAGE))
        self.label.append(label if isinstance(label, int) else -1)
        fault = sample_fault(sample, self._extension)
        if fault:
            self._reject(row, sample.key, *fault)

    def rows(self) -> NDArray[np.void]:
        rows = np.empty(len(self.label), dtype=ROW)
        rows["offset"], rows["size"], rows["label"] = self._offset, self._size, self.label
        return rows

    def _reject(self, row: int, key: str, reason: Reason, detail: str) -> None:
        self.faults[row] = Fault(self._shard, key, reason, detail)
        self.label[row] = -1


def sample_fault(sample: KeyedMembers, extension: str) -> tuple[Reason, str] | None:
    """Return what is wrong with a sample, the worst first."""
    key, images, labels = sample.key, sample.images, sample.labels
    if key.startswith("/") or ".." in key.split("/"):
        return "unsafe name", f"{sample.first.name!r} leads out of its directory"
    if not images:
        return "no image", f"{sample.first.name!r} has no image; expected a member {f'{key}.jpg'!r}"
    image = images[0]
    if len(images) > 1:
        return "two images", f"{image.name!r} and {images[1].name!r} are images of one sample"
    if image.size == 0:
        return "empty image", f"{image.name!r} has 0 bytes"
    if image.size > _LARGEST_IMAGE:
        return "oversized image", f"{image.name!r} has {image.size} bytes; expected less than 2 GiB"
    if not labels:
        return "no label", f"{image.name!r} has no label; expected a member {f'{key}.{extension}'!r}"
    if len(labels) > 1:
        return "bad label", f"{image.name!r} has {len(labels)} labels"
    return ("bad label", labels[0]) if isinstance(labels[0], str) else None


def read_label(tar: TarReader, member: Member, field: str, classes: int) -> int | str:
    """Return the class number in a member's text, or in `field` of its JSON; else what is wrong with it."""
    if member.size > (_LARGEST_JSON if field else _LARGEST_TEXT):
        return f"{member.name!r} has {member.size} bytes; expected a class number"
    value: Any = tar.read(member).strip()
    if field:
        try:
            value = json.loads(value)[field]
        except (KeyError, TypeError, IndexError):
            return f"{member.name!r} has no field {field!r}"
        except (ValueError, RecursionError):
            return f"{member.name!r} does not hold JSON"
    if isinstance(value, bytes | str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        return f"{member.name!r} holds {str(value)[:40]!r}; expected a class number"
    if not 0 <= value < classes:
        return f"{member.name!r} holds label {str(value)[:40]}; expected 0 to {classes - 1}"
    return value
