"""What a run tells: metrics.jsonl, TensorBoard, and one live line on the terminal."""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from gmscale.files import write_atomically


def plain_console() -> Console:
    """Return a console on standard output, wide enough for our lines and tables where there is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


_OF_LAYERS = {"layers", "quality"}  # phases that a person reads in figures, not line by line


class Tracker:
    """Writes metrics.jsonl and TensorBoard and shows progress; used by the main rank only.

    On a terminal training updates one line; elsewhere every record is a plain line.
    """

    def __init__(
        self, run_dir: Path, arm: str, total_steps: int, epochs: float, resume_step: int, console: Console
    ):
        self._path = run_dir / "metrics.jsonl"
        self._arm, self._total_steps, self._epochs = arm, total_steps, epochs
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._started, self._first_step = time.monotonic(), resume_step
        _truncate(self._path, resume_step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        self._file.close()
        self._board.close()

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Record one line of `phase` at `step` and show it, values of layers only in the files."""
        record = {"step": step, "epoch": round(step * self._epochs / self._total_steps, 4), "phase": phase}
        record.update({key: _json_value(value) for key, value in values.items()})
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for tag, value in _scalars(phase, values):
            self._board.add_scalar(tag, value, step)
        if phase not in _OF_LAYERS:
            self._show(phase, step, record)

    def sync(self) -> None:
        """Make everything recorded so far durable; called before a checkpoint is written."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def say(self, message: str) -> None:
        """Print a line above the live line."""
        self._console.print(message, highlight=False, markup=False)

    def medians(self, *names: str) -> dict[str, float | None]:
        """Return the median of each value over all training lines, also those from before a resume."""
        records = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        values = {n: [r[n] for r in records if r["phase"] == "train" and r.get(n) is not None] for n in names}
        return {name: statistics.median(found) if found else None for name, found in values.items()}

    def _show(self, phase: str, step: int, record: Mapping[str, Any]) -> None:
        if phase == "train":
            line = f"{self._arm:<14} {progress_line(record, self._epochs)}  ETA {self._eta(step)}"
            if self._live:
                self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
                return
        else:
            line = f"{self._arm:<14} {validation_line(record, self._epochs)}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _eta(self, step: int) -> str:
        elapsed = time.monotonic() - self._started
        seconds = elapsed / max(1, step - self._first_step) * (self._total_steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StepClock:
    """Wall time of the steps since the last log line, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self._steps, self._waited, self._total, self._mark = 0, 0.0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait for a step's data; the step itself lasts until the next wait."""
        self._lap()
        yield
        self._waited += self._lap()
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is no step: evaluation, saving."""
        self._lap()
        yield
        self._mark = time.perf_counter()

    def values(self, global_batch_size: int) -> dict[str, float]:
        """Return images/s, and milliseconds a step and waiting for data, and start afresh."""
        self._lap()
        total, steps, waited = self._total, self._steps, self._waited
        self._steps, self._waited, self._total = 0, 0.0, 0.0
        return {
            "images_per_s": steps * global_batch_size / total,
            "step_ms": 1e3 * total / steps,
            "data_ms": 1e3 * waited / steps,
        }

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._mark = now - self._mark, now
        self._total += lap
        return lap


def progress_line(record: Mapping[str, Any], epochs: float) -> str:
    """Return the live line's text of a `train` record."""
    parts = [
        f"epoch {record['epoch']:.2f}/{epochs:g}",
        f"loss {_number(record['loss'])}",
        f"top1 {_number(record['top1'], 1)} %",
        f"{_number(record['images_per_s'], 0)} images/s",
    ]
    if record.get("hook_ms") is not None:
        parts.append(f"hook {record['hook_ms']:.1f} ms ({100 * record['hook_share']:.1f} % of step)")
    if record.get("kept_entries") is not None:
        parts.append(
            f"kept {100 * record['kept_entries']:.0f} % of entries, {100 * record['kept_energy']:.0f} % energy"
        )
    if record.get("bad_samples"):
        parts.append(f"{record['bad_samples']} bad samples replaced")
    return "  ".join(parts)


def validation_line(record: Mapping[str, Any], epochs: float) -> str:
    """Return the text of a `validation` or `validation_ema` record."""
    return (
        f"epoch {record['epoch']:.2f}/{epochs:g}  {record['phase']}: loss {_number(record['loss'])}  "
        f"top1 {_number(record['top1'], 1)} %  top5 {_number(record['top5'], 1)} %  ({record['count']} images)"
    )


def _scalars(phase: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield TensorBoard's tags and values; those of layers in a group of their own for each quantity."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{phase}_{key}", value)
        elif isinstance(value, int | float):
            yield f"{phase}/{key}", value


def _truncate(path: Path, step: int) -> None:
    """Drop the records after `step`, which the resumed run makes again, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # torn by a kill; nothing was synced behind it
        if record["step"] <= step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_value(v) for key, v in value.items()}
    # JSON has no NaN; null says that there was no number
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
