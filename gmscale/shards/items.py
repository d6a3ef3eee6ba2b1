"""The bytes of one sample of a build's source: a file that is an image, or a stretch of a shard."""

import io
import re
import tarfile
from typing import NamedTuple

from gmscale.data.faults import ImageError, Reason
from gmscale.data.tars.scan import IMAGE_EXTENSIONS
from gmscale.errors import RunError

# webdataset's rules: the key of a sample ends at the first dot of the file name, and __meta__ names are no samples.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/]*__(?:$|/)")

# A photograph of 100 megapixels takes about a third of it.
_LARGEST = 256 << 20


class Item(NamedTuple):
    """Where a sample is."""

    name: str
    """For people: the path in the source's directory, or SHARD/KEY."""
    path: str
    size: int
    """Bytes; -1 where the file cannot be examined."""
    label: int
    offset: int | None = None
    """Byte of the shard `path` at which the headers of the sample's first member begin; None for an image file."""
    fault: tuple[Reason, str] | None = None
    """What is known to be wrong with it."""


def read(item: Item) -> tuple[bytes, dict[str, bytes]]:
    """Return the encoded image of a sample, and its other members but for the label by extension.

    ImageError for a sample that cannot be read, RunError for one that has changed since it was listed.
    """
    if item.fault:
        raise ImageError(*item.fault)
    if item.size > _LARGEST:
        raise ImageError("oversized image", f"{item.size} bytes; expected at most {_LARGEST}")
    try:
        with open(item.path, "rb") as file:
            file.seek(item.offset or 0)
            # One byte more tells whether a file has grown.
            data = file.read(max(item.size, 0) + (item.offset is None))
    except OSError as error:
        raise ImageError("no image", f"cannot be read: {error.strerror or error}") from None
    if len(data) != item.size:
        raise RunError(f"{item.path} has changed since the build began; start it again when nothing writes there")
    return (data, {}) if item.offset is None else _unpack(data)


def split_name(member: str) -> tuple[str, str] | None:
    """Return key and extension of a tar member's name; None for one that belongs to no sample."""
    match = _MEMBER.fullmatch(member)
    return (match[1], match[2]) if match and not _META.match(member) else None


def _unpack(members: bytes) -> tuple[bytes, dict[str, bytes]]:
    image, others = b"", {}
    with tarfile.open(fileobj=io.BytesIO(members + bytes(2 * tarfile.BLOCKSIZE)), mode="r:") as tar:
        for member in tar:
            content, named = tar.extractfile(member), split_name(member.name)
            if content is None or named is None:
                continue
            extension = named[1]
            if extension.lower() in IMAGE_EXTENSIONS:
                image = content.read()
            elif extension.lower() != "cls":
                others[extension] = content.read()
    return image, others
