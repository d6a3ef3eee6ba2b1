"""Group scorecards into arms and compare each arm with the best baseline, metric by metric, paired over seeds."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmscale import scorecards
from gmscale.errors import UsageError
from gmscale.report.comparison import arms
from gmscale.report.runs import Run, is_run, load_run, number
from gmscale.statistics import (
    ENOUGH_SEEDS,
    Paired,
    Summary,
    bootstrap_interval,
    equivalence,
    holm,
    paired_difference,
    significant,
    summary,
    verdict,
)

# What a baseline has to share with an arm for their difference to be that of their training.
_WORKLOAD = ("model.name", "data.source", "data.size", "run.epochs")
# What tells two entries of a section apart, beside their images.
_ASKED = (
    *("name", "how", "sparsity", "finetune", "attack", "norm", "eps", "steps", "restarts", "surrogate"),
    *("family", "path", "method", "boxes"),
)
_IMAGES = ("source", "val_split", "limit")


@dataclass(frozen=True)
class Card:
    """A scorecard and, where it lies in a run directory, that run. `baseline`: it was given as one."""

    path: Path
    content: dict[str, Any]
    run: Run | None
    baseline: bool

    @functools.cached_property
    def values(self) -> dict[str, float]:
        return scorecards.metrics(self.content)

    @property
    def seed(self) -> int:
        return self.run.seed if self.run else int(self.content.get("seed") or 0)

    @property
    def name(self) -> str:
        """What a model without a run is called."""
        about = self.content.get("run") or self.content
        return str(about.get("name") or about.get("model") or self.path.absolute().parent.name)

    def entries(self, section: str) -> list[dict[str, Any]]:
        """The entries of a section that lists several; none if it is missing."""
        return list(self.content.get(section) or ())


@dataclass(frozen=True)
class ScoredArm:
    """Scorecards of runs that differ by their seed only, or one model's."""

    label: str
    cards: tuple[Card, ...]
    masked: bool = False
    baseline: bool = False

    def by_seed(self, metric: str) -> dict[int, float]:
        """Seed -> value. A repeated seed is averaged: it is no further evidence."""
        return self.over_seeds(lambda card: card.values.get(metric))

    def over_seeds(self, value: Callable[[Card], float | None]) -> dict[int, float]:
        """Seed -> `value` of its card, where that has one."""
        found: defaultdict[int, list[float]] = defaultdict(list)
        for card in self.cards:
            if (one := value(card)) is not None:
                found[card.seed].append(one)
        return {seed: sum(several) / len(several) for seed, several in found.items()}

    def summary(self, metric: str) -> Summary:
        """Mean and standard deviation over the seeds."""
        return summary(list(self.by_seed(metric).values()))

    @property
    def seeds(self) -> frozenset[int]:
        return frozenset(card.seed for card in self.cards)

    @property
    def lr(self) -> float | None:
        run = self.cards[0].run
        return number(run.setting("optim.lr")) if run else None

    @property
    def workload(self) -> tuple[str, ...] | None:
        run = self.cards[0].run
        return tuple(repr(run.setting(key)) for key in _WORKLOAD) if run else None


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline that is best by `metric`; `control` says what that one's tuning lacks."""

    metric: str
    arm: ScoredArm
    reference: ScoredArm
    paired: Paired
    seed_differences: tuple[float, ...]
    bootstrap: tuple[float, float] | None
    control: str
    adjusted_p: float | None = None
    verdict: str = ""

    @property
    def higher_is_better(self) -> bool:
        return scorecards.higher_is_better(self.metric)

    @property
    def better(self) -> bool | None:
        """Whether the arm is better (True) or worse (False); None where nothing is significant."""
        if not significant(self.paired, self.adjusted_p) or self.paired.mean is None:
            return None
        return (self.paired.mean > 0) == self.higher_is_better


def load_cards(paths: Sequence[str | Path], *, baseline: bool) -> list[Card]:
    """Read scorecard files, or those of run directories. Raises UsageError for what has none."""
    found: dict[Path, Card] = {}
    for path in map(Path, paths):
        file = path / scorecards.NAME if path.is_dir() else path
        content = scorecards.read(file)
        if not content:
            raise UsageError(f"{path} has no scorecard; make one with: gmscale evaluate {path}")
        run = load_run(file.parent) if is_run(file.parent) else None
        found.setdefault(file.resolve(), Card(file, _all_images(content), run, baseline))
    return list(found.values())


def _all_images(content: dict[str, Any]) -> dict[str, Any]:
    """Say of what was asked for on more images than there are that it is on all, as it was measured, and once."""
    samples = content.get("samples") or math.inf
    found = dict(content)
    for section in ("shifts", "pruning", "attacks", "corruptions", "saliency"):
        kept: dict[tuple[Any, ...], dict[str, Any]] = {}
        for entry in content.get(section) or ():
            images = None if (entry.get("images") or 0) >= samples else entry.get("images")
            kept.setdefault((images, *map(entry.get, _ASKED)), entry | {"images": images})
        if kept:
            found[section] = list(kept.values())
    return found


def scored_arms(cards: Sequence[Card]) -> list[ScoredArm]:
    """Group cards as the training report groups their runs, baselines first, then by falling top1.

    Baselines are the ones given as such; without any, where some runs are masked, the unmasked ones.
    """
    by_run = {card.run.path: card for card in cards if card.run}
    found = [
        ScoredArm(arm.label, tuple(by_run[run.path] for run in arm.runs), masked=arm.masked)
        for arm in arms([card.run for card in cards if card.run]).arms
    ]
    found += [ScoredArm(card.name, (card,)) for card in cards if not card.run]
    if any(card.baseline for card in cards):
        found = [replace(arm, baseline=any(card.baseline for card in arm.cards)) for arm in found]
    elif any(arm.masked for arm in found):
        found = [replace(arm, baseline=not arm.masked) for arm in found]
    return sorted(found, key=lambda arm: (not arm.baseline, -_merit(arm, "top1"), arm.label))


def images_differ(cards: Iterable[Card]) -> bool:
    """Whether the cards are of different images, so that nothing may be compared."""
    return len({repr(sorted(_images(card).items())) for card in cards}) > 1


def compare(found: Sequence[ScoredArm], margin: float) -> list[Comparison]:
    """Compare by every metric, with Holm's correction over all; a difference of `margin` points matters."""
    names = dict.fromkeys(name for arm in found for card in arm.cards for name in card.values)
    baselines = [arm for arm in found if arm.baseline]
    compared = [
        comparison
        for name in names
        for arm in found
        if not arm.baseline and (comparison := _compare(name, arm, baselines))
    ]
    tested = [i for i, one in enumerate(compared) if one.paired.p is not None]
    adjusted = dict(zip(tested, holm([compared[i].paired.p or 0.0 for i in tested]), strict=True))
    return [_judged(replace(one, adjusted_p=adjusted.get(i)), margin) for i, one in enumerate(compared)]


def _compare(metric: str, arm: ScoredArm, baselines: Sequence[ScoredArm]) -> Comparison | None:
    ours = arm.by_seed(metric)
    alike = [other for other in baselines if other.workload == arm.workload] or list(baselines)
    alike = [other for other in alike if other.by_seed(metric)]
    if not ours or not alike:
        return None

    common = {id(other): sorted(ours.keys() & other.by_seed(metric).keys()) for other in alike}
    most = max(map(len, common.values()))
    fullest = [other for other in alike if len(common[id(other)]) == most]
    reference = max(fullest, key=lambda other: _merit(other, metric))
    best = max(alike, key=lambda other: _merit(other, metric))
    seeds, theirs = common[id(reference)], reference.by_seed(metric)
    sides = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    return Comparison(
        metric=metric,
        arm=arm,
        reference=reference,
        paired=paired_difference(*sides),
        seed_differences=tuple(a - b for a, b in zip(*sides, strict=True)),
        bootstrap=bootstrap_interval(*sides),
        control=_control(arm, reference, best, alike),
    )


def _control(arm: ScoredArm, reference: ScoredArm, best: ScoredArm, alike: Sequence[ScoredArm]) -> str:
    """What the reference's learning rate lacks, in a few words; empty for a tuned one."""
    if arm.workload != reference.workload or arm.workload is None:
        return "another model, data or epochs"
    rates = [other.lr for other in alike if other.lr is not None]
    if len(set(rates)) < 2 or reference.lr is None:
        return "baseline at one learning rate"
    if best.lr != reference.lr:
        return f"baseline at learning rate {best.lr:g} does better on fewer seeds"
    if reference.lr in (min(rates), max(rates)):
        return f"best baseline at the edge of its learning rates, {min(rates):g} to {max(rates):g}"
    return ""


def _judged(one: Comparison, margin: float) -> Comparison:
    unit = scorecards.unit(one.metric)
    words = verdict(one.paired, one.adjusted_p, "the baseline", unit)
    if one.paired.low is not None and one.paired.n >= ENOUGH_SEEDS and unit == "points" and one.better is None:
        words += "; " + equivalence(one.paired, margin, higher_is_better=one.higher_is_better, unit=unit)
    return replace(one, verdict=words)


def _images(card: Card) -> dict[str, Any]:
    settings = card.content.get("settings") or {}
    return {key: settings.get(key) for key in _IMAGES} | {"samples": card.content.get("samples")}


def _merit(arm: ScoredArm, metric: str) -> float:
    """The mean over seeds, negated where lower is better; minus infinity for none."""
    mean = arm.summary(metric).mean
    if mean is None or not math.isfinite(mean):
        return -math.inf
    return mean if scorecards.higher_is_better(metric) else -mean
