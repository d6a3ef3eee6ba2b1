"""The trials of a sweep: the controls and the search, and once that is over the confirmation on fresh seeds."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gmscale.config import TrainConfig
from gmscale.sweep import space
from gmscale.sweep.config import SweepConfig, no_mask, random_twin
from gmscale.trials import BASELINE, MASK, RANDOM, Arm, Ledger, Record, Trial, findings, schedule

FRESH = 1000  # seeds of the confirmation begin so much higher than those of the search, or behind the last of them
ADAPTIVE = ("tpe", "nsga2")


def search(base: TrainConfig, sweep: SweepConfig) -> list[Trial]:
    """Return the controls and, unless they depend on results, the mask configurations; seed by seed."""
    configurations = list(_controls(base, sweep))
    if sweep.search not in ADAPTIVE:
        domains = sweep.domains
        drawn = space.grid(domains) if sweep.search == "grid" else space.sample(domains, sweep.trials, sweep.seed)
        points = list(drawn)
        configurations += [(MASK, point) for point in points]
        if sweep.random_twins:
            twins: list[tuple[Arm, Mapping[str, Any]]] = [(RANDOM, random_twin(base, point)) for point in points]
            configurations += [twin for twin in twins if twin not in configurations]
    seeds = range(base.run.seed, base.run.seed + sweep.seeds)
    return [
        Trial(number, "search", arm, settings, seed)
        for number, (seed, (arm, settings)) in enumerate(
            ((seed, configuration) for seed in seeds for configuration in configurations), 1
        )
    ]


def confirmation(base: TrainConfig, sweep: SweepConfig, records: Mapping[int, Record]) -> list[Trial]:
    """Return what is trained on fresh seeds: the best by each objective, its random twin, and the best baseline.

    Empty where the search left nothing to confirm, or confirm_seeds is 0.
    """
    chosen = _distinct(_best(base, sweep, records))
    first = base.run.seed + max(FRESH, sweep.seeds)
    seeds = range(first, first + sweep.confirm_seeds)
    number = max(n for n, record in records.items() if record.trial.stage == "search")
    return [
        Trial(number + i, "confirm", arm, settings, seed, changes)
        for i, (seed, (arm, settings, changes)) in enumerate(((s, c) for s in seeds for c in chosen), 1)
    ]


def plan_confirmation(ledger: Ledger, base: TrainConfig, sweep: SweepConfig, records: Mapping[int, Record]) -> bool:
    """If the search is over, write what `confirmation` says and is not in the ledger into it, and return True."""
    searched = [record for record in records.values() if record.trial.stage == "search"]
    if not all(record.ended for record in searched) or next_number(sweep, records) is not None:
        return False
    for trial in confirmation(base, sweep, records):
        if trial.number not in records:
            ledger.plan(trial)
    return True


def next_number(sweep: SweepConfig, records: Mapping[int, Record]) -> int | None:
    """Return the number of the next trial that an adaptive search may try; None when it has tried enough."""
    tried = sum(record.trial.stage == "search" and record.trial.arm == MASK for record in records.values())
    return max(records, default=0) + 1 if sweep.search in ADAPTIVE and tried < sweep.trials else None


def expected(sweep: SweepConfig, records: Mapping[int, Record]) -> int:
    """Return how many trials there will be if each objective has a best mask of its own."""
    searched = sum(record.trial.stage == "search" for record in records.values())
    if sweep.search in ADAPTIVE:
        controls = sum(record.trial.arm != MASK and record.trial.stage == "search" for record in records.values())
        searched = controls + sweep.trials
    arms = 1 + bool(sweep.no_mask_lr) + sweep.random_mask
    return searched + sweep.confirm_seeds * arms * len(sweep.objectives)


_Configuration = tuple[Arm, Mapping[str, Any], tuple[tuple[float, Mapping[str, Any]], ...]]


def _controls(base: TrainConfig, sweep: SweepConfig) -> Iterator[tuple[Arm, Mapping[str, Any]]]:
    for factor in sweep.no_mask_lr:
        yield BASELINE, no_mask(base, factor)
    if sweep.random_mask:
        yield RANDOM, random_twin(base, {})


def _best(base: TrainConfig, sweep: SweepConfig, records: Mapping[int, Record]) -> Iterator[_Configuration]:
    for objective in sweep.objectives:
        baseline = findings.best(records, objective, BASELINE)
        if baseline is not None:
            yield BASELINE, baseline.settings, ()
        mask = findings.best(records, objective, MASK)
        if mask is None:
            continue
        settings, changes = schedule(records, mask.trials[0])
        yield MASK, settings, changes
        if sweep.random_mask:
            twins = tuple((epoch, random_twin(base, changed)) for epoch, changed in changes)
            yield RANDOM, random_twin(base, settings), twins


def _distinct(configurations: Iterable[_Configuration]) -> list[_Configuration]:
    found: list[_Configuration] = []
    for configuration in configurations:
        if configuration not in found:
            found.append(configuration)
    return found
