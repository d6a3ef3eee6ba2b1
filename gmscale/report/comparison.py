"""Group runs into arms and compare each masked arm with its unmasked reference, seed by seed."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gmscale.report.runs import MASKS, Run, number
from gmscale.statistics import (
    ENOUGH_SEEDS,
    Paired,
    Summary,
    holm,
    paired_difference,
    significant,
    summary,
    verdict,
)

VALUES = ("top1", "loss", "images_per_s", "hook_ms", "hook_share", "kept_entries", "kept_energy", "wire_share")
# What a run is compared on: a reference has to share these.
_WORKLOAD = ("model.name", "data.source", "data.size", "run.epochs")
# Settings that say where and how a run is carried out, not what it computes, or that follow its seed.
_INCIDENTAL = (".seed", ".cache_dir", ".workers", ".eval_batch_size_per_device")


@dataclass(frozen=True)
class Arm:
    """Runs that differ by their seed only, and what their finished ones show.

    `values[name]` summarises one value per seed. `reference` is the label of the unmasked arm that the
    differences in top1, one per common seed, are measured against; these fields are empty without one.
    """

    label: str
    runs: tuple[Run, ...]
    values: dict[str, Summary]
    reference: str = ""
    seed_differences: dict[int, float] = field(default_factory=dict)
    difference: Paired | None = None
    adjusted_p: float | None = None
    verdict: str = ""

    @property
    def masked(self) -> bool:
        return self.runs[0].masked

    @property
    def seeds(self) -> frozenset[int]:
        return frozenset(run.seed for run in self.runs)

    @property
    def shown_runs(self) -> tuple[Run, ...]:
        """The finished runs; all of them while none has finished."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    @property
    def significant(self) -> bool:
        return self.difference is not None and significant(self.difference, self.adjusted_p)


@dataclass(frozen=True)
class ArmsTable:
    """The arms, unmasked first, then by falling top1, with the words that belong beside them."""

    arms: tuple[Arm, ...]
    control: str
    footnotes: tuple[str, ...]


def arms(runs: Sequence[Run]) -> ArmsTable:
    """Build the arms table of `runs`; unfinished runs are listed but enter no number."""
    groups = _group(runs)
    found = [
        Arm(label, tuple(group), {name: summary(list(_by_seed(group, name).values())) for name in VALUES})
        for label, group in groups.items()
    ]
    found.sort(key=lambda arm: (arm.masked, -_top1(arm), arm.label))
    found = _compare(found)
    return ArmsTable(tuple(found), _control(found), _footnotes(found))


def _group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Label -> runs. Where one label covers several settings, these join the label and split the arm."""
    by_label: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_label[run.label].append(run)
    groups: defaultdict[str, list[Run]] = defaultdict(list)
    for label, group in by_label.items():
        identities = [_identity(run) for run in group]
        differing = differing_keys(identities)
        for run, identity in zip(group, identities, strict=True):
            parts = [f"{key.rpartition('.')[2]} {plain(identity.get(key))}" for key in differing]
            groups[", ".join([label, *parts])].append(run)
    return groups


def differing_keys(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of `settings`, in order of appearance."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    counts: defaultdict[str, int] = defaultdict(int)
    for one in settings:
        for key, value in one.items():
            values[key].add(repr(value))
            counts[key] += 1
    return [key for key in values if len(values[key]) > 1 or counts[key] < len(settings)]


def masks(run: Run) -> tuple[str, ...]:
    """The sections of the masks that the run had, with a dot behind."""
    return tuple(f"{mask}." for mask in MASKS if run.has(mask))


def plain(value: Any) -> str:
    """A setting for people: 0.05, yes, no, or its text; a dash for none."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _identity(run: Run) -> dict[str, Any]:
    """The settings that make two runs the same experiment, apart from the seed."""
    sections = ("model.", "data.", "optim.", *masks(run))
    kept = {
        key: value
        for key, value in run.settings.items()
        if key.startswith(sections) and not key.endswith(_INCIDENTAL)
    }
    kept["run.epochs"] = run.setting("run.epochs")
    kept["world size"] = " then ".join(map(str, run.processes))
    return kept


def _by_seed(runs: Sequence[Run], name: str) -> dict[int, float]:
    """Seed -> value over finished runs. A repeated seed is averaged: it is no further evidence."""
    values: defaultdict[int, list[float]] = defaultdict(list)
    for run in runs:
        value = run.final(name) if run.finished else None
        if value is not None:
            values[run.seed].append(value)
    return {seed: sum(several) / len(several) for seed, several in values.items()}


def _top1(arm: Arm) -> float:
    mean = arm.values["top1"].mean
    return float("-inf") if mean is None or mean != mean else mean


def _workload(arm: Arm) -> tuple[str, ...]:
    return tuple(repr(arm.runs[0].setting(key)) for key in _WORKLOAD)


def _compare(found: Sequence[Arm]) -> list[Arm]:
    """Give every masked arm its reference, differences, adjusted p value and verdict."""
    references: dict[tuple[str, ...], Arm] = {}
    for arm in found:  # by falling top1, so the first unmasked arm of a workload is its best
        if not arm.masked:
            references.setdefault(_workload(arm), arm)
    paired = [_pair(arm, references.get(_workload(arm))) for arm in found]

    p_values = {arm.label: arm.difference.p for arm in paired if arm.difference and arm.difference.p is not None}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [
        replace(
            arm,
            adjusted_p=adjusted.get(arm.label),
            verdict=verdict(arm.difference, adjusted.get(arm.label), arm.reference),
        )
        if arm.difference
        else arm
        for arm in paired
    ]


def _pair(arm: Arm, reference: Arm | None) -> Arm:
    if not arm.masked or reference is None:
        return arm
    ours, theirs = _by_seed(arm.runs, "top1"), _by_seed(reference.runs, "top1")
    seeds = sorted(ours.keys() & theirs.keys())
    return replace(
        arm,
        reference=reference.label,
        seed_differences={seed: ours[seed] - theirs[seed] for seed in seeds},
        difference=paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]),
    )


def _control(found: Sequence[Arm]) -> str:
    """What the learning-rate control lacks, in one sentence; empty where nothing is missing or compared."""
    if len(found) < 2 or not any(arm.masked for arm in found):
        return ""
    unmasked = [arm for arm in found if not arm.masked]
    if not unmasked:
        return "There is no unmasked arm among these runs, so nothing is compared."
    for workload in {_workload(arm): None for arm in unmasked}:
        swept = [arm for arm in unmasked if _workload(arm) == workload]
        rates = [rate for arm in swept if (rate := number(arm.runs[0].setting("optim.lr"))) is not None]
        if len(set(rates)) < 2:
            return (
                "The unmasked arm was run at one learning rate only. A gain over a baseline that was not tuned "
                "is often matched by changing its learning rate; sweep that before claiming one."
            )
        if rates[0] in (min(rates), max(rates)):
            return (
                f"The best learning rate of the unmasked arms, {rates[0]:g}, lies at the edge of its sweep "
                f"({min(rates):g} to {max(rates):g}), so the baseline may not be tuned; widen the sweep."
            )
    return ""


def _footnotes(found: Sequence[Arm]) -> tuple[str, ...]:
    tests = sum(arm.adjusted_p is not None for arm in found)
    notes = [
        "Mean ± sample standard deviation over the seeds of finished runs; top1 is that of the last evaluation."
    ]
    if any(arm.difference for arm in found):
        notes.append("Differences are paired by seed, with the 95 % Student-t interval of one comparison.")
    if tests > 1:
        notes.append(
            f"Verdicts apply Holm's correction to the {tests} comparisons, so one interval may exclude zero "
            "and the verdict still find no significant difference."
        )
    if tests > 1 and any(arm.significant and arm.difference and (arm.difference.mean or 0) > 0 for arm in found):
        notes.append("A winner picked from several arms is a finding only after it wins again on fresh seeds.")
    if any(arm.difference and arm.difference.n < ENOUGH_SEEDS for arm in found):
        notes.append(f"Below {ENOUGH_SEEDS} paired seeds a difference is shown but is no evidence.")
    if sum(not arm.masked for arm in found) > 1:
        notes.append("The reference is the best unmasked arm by mean top1 at the same model, data and epochs.")
    if any(len(arm.seeds) < len(arm.runs) for arm in found):
        notes.append("A seed that was run more than once counts once, with its mean.")
    return tuple(notes)
