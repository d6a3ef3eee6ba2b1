"""A strict, bounded reader of tar headers.

Python's tarfile takes a header that it cannot read for the end of the archive, so a damaged shard silently loses
its tail. Here every byte of a shard is accounted for: each header has the right checksum and stands where the
member before it ends, and after the last come two blocks of zeros and nothing else.

Contents are not read, so damage inside them stays unseen, and so does damage that leaves a correct archive: whole
members removed or repeated, also where lost blocks swallow exactly the members after them, or zeros from a header
on where what follows is short enough to pass for padding. Counts and hashes (_info.json) find those.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn

from gmscale.data.faults import Fault, Reason, ShardError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
# One call fetches a header and, between photographs, the few small members around it.
_WINDOW = 4096
_LARGEST_EXTENSION = 1 << 20
_LONGEST_NAME = 4096
# Archives are padded to whole records, of 10 KiB by default.
_LONGEST_PADDING = 1 << 16

_REGULAR = b"0\x007"
_WITHOUT_DATA = b"123456"  # links, devices, directories, pipes
_PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = b"g", b"L", b"K", b"S"
_EXTENSIONS = b"xX" + _PAX_GLOBAL + _LONG_NAME + _LONG_LINK  # they describe the member after them

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
}
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, fetch the file itself",
    b"<": "an HTML or XML page, perhaps an error that was saved in its place",
    b"{": "JSON",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"RIFF": "a RIFF file, such as a WebP image",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
}


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    """In full, of whichever format; bytes that are not UTF-8 are kept as surrogates."""
    offset: int
    """Byte at which its contents begin."""
    size: int


def members(path: Path) -> Iterator[Member]:
    """Yield the regular files of a tar, reading headers only; ShardError for whatever is wrong with it.

    The fault may come after some members: none of them is to be trusted before the iterator has ended.
    """
    with Tar(path) as tar:
        yield from tar.members()


def pread(descriptor: int, size: int, offset: int) -> bytes:
    """Return `size` bytes from `offset`, fewer only where the file ends. Independent of the file's position."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class TarReader:
    """What is asked of a tar. Whatever is wrong with it is a ShardError whose fault names `shard`."""

    shard: str
    length: int
    """Bytes."""

    def bytes_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only where the tar ends."""
        raise NotImplementedError

    def read(self, member: Member) -> bytes:
        """Return the contents of a member; the caller has looked at its size."""
        return self.bytes_at(member.offset, member.size)

    def members(self) -> Iterator[Member]:
        """Yield the regular files, headers only."""
        if not self.length:
            self.fail("empty shard", "0 bytes")
        self._position, self._last, found = 0, "", False
        while (block := self.bytes_at(self._position, _BLOCK)) != _ZEROS:
            kind, name, size = self._header(block)
            if kind in _EXTENSIONS:
                kind, name, size = self._extended(kind, size)
            if kind in _WITHOUT_DATA:
                size = 0
            elif kind in _SPARSE:
                self._fail_sparse()
            elif kind not in _REGULAR:
                self.fail("damaged header", f"{name!r} is of the unknown type {kind!r} {self._where}")
            offset = self._position + _BLOCK
            if offset + size > self.length:
                self.fail("truncated shard", f"ends inside {name!r}, at byte {self.length}")
            # Before 1988 a directory was an empty file whose name ended in a slash.
            if kind in _REGULAR and not name.endswith("/"):
                found = True
                yield Member(name, offset, size)
            self._position, self._last = offset + _padded(size), name
        self._check_end()
        if not found:
            self.fail("empty shard", "a tar without a file in it")

    def _header(self, block: bytes) -> tuple[bytes, str, int]:
        """Return type, name and size from a header whose checksum is right."""
        if len(block) == _BLOCK and _checksum_fits(block):
            name = _text(block[:100])
            if block[345] and block[257:263] == b"ustar\0":
                name = f"{_text(block[345:500])}/{name}"
            try:
                return block[156:157], name, _number(block[124:136])
            except ValueError:
                self.fail("damaged header", f"{name!r} has a size of {block[124:136]!r} {self._where}")
        if self._position == 0:
            self._fail_foreign(block)
        if len(block) < _BLOCK:
            self.fail("truncated shard", f"ends {self._where}, without the two blocks of zeros that end a tar")
        self.fail("damaged header", f"no valid tar header {self._where}")

    def _extended(self, kind: bytes, size: int) -> tuple[bytes, str, int]:
        """Return type, name and size of the member after this extension header and any others."""
        long_name: str | None = None
        long_size: int | None = None
        while kind in _EXTENSIONS:
            if size > _LARGEST_EXTENSION:
                self.fail("oversized header", f"an extension header of {size} bytes {self._where}; expected 1 MiB")
            content = self.bytes_at(self._position + _BLOCK, size)
            if len(content) < size:
                self.fail("truncated shard", f"ends inside an extension header {self._where}")
            path: str | None = None
            pax_size: int | None = None
            if kind in _LONG_NAME:
                if b"\0" in content[:-1]:
                    self.fail("damaged header", f"a long name with zeros in it {self._where}")
                path = _text(content)
            elif kind not in _LONG_LINK:
                path, pax_size = self._pax(content)
                if kind in _PAX_GLOBAL and (path, pax_size) != (None, None):
                    self.fail("damaged header", f"one name or size for all members {self._where}")
            if path is not None and len(path) > _LONGEST_NAME:
                self.fail("oversized header", f"a name of {len(path)} characters {self._where}; expected 4096")
            if None not in (long_name, path) or None not in (long_size, pax_size):
                self.fail("damaged header", f"two names or sizes for one member {self._where}")
            long_name, long_size = path or long_name, long_size if pax_size is None else pax_size
            self._position += _BLOCK + _padded(size)
            kind, name, size = self._header(self.bytes_at(self._position, _BLOCK))
        return kind, long_name or name, size if long_size is None else long_size

    def _pax(self, content: bytes) -> tuple[str | None, int | None]:
        """Return the path and the size that a PAX header gives: records 'LENGTH KEY=VALUE\\n' from end to end."""
        path: str | None = None
        size: int | None = None
        position = 0
        while position < len(content):
            digits, _, _ = content[position : position + 20].partition(b" ")
            end = position + (int(digits) if digits.isdigit() else 0)
            key, equals, value = content[position + len(digits) + 1 : end - 1].partition(b"=")
            if not key or not equals or content[end - 1 : end] != b"\n" or (key == b"path" and b"\0" in value):
                self.fail("damaged header", f"a PAX header that cannot be read {self._where}")
            if key.startswith(b"GNU.sparse."):
                self._fail_sparse()
            if key == b"path":
                path = _text(value)
            elif key == b"size":
                if not value.isdigit() or len(value) > 20:
                    self.fail("damaged header", f"a PAX size of {value[:20]!r} {self._where}")
                size = int(value)
            position = end
        return path, size

    def _check_end(self) -> None:
        position = self._position
        tail = self.bytes_at(position, _LONGEST_PADDING + 2 * _BLOCK)
        if tail.strip(b"\0"):
            self.fail("damaged header", f"a block of zeros at byte {position}, but more after it")
        if len(tail) < 2 * _BLOCK:
            self.fail("truncated shard", "ends with one block of zeros instead of two")
        if position + len(tail) < self.length:
            self.fail("truncated shard", f"only zeros from byte {position} on, where members should be")

    def _fail_foreign(self, start: bytes) -> NoReturn:
        """Say what a file that does not begin with a tar header looks like."""
        for magic, program in _COMPRESSED.items():
            if start.startswith(magic):
                self.fail(
                    "compressed shard", f"is compressed with {program}; unpack it, or set data.access to stream"
                )
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        for magic, description in _FOREIGN.items():
            if text.startswith(magic):
                self.fail("not a tar", f"looks like {description}")
        if start[257:262] == b"ustar":
            self.fail("damaged header", "the header at byte 0 is damaged")
        if len(start) < _BLOCK:
            self.fail("truncated shard", f"{len(start)} bytes, less than a tar header")
        self.fail("not a tar", f"begins with {start[:16]!r}")

    def _fail_sparse(self) -> NoReturn:
        self.fail("sparse member", f"a member is stored with holes {self._where}; write the shard without --sparse")

    @property
    def _where(self) -> str:
        return f"at byte {self._position}" + (f", after {self._last!r}" if self._last else "")

    def fail(self, reason: Reason, detail: str) -> NoReturn:
        raise ShardError(Fault(self.shard, None, reason, detail))


class Tar(TarReader):
    """An open tar. Whatever is wrong with it is a ShardError whose fault names `shard`, by default the path."""

    def __init__(self, path: Path, shard: str | None = None) -> None:
        self.shard = shard or str(path)
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for its writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            self.fail("missing shard", "there is no such file")
        except (OSError, ValueError) as error:
            self.fail("unreadable shard", f"cannot be opened: {getattr(error, 'strerror', None) or error}")
        status = os.fstat(self._descriptor)
        self.length, self.mtime_ns = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            self.fail("unreadable shard", "is not a regular file")
        self._window, self._window_start = b"", 0

    def __enter__(self) -> "Tar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def bytes_at(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes: fewer where the file ends."""
        start = offset - self._window_start
        if start < 0 or start + size > len(self._window):
            try:
                self._window = pread(
                    self._descriptor, min(max(size, _WINDOW), max(self.length - offset, 0)), offset
                )
            except OSError as error:
                self.fail("unreadable shard", f"cannot be read at byte {offset}: {error.strerror}")
            self._window_start, start = offset, 0
        return self._window[start : start + size]


def _checksum_fits(block: bytes) -> bool:
    try:
        checksum = _number(block[148:156])
    except ValueError:
        return False
    # Eight spaces stand in for the checksum itself. Most of a header is zeros, quicker dropped than added up.
    counted = (block[:148] + b" " * 8 + block[156:]).translate(None, b"\0")
    total = sum(counted)
    # Some old programs add up signed bytes.
    return checksum == total or checksum == total - 256 * sum(byte > 127 for byte in counted)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Read an octal number, or a large one in base 256; ValueError for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits and not digits.isdigit():
        raise ValueError(field)
    return int(digits or b"0", 8)
