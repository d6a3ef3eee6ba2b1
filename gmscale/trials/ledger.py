"""The ledger of a sweep, trials.jsonl: one event a line, appended and never changed.

Everything else about a sweep can be rebuilt from it and from the trials' run directories, so a sweep goes on
wherever its folder lies. A line that was cut by a crash counts as not written.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gmscale.errors import UsageError
from gmscale.files import write_atomically
from gmscale.trials.trial import Trial

State = Literal["planned", "running", "finished", "stopped", "diverged", "failed"]
ENDED: tuple[State, ...] = ("finished", "stopped", "diverged", "failed")


@dataclass(frozen=True)
class Result:
    """An evaluation on the way: what metrics.jsonl says of it."""

    step: int
    epoch: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Branch:
    """From here on a trial goes on from the checkpoint of another with other settings (population based)."""

    segment: int
    """Number of the run directory that begins here."""
    step: int
    epoch: float
    parent: int
    """The trial whose checkpoint it is, maybe this one."""
    parent_segment: int
    settings: Mapping[str, Any]


@dataclass
class Record:
    """What the ledger says of one trial."""

    trial: Trial
    state: State = "planned"
    attempts: int = 0
    """Times it was started; more than one after failures and interruptions."""
    failures: list[str] = field(default_factory=list)
    """The errors of attempts that failed, in order."""
    results: list[Result] = field(default_factory=list)
    """By step."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Final metrics, of a trial that has ended; where it was stopped early, those of its last evaluation."""
    wall_s: float = 0.0
    """Of its attempts, as far as they ended in an orderly way."""
    branches: list[Branch] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def reached(self) -> Result | None:
        """Where it stands: its last evaluation, or where it has branched since."""
        last, branch = self.results[-1:], self.branches[-1:]
        if branch and (not last or last[0].step < branch[0].step):
            return Result(branch[0].step, branch[0].epoch, {})
        return last[0] if last else None


class Ledger:
    """Appends to the ledger of the sweep in `folder`, safely beside other processes that do."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trials.jsonl"

    def begin(self, trials: Iterable[Trial]) -> None:
        """Make the ledger of a new sweep, with the trials that are to be trained: all of them, or no ledger."""
        write_atomically(self.path, "".join(_line("planned", trial.number, _plan(trial)) for trial in trials))

    def plan(self, trial: Trial) -> None:
        """One more trial is to be trained."""
        self._add("planned", trial.number, **_plan(trial))

    def start(self, trial: Trial, attempt: int, where: str) -> None:
        """Its training begins, or goes on, on the host `where`."""
        self._add("started", trial.number, attempt=attempt, where=where)

    def result(self, trial: Trial, result: Result) -> None:
        """It was evaluated."""
        self._add("result", trial.number, **asdict(result))

    def failure(self, trial: Trial, error: str, wall_s: float) -> None:
        """An attempt failed, and there will be another."""
        self._add("failure", trial.number, error=error, wall_s=round(wall_s, 3))

    def branch(self, trial: Trial, branch: Branch) -> None:
        """It goes on from another's checkpoint."""
        self._add("branch", trial.number, **asdict(branch))

    def end(self, trial: Trial, state: State, values: Mapping[str, float], wall_s: float, error: str = "") -> None:
        """It is over. `error` says why it failed or diverged."""
        self._add("ended", trial.number, state=state, values=values, wall_s=round(wall_s, 3), error=error)

    def _add(self, event: str, number: int, **fields: Any) -> None:
        line = _line(event, number, fields)
        with open(self.path, "ab") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # jobs of an array share the ledger
            if file.tell() and not _ends_a_line(self.path):
                line = "\n" + line  # what a crash cut off stays a line of its own
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Be the only process that hands out trials of the sweep in `folder`, which is made if it is not there.

    Raises UsageError if another one does, or if the folder cannot be written. Whoever dies lets go.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"sweep.dir {folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{folder} is driven already, by {file.read() or 'another process'}; wait for it, stop it, or "
                "choose another sweep.dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _line(event: str, number: int, fields: Mapping[str, Any]) -> str:
    return json.dumps({"event": event, "trial": number, "time": round(time.time(), 3), **fields}) + "\n"


def _plan(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in asdict(trial).items() if name != "number"}


class Follower:
    """Reads the ledger of the sweep in `folder` as it grows."""

    def __init__(self, folder: Path) -> None:
        self.records: dict[int, Record] = {}
        """What the ledger said at the last update, by number."""
        self._path = folder / "trials.jsonl"
        self._read, self._lines = 0, 0

    def update(self) -> dict[int, Record]:
        """Read what was appended since the last time. Raises UsageError if there is no ledger, or it is not one."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._read)
                content = file.read()
        except OSError as error:
            raise UsageError(f"{self._path.parent} holds no sweep: {self._path.name}: {error.strerror}") from None
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._lines += 1
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut off by a crash
            try:
                _apply(self.records, event)
            except (AttributeError, KeyError, TypeError):
                where = f"{self._path}, line {self._lines}"
                raise UsageError(f"{where}: not an event of a sweep's ledger") from None
        return self.records


def read(folder: Path) -> dict[int, Record]:
    """Return the records of all trials of the sweep in `folder`, by number. Raises UsageError if it holds none."""
    return Follower(folder).update()


def _apply(records: dict[int, Record], event: dict[str, Any]) -> None:
    kind, number = event.pop("event"), event.pop("trial")
    event.pop("time")
    if kind == "planned":
        schedule = tuple((epoch, settings) for epoch, settings in event.pop("schedule", ()))
        records.setdefault(number, Record(Trial(number, schedule=schedule, **event)))
        return
    record = records[number]
    if kind == "started":
        record.state, record.attempts = "running", max(record.attempts, event["attempt"])
    elif kind == "result":
        # an attempt that begins at a checkpoint repeats what was evaluated after it
        result = Result(**event)
        record.results = [r for r in record.results if r.step < result.step] + [result]
    elif kind == "failure":
        record.state = "planned"
        record.failures.append(event["error"])
        record.wall_s += event["wall_s"]
    elif kind == "branch":
        branch = Branch(**event)
        record.branches.append(branch)
        record.results = [r for r in record.results if r.step <= branch.step]  # what came after it is given up
    elif kind == "ended":
        record.state, record.values = event["state"], event["values"]
        record.wall_s += event["wall_s"]
        if event["error"]:
            record.failures.append(event["error"])
    else:
        raise KeyError(kind)


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
