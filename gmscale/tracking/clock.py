"""How long steps take, and how much of it is waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
