"""How far a long command is: a bar on a terminal, elsewhere a line now and then. Both on standard error."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 30.0


class Meter:
    """Shows `what` being done, in images and images a second since the first call."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start: tuple[float, int] | None = None
        self._next_line = 0.0

    def __enter__(self) -> "Meter":
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """Take note that `done` of `total` images are done."""
        now = time.monotonic()
        if self._start is None:
            self._start, self._next_line = (now, done), now + _LINE_EVERY_S
        seconds, images = now - self._start[0], done - self._start[1]
        rate = f"{images / seconds:,.0f} images/s" if images and seconds > 0 else ""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._what, total=total, completed=done, rate=rate)
            self._bar.update(self._task, completed=done, total=total, rate=rate)
        elif now >= self._next_line:
            self._next_line = now + _LINE_EVERY_S
            left = f", {(total - done) * seconds / images / 60:.0f} min left" if images else ""
            print(f"{self._what}: {done} of {total} images, {rate}{left}", file=sys.stderr, flush=True)
