"""The figures of a report, each an SVG drawing without fonts, scripts or outside resources."""

import base64
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gmscale.report.comparison import Arm
from gmscale.report.runs import Run, number

MAX_ARMS = 12
MAX_LAYERS = 60
_MAX_POINTS = 400
_WIDTH = 5.8  # inches, at which the text of a half-page figure has the size of the page's small print

# Okabe and Ito's colours, which stay apart under every common colour blindness; without the yellow and
# sky blue that fade on white. Past six arms the dashes tell them apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#882255")
_UNMASKED = "#222222"
_PARTS = ("step_ms", "data_ms", "hook_ms")
INK, _FAINT = "#3b4252", "#d9dee5"
RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#9aa3af",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in an arm's label is a dollar sign
    "svg.hashsalt": "gmscale",  # the same runs give the same bytes
}


@dataclass(frozen=True)
class Style:
    """How one arm is drawn in every figure; `dash` is in SVG's words, empty for a solid line."""

    colour: str
    dash: str = ""


def styles(arms: Sequence[Arm]) -> dict[str, Style]:
    """Give each arm its colour and dash: dark for unmasked arms, a colour for masked ones."""
    given: dict[str, Style] = {}
    dashes = ("", "6 3", "2 2")
    counts = {True: 0, False: 0}
    for arm in arms:
        row, column = divmod(counts[arm.masked], len(_COLOURS) if arm.masked else 1)
        colour = _COLOURS[column] if arm.masked else _UNMASKED
        given[arm.label] = Style(colour, dashes[row % len(dashes)])
        counts[arm.masked] += 1
    return given


def curves(
    arms: Iterable[Arm], drawn: dict[str, Style], phase: str, key: str, x: str, label: str, scale: float = 1.0
) -> str:
    """Draw `key` of one phase against `x`: a line is an arm's mean over its runs, its band min to max."""
    with matplotlib.rc_context(RC):
        figure, axes = canvas(3.3)
        drawn_before: list[bytes] = []
        for arm in arms:
            grid, values = _on_one_grid([_series(run, phase, x, key) for run in arm.shown_runs])
            if not len(grid):
                continue
            style, mean = drawn[arm.label], scale * values.mean(axis=0)
            twins = drawn_before.count(mean.round(9).tobytes())
            drawn_before.append(mean.round(9).tobytes())
            axes.plot(
                grid,
                mean,
                color=style.colour,
                # A line exactly on another is drawn with gaps, through which that one shows.
                linestyle=(0, (5, 5 * twins)) if twins else _linestyle(style),
                linewidth=1.6,
                marker="o" if len(grid) == 1 else "",
            )
            if len(values) > 1:
                low, high = scale * values.min(axis=0), scale * values.max(axis=0)
                axes.fill_between(grid, low, high, color=style.colour, alpha=0.14, linewidth=0)
        axes.set_xlabel(x)
        axes.set_title(label, loc="left", fontsize=9)
        return svg(figure) if axes.lines else ""


def differences(arms: Iterable[Arm], drawn: dict[str, Style]) -> str:
    """Draw each compared arm's difference in top1: a ring per seed, the mean and its 95 % interval."""
    compared = [(arm, arm.difference) for arm in arms if arm.difference and arm.difference.n]
    if not compared:
        return ""
    with matplotlib.rc_context(RC):
        figure, axes = canvas(0.8 + 0.42 * len(compared))
        axes.axvline(0, color=_UNMASKED, linewidth=1)
        for row, (arm, paired) in enumerate(compared):
            colour = drawn[arm.label].colour
            seeds = list(arm.seed_differences.values())
            axes.plot(seeds, [row + 0.2] * len(seeds), "o", ms=4.5, color=colour, markerfacecolor="none")
            interval = [end for end in (paired.low, paired.high) if end is not None]
            axes.plot(interval, [row - 0.12] * len(interval), color=colour, linewidth=2)
            axes.plot([statistics.fmean(seeds)], [row - 0.12], "D", ms=5, color=colour)
        axes.set_yticks(range(len(compared)), [shortened(arm.label) for arm, _ in compared])
        axes.set_ylim(len(compared) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_title("difference in top1 to the unmasked reference, points", loc="left", fontsize=9)
        return svg(figure)


def layers(arms: Sequence[Arm], drawn: dict[str, Style], key: str, label: str) -> tuple[str, int]:
    """Draw `key` (a fraction) per layer as dots, an arm a colour, from the last 'layers' line of each run.

    Returns the figure and the number of layers left out: the ones with the fewest entries past MAX_LAYERS.
    """
    means = {arm.label: _layer_means(arm, key) for arm in arms}
    means = {name: values for name, values in means.items() if values}
    if not means:
        return "", 0
    names = list(dict.fromkeys(name for values in means.values() for name in values))
    largest = sorted(names, key=_entries(arms), reverse=True)[:MAX_LAYERS]
    shown = [name for name in names if name in set(largest)]

    with matplotlib.rc_context(RC):
        figure, axes = canvas(0.7 + len(shown) * max(0.17, 0.06 * len(means)))
        for row, (name, values) in enumerate(means.items()):
            offset = 0.0 if len(means) == 1 else 0.5 * (row / (len(means) - 1) - 0.5)
            style = drawn[name]
            heights = [i + offset for i, layer in enumerate(shown) if layer in values]
            fractions = [100 * values[layer] for layer in shown if layer in values]
            filling = "none" if style.dash else style.colour
            axes.plot(fractions, heights, "o", ms=4, color=style.colour, markerfacecolor=filling)
        axes.set_yticks(
            range(len(shown)), [shortened(name.removesuffix(".weight")) for name in shown], fontsize=7.5
        )
        axes.set_ylim(len(shown) - 0.4, -0.6)  # the input at the top
        axes.set_xlim(-2, 102)
        axes.set_title(label, loc="left", fontsize=9)
        return svg(figure), len(names) - len(shown)


def step_time(arms: Sequence[Arm]) -> str:
    """Draw the median step of each arm as a bar of data, hook and the rest, in milliseconds."""
    rows = [(arm.label, parts) for arm in arms if (parts := _step_parts(arm))]
    if not rows:
        return ""
    with matplotlib.rc_context(RC):
        figure, axes = canvas(1.0 + 0.36 * len(rows))
        left = np.zeros(len(rows))
        for column, (name, colour) in enumerate((("data", "#8fa3b8"), ("hook", "#1f2933"), ("rest", "#d5dde6"))):
            widths = np.array([parts[column] for _, parts in rows])
            axes.barh(range(len(rows)), widths, left=left, height=0.6, color=colour, label=name)
            left += widths
        for row, (_, parts) in enumerate(rows):
            share = f", hook {100 * parts[1] / sum(parts):.1f} %" if parts[1] else ""
            axes.annotate(
                f"{sum(parts):.1f} ms{share}", (left[row], row), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(rows)), [shortened(name) for name, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.42 * left.max())  # room for the words beside the longest bar
        axes.grid(visible=False)
        axes.set_xlabel("ms")
        figure.legend(loc="outside upper left", ncols=3, frameon=False, handlelength=1)
        return svg(figure)


def _series(run: Run, phase: str, x: str, key: str) -> dict[float, float]:
    """x -> value, in rising x; a value that is not finite is a gap."""
    points: dict[float, float] = {}
    for line in run.lines(phase):
        at, value = number(line.get(x)), number(line.get(key))
        if at is not None and value is not None:
            points[at] = value if math.isfinite(value) else math.nan
    return dict(sorted(points.items()))


def _on_one_grid(series: list[dict[float, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bring runs that logged at different places onto the x that all of them cover: grid[x], values[run, x]."""
    series = [points for points in series if points]
    if not series:
        return np.empty(0), np.empty((0, 0))
    start = max(next(iter(points)) for points in series)
    end = min(next(reversed(points)) for points in series)
    grid = np.array(sorted({at for points in series for at in points if start <= at <= end}))
    if len(grid) > _MAX_POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, _MAX_POINTS).astype(int)]
    values = [np.interp(grid, list(points), list(points.values())) for points in series]
    return grid, np.array(values)


def _layer_means(arm: Arm, key: str) -> dict[str, float]:
    collected: dict[str, list[float]] = {}
    for run in arm.shown_runs:
        lines = run.lines("layers")
        for name, value in (lines[-1].get(key) or {}).items() if lines else ():
            collected.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in collected.items()}


def _entries(arms: Iterable[Arm]) -> Callable[[str], int]:
    sizes: dict[str, int] = {}
    for arm in arms:
        for layer in arm.runs[0].touched.get("mask", {}).get("touched", ()):
            sizes[layer["name"]] = layer.get("entries", 0)
    return lambda name: sizes.get(name, 0)


def _step_parts(arm: Arm) -> tuple[float, float, float] | None:
    """Data, hook and rest of a step in ms: the median of each run, averaged over the runs."""
    runs = []
    for run in arm.shown_runs:
        lines = [line for line in run.lines("train") if number(line.get("step_ms")) is not None]
        lines = lines[1:] or lines  # the first line includes the warm-up
        if lines:
            runs.append([statistics.median(number(line.get(key)) or 0.0 for line in lines) for key in _PARTS])
    if not runs:
        return None
    step, data, hook = (statistics.fmean(column) for column in zip(*runs, strict=True))
    return data, hook, max(0.0, step - data - hook)


def canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _linestyle(style: Style) -> str | tuple[int, tuple[float, ...]]:
    return (0, tuple(float(part) / 1.6 for part in style.dash.split())) if style.dash else "-"


def shortened(text: str) -> str:
    return text if len(text) <= 34 else f"{text[:12]}…{text[-21:]}"


def svg(figure: Figure) -> str:
    """The figure as a data URI, so that the page shows it without a second file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
