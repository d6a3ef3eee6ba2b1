"""gmscale bench: what the mask costs and saves, measured beside what it is compared with, in one run."""

import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gmscale.errors import UsageError, nearest

_HELP = """\
usage: gmscale bench WHAT ...

  step      whole training steps: plain DDP, torch's hooks and our modes; ratios, bytes, memory
  mask      the masking alone on the gradients of real models, as a share of what a memory copy reaches
  comm      the same training steps over a link whose rate is limited (Linux, root)
  plan      the step that gmscale plan predicts beside the measured one, over such links (Linux, root)
  loop      whole training runs beside those of timm's and Accelerate's loops: images/s, start-up, memory
  loader    input pipelines on the same JPEGs: images per CPU-second; a training's wait for data; the index at scale
  evaluate  an evaluation beside a loop as in timm's validate.py: images/s
  sweep     a sweep beside its trials by hand; what its driver holds; the report of a thousand trials

gmscale bench WHAT --help explains the options."""


def main(argv: list[str]) -> int:
    """Run one benchmark; those of several processes start them themselves. Returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else 2
    if argv[0] not in _BENCHES:
        expected = ", ".join(_BENCHES)
        raise UsageError(f"gmscale bench: {argv[0]!r}; expected one of {expected}{nearest(argv[0], _BENCHES)}")
    _check_json(argv[1:])
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        return _BENCHES[argv[0]](argv[1:])
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_json(argv: list[str]) -> None:
    """Raise UsageError if the results could not be written, before minutes are spent on them."""
    for option, value in pairwise([*argv, ""]):
        path = Path(option.removeprefix("--json=") if option.startswith("--json=") else value)
        if (option == "--json" or option.startswith("--json=")) and not os.access(path.parent, os.W_OK):
            raise UsageError(f"--json {path}: no directory {path.parent} to write in")


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # in order: what was started is ended, what was made is removed


def _step(argv: list[str]) -> int:
    from gmscale.bench.step import main as step

    return step(argv)


def _mask(argv: list[str]) -> int:
    from gmscale.bench.mask import main as mask

    return mask(argv)


def _comm(argv: list[str]) -> int:
    from gmscale.bench.comm import main as comm

    return comm(argv)


def _plan(argv: list[str]) -> int:
    from gmscale.bench.plan import main as plan

    return plan(argv)


def _loader(argv: list[str]) -> int:
    from gmscale.bench.loader import main as loader

    return loader(argv)


def _loop(argv: list[str]) -> int:
    from gmscale.bench.loop import main as loop

    return loop(argv)


def _evaluate(argv: list[str]) -> int:
    from gmscale.bench.evaluation import main as evaluate

    return evaluate(argv)


def _sweep(argv: list[str]) -> int:
    from gmscale.bench.sweep import main as sweep

    return sweep(argv)


_BENCHES: dict[str, Callable[[list[str]], int]] = {
    "step": _step,
    "mask": _mask,
    "comm": _comm,
    "plan": _plan,
    "loop": _loop,
    "loader": _loader,
    "evaluate": _evaluate,
    "sweep": _sweep,
}
