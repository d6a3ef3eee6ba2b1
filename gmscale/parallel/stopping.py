"""Stopping on request: a signal sets a flag, which the training loop reads between two steps."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPED = 75  # sysexits EX_TEMPFAIL: checkpointed on request; the same command goes on


class StopRequest:
    """Whether SIGTERM, SIGUSR1 or SIGINT asked this process to stop; the handler only sets a flag."""

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.requested = True
