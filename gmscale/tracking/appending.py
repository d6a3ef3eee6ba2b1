"""Files that grow by whole records, and outlive a full disk."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


class Appender:
    """Appends records to a file, each of them whole or not at all.

    A record that cannot be written, as on a full disk, is lost: `warn` hears of the first, and later ones are tried
    again. What of it had reached the file is cut off before anything follows, so that every reader goes on.
    """

    def __init__(self, path: Path, warn: Callable[[str], None], header: bytes = b"") -> None:
        self.path = path
        self.lost = 0
        """Records that could not be written."""
        self._warn, self._header = warn, header
        self._descriptor: int | None = None
        self._whole = 0  # bytes of whole records
        self._torn = False

    def append(self, record: bytes) -> None:
        """Write a record, so that other processes can read it."""
        try:
            if self._descriptor is None:
                self._open()
            if self._torn:
                self._cut()
            if self._whole == 0:
                self._write(self._header)
            self._write(record)
        except OSError as error:
            if self.lost == 0:
                self._warn(f"{self.path} cannot be written: {error.strerror}; the run goes on without its records")
            self.lost += 1
            with contextlib.suppress(OSError):  # else before the next record
                self._cut()

    def sync(self) -> None:
        """Wait until everything is on the disk, as far as the disk takes it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # whoever must know asks the next record
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file and say how much it misses."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
        if self.lost:
            self._warn(f"{self.path} misses {self.lost} records that could not be written")

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._whole = os.fstat(self._descriptor).st_size

    def _write(self, record: bytes) -> None:
        assert self._descriptor is not None
        rest = memoryview(record)
        self._torn = True
        while rest:  # a disk that fills up takes a part first
            rest = rest[os.write(self._descriptor, rest) :]
        self._torn = False
        self._whole += len(record)

    def _cut(self) -> None:
        if self._descriptor is not None and self._torn:
            os.ftruncate(self._descriptor, self._whole)
            self._torn = False
