"""Heartbeats: each rank leaves word of where it is, for whoever asks when a job is not coming on.

A record is one JSON line of fixed length, overwritten in place. Every change of phase goes into a file on this
machine when a launcher has named a folder for it, so that it is exact even after SIGKILL. A thread copies the
record into the run directory every few seconds, where all nodes and people can read it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

from gmscale.launched import HEARTBEATS, world_name

_LENGTH = 2048  # of a record; a longer error is cut
_PERIOD_S = 2.0
_WRITES_PER_S = 100  # of all ranks together into the shared folder


@dataclass(kw_only=True)
class Record:
    """What a rank says of itself."""

    rank: int
    size: int
    host: str
    pid: int
    world: str = ""
    """Which start of the ranks this is; all of one start say the same."""
    step: int | None = None
    """The optimizer step it is in, from 1 on; None before the first."""
    phase: str = "start"
    place: int = 0
    """How many phases of this step it has begun: ranks go through the same ones."""
    since: float = 0.0
    """When the phase began, in seconds since 1970 by the host's clock."""
    seen: float = 0.0
    """When the record was written, by the same clock."""
    status: int | None = None
    """How the rank left; None while it has not said."""
    error: str = ""
    final: bool = False
    """Whether the error would come again, were the ranks started again."""
    by_peer: bool = False
    """Whether the error came from what another rank did, or did not do."""
    sharing: bool = False
    """Whether it is in the run directory, and writes itself again every few seconds as long as the rank lives."""
    folder: str = ""
    """Where the records of all ranks are."""

    @property
    def where(self) -> str:
        """The step and the phase in words."""
        return self.phase if self.step is None else f"step {self.step}, {self.phase}"


class Heartbeat:
    """Keeps the record of this rank."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self._record = Record(
            rank=rank, size=size, host=socket.gethostname(), pid=os.getpid(), world=world_name(), since=time.time()
        )
        folder = os.environ.get(HEARTBEATS)
        self._local = _open(Path(folder), rank) if folder else None
        self._shared: int | None = None
        self._write(self._local)

    @property
    def where(self) -> str:
        """The step and the phase in words."""
        return self._record.where

    @property
    def folder(self) -> str | None:
        """Where the records of all ranks are, once they are shared."""
        return self._record.folder or None

    def at(self, phase: str, step: int | None = None) -> None:
        """Say that a phase begins, of a new `step` if one is given."""
        record = self._record
        if step is not None and step != record.step:
            record.step, record.place = step, -1
        record.place += 1
        record.phase, record.since = phase, time.time()
        if self._local is not None:
            self._write(self._local)

    @contextmanager
    def shared(self, run_dir: Path) -> Iterator[None]:
        """Keep a copy of the record in `run_dir`/heartbeats; the last one stays there."""
        folder = run_dir / "heartbeats"
        if self._shared is not None:  # of another run, in the same process
            os.close(self._shared)
            self._shared = None
        with suppress(OSError):  # nobody's training fails because nobody can see it
            folder.mkdir(parents=True, exist_ok=True)
            self._record.folder = str(folder.absolute())
            self._shared = _open(folder, self._record.rank)
            self._record.sharing = True
        for file in (self._local, self._shared):
            self._write(file)
        ended = threading.Event()
        pulse = threading.Thread(target=self._pulse, args=(ended,), name="heartbeat", daemon=True)
        pulse.start()
        try:
            yield
        finally:
            ended.set()
            pulse.join(timeout=1.0)  # a file system that hangs must not keep this process
            self._record.sharing = False
            self._write(self._shared)

    def leave(self, status: int, error: str = "", *, final: bool = False, by_peer: bool = False) -> None:
        """Write the last record: how this rank ends."""
        record = self._record
        record.status, record.error, record.final, record.by_peer = status, " ".join(error.split()), final, by_peer
        if not error:
            record.phase = "ended"
        for file in (self._local, self._shared):
            if file is not None:
                self._write(file)
                os.close(file)
        self._local = self._shared = None

    def _pulse(self, ended: threading.Event) -> None:
        while not ended.wait(period_s(self._record.size)):
            self._write(self._shared)
            with suppress(OSError):
                if self._shared is not None:
                    os.fsync(self._shared)  # other nodes see it now

    def _write(self, file: int | None) -> None:
        if file is None:
            return
        self._record.seen = time.time()
        text, error = self._text(), self._record.error
        while len(text) >= _LENGTH and error:
            error = error[: len(error) * 3 // 4]
            text = self._text(error=error)
        with suppress(OSError):
            os.pwrite(file, text.ljust(_LENGTH - 1) + b"\n", 0)

    def _text(self, **instead: str) -> bytes:
        return json.dumps(vars(self._record) | instead, ensure_ascii=False).encode()


def period_s(size: int) -> float:
    """Return the seconds between two heartbeats of a rank of `size`."""
    return max(_PERIOD_S, size / _WRITES_PER_S)


def read_all(folder: Path) -> list[Record]:
    """Return the records in `folder` in the order of ranks, but for those that cannot be read."""
    return sorted(_read(folder), key=lambda record: record.rank)


def _read(folder: Path) -> Iterator[Record]:
    known = {field.name for field in fields(Record)}
    for path in folder.glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            found = json.loads(path.read_text())
            yield Record(**{name: value for name, value in found.items() if name in known})


def _open(folder: Path, rank: int) -> int:
    return os.open(folder / f"rank-{rank:05d}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
