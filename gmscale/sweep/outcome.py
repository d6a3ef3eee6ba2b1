"""What became of a training, judged by what it has left: its run directory, its exit status, its log.

Imports neither torch nor Ray.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gmscale import diagnosis, heartbeat
from gmscale.heartbeat import Record
from gmscale.stopping import STOPPED, StopRequest
from gmscale.sweep.process import COMMAND

_VALUES = (
    "top1",
    "top5",
    "loss",
    "best_top1",
    "ema_top1",
    "images_per_s",
    "kept_entries",
    "kept_energy",
    "wire_share",
    "wall_s",
)
_USAGE, _INTERRUPTED = 2, 130
_LONGEST = 300  # characters of an error
_TAIL = 1 << 16  # bytes at the end of a file in which its last words are looked for

# What an attempt says last of why it failed: the command, the launcher of several, or Python.
_SAID = re.compile(r"gmscale: error: (?P<error>.+)|gmscale launch: (?P<rank>rank \d+ .+)")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(: .*)?$")


@dataclass(frozen=True)
class Outcome:
    """How a training ended; interrupted ones go on when the same command is started again."""

    state: Literal["finished", "diverged", "interrupted", "failed"]
    values: Mapping[str, float] = field(default_factory=dict)
    """Of a run with a summary: its final metrics, without those that are missing or not finite."""
    error: str = ""
    """Why it diverged or failed, in one line."""
    may_be_tried_again: bool = True
    """Of a failure: not one of the configuration, which would fail again."""


def judge(run_dir: Path, status: int | None, log: Path | None) -> Outcome:
    """Return what became of the training in `run_dir`, which has ended with `status`, negative for a signal.

    Without a status, as of a process whose parent was lost, the run's own records say what they can. `log` is what
    its process has printed; the last attempt counts.
    """
    summary = _summary(run_dir)
    if summary is not None:
        values = {name: float(summary[name]) for name in _VALUES if _is_finite(summary.get(name))}
        if _is_finite(summary.get("loss")):
            return Outcome("finished", values)
        return Outcome("diverged", values, "the loss of the last evaluation is not finite")
    ranks = heartbeat.read_all(run_dir / "heartbeats")
    if status is None:
        status = next((record.status for record in ranks if record.status is not None), None)
    if _was_stopped(status):
        return Outcome("interrupted")
    said = (_last_words(log) if log is not None else "") or _error_of(ranks, status)
    if _ended_in_skipped_steps(run_dir) and "not finite" in said:
        return Outcome("diverged", error=_one_line(said))
    error = _one_line(_failure(status, said, ranks))
    # another process that still trains there will end, or be given up
    final = status == _USAGE and "is being trained already" not in said
    return Outcome("failed", error=error, may_be_tried_again=not final)


def _was_stopped(status: int | None) -> bool:
    """Return whether a status says that somebody asked to stop, maybe before the training had begun to listen."""
    return status in (STOPPED, _INTERRUPTED) or (status is not None and -status in StopRequest.listens_to())


def _failure(status: int | None, said: str, ranks: list[Record]) -> str:
    if status is not None and status < 0:
        return diagnosis.describe_status(status) + (f": {said}" if said else "")
    if said:
        return said
    if status is None:
        where = next((f", last in {record.where}" for record in ranks), "")
        return f"ended without a word{where}: killed, or its node is gone"
    return f"ended with status {status} and without summary.json"


def _summary(run_dir: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return None  # it is written as a whole, or not at all
    return found if isinstance(found, dict) else None


def _ended_in_skipped_steps(run_dir: Path) -> bool:
    """Return whether the last thing that a run recorded is a step whose gradients were not finite."""
    lines = _tail(run_dir / "metrics.jsonl").splitlines()
    try:
        return bool(lines) and json.loads(lines[-1]).get("phase") == "skipped"
    except (ValueError, AttributeError):
        return False


def _error_of(ranks: list[Record], status: int | None) -> str:
    """Return what the ranks say themselves, the one whose own fault it was first."""
    own = [record for record in ranks if record.error and (status is None or record.status == status)]
    return next((record.error for record in sorted(own, key=lambda record: record.by_peer)), "")


def _last_words(log: Path) -> str:
    """Return the error at the end of a log: one that was said for people, or the last exception."""
    lines = _tail(log).splitlines()
    start = max((n for n, line in enumerate(lines) if line.startswith(COMMAND)), default=-1) + 1
    error = rank = exception = ""
    in_ranks = in_traceback = False
    for line in lines[start:]:
        found = _SAID.match(line)
        if found is not None and found["error"]:
            error = found["error"]
        elif found is not None and not in_ranks:
            rank = found["rank"]  # of several the cause comes first
        elif line.startswith("Traceback (most recent call last)"):
            in_traceback = True
        elif in_traceback and _EXCEPTION.match(line):
            exception, in_traceback = line, False
        in_ranks = found is not None and found["rank"] is not None
    return error or rank or exception


def _tail(path: Path) -> str:
    """Return the whole lines at the end of a file; nothing if it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text.partition("\n")[2] if start else text


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
