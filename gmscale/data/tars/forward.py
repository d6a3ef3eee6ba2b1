"""A shard that is read once from front to back: a file, decompressed if need be, or what a command writes.

Nothing is trusted for its size: contents are decompressed as they are asked for, in memory that does not grow with
them. A tar's members are at an end only when the compressor's checksum and the command's exit status are right.
"""

import io
import lzma
import os
import signal
import subprocess
import sys
import zlib
from bz2 import BZ2File
from collections.abc import Iterator
from contextlib import closing, contextmanager
from gzip import GzipFile
from typing import TYPE_CHECKING, BinaryIO, NoReturn, cast

from gmscale.data.faults import Fault, Reason, ShardError
from gmscale.data.source import Directory
from gmscale.data.tars.tar import Member, TarReader

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIPE = "pipe:"

_CHUNK = 1 << 16
# xz -9 takes 65 MiB to decompress; a header can ask for 4 GiB.
_XZ_MEMORY = 256 << 20
_GZIP, _BZIP2, _XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"
_OTHERS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}


@contextmanager
def open_forward(directory: Directory, name: str) -> Iterator["ForwardTar"]:
    """Open a shard: decompressed if need be, or what a command writes if its name is `pipe:COMMAND`.

    The command runs in a shell; it is for the caller to have asked whether it may. Any fault is a ShardError.
    """
    shard = shown(directory, name)
    try:
        command = name.removeprefix(PIPE)
        file = directory.open(name) if command == name else cast(BinaryIO, _Command(command))
    except FileNotFoundError:
        _fail(shard, "missing shard", "there is no such file")
    except OSError as error:
        _fail(shard, "unreadable shard", f"cannot be opened: {error.strerror or error}")
    with closing(file):
        yield ForwardTar(file, shard)


def shown(directory: Directory, name: str) -> str:
    """Return how a fault names a shard."""
    return name if name.startswith(PIPE) else f"{directory}/{name}"


class ForwardTar(TarReader):
    """A tar that is read from front to back, held to all that TarReader asks; `shard` is its name in a fault.

    open_forward opens and closes it.
    """

    def __init__(self, file: BinaryIO, shard: str) -> None:
        self.shard = shard
        self.length = sys.maxsize  # until the end is met
        self._window, self._window_start = b"", 0
        whole = io.BufferedReader(_Whole(file), _CHUNK)
        with self._named():
            start = whole.peek()
        for magic, program in _OTHERS.items():
            if start.startswith(magic):
                self.fail("compressed shard", f"is compressed with {program}; expected gzip, bzip2 or xz, or a "
                           f"command in its place: 'pipe:{program} -dc FILE'")  # fmt: skip
        self._file = _decompressed(whole, start)
        self.bytes_at(0, 1)

    def read(self, member: Member) -> bytes:
        """Return the contents of the member last yielded; the caller has looked at its size."""
        data = super().read(member)
        if len(data) < member.size:
            self.fail("truncated shard", f"ends inside {member.name!r}, at byte {self.length}")
        return data

    def bytes_at(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes: fewer where the tar ends. What lies before `offset` is lost."""
        ahead = offset - self._window_start
        assert ahead >= 0
        with self._named():
            skipped = len(self._window)
            while skipped < ahead:
                count = len(self._file.read(min(ahead - skipped, _CHUNK)))
                skipped += count
                if not count:
                    self.fail("truncated shard", f"ends inside a member, at byte {self._window_start + skipped}")
            self._window, self._window_start = self._window[ahead:], offset
            missing = size - len(self._window)
            if missing > 0:
                more = self._file.read(missing)
                self._window += more
                if len(more) < missing:
                    self.length = offset + len(self._window)
        return self._window[:size]

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn the errors of files and decompressors into faults of the shard."""
        try:
            yield
        except EOFError:
            self.fail("truncated shard", "its compressed data ends too early")
        except (zlib.error, lzma.LZMAError, OSError) as error:
            said = getattr(error, "strerror", None) or str(error)
            self.fail("unreadable shard", f"cannot be read after byte {self._window_start}: {said}")


def _decompressed(file: BinaryIO, start: bytes) -> BinaryIO:
    if start.startswith(_GZIP):
        return cast(BinaryIO, GzipFile(fileobj=file))
    if start.startswith(_BZIP2):
        return cast(BinaryIO, BZ2File(file))
    if start.startswith(_XZ):
        return io.BufferedReader(_Xz(file), _CHUNK)
    return file


def _fail(shard: str, reason: Reason, detail: str) -> NoReturn:
    raise ShardError(Fault(shard, None, reason, detail)) from None


class _Forward(io.RawIOBase):
    """A file whose bytes come from `_next`."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        """Return up to `size` bytes, none only at the end."""
        raise NotImplementedError


class _Whole(_Forward):
    """A file that gives as many bytes as it is asked for, but at its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def _next(self, size: int) -> bytes:
        data = self._file.read(size)
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        return data


class _Xz(_Forward):
    """What LZMAFile gives, but in bounded memory, which it cannot be asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._stream = self._begin()

    def _next(self, size: int) -> bytes:
        while True:
            fed = b""
            if self._stream.eof:  # one stream may follow another
                fed = self._after_zeros(self._stream.unused_data)
                if not fed:
                    return b""
                self._stream = self._begin()
            elif self._stream.needs_input:
                fed = self._file.read(_CHUNK)
                if not fed:
                    raise EOFError
            data = self._stream.decompress(fed, size)
            if data:
                return data

    def _begin(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def _after_zeros(self, data: bytes) -> bytes:
        while not (rest := data.lstrip(b"\0")):
            data = self._file.read(_CHUNK)
            if not data:
                break
        return rest


class _Command(_Forward):
    """What a shell command writes. A status other than 0 is an OSError at its end."""

    def __init__(self, command: str) -> None:
        # In a session of its own, so that all it has started can be ended with it.
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def _next(self, size: int) -> bytes:
        data = self._output.read(size)
        if not data and (status := self._process.wait()):
            raise OSError(f"its command ended with status {status}")
        return data

    def close(self) -> None:
        if not self.closed:
            self._output.close()
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        super().close()
