"""The page of a sweep: what it found, what that is worth, and every trial."""

import itertools
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gmscale.errors import UsageError
from gmscale.report import html
from gmscale.report import sweep_figures as figures
from gmscale.statistics import Summary, summary
from gmscale.trials import BASELINE, MASK, RANDOM, Arm, Record, commands, read, schedule
from gmscale.trials.caveats import caveats
from gmscale.trials.confirmation import Comparison, Confirmed, confirmed, winner
from gmscale.trials.findings import Configuration, configurations, final, leader, merit, pareto, short
from gmscale.trials.sensitivity import sensitivity

MAX_ROWS = 200
_MAX_PAIRS = 6
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, as it was read."""

    folder: Path
    base: Mapping[str, Any]
    settings: Mapping[str, Any]
    records: Mapping[int, Record]

    @property
    def objectives(self) -> list[str]:
        return list(self.settings["objectives"])

    @property
    def space(self) -> Mapping[str, Any]:
        return dict(self.settings["space"])


@dataclass(frozen=True)
class _Row:
    """A configuration of the confirmation in the table of arms."""

    configuration: Configuration
    values: Summary
    comparison: Comparison | None


def the_one(paths: Sequence[Path]) -> Sweep | None:
    """Return the sweep that `paths` names, None where they name none. UsageError for a sweep among other things."""
    sweeps = [path for path in paths if (path / "trials.jsonl").is_file()]
    if not sweeps:
        return None
    if len(paths) > 1:
        raise UsageError(f"a report is about runs or about one sweep; got the sweep {sweeps[0]} and other paths")
    folder = sweeps[0]
    base, settings = (_mapping(folder / name) for name in ("base.yaml", "sweep.yaml"))
    for key, kind in (("objectives", list), ("space", dict)):
        if not settings.get(key) or not isinstance(settings[key], kind):
            raise UsageError(
                f"{folder / 'sweep.yaml'}: expected {key} of a sweep, a {kind.__name__} that is not empty"
            )
    return Sweep(folder, base, settings, read(folder))


def render(sweep: Sweep) -> str:
    """Return the page."""
    records, objectives = sweep.records, sweep.objectives
    first = objectives[0]
    tables = confirmed(records, objectives)
    masks = configurations(records, "search", MASK)
    leaders = {arm: [c for o in objectives if (c := _leader(records, o, arm))] for arm in figures.COLOURS}
    steady = [c for c in masks if not any(record.branches for record in c.records)]
    fields = figures.varied(masks, sweep.space)
    everything = configurations(records, "search")
    return html.render(
        "sweep.html.j2",
        title=f"Sweep of {_setting(sweep.base, 'model.name')} on {Path(_setting(sweep.base, 'data.source')).name}",
        facts=list(_facts(sweep)),
        conclusions=[winner(records, o, sweep.settings, tables.get(o)) for o in objectives],
        notices=[*_toy(sweep), *caveats(records, sweep.settings)],
        colours=figures.COLOURS,
        confirmation=[(o, _rows(tables[o]), tables[o].to_twin, _differences(tables[o])) for o in tables],
        search=list(_search_rows(sweep)),
        objectives=objectives,
        parallel=[
            (figures.parallel_coordinates(masks, sweep.space, o), f"Settings and {o} of mask configurations")
            for o in objectives
        ],
        branched=len(steady) < len(masks),
        sensitivities=[
            (
                o,
                sensitivity(records, o, fields),
                (figures.panels(steady, sweep.space, o), f"{o} against each hyper-parameter"),
            )
            for o in objectives
            if steady
        ],
        curves=[
            (
                figures.learning_curves(
                    (r for r in records.values() if r.trial.stage == stage),
                    (r.trial.number for found in leaders.values() for c in found[:1] for r in c.records),
                    "top1",
                    words,
                ),
                f"Validation top1 of the {words} over epochs",
            )
            for stage, words in (("search", "search"), ("confirm", "confirmation"))
        ],
        fronts=[
            (
                figures.pareto_front(everything, pareto(records, pair, "search"), *pair),
                f"{pair[1]} against {pair[0]}",
            )
            for pair in list(itertools.combinations(objectives, 2))[:_MAX_PAIRS]
        ],
        front=pareto(records, objectives, "search") if len(objectives) > 1 else [],
        schedules=list(_schedules(sweep, leaders[MASK][:1])),
        troubled=[r for r in records.values() if r.state in ("failed", "diverged") or r.failures],
        commands=list(_commands(sweep, [leaders[MASK], leaders[BASELINE], leaders[RANDOM]])),
        fields=[(field, short(field)) for field in _columns(sweep)],
        trials=_by_merit(records.values(), first)[:MAX_ROWS],
        total=len(records),
        last=_last,
        short=short,
        digits=_digits,
    )


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _YAML_LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} of the sweep cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} of the sweep holds a {type(content).__name__}; expected keys and values")
    return content


def _setting(base: Mapping[str, Any], key: str) -> str:
    section, name = key.split(".")
    return html.plain((base.get(section) or {}).get(name))


def _facts(sweep: Sweep) -> Iterator[tuple[str, str]]:
    states = Counter(record.state for record in sweep.records.values())
    yield "Folder", str(sweep.folder)
    yield "Trials", f"{len(sweep.records)}: " + ", ".join(f"{n} {state}" for state, n in states.most_common())
    for term, key in (("Model", "model.name"), ("Data", "data.source"), ("Epochs", "run.epochs")):
        yield term, _setting(sweep.base, key)
    yield "Optimizer", f"{_setting(sweep.base, 'optim.opt')}, base learning rate {_setting(sweep.base, 'optim.lr')}"
    scheduler = sweep.settings.get("scheduler", "none")
    yield "Search", f"{sweep.settings.get('search')}" + (f" with {scheduler}" if scheduler != "none" else "")
    yield "Objectives", ", ".join(sweep.objectives)
    for stage, term in (("search", "Search seeds"), ("confirm", "Confirmation seeds")):
        seeds = sorted({r.trial.seed for r in sweep.records.values() if r.trial.stage == stage})
        yield term, ", ".join(map(str, seeds[:6])) + (" …" if len(seeds) > 6 else "") if seeds else "–"
    yield "Processes a trial", html.plain(sweep.settings.get("workers", 1))
    hours = sum(record.wall_s for record in sweep.records.values()) / 3600
    yield "Time of all trials", f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _toy(sweep: Sweep) -> Iterator[tuple[str, str]]:
    if _setting(sweep.base, "data.source") == "embedded":
        yield (
            "Toy-sized data",
            "The trials train on the small embedded set (digits pasted on photographs). Nothing here follows for "
            "ImageNet.",
        )


def _leader(records: Mapping[int, Record], objective: str, arm: Arm) -> Configuration | None:
    found = leader(records, objective, arm)
    return found[0] if found else None


def _rows(table: Confirmed) -> list[_Row]:
    compared = {id(c.configuration): c for c in table.to_reference}
    return [_Row(c, _finite_summary(c.by_seed(table.objective)), compared.get(id(c))) for c in table.configurations]


def _finite_summary(values: Mapping[int, float]) -> Summary:
    """Over the seeds that did not diverge; the verdict tells of the others."""
    return summary([value for value in values.values() if math.isfinite(value)])


def _differences(table: Confirmed) -> tuple[str, str]:
    drawn = figures.differences([*table.to_reference, *table.to_twin])
    return drawn, f"Differences in {table.objective} on the seeds of the confirmation"


def _search_rows(sweep: Sweep) -> Iterator[tuple[Arm, int, str, list[tuple[str, float | None, str]]]]:
    """Arm, configurations, states of its trials, and by objective its best score and whose that is."""
    for arm in figures.COLOURS:
        found = configurations(sweep.records, "search", arm)
        states = Counter(record.state for c in found for record in c.records)
        bests: list[tuple[str, float | None, str]] = []
        for objective in sweep.objectives:
            best = leader(sweep.records, objective, arm)
            bests.append((objective, best[1], best[0].label) if best else (objective, None, "–"))
        if found:
            yield arm, len(found), ", ".join(f"{n} {state}" for state, n in states.most_common()), bests


def _schedules(sweep: Sweep, best: Sequence[Configuration]) -> Iterator[tuple[str, str]]:
    """The settings of the best trial over its epochs, where they changed."""
    for configuration in best:
        record = configuration.records[0]
        settings, changes = schedule(sweep.records, record.trial.number)
        if changes and record.results:
            drawn = figures.schedule_steps(settings, changes, record.results[-1].epoch)
            yield drawn, f"Settings of trial {record.trial.name} over epochs"


def _commands(sweep: Sweep, found: Sequence[Sequence[Configuration]]) -> Iterator[tuple[str, str]]:
    """Name and command lines of the best configuration of each arm, by each objective."""
    seen: set[int] = set()
    for configuration in itertools.chain(*found):
        number = configuration.records[0].trial.number
        if number not in seen:
            seen.add(number)
            lines = commands(sweep.folder, sweep.records, number, int(sweep.settings.get("workers", 1)))
            yield f"{configuration.name}, trial {number:04d}", "\n".join(map(shlex.join, lines))


def _columns(sweep: Sweep) -> list[str]:
    """The fields in which trials differ, those of the space first."""
    given = [record.trial.settings for record in sweep.records.values()]
    named = dict.fromkeys([*sweep.space, *(field for one in given for field in one)])
    return [
        field
        for field in named
        if not field.endswith((".enabled", ".random_like"))
        and len({repr(settings.get(field)) for settings in given}) > 1
    ]


def _by_merit(records: Iterable[Record], objective: str) -> list[Record]:
    """The best first; without a final value those come first that came furthest."""

    def key(record: Record) -> tuple[float, float]:
        value = final(record, objective)
        reached = record.results[-1].epoch if record.results else 0.0
        return (-math.inf if value is None else merit(objective, value), reached)

    return sorted(records, key=key, reverse=True)


def _last(record: Record, objective: str) -> float | None:
    """The final value, or where there is none the one of the last evaluation."""
    value = record.values.get(objective)
    if value is None and record.results:
        value = record.results[-1].values.get(objective)
    return value if value is not None and math.isfinite(value) else None


def _digits(objective: str) -> int:
    return 3 if objective.endswith("loss") else 2
