"""Which checkpoints of a run are kept, and how the others go."""

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gmscale.checkpoint.layout import checkpoints, read
from gmscale.errors import UsageError


def kept(scores: Sequence[float | None], keep: int, keep_best: int) -> set[int]:
    """Return the places of those to keep among checkpoints, oldest first, of validation top1 `scores`.

    These are the newest `keep`, and of those that have a score the best `keep_best`, the newer of equals.
    """
    newest = range(max(0, len(scores) - keep), len(scores))
    scored = [(score, place) for place, score in enumerate(scores) if score is not None]
    return {*newest, *(place for _, place in sorted(scored, reverse=True)[:keep_best])}


def remove_old(run_dir: Path, keep: int, keep_best: int) -> None:
    """Remove the checkpoints that `kept` does not name."""
    found = checkpoints(run_dir)
    wanted = kept([_top1(path) for path in found], keep, keep_best)
    for place, path in enumerate(found):
        if place not in wanted:
            with suppress(OSError):  # it only costs space, and is tried again after the next checkpoint
                remove(path)


def best_top1(run_dir: Path) -> float:
    """Return the best validation top1 among the checkpoints of a run; minus infinity where there is none."""
    scores = (_top1(path) for path in checkpoints(run_dir))
    return max((score for score in scores if score is not None), default=-math.inf)


def remove(path: Path) -> None:
    """Remove a checkpoint, which stops looking complete at once."""
    doomed = path.with_name(f".{path.name}.old")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(run_dir: Path) -> None:
    """Remove what killed processes left half-written or half-removed."""
    folder = run_dir / "checkpoints"
    for left_over in folder.glob(".step-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    for left_over in folder.glob("step-*/.*.tmp"):
        left_over.unlink(missing_ok=True)


def _top1(path: Path) -> float | None:
    try:
        top1: float | None = read(path)["top1"]
    except UsageError:  # damaged: whoever wants to read it will hear of it
        return None
    return top1
