"""What the trials of a sweep show: scores, the best configuration of an arm, the Pareto front."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gmscale.trials.ledger import Record
from gmscale.trials.trial import BASELINE, MASK, RANDOM, Arm, Stage

# What makes an arm, which its name says already.
_SWITCHES = {
    BASELINE: (".enabled",),
    MASK: (),
    RANDOM: (".operator", ".random_like"),
}


@dataclass(frozen=True)
class Configuration:
    """The trials of one stage that differ by their seed only."""

    stage: Stage
    arm: Arm
    settings: Mapping[str, Any]
    records: tuple[Record, ...]

    @property
    def label(self) -> str:
        """The settings in a few words, without what its arm says already."""
        shown = {key: v for key, v in self.settings.items() if not key.endswith(_SWITCHES[self.arm])}
        changing = any(record.branches or record.trial.schedule for record in self.records)
        return (words(shown) or "as the base") + (" (changed on the way)" if changing else "")

    @property
    def name(self) -> str:
        """Arm and label."""
        return f"{self.arm} ({self.label})"

    def by_seed(self, objective: str) -> dict[int, float]:
        """Seed -> final value of the trials that have one."""
        found = {record.trial.seed: final(record, objective) for record in self.records}
        return {seed: value for seed, value in found.items() if value is not None}

    def score(self, objective: str) -> float | None:
        """The mean over its seeds, see the function of this name."""
        return score(self.records, objective)


@dataclass(frozen=True)
class Choice:
    """The best configuration of an arm in the search, with the seeds and numbers of the trials behind its score."""

    settings: Mapping[str, Any]
    score: float
    seeds: tuple[int, ...]
    trials: tuple[int, ...]


def short(name: str) -> str:
    """A dotted field without the sections whose fields everybody knows: strength, lr, output.strength."""
    section, _, rest = name.partition(".")
    return rest if section in ("mask", "optim") and rest else name


def words(settings: Mapping[str, Any]) -> str:
    """Settings for people: 'strength 0.5, lr 0.01'."""
    return ", ".join(f"{short(key)} {plain(value)}" for key, value in settings.items())


def lower_is_better(objective: str) -> bool:
    """Whether small values of the objective are good ones: of losses only."""
    return objective.endswith("loss")


def merit(objective: str, value: float) -> float:
    """The value with such a sign that more is better."""
    return -value if lower_is_better(objective) else value


def final(record: Record, objective: str) -> float | None:
    """The final value of a finished trial; the worst there is, infinite, of a diverged one; else None."""
    worst = math.inf if lower_is_better(objective) else -math.inf
    if record.state == "diverged":
        return worst
    value = record.values.get(objective) if record.state == "finished" else None
    if value is None:
        return None
    return worst if math.isnan(value) else float(value)


def score(records: Iterable[Record], objective: str) -> float | None:
    """Return the mean final value over the trials of one configuration; None without one.

    Also None where a trial was stopped early: it was never trained to the end, so it is no candidate.
    """
    records = list(records)
    values = [value for record in records if (value := final(record, objective)) is not None]
    if not values or any(record.state == "stopped" for record in records):
        return None
    return statistics.fmean(values)


def configurations(records: Mapping[int, Record], stage: Stage, arm: Arm | None = None) -> list[Configuration]:
    """Return the configurations of a stage, of one arm where given, in the order in which they were first tried."""
    groups: defaultdict[tuple[str, str, int], list[Record]] = defaultdict(list)
    for number in sorted(records):
        record = records[number]
        trial = record.trial
        if trial.stage == stage and arm in (None, trial.arm):
            # a trial that took up another's settings on its way shares its configuration with none
            alone = number if record.branches and not trial.schedule else 0
            groups[trial.arm, trial.configuration, alone].append(record)
    return [
        Configuration(stage, group[0].trial.arm, group[0].trial.settings, tuple(group)) for group in groups.values()
    ]


def leader(records: Mapping[int, Record], objective: str, arm: Arm) -> tuple[Configuration, float] | None:
    """Return the best configuration of an arm in the search and its score; see `best`."""
    scored = [(c, s) for c in configurations(records, "search", arm) if (s := c.score(objective)) is not None]
    finite = [(c, s) for c, s in scored if math.isfinite(s)]
    return max(finite, key=lambda pair: merit(objective, pair[1]), default=None)


def best(records: Mapping[int, Record], objective: str, arm: Arm) -> Choice | None:
    """Return the best configuration of an arm in the search, of equal ones the first tried; None without any."""
    if (found := leader(records, objective, arm)) is None:
        return None
    configuration, value = found
    numbers = tuple(record.trial.number for record in configuration.records)
    return Choice(configuration.settings, value, tuple(configuration.by_seed(objective)), numbers)


def pareto(records: Mapping[int, Record], objectives: Sequence[str], stage: Stage) -> list[Configuration]:
    """Return the configurations of a stage that no other equals in all objectives and betters in one.

    Those without a finite mean in every objective are left out.
    """
    scored = [
        (configuration, [merit(o, s) for o, s in zip(objectives, scores, strict=True)])
        for configuration in configurations(records, stage)
        if (scores := finite_scores(configuration, objectives)) is not None
    ]
    if not scored:
        return []
    points = np.array([point for _, point in scored])
    as_good = (points[:, None] >= points[None]).all(axis=2)  # [i, j]: i is at least as good as j
    dominated = np.any(as_good & ~as_good.T, axis=0).tolist()
    return [configuration for (configuration, _), lost in zip(scored, dominated, strict=True) if not lost]


def finite_scores(configuration: Configuration, objectives: Sequence[str]) -> list[float] | None:
    """Return the score in each objective, or None unless all are there and finite."""
    found = [s for o in objectives if (s := configuration.score(o)) is not None and math.isfinite(s)]
    return found if len(found) == len(objectives) else None


def plain(value: Any) -> str:
    """A setting for people: 0.05, yes, no, or its text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
