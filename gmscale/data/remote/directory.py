"""A directory of shards on an http(s) or S3 server, whose files are fetched into a cache on the node's disk."""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from gmscale.data.faults import Fault, Reason, ShardError
from gmscale.data.remote.cache import Cache, Entry, name_of
from gmscale.data.remote.prefetch import Prefetch
from gmscale.data.remote.servers import CHUNK, Address, Answer
from gmscale.data.remote.transfer import check_installed, receive
from gmscale.data.tars.tar import members
from gmscale.errors import RunError, UsageError
from gmscale.files import sync

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Room is made in such steps for a file whose size its server does not say.
_STEP = 64 << 20
# Share of the cache that may be filled with files before they are asked for.
_AHEAD = 1 / 3


class RemoteDirectory:
    """Files at `address`, of which copies in `cache_dir` take at most `cache_gb` GB, whoever made them.

    A copy is trusted while the size and the hash that the caller knows are its own. A shard of which neither is
    known is trusted as it was first fetched; of other files the server is asked each time whether they are still
    the same. A file that is removed from the cache while it is open stays readable.
    """

    def __init__(self, address: str, cache_dir: Path, cache_gb: float) -> None:
        self._address = Address(address)
        _check_address(address)
        check_installed(self._address)
        self._cache = Cache(cache_dir, int(cache_gb * 1e9))
        self._prefetch: Prefetch | None = None

    def __str__(self) -> str:
        """The directory as the user wrote it, without credentials and query."""
        return str(self._address)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prefetch": None}

    def writable(self) -> Path | None:
        """Nothing can be put beside the shards."""
        return None

    def open(self, name: str) -> BinaryIO:
        """Open a file to be read once, from front to back, as it comes; no copy is made."""
        # A RawIOBase that is read only is what BufferedReader takes, and that is a BinaryIO in all but name.
        return cast(BinaryIO, io.BufferedReader(_Forward(self._address / _checked(name)), CHUNK))

    def fetch(self, name: str, *, size: int | None = None, sha256: str | None = None) -> Path:
        """Return a complete copy that has `size` and `sha256`; the processes of a node make one between them.

        FileNotFoundError where the server has no such file, ShardError where it has another one, RunError where it
        cannot be reached.
        """
        address = self._address / _checked(name)
        cached = name_of(address.url, name)
        fixed = size is not None or sha256 is not None or name.endswith(".tar")
        if fixed and (path := self._cache.find(cached, size, sha256)):
            return path
        try:
            self._cache.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"data.cache_dir: {self._cache.folder} cannot be made: {error.strerror}") from None
        with self._cache.locked(cached) as entry:
            if fixed and (path := self._cache.find(cached, size, sha256)):
                return path
            for last in (False, True):
                fault = self._download(entry, name, size, sha256)
                if fault is None:
                    break
                entry.part.unlink()
                if last:
                    raise ShardError(fault)
            return entry.path

    def prefetch(self, names: Sequence[str]) -> None:
        """Begin to fetch files that will be read, in their order, in the background; instead of earlier ones.

        For one process of a node. A third of the cache is filled ahead of the readers, wherever these are: a file
        whose copy was asked for again has been reached, and so have those before it.
        """
        if self._prefetch:
            self._prefetch.stop()
        paths = [self._cache.folder / name_of((self._address / _checked(name)).url, name) for name in names]
        self._prefetch = Prefetch(self.fetch, names, paths, self._cache.bound * _AHEAD)

    def _download(self, entry: Entry, name: str, size: int | None, sha256: str | None) -> Fault | None:
        """Fetch, check and name a file; what is wrong with it is returned, and left as a part."""
        shown = f"{self}/{name}"
        version, start = entry.version(), entry.part_size()
        kept = version if entry.path.exists() and not start and sha256 is None else None
        digest, position, room = hashlib.sha256(), 0, 0
        with _disk(entry.part), os.fdopen(os.open(entry.part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            with closing(receive(self._address / name, start, version)) as items:
                for item in items:
                    if isinstance(item, Answer):
                        version = item.version
                        if version == kept and version.tag and size in (None, version.size):
                            os.utime(entry.path)
                            return None
                        if size is not None and version.size not in (None, size):
                            return _wrong_size(shown, version.size or 0, size)
                        file.truncate(item.start)
                        if item.start != position:
                            digest, position = _digest(file, item.start), item.start
                        file.seek(position)
                        entry.note(version)
                        room = version.size or 0
                        self._cache.make_room(entry, room, shown)
                    else:
                        if position + len(item) > room:
                            room = max(position + len(item), min(position + _STEP, self._cache.bound))
                            self._cache.make_room(entry, room, shown)
                        file.write(item)
                        digest.update(item)
                        position += len(item)
            file.flush()
            os.fsync(file.fileno())
        if size not in (None, position):
            return _wrong_size(shown, position, size or 0)
        if sha256 not in (None, digest.hexdigest()):
            detail = f"its SHA-256 is {digest.hexdigest()}, _info.json says {sha256}"
            return Fault(shown, None, "wrong hash", detail)
        if sha256 is None and name.endswith(".tar") and (fault := _tar_fault(entry.part, shown)):
            return fault
        assert version is not None
        with _disk(entry.path):
            entry.note(version, digest.hexdigest())
            os.replace(entry.part, entry.path)
            sync(entry.path.parent)
        self._cache.make_room(entry, 0, shown)
        return None


class _Forward(io.RawIOBase):
    """A file that is read as it comes. RunError where it changes meanwhile."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._items = receive(address)
        first = next(self._items)
        assert isinstance(first, Answer)
        self._version = first.version
        self._rest = memoryview(b"")
        self._position = self._coming = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        while not self._rest:
            item = next(self._items, None)
            if item is None:
                return 0
            if isinstance(item, Answer):
                if item.version != self._version:
                    raise RunError(f"{self._address} changed on its server while it was read")
                self._coming = item.start
                continue
            # A server that cannot begin in the middle sends again what has been read.
            self._rest = memoryview(item)[max(0, self._position - self._coming) :]
            self._coming += len(item)
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        return count

    def close(self) -> None:
        self._items.close()
        super().close()


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (UsageError, RunError):
        raise
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


def _digest(file: BinaryIO, size: int) -> "hashlib._Hash":
    """Hash what the file begins with."""
    digest = hashlib.sha256()
    file.seek(0)
    while size:
        chunk = file.read(min(size, CHUNK))
        digest.update(chunk)
        size -= len(chunk)
    return digest


def _wrong_size(shown: str, size: int, expected: int) -> Fault:
    reason: Reason = "truncated shard" if size < expected else "wrong size"
    return Fault(shown, None, reason, f"{size} bytes, _info.json says {expected}")


def _tar_fault(path: Path, shown: str) -> Fault | None:
    """Look through the headers, for a page or half a file may come in a shard's place."""
    try:
        for _ in members(path):
            pass
    except ShardError as error:
        return error.fault._replace(shard=shown)
    return None


def _check_address(address: str) -> None:
    shown = Address(address)
    expected = "expected http://HOST/DIRECTORY, https://HOST/DIRECTORY or s3://BUCKET/DIRECTORY"
    try:
        parts = urlsplit(address)
        valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        raise UsageError(f"data.source is not a valid address; {expected}") from None
    if not valid or parts.scheme not in ("http", "https", "s3") or not address.isprintable():
        raise UsageError(f"data.source {shown} is not a valid address; {expected}")
    if parts.fragment or (parts.scheme == "s3" and (parts.query or "@" in parts.netloc)):
        raise UsageError(f"data.source {shown} has more than a directory's address; {expected}")


def _checked(name: str) -> str:
    """Return a name that stays in the directory."""
    outside = name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts
    if not name.isprintable() or not name or outside or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
        raise UsageError(f"{name!r} is not the name of a file within data.source")
    return name
