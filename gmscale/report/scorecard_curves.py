"""Curves of a scorecard page: top1 against what was pruned, what that costs, and the radius of attacks."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gmscale import scorecards
from gmscale.report.figures import INK, RC, Style, canvas, svg
from gmscale.report.scorecard_comparison import Card, ScoredArm
from gmscale.report.scorecard_figures import WHITE, WIDE, dashes, entries

_MARKS = ("o", "s", "^", "D", "v", "P")

Value = Callable[[Card], float | None]


def pruning(arms: Sequence[ScoredArm], drawn: Mapping[str, Style]) -> str:
    """Draw top1 against the share of weights that went, a panel for each way of pruning that has several."""
    ways: dict[tuple[str, int], set[float]] = {}
    for entry in entries(arms, "pruning"):
        ways.setdefault(_way(entry), set()).add(entry["sparsity"])
    panels = [way for way, shares in ways.items() if len(shares) > 1]
    if not panels:
        return ""
    with matplotlib.rc_context(RC):
        figure, grid = _panels(len(panels), 2.7)
        for axes, way in zip(grid, panels, strict=True):
            for arm in arms:
                points = [(0.0, arm.summary("top1").mean)]
                for share in sorted(ways[way]):
                    points.append((100 * share, _mean(arm, _pruned(way, share, "top1"))))
                _line(axes, points, drawn[arm.label])
            axes.set_xlabel("channels removed, %" if way[0] == "structured" else "weights removed, %")
            finetuned = f", {way[1]} steps of fine-tuning" if way[1] else ""
            title = {"global": "smallest weights", "layer": "smallest weights of each layer"}.get(way[0], way[0])
            axes.set_title(f"top1, %: {title}{finetuned}", loc="left", fontsize=9)
        return svg(figure)


def costs(arms: Sequence[ScoredArm], drawn: Mapping[str, Style], key: str, label: str) -> str:
    """Draw top1 of everything pruned against a share of the whole model, `key`; a mark is a way of pruning."""
    ways = list(dict.fromkeys(_way(entry) for entry in entries(arms, "pruning") if entry.get(key) is not None))
    if not ways:
        return ""
    with matplotlib.rc_context(RC):
        figure, axes = canvas(3.5)
        for arm in arms:
            colour = drawn[arm.label].colour
            for number, way in enumerate(ways):
                shares = sorted({e["sparsity"] for e in entries([arm], "pruning") if _way(e) == way})
                x = [_mean(arm, _pruned(way, share, key)) for share in shares]
                y = [_mean(arm, _pruned(way, share, "top1")) for share in shares]
                points = [(100 * a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
                _marks(axes, points, number, way, colour)
        for number, way in enumerate(ways):
            _marks(axes, [], number, way, INK, label=f"{way[0]}, fine-tuned {way[1]} steps" if way[1] else way[0])
        axes.set_xlim(0, 102)
        axes.set_xlabel(label)
        axes.set_title("top1, %", loc="left", fontsize=9)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        return svg(figure)


def radii(arms: Sequence[ScoredArm], drawn: Mapping[str, Style]) -> str:
    """Draw top1 against the radius of attacks that were made at several, a panel for each attack."""
    found: dict[tuple[str, str], set[float]] = {}
    for entry in entries(arms, "attacks"):
        found.setdefault((entry["norm"], scorecards.attack_name(entry)), set()).add(entry["eps"])
    panels = [one for one, radii in found.items() if len(radii) > 1]
    if not panels:
        return ""
    with matplotlib.rc_context(RC):
        figure, grid = _panels(len(panels), 2.7)
        for axes, (norm, attack) in zip(grid, panels, strict=True):
            scale = 255 if norm == "linf" else 1
            for arm in arms:
                points = [(0.0, arm.summary("top1").mean)]
                for eps in sorted(found[norm, attack]):
                    points.append((scale * eps, _mean(arm, _attacked(norm, attack, eps))))
                _line(axes, points, drawn[arm.label])
            axes.set_xlabel("L-inf radius, of 255" if norm == "linf" else "L2 radius, pixels in [0, 1]")
            axes.set_title(f"top1, %: {attack}", loc="left", fontsize=9)
            axes.set_ylim(bottom=0)
            axes.set_xticks([0, *(scale * eps for eps in sorted(found[norm, attack]))])
            axes.xaxis.set_major_formatter("{x:.3g}")
        return svg(figure)


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(3, max(2, count))
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDE, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _line(axes: Axes, points: Iterable[tuple[float, float | None]], style: Style) -> None:
    known = [(x, y) for x, y in points if y is not None]
    if len(known) > 1:
        axes.plot(
            *zip(*known, strict=True), marker="o", ms=3.5, color=style.colour, linestyle=dashes(style), lw=1.5
        )


def _marks(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    number: int,
    way: tuple[str, int],
    colour: str,
    label: str = "",
) -> None:
    """Draw what was pruned in one way, hollow where it was fine-tuned."""
    x, y = [x for x, _ in points], [y for _, y in points]
    filling = WHITE if way[1] else colour
    axes.plot(
        x,
        y,
        marker=_MARKS[number % len(_MARKS)],
        ms=5,
        color=colour,
        markerfacecolor=filling,
        linewidth=0.5 if points else 0,
        label=label or None,
    )


def _mean(arm: ScoredArm, value: Value) -> float | None:
    found = arm.over_seeds(value)
    return statistics.fmean(found.values()) if found else None


def _way(entry: Mapping[str, Any]) -> tuple[str, int]:
    return entry.get("how", "global"), entry.get("finetune") or 0


def _pruned(way: tuple[str, int], share: float, key: str) -> Value:
    def value(card: Card) -> float | None:
        found = (e.get(key) for e in card.entries("pruning") if _way(e) == way and e["sparsity"] == share)
        return next(found, None)

    return value


def _attacked(norm: str, attack: str, eps: float) -> Value:
    def value(card: Card) -> float | None:
        wanted = (norm, attack, eps)
        for entry in card.entries("attacks"):
            if (entry["norm"], scorecards.attack_name(entry), entry["eps"]) == wanted:
                return float(entry["top1"])
        return None

    return value
