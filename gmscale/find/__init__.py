"""gmscale find: what to set where the best value depends on the machine, or on model and data together.

Nothing is applied: a run's results must not depend on the machine without its configuration saying so. What is
found is printed as flags to copy.
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from gmscale.errors import UsageError, nearest

_HELP = """\
usage: gmscale find WHAT --config FILE ...

  batch_size  the largest and the fastest batch size of a device at the same global batch; starts its own processes
  lr          learning-rate range test: where the loss falls fastest, and where it diverges; also under torchrun

gmscale find WHAT --help explains the options; all those of gmscale train can be given too. Nothing is applied: copy
the flags that are printed, so that a run's configuration says all that its results depend on."""

InWorld = Callable[[Any, Callable[[Any], int]], int]


def main(argv: list[str], in_world: InWorld) -> int:
    """Run one finder; `in_world` runs a function in the process group. Returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else 2
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        if argv[0] == "batch_size":
            from gmscale.find.batch_size import main as batch_size

            return batch_size(argv[1:])
        if argv[0] == "lr":
            from gmscale.find.lr import main as lr

            return lr(argv[1:], in_world)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    raise UsageError(
        f"gmscale find: {argv[0]!r}; expected batch_size or lr{nearest(argv[0], ('batch_size', 'lr'))}"
    )


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # in order: what was started is ended
