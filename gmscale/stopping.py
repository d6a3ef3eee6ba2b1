"""Stopping on request: a signal sets a flag, which the training loop reads between two steps.

Without torch, so that a command can listen before its seconds of imports.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar, Self

STOPPED = 75  # sysexits EX_TEMPFAIL: checkpointed on request; the same command goes on


class StopRequest:
    """Whether SIGTERM, SIGUSR1, SIGINT or SIGHUP asked this process to stop; the handler only sets a flag.

    One inside another knows what the outer one has heard, and the outer one what the inner has.
    """

    _innermost: ClassVar["StopRequest | None"] = None

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._outer: StopRequest | None = None

    @staticmethod
    def listens_to() -> tuple[signal.Signals, ...]:
        """Return the signals that ask to stop. Not a hang-up that somebody wants ignored, as nohup does."""
        always = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        return always if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*always, signal.SIGHUP)

    @classmethod
    def ignore_more(cls) -> None:
        """Let further requests pass unheard: a process that is about to leave keeps its status."""
        for number in cls.listens_to():
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in self.listens_to()}
            self._outer, StopRequest._innermost = StopRequest._innermost, self
            self.requested = self._outer is not None and self._outer.requested
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            StopRequest._innermost = self._outer

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        request: StopRequest | None = self
        while request is not None:
            request.requested = True
            request = request._outer
