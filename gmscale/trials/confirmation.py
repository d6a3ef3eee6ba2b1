"""The confirmation of a sweep: what its best configurations do on fresh seeds, and what may be said of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gmscale.statistics import ENOUGH_SEEDS, Paired, holm, paired_difference, significant, verdict
from gmscale.trials.findings import Configuration, configurations, leader, merit
from gmscale.trials.ledger import Record
from gmscale.trials.trial import BASELINE, MASK, RANDOM, Trial


@dataclass(frozen=True)
class Comparison:
    """A configuration minus another, seed by seed; `adjusted_p` is corrected for the comparisons of its kind."""

    objective: str
    configuration: Configuration
    against: Configuration
    seed_differences: Mapping[int, float]
    paired: Paired
    adjusted_p: float | None = None
    verdict: str = ""

    @property
    def better(self) -> bool:
        """Whether the difference is significant, and to the good."""
        good = self.paired.mean is not None and merit(self.objective, self.paired.mean) > 0
        return good and significant(self.paired, self.adjusted_p)


@dataclass(frozen=True)
class Confirmed:
    """The confirmation in one objective: each configuration against the best without a mask, each mask its twin."""

    objective: str
    reference: Configuration | None
    configurations: tuple[Configuration, ...]
    """All, the reference first, then by falling merit."""
    to_reference: tuple[Comparison, ...]
    to_twin: tuple[Comparison, ...]


@dataclass(frozen=True)
class Conclusion:
    """What a sweep says about one objective, in one sentence."""

    confirmed: bool
    sentence: str


def confirmed(records: Mapping[int, Record], objectives: Sequence[str]) -> dict[str, Confirmed]:
    """Return what the confirmation shows, by objective; empty before it has begun.

    The reference is the best configuration without a mask on the very seeds of the confirmation, which favours
    no mask. Holm's correction covers all masks over all objectives, and apart from them all controls.
    """
    found = configurations(records, "confirm")
    tables = {objective: _table(found, objective) for objective in objectives if found}
    everything = [c for table in tables.values() for c in (*table.to_reference, *table.to_twin)]
    claims = [c for c in everything if _is_claim(c)]
    adjusted = {**_adjusted(claims), **_adjusted([c for c in everything if not _is_claim(c)])}

    def judged(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
        return tuple(_judge(c, adjusted.get(id(c))) for c in comparisons)

    return {
        objective: replace(table, to_reference=judged(table.to_reference), to_twin=judged(table.to_twin))
        for objective, table in tables.items()
    }


def winner(
    records: Mapping[int, Record], objective: str, sweep: Mapping[str, Any], table: Confirmed | None
) -> Conclusion:
    """Return what may be said of the objective; a winner needs a complete confirmation against a tuned no mask.

    `table` is what `confirmed` found for the objective, None before the confirmation.
    """
    tried = count(len(configurations(records, "search", MASK)), "mask configuration")
    waiting = sum(not r.ended for r in records.values() if r.trial.stage == "search")
    first = leader(records, objective, MASK)
    so_far = f" Best {objective} of the search so far: {first[1]:.4g}, {first[0].label}." if first else ""
    if waiting and table is None:
        total = sum(r.trial.stage == "search" for r in records.values())
        return Conclusion(False, f"Not known yet: {total - waiting} of {total} search trials have ended.{so_far}")
    if table is None:
        if first is None:
            return Conclusion(False, f"None of {tried} was trained to the end with a finite {objective}.")
        return Conclusion(
            False,
            f"Not confirmed: {first[0].label} has the best {objective} of {tried} in the search, {first[1]:.4g}, "
            "but the winner of a search is not a winner yet.",
        )
    if not complete(records, int(sweep.get("confirm_seeds", 0))):
        done, total = _confirmation_trials(records)
        return Conclusion(False, f"Not confirmed yet: {done} of {total} confirmation trials have ended.{so_far}")
    masks = [c for c in table.to_reference if c.configuration.arm == MASK]
    if table.reference is None or not masks:
        return Conclusion(False, f"Uncontrolled: nothing without a mask to compare the {objective} with.")
    foremost = max(masks, key=lambda c: (c.better, _mean_merit(c)))
    tuned = len(baseline_learning_rates(records)) > 1
    if foremost.paired.n < ENOUGH_SEEDS:
        return Conclusion(
            False, f"Nothing shown in {objective}; {foremost.configuration.label}: {foremost.verdict}."
        )
    if not foremost.better:
        return Conclusion(
            False,
            f"No configuration beat the {'tuned ' if tuned else ''}baseline in {objective}; the best of {tried}, "
            f"{foremost.configuration.label}: {foremost.verdict}.",
        )
    if not tuned:
        return Conclusion(
            False,
            f"No winner in {objective}, as the baseline was not tuned: {foremost.configuration.label} is "
            f"{foremost.verdict}, which another learning rate without a mask may do as well.",
        )
    return Conclusion(
        True,
        f"Confirmed in {objective}: {foremost.configuration.label}, chosen from {tried}, is {foremost.verdict}; "
        f"{_beside_its_twin(foremost, table)}.",
    )


def complete(records: Mapping[int, Record], seeds: int) -> bool:
    """Whether the confirmation has ended, with all its seeds."""
    found = configurations(records, "confirm")
    return bool(found) and all(len(c.records) >= seeds and all(r.ended for r in c.records) for c in found)


def baseline_learning_rates(records: Mapping[int, Record]) -> list[float]:
    """The learning rates that were trained without a mask in the search, rising."""
    unmasked = [r for r in records.values() if (r.trial.stage, r.trial.arm) == ("search", BASELINE)]
    trained = [r.trial.settings for r in unmasked if r.state in ("finished", "diverged")]
    return sorted({float(settings["optim.lr"]) for settings in trained if "optim.lr" in settings})


def count(number: int, noun: str) -> str:
    """'1 trial', '2 trials'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(found: Sequence[Configuration], objective: str) -> Confirmed:
    def rank(configuration: Configuration) -> float:
        value = configuration.score(objective)
        return -math.inf if value is None else merit(objective, value)

    unmasked = [c for c in found if c.arm == BASELINE and c.score(objective) is not None]
    reference = max(unmasked, key=rank) if unmasked else None
    ordered = sorted(found, key=lambda c: (c is not reference, -rank(c)))
    pairs = [(c, reference) for c in ordered if reference is not None and c is not reference]
    twins = [(c, twin) for c in ordered if c.arm == MASK and (twin := _twin(c, found)) is not None]
    return Confirmed(
        objective,
        reference,
        tuple(ordered),
        tuple(_compare(objective, ours, theirs) for ours, theirs in pairs),
        tuple(_compare(objective, ours, theirs) for ours, theirs in twins),
    )


def _compare(objective: str, ours: Configuration, theirs: Configuration) -> Comparison:
    mine, other = ours.by_seed(objective), theirs.by_seed(objective)
    seeds = sorted(mine.keys() & other.keys())
    with np.errstate(invalid="ignore"):  # both diverged: infinity minus infinity
        differences = {seed: float(np.subtract(mine[seed], other[seed])) for seed in seeds}
        paired = paired_difference([mine[seed] for seed in seeds], [other[seed] for seed in seeds])
    return Comparison(objective, ours, theirs, differences, paired)


def _twin(mask: Configuration, found: Sequence[Configuration]) -> Configuration | None:
    """The random mask that has all settings of `mask` but its operators."""
    operators = {key: value for key, value in mask.settings.items() if key.endswith(".operator")}
    for other in found:
        if other.arm == RANDOM and _bare(other.records[0].trial) == _bare(mask.records[0].trial):
            like = (other.settings.get(key.replace(".operator", ".random_like"), v) for key, v in operators.items())
            if list(like) == list(operators.values()):
                return other
    return None


def _bare(trial: Trial) -> str:
    """All settings of a trial but those that tell a mask from its random twin."""
    parts = [(0.0, trial.settings), *trial.schedule]
    dropped = (".operator", ".random_like")
    kept = [(at, {k: v for k, v in part.items() if not k.endswith(dropped)}) for at, part in parts]
    return json.dumps(kept, sort_keys=True)


def _is_claim(comparison: Comparison) -> bool:
    """Whether it is one that a sweep is made for: a mask against none."""
    return comparison.configuration.arm == MASK and comparison.against.arm == BASELINE


def _adjusted(comparisons: Sequence[Comparison]) -> dict[int, float]:
    tested = [c for c in comparisons if c.paired.p is not None]
    return dict(zip(map(id, tested), holm([c.paired.p or 0.0 for c in tested]), strict=True))


def _judge(comparison: Comparison, adjusted_p: float | None) -> Comparison:
    unit = "in loss" if comparison.objective.endswith("loss") else "points"
    said = verdict(comparison.paired, adjusted_p, comparison.against.name, unit)
    return replace(comparison, adjusted_p=adjusted_p, verdict=said)


def _mean_merit(comparison: Comparison) -> float:
    mean = comparison.paired.mean
    return -math.inf if mean is None or not math.isfinite(mean) else merit(comparison.objective, mean)


def _beside_its_twin(foremost: Comparison, table: Confirmed) -> str:
    for comparison in table.to_twin:
        if comparison.configuration is foremost.configuration:
            if comparison.better:
                return f"against its random twin it is {comparison.verdict}"
            return (
                f"yet not shown to be better than a random mask of equal density ({comparison.verdict}), "
                "so the gain may owe nothing to what the mask inhibits"
            )
    return "it was not compared with a random mask of equal density, which may do as well"


def _confirmation_trials(records: Mapping[int, Record]) -> tuple[int, int]:
    confirm = [record for record in records.values() if record.trial.stage == "confirm"]
    return sum(record.ended for record in confirm), len(confirm)
