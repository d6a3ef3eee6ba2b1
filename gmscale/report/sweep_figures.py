"""The figures of a sweep's report; drawn as those of runs are."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from gmscale.report.figures import INK, RC, canvas, shortened, svg
from gmscale.trials import BASELINE, MASK, RANDOM, Arm, Record, Result
from gmscale.trials.confirmation import Comparison
from gmscale.trials.findings import Configuration, finite_scores, lower_is_better, merit, plain, short
from gmscale.trials.sensitivity import group_means, is_number

COLOURS: dict[Arm, str] = {BASELINE: "#222222", MASK: "#0072B2", RANDOM: "#D55E00"}
_UNKNOWN, _LOST = "#b9c0ca", "#b3261e"
MAX_FIELDS = 12
_WIDE = 11.6  # inches, at which a figure across the page has the text size of a half-page one
_BOTTOM = -0.09  # of the height of an axis: the place of what diverged
_COLUMNS = 4
_MAX_TICKS = 7
_MANY = 250  # lines
_QUARTERS = (0, 0.25, 0.5, 0.75, 1)
_MERIT = LinearSegmentedColormap.from_list("merit", ["#cfe3d4", "#5aae9b", "#2a6ea6", "#1d1147"])


@dataclass(frozen=True)
class _Scale:
    """Where the values of a hyper-parameter lie between 0 and 1, and which of them are named there.

    Equal values are spread over `width`: those of a list, or of few whole numbers.
    """

    place: Callable[[Any], float]
    ticks: Sequence[tuple[float, str]]
    width: float = 0.0


def parallel_coordinates(configurations: Sequence[Configuration], space: Mapping[str, Any], objective: str) -> str:
    """Draw each configuration as a line through its settings to its objective, dark for good ones.

    Lines of configurations without a final value, such as those that were stopped, end before the objective;
    those of diverged ones go below its axis.
    """
    fields = varied(configurations, space)[:MAX_FIELDS]
    configurations = [c for c in configurations if all(field in c.settings for field in fields)]
    if not fields or not configurations:
        return ""
    scales = [_scale(space[field], [c.settings[field] for c in configurations]) for field in fields]
    scores = [c.score(objective) for c in configurations]
    finite = [s for s in scores if s is not None and math.isfinite(s)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    span = high - low or 1.0

    def quality(value: float | None) -> float:
        """Where a line is drawn: what has no value first, below all others; the best last."""
        return -math.inf if value is None else merit(objective, value)

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDE, 3.9), layout="constrained")
        axes = figure.add_subplot()
        order = sorted(range(len(scores)), key=lambda i: quality(scores[i]))
        lines, colours = [], []
        for index in order:
            value = scores[index]
            heights = [
                scale.place(configurations[index].settings[field]) + scale.width * _spread(index)
                for field, scale in zip(fields, scales, strict=True)
            ]
            if value is None:
                colours.append(_UNKNOWN)
            elif math.isfinite(value):
                heights.append((value - low) / span)
                good = merit(objective, heights[-1]) + (1 if lower_is_better(objective) else 0)
                colours.append(to_hex(_MERIT(good)))
            else:
                heights.append(_BOTTOM)
                colours.append(_LOST)
            lines.append(list(enumerate(heights)))
        many = len(lines) > _MANY
        widths = [0.4 if many else 1.0] * (len(lines) - 1) + [2.4 if finite else 1.0]
        # of very many lines only the best tenth is drawn in full
        opacity = [0.3 if many and i < 0.9 * len(lines) else 1.0 for i in range(len(lines))]
        axes.add_collection(LineCollection(lines, colors=colours, linewidths=widths, alpha=opacity))
        for column, scale in enumerate(scales):
            _upright(axes, column, scale.ticks)
        last = [(x, f"{low + x * span:.3g}") for x in _QUARTERS] if finite else []
        if any(s is not None and not math.isfinite(s) for s in scores):
            last.append((_BOTTOM, "diverged"))
        _upright(axes, len(fields), last)
        axes.set_xticks(range(len(fields) + 1), [*map(short, fields), objective])
        axes.set_xlim(-0.15, len(fields) + 0.35)
        axes.set_ylim(_BOTTOM - 0.04, 1.05)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        return svg(figure)


def panels(configurations: Sequence[Configuration], space: Mapping[str, Any], objective: str) -> str:
    """Draw the objective of each configuration that has a final one against each hyper-parameter."""
    fields = varied(configurations, space)[:MAX_FIELDS]
    scored = [(c, s) for c in configurations if (s := c.score(objective)) is not None]
    finite = [s for _, s in scored if math.isfinite(s)]
    if not fields or len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 1.0
    lost = high + 2 * margin if objective.endswith("loss") else low - 2 * margin
    rows = -(-len(fields) // _COLUMNS)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDE, 0.3 + 2.2 * rows), layout="constrained")
        grid = figure.subplots(rows, _COLUMNS, sharey=True, squeeze=False)
        for axes in grid.flat[len(fields) :]:
            axes.remove()
        for axes, field in zip(grid.flat, fields, strict=False):
            pairs = [(c.settings[field], s) for c, s in scored if field in c.settings]
            places = _along(axes, space[field], [given for given, _ in pairs])
            kept = [(x, s) for x, (_, s) in zip(places, pairs, strict=True) if math.isfinite(s)]
            gone = [x for x, (_, s) in zip(places, pairs, strict=True) if not math.isfinite(s)]
            size = 14 if len(kept) < 100 else 5
            axes.scatter(*_xy(kept), s=size, color=COLOURS[MASK], alpha=0.55, linewidths=0)
            axes.scatter(gone, [lost] * len(gone), s=18, marker="x", color=_LOST, linewidths=1)
            if isinstance(space[field], list):
                words = _words(space[field], [given for given, _ in pairs])
                for word, mean in group_means(*zip(*pairs, strict=True)).items():
                    at = words.index(word)
                    axes.plot([at - 0.3, at + 0.3], [mean, mean], color=INK, linewidth=1.6)
            axes.set_xlabel(short(field))
        grid[0, 0].set_ylim(min(low - margin, lost - margin), max(high + margin, lost + margin))
        for axes in grid[:, 0]:
            axes.set_ylabel(objective)
        return svg(figure)


def learning_curves(records: Iterable[Record], emphasised: Iterable[int], metric: str, which: str) -> str:
    """Draw a metric over epochs, a thin line a trial; the trials with emphasised numbers thick; `which` names them.

    A trial that was stopped ends with a dot, one that diverged with a cross.
    """
    emphasised = set(emphasised)
    shown = [(record, points) for record in records if (points := _points(record.results, metric))]
    if not shown:
        return ""
    with matplotlib.rc_context(RC):
        figure, axes = canvas(3.3)
        alpha = max(0.06, min(0.6, 20 / len(shown)))
        for arm, colour in COLOURS.items():
            mine = [(record, points) for record, points in shown if record.trial.arm == arm]
            axes.add_collection(LineCollection([p for _, p in mine], colors=colour, linewidths=0.8, alpha=alpha))
            for state, marker in (("stopped", "."), ("diverged", "x")):
                ends = [points[-1] for record, points in mine if record.state == state]
                if ends:
                    axes.plot(*_xy(ends), marker, color=colour, ms=4, alpha=min(1, 2 * alpha))
            single = [points[0] for _, points in mine if len(points) == 1]
            if single:
                axes.plot(*_xy(single), "o", color=colour, ms=3, alpha=alpha)
        for record, points in shown:
            if record.trial.number in emphasised:
                axes.plot(*_xy(points), color="white", linewidth=3.6)
                axes.plot(*_xy(points), color=COLOURS[record.trial.arm], linewidth=1.8)
        axes.autoscale_view()
        axes.set_xlim(left=0)
        axes.set_xlabel("epoch")
        axes.set_title(f"validation {metric}, {which}", loc="left", fontsize=9)
        return svg(figure)


def pareto_front(
    configurations: Iterable[Configuration], front: Iterable[Configuration], across: str, up: str
) -> str:
    """Draw the scores of configurations in two objectives, and through those of `front` a line."""
    with matplotlib.rc_context(RC):
        figure, axes = canvas(3.5)
        scored = [(c, s) for c in configurations if (s := finite_scores(c, (across, up))) is not None]
        for arm, colour in COLOURS.items():
            points: list[Sequence[float]] = [s for c, s in scored if c.arm == arm]
            if points:
                axes.scatter(*_xy(points), s=18, color=colour, alpha=0.5, linewidths=0)
        best = sorted((s, c.arm) for c in front if (s := finite_scores(c, (across, up))) is not None)
        if not scored or not best:
            return ""
        axes.plot(*_xy([s for s, _ in best]), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        colours = [COLOURS[arm] for _, arm in best]
        axes.scatter(*_xy([s for s, _ in best]), s=44, color=colours, edgecolors="white", zorder=3)
        axes.set_xlabel(across)
        axes.set_title(up, loc="left", fontsize=9)
        return svg(figure)


def differences(comparisons: Sequence[Comparison]) -> str:
    """Draw the differences of the confirmation: a ring per seed, the mean and its 95 % interval."""
    shown = [c for c in comparisons if c.seed_differences and all(map(math.isfinite, c.seed_differences.values()))]
    if not shown:
        return ""
    with matplotlib.rc_context(RC):
        figure, axes = canvas(0.8 + 0.46 * len(shown))
        axes.axvline(0, color=COLOURS[BASELINE], linewidth=1)
        for row, c in enumerate(shown):
            colour, seeds = COLOURS[c.configuration.arm], list(c.seed_differences.values())
            axes.plot(seeds, [row + 0.2] * len(seeds), "o", ms=4.5, color=colour, markerfacecolor="none")
            interval = [end for end in (c.paired.low, c.paired.high) if end is not None]
            axes.plot(interval, [row - 0.12] * len(interval), color=colour, linewidth=2)
            axes.plot([statistics.fmean(seeds)], [row - 0.12], "D", ms=5, color=colour)
        names = [f"{c.configuration.arm} minus {c.against.arm}\n{shortened(c.configuration.label)}" for c in shown]
        axes.set_yticks(range(len(shown)), names, fontsize=7.5)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_title(f"difference in {shown[0].objective}", loc="left", fontsize=9)
        return svg(figure)


def schedule_steps(
    settings: Mapping[str, Any], changes: Sequence[tuple[float, Mapping[str, Any]]], end: float
) -> str:
    """Draw the settings that changed on the way of a trial over its epochs, up to `end`."""
    epochs = [0.0, *(epoch for epoch, _ in changes), end]
    stages = [dict(settings), *({**settings, **changed} for _, changed in changes)]
    fields = [
        field
        for field in stages[0]
        if all(is_number(stage[field]) for stage in stages) and len({stage[field] for stage in stages}) > 1
    ]
    if not fields:
        return ""
    with matplotlib.rc_context(RC):
        rows = -(-len(fields) // _COLUMNS)
        figure = Figure(figsize=(_WIDE, 0.2 + 1.9 * rows), layout="constrained")
        for index, field in enumerate(fields):
            axes = figure.add_subplot(rows, _COLUMNS, index + 1)
            values = [stage[field] for stage in stages]
            axes.stairs(values, epochs, baseline=None, color=COLOURS[MASK], linewidth=1.8)
            axes.set_xlim(0, end)
            axes.set_ylim(bottom=0 if min(values) > 0 else None, top=1.1 * max(values) if min(values) > 0 else None)
            axes.set_xlabel("epoch")
            axes.set_title(short(field), loc="left", fontsize=9)
        return svg(figure)


def varied(configurations: Iterable[Configuration], space: Mapping[str, Any]) -> list[str]:
    """The fields of the space that took more than one value."""
    given = [c.settings for c in configurations]
    return [field for field in space if len({plain(one[field]) for one in given if field in one}) > 1]


def _scale(domain: Any, values: Sequence[Any]) -> _Scale:
    if isinstance(domain, list):
        words = _words(domain, values)
        places = {word: (i + 0.5) / len(words) for i, word in enumerate(words)}
        ticks = [(places[word], word) for word in words[:: -(-len(words) // _MAX_TICKS)]]
        return _Scale(lambda value: places[plain(value)], ticks, min(0.12, 0.5 / len(words)))
    kind, (low, high) = next(iter(domain.items()))
    if kind == "loguniform":
        ratio = math.log(high / low)
        ticks = [(x, f"{low * math.exp(x * ratio):.2g}") for x in _QUARTERS]
        return _Scale(lambda value: math.log(value / low) / ratio, ticks)
    marks = sorted({round(low + x * (high - low)) if kind == "int" else low + x * (high - low) for x in _QUARTERS})
    ticks = [((mark - low) / (high - low), f"{mark:.3g}") for mark in marks]
    return _Scale(lambda value: (value - low) / (high - low), ticks)


def _words(domain: Sequence[Any], values: Iterable[Any]) -> list[str]:
    """The listed values that were tried: numbers by size, else in the order of the list."""
    given = {plain(value): value for value in values}
    if all(map(is_number, given.values())):
        return sorted(given, key=given.__getitem__)
    order = {plain(word): i for i, word in enumerate(domain)}
    return sorted(given, key=lambda word: order.get(word, len(order)))


def _along(axes: Axes, domain: Any, values: Sequence[Any]) -> list[float]:
    """Set up the horizontal axis for a domain and return where the values lie on it."""
    if isinstance(domain, list):
        words = _words(domain, values)
        every = -(-len(words) // _MAX_TICKS)
        axes.set_xticks(range(0, len(words), every), [shortened(word) for word in words[::every]])
        axes.set_xlim(-0.5, len(words) - 0.5)
        axes.grid(visible=False, axis="x")
        return [words.index(plain(value)) + 0.3 * _spread(i) for i, value in enumerate(values)]
    kind, (low, high) = next(iter(domain.items()))
    if kind == "loguniform":
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(low * (low / high) ** 0.04, high * (high / low) ** 0.04)
    else:
        axes.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    return list(values)


def _upright(axes: Axes, column: int, ticks: Iterable[tuple[float, str]]) -> None:
    """Draw one axis of parallel coordinates with its ticks."""
    axes.plot([column, column], [0, 1], color="#6b7482", linewidth=1, zorder=4)
    for height, word in ticks:
        axes.plot([column - 0.015, column], [height, height], color="#6b7482", linewidth=1, zorder=4)
        axes.text(
            column + 0.02,
            height,
            shortened(word),
            fontsize=8,
            va="center",
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
        )


def _spread(index: int) -> float:
    """From -0.5 to 0.5, different for neighbours: a shift that keeps equal values apart."""
    return (index * 0.6180339887) % 1 - 0.5


def _points(results: Iterable[Result], metric: str) -> list[tuple[float, float]]:
    found = [(result.epoch, result.values.get(metric)) for result in results]
    return [(epoch, value) for epoch, value in found if value is not None and np.isfinite(value)]


def _xy(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
