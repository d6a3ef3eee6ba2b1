"""The tables of a scorecard page: what was measured in rows, what it is of in columns, over seeds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gmscale import scorecards
from gmscale.corruption_error import mean_corruption_error, suites
from gmscale.report.scorecard_comparison import Card, ScoredArm
from gmscale.robustness import NORM_NAMES
from gmscale.statistics import Summary, summary

MAX_CLASSES = 12
_GROUPS = {"square": "black-box", "transfer": "transfer"}  # the others see the gradients
_ORDER = ("fgsm", "pgd", "apgd-ce", "apgd-dlr", "square", "transfer")
_WAYS = {"global": 0, "layer": 1, "structured": 3}  # N:M comes before whole channels
_SALIENCY = ("iou", "ebpg", "pointing", "deletion", "insertion", "randomisation")
_QUALITY = ("gain", "control_gain", "over_control", "alignment", "kept_entries", "kept_energy", "snr", "snr_masked")


Suite = tuple[str | None, int | None]


@dataclass(frozen=True)
class Column:
    """A heading, small words below it, the group of columns that it belongs to, and how many decimals it has."""

    heading: str
    note: str = ""
    group: str = ""
    digits: int = 1


@dataclass(frozen=True)
class Row:
    """`name` and `arm` head it; a cell is the summary over the seeds."""

    name: str
    arm: ScoredArm | None
    cells: tuple[Summary, ...]


@dataclass(frozen=True)
class Table:
    """Rows of one name follow one another."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The groups of columns and how many columns each has; none where there are none."""
        names = [column.group for column in self.columns]
        return [(name, names.count(name)) for name in dict.fromkeys(names)] if any(names) else []


@dataclass(frozen=True)
class ClassTable:
    """Rows of (class, images, top1 of each arm) out of `count` classes; `changes`: picked for their differences."""

    arms: tuple[ScoredArm, ...]
    rows: tuple[tuple[str, float, tuple[float | None, ...]], ...]
    count: int
    changes: bool


def accuracy(arms: Sequence[ScoredArm]) -> Table:
    """Top1, top5, loss and calibration error of each arm."""
    columns = (Column("Top1, %", digits=2), Column("Top5, %", digits=2), Column("Loss", digits=3), Column("ECE, %"))
    names = ("top1", "top5", "loss", "ece")
    return Table(columns, tuple(Row(arm.label, arm, tuple(map(arm.summary, names))) for arm in arms))


def shifts(arms: Sequence[ScoredArm]) -> Table | None:
    """Top1 on other sets of images and labels; within: among the classes of that set alone."""
    names = _distinct(arms, "shifts", lambda entry: str(entry["name"]))

    def value(name: str, key: str) -> Callable[[Card], float | None]:
        return lambda card: next((e.get(key) for e in card.entries("shifts") if e["name"] == name), None)

    columns = [(name, key) for name in names for key in ("top1", "top1_within") if _any(arms, value(name, key))]
    if not columns:
        return None
    return Table(
        tuple(
            Column(name, "top1 within its classes, %" if "within" in key else "top1, %") for name, key in columns
        ),
        tuple(Row(a.label, a, tuple(_summary(a, value(*column)) for column in columns)) for a in arms),
    )


def pruning(arms: Sequence[ScoredArm]) -> Table | None:
    """Top1 of each arm after each way of pruning, and what is left of the model's parameters and FLOPs."""
    entries = [entry for arm in arms for card in arm.cards for entry in card.entries("pruning")]
    if not entries:
        return None
    ordered = sorted(
        entries, key=lambda e: (_WAYS.get(e.get("how", "global"), 2), str(e.get("how")), e["sparsity"])
    )
    names = list(dict.fromkeys(map(scorecards.pruning_name, ordered)))

    def value(name: str, key: str) -> Callable[[Card], float | None]:
        return lambda card: next(
            (e.get(key) for e in card.entries("pruning") if scorecards.pruning_name(e) == name), None
        )

    def left(name: str, key: str) -> Summary:
        shares = [100 * share for arm in arms for share in arm.over_seeds(value(name, key)).values()]
        return summary(shares[:1] if len(set(shares)) == 1 else shares)

    rows = []
    for name in names:
        cells = [_summary(arm, value(name, "top1")) for arm in arms]
        rows.append(Row(name, None, (*cells, left(name, "parameters_share"), left(name, "flops_share"))))
    columns = [Column(arm.label, group="top1, %") for arm in arms]
    columns += [Column("parameters", group="what is left, %"), Column("FLOPs", group="what is left, %")]
    return Table(tuple(columns), tuple(rows))


def attacks(arms: Sequence[ScoredArm]) -> Table | None:
    """Top1 under attack: a row an arm and radius, white-box, black-box and transfer attacks side by side."""
    entries = [entry for arm in arms for card in arm.cards for entry in card.entries("attacks")]
    if not entries:
        return None
    variants = {(entry["attack"], scorecards.attack_name(entry), entry.get("images")): None for entry in entries}
    ordered = sorted(variants, key=lambda variant: (_ORDER.index(variant[0]), variant[1], variant[2] or 0))
    clean = sorted({variant[2] for variant in ordered}, key=lambda images: images or 10**9)
    balls = sorted({(entry["norm"], entry["eps"]) for entry in entries})

    def value(ball: tuple[str, float], name: str, images: int | None, key: str) -> Callable[[Card], float | None]:
        def of(card: Card) -> float | None:
            for entry in card.entries("attacks"):
                same = ball == (entry["norm"], entry["eps"]) and images == entry.get("images")
                if same and name in ("", scorecards.attack_name(entry)):
                    return entry.get(key)
            return None

        return of

    rows = []
    for norm, eps in balls:
        for arm in arms:
            cells = [_summary(arm, value((norm, eps), "", images, "clean_top1")) for images in clean]
            cells += [_summary(arm, value((norm, eps), name, images, "top1")) for _, name, images in ordered]
            rows.append(Row(f"{NORM_NAMES[norm]} {scorecards.radius(eps)}", arm, tuple(cells)))
    columns = [Column("clean", _images(images), "no attack") for images in clean]
    for attack, name, images in ordered:
        note = ", ".join(filter(None, (name.partition(" ")[2], _images(images))))
        columns.append(Column(attack, note, _GROUPS.get(attack, "white-box")))
    return Table(tuple(columns), tuple(rows))


def corruptions(arms: Sequence[ScoredArm]) -> dict[Suite, tuple[str, Table]]:
    """The corruption errors of each suite, a row an arm; the mCE is relative to the first arm's, if a baseline."""
    columns = (Column("mean error", "%"), Column("mCE", "%"), Column("relative mCE", "%"))
    shown = 3 if len(arms) > 1 and arms[0].baseline else 1
    listed = [suites(card.entries("corruptions")) for arm in arms for card in arm.cards]
    names = {suite: scorecards.suite_name(suite, entries) for one in listed for suite, entries in one.items()}
    return {
        suite: (
            name,
            Table(
                columns[:shown],
                tuple(Row(arm.label, arm, _corruption_errors(arm, arms[0], suite)[:shown]) for arm in arms),
            ),
        )
        for suite, name in names.items()
    }


def _corruption_errors(arm: ScoredArm, reference: ScoredArm, suite: Suite) -> tuple[Summary, ...]:
    baselines = {card.seed: suites(card.entries("corruptions")).get(suite, ()) for card in reference.cards}

    def value(key: str) -> Callable[[Card], float | None]:
        def of(card: Card) -> float | None:
            entries = suites(card.entries("corruptions")).get(suite, ())
            found: dict[str, float | None] = mean_corruption_error(entries, baselines.get(card.seed, ()))
            return found.get(key)

        return of

    return tuple(_summary(arm, value(key)) for key in ("mean_error", "mce", "relative_mce"))


def saliency(arms: Sequence[ScoredArm]) -> Table | None:
    """The saliency metrics, percent but for the correlation, a row a method and arm, and what the centre has."""
    methods = _distinct(arms, "saliency", lambda entry: str(entry["method"]))
    if not methods:
        return None

    def value(method: str, key: str, scale: float = 100) -> Callable[[Card], float | None]:
        def of(card: Card) -> float | None:
            found = (e.get(key) for e in card.entries("saliency") if e["method"] == method)
            number = next(found, None)
            return None if number is None else scale * number

        return of

    keys = dict.fromkeys(_SALIENCY, 100.0) | {"count": 1.0, "randomisation": 1.0}
    rows = [
        Row(method, arm, tuple(_summary(arm, value(method, key, keys[key])) for key in ("count", *_SALIENCY)))
        for method in methods
        for arm in arms
    ]
    centre = ("centre_iou", "centre_ebpg", "centre_pointing")
    none = Summary(0, None, None)
    for arm in arms:
        floor = tuple(_summary(arm, value(methods[0], key)) for key in centre)
        if any(cell.mean is not None for cell in floor):
            rows.append(Row("centre of the image", arm, (none, *floor, none, none, none)))
    columns = (
        Column("boxes", "images judged", "where maps look: higher is better", 0),
        Column("IoU", "%", "where maps look: higher is better"),
        Column("EBPG", "%", "where maps look: higher is better"),
        Column("pointing", "%", "where maps look: higher is better"),
        Column("deletion", "lower is better", "what the model needs, %"),
        Column("insertion", "higher is better", "what the model needs, %"),
        Column("randomised", "correlation", "check of the maps: near 0", 2),
    )
    return Table(columns, tuple(rows))


def quality(arms: Sequence[ScoredArm]) -> Table | None:
    """Gradient quality, a row an arm and mask: combined over the layers."""
    masks = _distinct(arms, "quality", scorecards.mask_name)
    if not masks:
        return None

    def value(mask: str, key: str) -> Callable[[Card], float | None]:
        def of(card: Card) -> float | None:
            for entry in card.entries("quality"):
                if scorecards.mask_name(entry) == mask:
                    return (entry.get("combined") or entry).get(key)
            return None

        return of

    rows = [
        Row(mask, arm, tuple(_summary(arm, value(mask, key)) for key in _QUALITY)) for mask in masks for arm in arms
    ]
    aligned, kept, signal = "alignment with the next gradient", "kept share", "signal to noise"
    columns = [Column(name, "", aligned, 3) for name in ("gain", "of random mask", "difference", "alignment")]
    columns += [Column(name, "", kept, 2) for name in ("entries", "energy")]
    columns += [Column(name, "", signal, 2) for name in ("raw", "masked")]
    return Table(tuple(columns), tuple(row for row in rows if any(cell.n for cell in row.cells)))


def classes(arms: Sequence[ScoredArm]) -> ClassTable:
    """Top1 of few classes: those in which an arm differs most from the first baseline; without it the worst."""

    def value(name: str) -> Callable[[Card], float | None]:
        return lambda card: _per_class(card).get(name, {}).get("top1")

    changes = len(arms) > 1 and arms[0].baseline
    shown = [arm for arm in arms if not (changes and arm.baseline and arm is not arms[0])]
    counts = {name: one["count"] for arm in shown for card in arm.cards for name, one in _per_class(card).items()}
    rows = [
        (name, count, tuple(_summary(arm, value(name)).mean for arm in shown)) for name, count in counts.items()
    ]

    def order(row: tuple[str, float, tuple[float | None, ...]]) -> float:
        first, *others = row[2]
        if first is None:
            return 100.0
        return (
            -max((abs(other - first) for other in others if other is not None), default=0.0) if changes else first
        )

    return ClassTable(tuple(shown), tuple(sorted(rows, key=order)[:MAX_CLASSES]), len(rows), changes)


def _per_class(card: Card) -> dict[str, dict[str, float]]:
    return card.content.get("accuracy", {}).get("per_class") or {}


def _distinct(arms: Iterable[ScoredArm], section: str, name: Callable[[dict[str, Any]], str]) -> list[str]:
    return list(dict.fromkeys(name(e) for arm in arms for card in arm.cards for e in card.entries(section)))


def _any(arms: Iterable[ScoredArm], value: Callable[[Card], float | None]) -> bool:
    return any(arm.over_seeds(value) for arm in arms)


def _summary(arm: ScoredArm, value: Callable[[Card], float | None]) -> Summary:
    return summary(list(arm.over_seeds(value).values()))


def _images(images: int | None) -> str:
    return f"{images} images" if images else ""
