"""The live view of a sweep: what runs, the best so far, and how long it will take.

One table on a terminal; elsewhere a line when a trial ends, and one about all of them every half minute.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gmscale.tracking.lines import duration
from gmscale.trials import Record, Trial

_REFRESH_S = 0.25
_LINE_S = 30.0  # between two lines about the whole sweep where there is no terminal
_ENDED = ("finished", "stopped", "diverged", "failed")
_OTHER_LINES = 12  # of the table but for the running trials: head, best of each arm, sums


class Display:
    """Shows trials of `epochs` epochs, compared by `objective`; a context manager.

    `total` is how many there will be, as far as that is known; those of the ledger if they are more. `clock`
    returns seconds.
    """

    def __init__(
        self,
        console: Console,
        epochs: float,
        objective: str,
        total: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._epochs, self._objective, self._total = console, epochs, objective, total
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._clock, self._began = clock, clock()
        self._refreshed = self._said = -float("inf")
        self._records: Mapping[int, Record] | None = None
        self._ended: dict[int, float] = {}  # number -> wall time, of trials that are looked at no more
        self._states: Counter[str] = Counter()  # of those
        self._best: dict[str, Record] = {}  # of each arm, among those
        self._running: list[Record] = []
        self._wall_s = 0.0

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(last=True)
        if self._live:
            self._live.stop()

    def update(self, records: Mapping[int, Record]) -> None:
        """Show what the ledger says now, by the numbers of trials; of calls in quick succession only the first."""
        first = self._records is None
        self._records = records
        if self._clock() - self._refreshed >= _REFRESH_S:
            self._show(tell=not first)

    def _show(self, *, tell: bool = True, last: bool = False) -> None:
        """Bring the view up to date; without `tell` what has ended before is only counted."""
        self._refreshed = self._clock()
        self._take_in(tell)
        if self._live:
            self._live.update(self._table(), refresh=True)
        elif last or self._refreshed - self._said >= _LINE_S:
            self._said = self._refreshed
            self._print(self._sums())

    def _take_in(self, tell: bool) -> None:
        self._running = []
        self._total = max(self._total, len(self._records or ()))
        for number, record in (self._records or {}).items():
            if number in self._ended:
                continue
            if record.state == "running":
                self._running.append(record)
            elif record.ended:
                self._ended[number] = record.wall_s
                self._wall_s += record.wall_s
                self._states[record.state] += 1
                is_best = self._is_best(record)
                if is_best:
                    self._best[record.trial.arm] = record
                if tell and (self._live is None or record.state in ("diverged", "failed")):
                    self._print(self._end_line(record, is_best))

    def _is_best(self, record: Record) -> bool:
        """Return whether a trial that was trained to its end is the best of its arm so far."""
        value = record.values.get(self._objective)
        if record.state != "finished" or value is None:
            return False
        before = self._best.get(record.trial.arm)
        if before is None:
            return True
        known = before.values[self._objective]
        return value < known if self._objective == "loss" else value > known  # the one that is to be low

    # -- words ---------------------------------------------------------------------------------------------------

    def _table(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
        table.add_column("trial", no_wrap=True)
        table.add_column("arm", no_wrap=True)
        table.add_column("settings", no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column("epoch", no_wrap=True, justify="right")
        table.add_column(self._objective, no_wrap=True, justify="right")

        def row(*cells: str, style: str = "") -> None:
            table.add_row(*map(Text, cells), style=style)

        most = max(3, self._console.height - _OTHER_LINES)
        for record in self._running[:most]:
            last = record.results[-1] if record.results else None
            epoch = f"{last.epoch if last else 0.0:.1f}/{self._epochs:g}"
            value = self._value(last.values) if last else ""
            row(record.trial.name, record.trial.arm, short_settings(record.trial), epoch, value)
        if len(self._running) > most:
            row("", "", f"and {len(self._running) - most} more that run")
        if self._best:
            row("")
            row("", "", "best trial of each arm so far:")
        for arm, record in sorted(self._best.items()):
            row(record.trial.name, arm, short_settings(record.trial), "", self._value(record.values), style="bold")
        return Group(table, Text(), Text(self._sums()))

    def _sums(self) -> str:
        """Return the numbers of trials by state, the time so far and the time left."""
        ended, running = len(self._ended), len(self._running)
        known = ", ".join(f"{self._states[state]} {state}" for state in _ENDED if self._states[state])
        planned = max(0, self._total - ended - running)
        return (
            f"{ended} of {self._total} trials ended" + (f" ({known})" if known else "") + f", {running} running, "
            f"{planned} to come; elapsed {duration(self._clock() - self._began)}, ETA {self._eta()}"
        )

    def _end_line(self, record: Record, is_best: bool) -> str:
        trial = record.trial
        line = f"trial {trial.name} ({trial.arm}, {short_settings(trial)}) {record.state}"
        value = self._value(record.values)
        if value:
            line += f": {self._objective} {value}" + (" (best of its arm so far)" if is_best else "")
        if record.state in ("diverged", "failed") and record.failures:
            line += f": {record.failures[-1]}"
        return line

    def _value(self, values: Mapping[str, float]) -> str:
        value = values.get(self._objective)
        if value is None:
            return ""
        return f"{value:.4f}" if self._objective == "loss" else f"{value:.2f}"

    def _eta(self) -> str:
        """Return the time left, if trials to come take as long as those that have ended, as many at once as now."""
        left = self._total - len(self._ended)
        if left <= 0:
            return duration(0)
        if not self._wall_s or not self._running:
            return "unknown"
        done = sum(record.results[-1].epoch for record in self._running if record.results) / self._epochs
        return duration(self._wall_s / len(self._ended) * max(0.0, left - done) / len(self._running))

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def short_settings(trial: Trial) -> str:
    """Return what a trial changes, such as 'lr 0.05, sigma 1.2'; sections only where two have the same field."""
    settings = {name: value for name, value in trial.settings.items() if name != "mask.enabled"}  # the arm says it
    names = Counter(name.rpartition(".")[2] for name in settings)
    parts = []
    for name, value in settings.items():
        field = name.rpartition(".")[2]
        parts.append(f"{field if names[field] == 1 else name} {_short(value)}")
    return ", ".join(parts) or "as base.yaml"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
