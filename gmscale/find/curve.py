"""The learning-rate range test as numbers: rates, smoothed losses, when to stop, what to suggest.

L. N. Smith, Cyclical learning rates for training neural networks, https://arxiv.org/abs/1506.01186. Raising the
rate exponentially, smoothing the loss, and stopping at a multiple of its minimum became common with fastai.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

_SMOOTHING = 0.9  # weight of the past in the smoothed loss
_DIVERGED = 4.0  # times the smallest smoothed loss


@dataclass(frozen=True)
class Point:
    """One step of the test."""

    lr: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class Suggestion:
    """A learning rate, and the smoothed loss there."""

    lr: float
    loss: float
    why: str


def rates(low: float, high: float, steps: int) -> list[float]:
    """Return `steps` learning rates from `low` to `high`, each the same multiple of the one before."""
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


class Curve:
    """The points so far."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._average = 0.0

    def add(self, lr: float, loss: float) -> Point:
        """Add the loss of a step; smoothing does not lean towards the first ones."""
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        smoothed = self._average / (1 - _SMOOTHING ** (len(self.points) + 1))
        self.points.append(Point(lr, loss, smoothed))
        return self.points[-1]

    @property
    def diverged(self) -> bool:
        """Whether to stop: the last loss is no number, or the smoothed one several times its minimum."""
        last = self.points[-1]
        return not math.isfinite(last.loss) or last.smoothed > _DIVERGED * min(p.smoothed for p in self.points)


def suggestions(points: Sequence[Point]) -> list[Suggestion]:
    """Return where the smoothed loss falls most steeply with log lr, and a tenth of the lr of its minimum.

    The slope is that of the line through a tenth of the points (at least three). Empty where the loss does not fall
    by more than the steps before its minimum scatter.
    """
    points = [p for p in points if math.isfinite(p.smoothed)]
    if not points:
        return []
    bottom = min(range(len(points)), key=lambda i: points[i].smoothed)
    width = max(3, len(points) // 10)
    windows = [points[i : i + width] for i in range(bottom - width + 2)]
    scatter = math.sqrt(fmean((p.loss - p.smoothed) ** 2 for p in points[: bottom + 1]))
    if not windows or fmean(p.smoothed for p in windows[0]) - points[bottom].smoothed <= scatter:
        return []
    steepest = min(windows, key=_slope)
    middle, lowest = steepest[len(steepest) // 2], points[bottom]
    return [
        Suggestion(middle.lr, middle.smoothed, "the loss falls most steeply"),
        Suggestion(lowest.lr / 10, _loss_at(points, lowest.lr / 10), "a tenth of where the loss is smallest"),
    ]


def _loss_at(points: Sequence[Point], lr: float) -> float:
    return min(points, key=lambda p: abs(math.log(p.lr / lr))).smoothed


def _slope(points: Sequence[Point]) -> float:
    """Return the least-squares slope of the smoothed loss over the decades of lr."""
    x = [math.log10(p.lr) for p in points]
    mean_x, mean_y = fmean(x), fmean(p.smoothed for p in points)
    covariance = sum((a - mean_x) * (p.smoothed - mean_y) for a, p in zip(x, points, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
