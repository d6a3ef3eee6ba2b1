"""What a build has done so far, on the disk, so that the next start can go on."""

import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from gmscale.errors import UsageError
from gmscale.files import write_atomically

Plan = dict[str, Any]


class Skipped(NamedTuple):
    """A source image that was left out."""

    name: str
    reason: str
    detail: str


class Finished(NamedTuple):
    """A shard that is complete; its file may be absent where all its images were skipped."""

    shard: str
    samples: int
    bytes: int
    sha256: str
    skipped: tuple[Skipped, ...]


class Journal:
    """A file whose first line is the plan of a build, and each further line a shard that is complete.

    Lines are only added, each durably, until `close_with` puts them in order.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        """Begin, or go on with a build of the same plan; an other one is a UsageError with the first difference."""
        self.path = path
        self.finished: dict[str, Finished] = {}
        self._plan = plan
        if not path.exists():
            write_atomically(path, _line(plan))
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            before, *lines = [json.loads(line) for line in whole.splitlines()]
            entries = [
                Finished(**line | {"skipped": tuple(Skipped(*each) for each in line["skipped"])}) for line in lines
            ]
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{path} is damaged; remove it and its shards to build them again") from None
        _compare(path, before, plan)
        self.finished.update((entry.shard, entry) for entry in entries)
        if whole != data:
            os.truncate(path, len(whole))  # a line that was being written when the power went

    def add(self, entry: Finished) -> None:
        """Note a complete shard."""
        with open(self.path, "ab") as file:
            file.write(_line(entry._asdict()))
            file.flush()
            os.fsync(file.fileno())
        self.finished[entry.shard] = entry

    def close_with(self, entries: Iterable[Finished]) -> None:
        """Leave the plan and these entries, in this order: the same file however the work was divided."""
        write_atomically(self.path, b"".join([_line(self._plan), *(_line(entry._asdict()) for entry in entries)]))


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make `directory` and hold it against other builds, until this process ends in whatever way."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".build.lock", "a+b")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"OUT {directory} cannot be written: {error.strerror}") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(f"{directory}: another build is writing there ({file.read().decode()})") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            warnings.warn(f"{directory}: no locks on this file system; start no second build there", stacklevel=2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                file.truncate(0)


def _compare(path: Path, before: Plan, plan: Plan) -> None:
    for key in plan:
        if before.get(key) != plan[key]:
            raise UsageError(
                f"the build in {path.parent} began with {key} {_short(before.get(key))}, this is "
                f"{_short(plan[key])}; repeat the former, choose another OUT, or remove {path.name} and its shards"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()
