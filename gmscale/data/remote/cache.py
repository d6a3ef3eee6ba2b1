"""A folder of fetched files on a node's disk, of bounded size, that all processes of the node share.

A file NAME is complete or absent. While it comes it is .NAME.part, and who fetches it holds a lock on .NAME.lock,
which the system releases however the process ends. In that file stands who it is, and what it fetches or has
fetched. A file's time of modification is when it was last asked for.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gmscale.data.remote.servers import Version
from gmscale.errors import RunError, UsageError

POLL = 0.1
PATIENCE = 600.0
"""Seconds to wait for another process's download that does not grow."""
_STALE = 24 * 3600
_RECORD = 1024
_LONGEST_TAG = 512

_NAME = re.compile(r"[0-9a-f]{32}-[A-Za-z0-9._-]*")

# Descriptors with locks. A forked process has them too, and would keep the locks when its parent dies.
_held: set[int] = set()


def _drop_inherited() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_inherited)


def name_of(identity: str, name: str) -> str:
    """Return the name under which a file is cached: the hash of its identity, and `name`'s end for people."""
    tail = re.sub(r"[^A-Za-z0-9._-]", "_", name.rpartition("/")[2])[-80:]
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}-{tail}"


@dataclass(frozen=True)
class Entry:
    """A file of the cache, locked by this process."""

    path: Path
    part: Path
    lock: int

    def version(self) -> Version | None:
        """Return what the part, or else the complete file, is a copy of."""
        record = _read(self.lock)
        return record and Version(record.size, record.tag)

    def part_size(self) -> int:
        return _size(self.part)

    def note(self, version: Version, sha256: str | None = None) -> None:
        """Write down which version comes and who fetches it, or the hash of what came."""
        tag = version.tag if version.tag is None or len(json.dumps(version.tag)) <= _LONGEST_TAG else None
        record = _Record(socket.gethostname(), os.getpid(), version.size, tag, sha256)
        # Of one length and in one call, for others read it without the lock.
        os.pwrite(self.lock, json.dumps(record).encode().ljust(_RECORD), 0)


class _Record(NamedTuple):
    host: str
    pid: int
    size: int | None
    tag: str | None
    sha256: str | None
    """Of the complete file; None while it comes."""


@dataclass(frozen=True)
class Cache:
    """The files in `folder`, which together may take `bound` bytes."""

    folder: Path
    bound: int

    def find(self, name: str, size: int | None, sha256: str | None) -> Path | None:
        """Return a file, marked as used, if it is there and what is known of it holds."""
        path = self.folder / name
        with suppress(OSError):
            if size in (None, path.stat().st_size) and sha256 in (None, self._sha256(name)):
                os.utime(path)
                return path
        return None

    @contextmanager
    def locked(self, name: str) -> Iterator[Entry]:
        """Have a file for this process alone. RunError if another has it for PATIENCE seconds without progress."""
        part = self.folder / f".{name}.part"
        lock = self.folder / f".{name}.lock"
        seen, since = -1, time.monotonic()
        while (descriptor := _try_lock(lock)) is None:
            size = _size(part)
            if size != seen:
                seen, since = size, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                raise RunError(f"{part} has not grown for {PATIENCE:.0f} s; it is being fetched by {_holder(lock)}")
            time.sleep(POLL)
        entry = Entry(self.folder / name, part, descriptor)
        try:
            yield entry
        finally:
            if not entry.part_size():
                part.unlink(missing_ok=True)
                if not entry.path.exists():
                    lock.unlink(missing_ok=True)
            _unlock(descriptor)

    def make_room(self, entry: Entry, size: int, shown: str) -> None:
        """Remove the longest unused files until the part of `entry`, grown to `size` bytes, fits beside the others.

        Downloads that run are counted at the size that they will have. Files that are not the cache's are left
        alone. UsageError where the whole cache would be too small.
        """
        if size > self.bound:
            raise UsageError(
                f"{shown} takes {_gb(size)} GB, data.cache_gb is {_gb(self.bound)}; expected at least {_gb(size)}"
            )
        with self._whole():
            total, idle = size, []
            for file in os.scandir(self.folder):
                part = file.name.startswith(".") and file.name.endswith(".part")
                name = file.name[1:-5] if part else file.name
                if not _NAME.fullmatch(name) or not file.is_file(follow_symlinks=False):
                    continue
                path = Path(file.path)
                if path == entry.part:
                    continue
                with suppress(FileNotFoundError):
                    status = file.stat()
                    if part and (coming := self._coming(name)) is not None:
                        total += max(coming, status.st_size)
                    elif part and time.time() - status.st_mtime > _STALE:
                        self._remove(path, name)
                    else:
                        total += status.st_size
                        idle.append((status.st_mtime_ns, status.st_size, path, name))
            for _, length, path, name in sorted(idle):
                if total <= self.bound:
                    break
                if self._remove(path, name):
                    total -= length

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Be the only process of the node that removes files."""
        while (descriptor := _try_lock(self.folder / ".lock")) is None:
            time.sleep(POLL / 10)
        try:
            yield
        finally:
            _unlock(descriptor)

    def _coming(self, name: str) -> int | None:
        """Return the size that a download will have, or None if none runs."""
        lock = self.folder / f".{name}.lock"
        descriptor = _try_lock(lock)
        if descriptor is not None:
            _unlock(descriptor)
            return None
        record = _read_file(lock)
        return (record and record.size) or 0

    def _sha256(self, name: str) -> str | None:
        record = _read_file(self.folder / f".{name}.lock")
        return record and record.sha256

    def _remove(self, path: Path, name: str) -> bool:
        """Remove a file that nobody is fetching, and its lock."""
        lock = self.folder / f".{name}.lock"
        descriptor = _try_lock(lock)
        if descriptor is None:
            # Someone is about to replace it, or has just asked for it.
            return False
        try:
            path.unlink(missing_ok=True)
            if not (self.folder / name).exists() and not (self.folder / f".{name}.part").exists():
                lock.unlink(missing_ok=True)
        finally:
            _unlock(descriptor)
        return True


def _size(path: Path) -> int:
    """Return the size of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _try_lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock on a file, made if need be, or None if another process has it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been removed, or made anew, before it was locked.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            _unlock(descriptor)
            raise
        _unlock(descriptor)
        return None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be locked: {error.strerror}; expected data.cache_dir on a disk of this node"
        ) from None


def _unlock(descriptor: int) -> None:
    # Closing alone would leave the lock with a process that was forked meanwhile.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    _held.discard(descriptor)
    os.close(descriptor)


def _read(descriptor: int) -> _Record | None:
    try:
        return _Record(*json.loads(os.pread(descriptor, _RECORD, 0)))
    except (ValueError, TypeError):
        return None


def _read_file(lock: Path) -> _Record | None:
    with suppress(OSError), lock.open("rb") as file:
        return _read(file.fileno())
    return None


def _holder(lock: Path) -> str:
    record = _read_file(lock)
    return f"process {record.pid} on {record.host}" if record else "another process"


def _gb(size: int) -> str:
    return f"{size / 1e9:.6g}"
