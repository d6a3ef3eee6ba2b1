"""Where a branched trial comes from: the settings it had at each epoch, and the commands that train it alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gmscale.trials.ledger import Branch, Record
from gmscale.trials.trial import Trial, command, run_dir

Schedule = tuple[tuple[float, Mapping[str, Any]], ...]


def branch_point(folder: Path, number: int, segment: int, step: int) -> Path:
    """Return where the checkpoint is kept from which others branched."""
    return folder / "branches" / f"{number:04d}.{segment}-step-{step}"


def ancestry(records: Mapping[int, Record], number: int) -> list[tuple[int, int, Branch | None]]:
    """Return (trial, segment, branch that it began with) of all that led to the end of a trial, oldest first."""
    branches = records[number].branches
    found: list[tuple[int, int, Branch | None]] = []
    segment = branches[-1].segment if branches else 0
    while True:
        began = next((b for b in records[number].branches if b.segment == segment), None)
        found.append((number, segment, began))
        if began is None:
            return found[::-1]
        number, segment = began.parent, began.parent_segment


def schedule(records: Mapping[int, Record], number: int) -> tuple[Mapping[str, Any], Schedule]:
    """Return the settings that a trial began with, by its ancestors, and what replaced them from which epoch."""
    (first, _, _), *rest = ancestry(records, number)
    return records[first].trial.settings, tuple((b.epoch, b.settings) for _, _, b in rest if b is not None)


def commands(folder: Path, records: Mapping[int, Record], number: int, workers: int = 1) -> list[list[str]]:
    """Return the command lines that train a trial of the sweep in `folder` alone, one after another.

    One, but for population based training: there each ancestor is trained to where the next one branched off.
    """
    chain = ancestry(records, number)
    found = []
    for i, (one, segment, began) in enumerate(chain):
        trial: Trial = records[one].trial
        extra: dict[str, Any] = {"run.dir": str(run_dir(folder, trial, segment))}
        if began is not None:
            trial = replace(trial, settings=began.settings)
            point = branch_point(folder, began.parent, began.parent_segment, began.step)
            extra["run.branch_from"] = str(point)
        if i + 1 < len(chain) and (following := chain[i + 1][2]) is not None:
            extra["run.pause_after_epochs"] = following.epoch
        found.append(command(folder, trial, workers, extra))
    return found
