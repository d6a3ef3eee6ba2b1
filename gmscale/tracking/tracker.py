"""One place that a run reports to: files, TensorBoard, Weights & Biases if asked for, and the terminal."""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gmscale.config import TrainConfig
from gmscale.tracking.appending import Appender
from gmscale.tracking.board import Board
from gmscale.tracking.jsonl import cut_back, finite, line_of, read_records
from gmscale.tracking.lines import duration, skipped_line, train_line, validation_line
from gmscale.tracking.weights_and_biases import WandbRun

# Phases that a person reads in figures, not line by line; and one of which the run says more in words of its own.
_NOT_SHOWN = {"layers", "quality", "world"}


def plain_console() -> Console:
    """Return a console on standard output, wide enough for our lines and tables where there is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


class Tracker:
    """Writes metrics.jsonl and TensorBoard's files and shows progress; used by the main rank only.

    On a terminal training updates one line; elsewhere every record is a plain line. A disk that is full, or a
    service that does not answer, costs records and a warning, never the run. Raises UsageError if Weights & Biases
    is asked for and does not start, and RunError if metrics.jsonl cannot be cut back to `resume_step`.
    """

    def __init__(
        self, run_dir: Path, config: TrainConfig, total_steps: int, resume_step: int, console: Console
    ) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._arm, self._total_steps, self._epochs = config.arm, total_steps, config.run.epochs
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._started, self._first_step = time.monotonic(), resume_step
        cut_back(self._path, resume_step)
        self._file = Appender(self._path, self.say)
        self._board = Board(run_dir / "tensorboard", resume_step, self.say)
        self._wandb = WandbRun(run_dir, config, self.say) if config.run.wandb_project else None

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
        if self._wandb:
            self._wandb.finish(failed=kind is not None)

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Record one line of `phase` at `step` and show it, but values of layers only in the files."""
        record = {"step": step, "epoch": round(step * self._epochs / self._total_steps, 4), "phase": phase}
        record |= finite(values)
        self._file.append(line_of(record))
        scalars = dict(_scalars(phase, values))
        self._board.add(scalars, step)
        if self._wandb:
            self._wandb.add(scalars, step)
        if phase not in _NOT_SHOWN:
            self._show(phase, step, record)

    def sync(self) -> None:
        """Make everything recorded so far durable; called before a checkpoint is written."""
        self._file.sync()
        self._board.sync()

    def say(self, message: str) -> None:
        """Print a line above the live line."""
        self._print(message)

    def medians(self, *names: str) -> dict[str, float | None]:
        """Return the median of each value over all training lines, also those from before a resume."""
        records = [record for record in read_records(self._path) if record.get("phase") == "train"]
        values = {n: [r[n] for r in records if r.get(n) is not None] for n in names}
        return {name: statistics.median(found) if found else None for name, found in values.items()}

    def _show(self, phase: str, step: int, record: Mapping[str, Any]) -> None:
        if phase == "train":
            eta = duration(self._seconds_left(step))
            if self._live:
                line = train_line(record, self._arm, self._epochs, eta, self._console.width)
                self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            else:
                self._print(train_line(record, self._arm, self._epochs, eta))
        elif phase == "skipped":
            self._print(skipped_line(record, self._arm), style="yellow")
        else:
            self._print(validation_line(record, self._arm, self._epochs))

    def _print(self, text: str, style: str | None = None) -> None:
        with contextlib.suppress(OSError):  # standard output may be a file on the disk that is full
            self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _seconds_left(self, step: int) -> float:
        elapsed = time.monotonic() - self._started
        return elapsed / max(1, step - self._first_step) * (self._total_steps - step)


def _scalars(phase: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield TensorBoard's tags and values; those of layers in a group of their own for each quantity."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{phase}_{key}", value)
        elif isinstance(value, int | float):
            yield f"{phase}/{key}", value
