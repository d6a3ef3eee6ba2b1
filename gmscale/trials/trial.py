"""One trial: what it changes of the sweep's base configuration, and the command that trains it alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

Arm = Literal["no mask", "mask", "random mask"]
Stage = Literal["search", "confirm"]

BASELINE: Final = "no mask"
MASK: Final = "mask"
RANDOM: Final = "random mask"


@dataclass(frozen=True)
class Trial:
    """A configuration at one seed; trials with equal settings differ by their seed only."""

    number: int
    """From 1, in the order in which trials were made."""
    stage: Stage
    """search, or confirm: on seeds that the search has not seen."""
    arm: Arm
    settings: Mapping[str, Any]
    """Dotted field -> value: what differs from the base configuration, but for the seeds."""
    seed: int
    """run.seed; mask.seed and output.seed follow it."""
    schedule: tuple[tuple[float, Mapping[str, Any]], ...] = ()
    """(epoch, settings): what takes the place of the settings from then on, as population based training found."""

    @property
    def name(self) -> str:
        """Its folder below trials/, and how people call it."""
        return f"{self.number:04d}"

    @property
    def configuration(self) -> str:
        """What it shares with the same configuration at other seeds."""
        return json.dumps([self.settings, *self.schedule] if self.schedule else self.settings, sort_keys=True)


def run_dir(folder: Path, trial: Trial, segment: int = 0) -> Path:
    """Return the run directory of a trial in the sweep `folder`; one that was branched has several, from 0."""
    return folder / "trials" / (trial.name if segment == 0 else f"{trial.name}.{segment}")


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return dotted fields as flags that the command line reads back as the same values."""
    return [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in settings.items()]


def command(folder: Path, trial: Trial, workers: int = 1, extra: Mapping[str, Any] | None = None) -> list[str]:
    """Return the command line that trains the trial of the sweep in `folder`, here and alone.

    `workers` processes train it, on one node; `extra` are further fields, such as another run.dir.
    """
    seeds = {f"{section}.seed": trial.seed for section in ("run", "mask", "output")}
    fields = {**trial.settings, **seeds, "run.dir": str(run_dir(folder, trial)), **(extra or {})}
    launch = ["launch", "--nproc_per_node", str(workers)] if workers > 1 else []
    return ["gmscale", *launch, "train", "--config", str(folder / "base.yaml"), *as_flags(fields)]
