"""Who may write a run directory: the newest start of the run, and nobody beside it.

A command started twice by mistake, or a network that broke into two halves which both go on, would else have two
worlds write one run's checkpoints. Every start leaves a numbered file; the highest number owns the directory, and
whoever finds a higher one than its own ends before it writes a checkpoint.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from gmscale import heartbeat, launched
from gmscale.errors import RunError, UsageError
from gmscale.heartbeat import Record, period_s

_ALIVE = 2.5  # heartbeats, within which a living rank has written its record again


@dataclass(frozen=True)
class Owner:
    """A start of the run, which owns its directory until there is a newer one."""

    folder: Path
    number: int

    def check(self) -> None:
        """Raise RunError if the run has been started again."""
        newest = max(_numbers(self.folder), default=self.number)
        if newest > self.number:
            raise RunError(
                f"{self.folder.parent} was taken over by a newer start of this run (see "
                f"{_file(self.folder, newest)}); this one ends, and writes nothing more"
            )


def take(run_dir: Path) -> Owner:
    """Own `run_dir` from now on. Raises UsageError if another start of this run is training there."""
    _refuse_company(run_dir)
    try:
        return _take(run_dir / "starts")
    except OSError as error:
        raise UsageError(f"run.dir {run_dir} cannot be written: {error.strerror}") from None


def _take(folder: Path) -> Owner:
    folder.mkdir(parents=True, exist_ok=True)
    by = {"host": socket.gethostname(), "pid": os.getpid(), "world": launched.world_name(), "time": time.time()}
    while True:
        number = max(_numbers(folder), default=0) + 1
        try:
            with open(_file(folder, number), "x") as file:  # of two at the same moment one gets the next number
                json.dump(by, file)
        except FileExistsError:
            continue
        return Owner(folder, number)


def _refuse_company(run_dir: Path) -> None:
    """Raise UsageError if ranks of another start still write their heartbeats, after time to end."""
    folder = run_dir / "heartbeats"
    before = {record.rank: record for record in _others(folder)}
    deadline = time.monotonic() + _ALIVE * max((period_s(record.size) for record in before.values()), default=0.0)
    while before and time.monotonic() < deadline:
        time.sleep(0.1)
        now = {record.rank: record for record in _others(folder)}
        before = {rank: record for rank, record in before.items() if rank in now}
    alive = [r for r in _others(folder) if r.rank in before and r.seen != before[r.rank].seen]
    if alive:
        raise UsageError(
            f"{run_dir} is being trained already, by process {alive[0].pid} on {alive[0].host} ({alive[0].where}); "
            "wait for it, stop it, or choose another run.dir"
        )


def _others(folder: Path) -> list[Record]:
    """Return the records of ranks of other starts that may still live, as far as this machine can tell."""
    found = []
    launch = _launch(launched.world_name())
    for record in heartbeat.read_all(folder):
        if not record.sharing or _launch(record.world) == launch:
            continue  # it has left, or the launcher that started us has ended it before
        if record.host == socket.gethostname() and not Path(f"/proc/{record.pid}").exists():
            continue
        found.append(record)
    return found


def _launch(world: str) -> str:
    """Return the name of a launch, which may start its ranks several times."""
    return world.rpartition(".")[0]


def _numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("[0-9]*.json")]


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"
