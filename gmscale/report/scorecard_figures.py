"""The figures of a scorecard page. A line or a dot is an arm's mean over its seeds."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gmscale import scorecards
from gmscale.report.figures import MAX_LAYERS, RC, Style, canvas, shortened, svg
from gmscale.report.scorecard_comparison import Comparison, ScoredArm

MAX_MAPS = 4
WIDE = 11.4  # inches, the page's width at its small print's size
# Okabe and Ito's, as in the figures of training; baselines are dark, told apart by dashes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#882255")
_BASELINE = "#222222"
_DASHES = ("", "6 3", "2 2")
WHITE = "#ffffff"

Suite = tuple[str | None, int | None]


def styles(arms: Sequence[ScoredArm]) -> dict[str, Style]:
    """Give each arm its colour and dash in every figure."""
    given: dict[str, Style] = {}
    counts = {True: 0, False: 0}
    for arm in arms:
        row, column = divmod(counts[arm.baseline], 1 if arm.baseline else len(_COLOURS))
        given[arm.label] = Style(_BASELINE if arm.baseline else _COLOURS[column], _DASHES[row % len(_DASHES)])
        counts[arm.baseline] += 1
    return given


def differences(compared: Sequence[Comparison], drawn: Mapping[str, Style]) -> str:
    """Draw each comparison in points: a ring per seed, the mean and its 95 % interval; better is to the right."""
    shown = [one for one in compared if one.seed_differences and scorecards.unit(one.metric) == "points"]
    if not shown:
        return ""
    rows = {name: row for row, name in enumerate(dict.fromkeys(one.metric for one in shown))}
    labels = list(dict.fromkeys(one.arm.label for one in shown))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDE, 0.8 + len(rows) * (0.08 + 0.1 * len(labels))), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=_BASELINE, linewidth=1)
        for one in shown:
            sign = 1 if one.higher_is_better else -1
            height = rows[one.metric] + 0.7 * ((labels.index(one.arm.label) + 0.5) / len(labels) - 0.5)
            colour, seeds = drawn[one.arm.label].colour, [sign * d for d in one.seed_differences]
            axes.plot(seeds, [height] * len(seeds), "o", ms=3.5, color=colour, markerfacecolor="none", mew=0.8)
            interval = [sign * end for end in (one.paired.low, one.paired.high) if end is not None]
            axes.plot(interval, [height] * len(interval), color=colour, linewidth=1.8)
            filling = colour if one.better is not None else WHITE
            axes.plot([statistics.fmean(seeds)], [height], "D", ms=5, color=colour, markerfacecolor=filling)
        # intervals of two or three seeds are so wide that nothing else could be told apart
        reach = 2 * max(abs(difference) for one in shown for difference in one.seed_differences) or 1.0
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -reach), min(high, reach))
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_title("improvement over the best baseline, points: better →", loc="left", fontsize=9)
        return svg(figure)


def reliability(arms: Sequence[ScoredArm], drawn: Mapping[str, Style]) -> str:
    """Draw accuracy against confidence, and below it how many images have that confidence."""
    found = {arm.label: bins for arm in arms if (bins := _bins(arm))}
    if not found:
        return ""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(5.8, 4.6), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        axes.plot([0, 100], [0, 100], color="#9aa3af", linewidth=1, linestyle="--")
        for label, bins in found.items():
            style, (confidence, accuracy, share) = drawn[label], np.array(bins).T
            axes.plot(confidence, accuracy, marker="o", ms=3.5, color=style.colour, linestyle=dashes(style))
            below.plot(confidence, share, marker="o", ms=3, color=style.colour, linestyle=dashes(style))
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        below.set_ylim(bottom=0)
        axes.set_title("accuracy, %", loc="left", fontsize=9)
        below.set_title("share of the images, %", loc="left", fontsize=9)
        below.set_xlabel("confidence, %")
        return svg(figure)


def corruptions(arms: Sequence[ScoredArm], suite: Suite) -> str:
    """Draw top1 of families x severities as a map for each of the first MAX_MAPS arms, and a family's mean."""
    families = list(dict.fromkeys(entry["family"] for arm in arms for entry in _suite(arm, suite)))
    shown = [arm for arm in arms if _suite(arm, suite)][:MAX_MAPS]
    maps = [np.array([_severities(arm, suite, family) for family in families]) for arm in shown]
    low, high = 10 * np.floor(np.nanmin(maps) / 10), 10 * np.ceil(np.nanmax(maps) / 10)
    with matplotlib.rc_context(RC | {"axes.grid": False}):
        size = (2.0 + 2.35 * len(shown), 0.6 + 0.24 * len(families))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, arm, values in zip(grid, shown, maps, strict=True):
            axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    ink = _BASELINE if value > (low + high) / 2 else WHITE
                    axes.text(column, row, f"{value:.0f}", color=ink, ha="center", va="center", fontsize=7.5)
            axes.axvline(4.5, color=WHITE, linewidth=4)
            axes.set_xticks(range(6), ["1", "2", "3", "4", "5", "mean"], fontsize=8)
            axes.set_yticks(range(len(families)), [family.replace("_", " ") for family in families], fontsize=8)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(shortened(arm.label), loc="left", fontsize=9)
            axes.set_xlabel("severity", loc="left", fontsize=8)
        return svg(figure)


def quality(arms: Sequence[ScoredArm], drawn: Mapping[str, Style], mask: str) -> tuple[str, int]:
    """Draw each layer's gain of alignment (dots) and that of a random mask (rings); and the layers left out."""
    means: dict[str, dict[str, tuple[float, float]]] = {}
    for arm in arms:
        collected: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for entry in entries([arm], "quality"):
            if scorecards.mask_name(entry) == mask:
                for name, layer in (entry.get("layers") or {}).items():
                    if layer.get("gain") is not None and layer.get("control_gain") is not None:
                        collected[name].append((layer["gain"], layer["control_gain"]))
        if collected:
            means[arm.label] = {name: tuple(np.mean(pairs, axis=0)) for name, pairs in collected.items()}
    names = list(dict.fromkeys(name for layers in means.values() for name in layers))
    shown = names[:MAX_LAYERS]
    if not shown:
        return "", 0
    with matplotlib.rc_context(RC):
        figure, axes = canvas(0.9 + len(shown) * max(0.17, 0.07 * len(means)))
        axes.axvline(0, color=_BASELINE, linewidth=1)
        for row, (label, layers) in enumerate(means.items()):
            offset = 0.5 * ((row + 0.5) / len(means) - 0.5)
            heights = [i + offset for i, name in enumerate(shown) if name in layers]
            gains, controls = zip(*(layers[name] for name in shown if name in layers), strict=True)
            colour = drawn[label].colour
            axes.plot(controls, heights, "o", ms=3.5, color=colour, markerfacecolor="none", mew=0.8)
            axes.plot(gains, heights, "o", ms=4, color=colour)
        axes.set_yticks(
            range(len(shown)), [shortened(name.removesuffix(".weight")) for name in shown], fontsize=7.5
        )
        axes.set_ylim(len(shown) - 0.4, -0.6)  # the input at the top
        axes.set_title("gain of alignment; rings: a random mask as dense", loc="left", fontsize=9)
        return svg(figure), len(names) - len(shown)


def dashes(style: Style) -> Any:
    return (0, tuple(float(part) / 1.6 for part in style.dash.split())) if style.dash else "-"


def _bins(arm: ScoredArm) -> list[tuple[float, float, float]]:
    """Confidence, accuracy and share of the images in percent for each bin with images, over all seeds' images."""
    sums: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for card in arm.cards:
        for number, one in enumerate(card.content.get("accuracy", {}).get("bins") or ()):
            if one["count"]:
                percent = 100 * one["count"]
                own = (percent * one["confidence"], percent * one["accuracy"], one["count"])
                sums[number] = [a + b for a, b in zip(sums[number], own, strict=True)]
    total = sum(count for _, _, count in sums.values())
    return [(a / n, b / n, 100 * n / total) for _, (a, b, n) in sorted(sums.items())]


def entries(arms: Iterable[ScoredArm], section: str) -> list[dict[str, Any]]:
    return [entry for arm in arms for card in arm.cards for entry in card.entries(section)]


def _suite(arm: ScoredArm, suite: Suite) -> list[dict[str, Any]]:
    return [e for e in entries([arm], "corruptions") if (e.get("path"), e.get("images")) == suite]


def _severities(arm: ScoredArm, suite: Suite, family: str) -> list[float]:
    """Top1 at each severity and their mean, over seeds; NaN where nothing was measured."""
    found = [entry["top1"] for entry in _suite(arm, suite) if entry["family"] == family]
    if not found:
        return [float("nan")] * 6
    means = [statistics.fmean(column) for column in zip(*found, strict=True)]
    return [*means, statistics.fmean(means)]
