"""The curve of a learning-rate range test as a picture."""

import io
import math
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gmscale.find.curve import Point, Suggestion

_COLOURS = ("#d95f02", "#7570b3")


def figure(points: Sequence[Point], found: Sequence[Suggestion], title: str) -> bytes:
    """Return a PNG of loss over learning rate, with the suggestions marked."""
    drawn = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    finite = [p for p in points if math.isfinite(p.smoothed)]
    lrs = [p.lr for p in finite]
    axes.plot(lrs, [p.loss for p in finite], color="0.75", linewidth=1, label="loss of a step")
    axes.plot(lrs, [p.smoothed for p in finite], color="#1b7837", linewidth=2, label="smoothed")
    for suggestion, colour in zip(found, _COLOURS, strict=False):
        axes.axvline(suggestion.lr, color=colour, linestyle=":", linewidth=1)
        label = f"{suggestion.lr:.2g}: {suggestion.why}"
        axes.plot(suggestion.lr, suggestion.loss, "o", color=colour, label=label)
    axes.set_xscale("log")
    if finite:
        low, high = min(p.smoothed for p in finite), finite[0].smoothed
        room = max(high - low, 0.05 * abs(high))
        axes.set_ylim(low - 0.3 * room, high + room)  # what diverges leaves the picture
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    file = io.BytesIO()
    drawn.savefig(file, format="png")
    return file.getvalue()
