"""Shards written whole or not at all, with bytes that follow from the samples alone."""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gmscale.files import sync


@dataclass(frozen=True)
class ShardStats:
    """What a shard came to."""

    count: int
    """Samples."""
    bytes: int
    sha256: str


class ShardFile:
    """A shard that is being written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._tar = tarfile.TarFile(fileobj=self, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]
        self.count = 0

    def add(self, sample: dict[str, str | bytes]) -> None:
        """Add a sample: its __key__ and the contents of each extension."""
        key = sample["__key__"]
        assert isinstance(key, str)
        for extension in sorted(sample.keys() - {"__key__"}):
            content = sample[extension]
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            member.mode = 0o444
            member.uname = member.gname = "bigdata"
            self._tar.addfile(member, io.BytesIO(data))
        self.count += 1

    def finish(self) -> None:
        """Write the end of the tar and wait until all is on the disk."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())

    def write(self, data: bytes) -> int:
        """Take bytes of the tar (called by tarfile)."""
        self._bytes += len(data)
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Return the bytes so far (called by tarfile)."""
        return self._bytes

    @property
    def stats(self) -> ShardStats:
        """What the shard has come to; final once it is finished."""
        return ShardStats(self.count, self._bytes, self._digest.hexdigest())


@contextmanager
def open_shard(path: Path) -> Iterator[ShardFile]:
    """Open a shard to add samples to: a file of that name exists once the block has ended without an exception.

    The bytes are those of webdataset's TarWriter(encoder=False, mtime=0), which is not used because its import
    takes seconds and brings torch. They depend on no user, umask, clock or machine.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            shard = ShardFile(file)
            yield shard
            shard.finish()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_shard(path: Path, samples: Iterable[dict[str, str | bytes]]) -> ShardStats:
    """Write one shard, complete and on the disk or not at all, with one sample at a time in memory."""
    with open_shard(path) as shard:
        for sample in samples:
            shard.add(sample)
    return shard.stats
