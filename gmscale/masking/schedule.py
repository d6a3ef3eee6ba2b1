"""Strength over training time: a pure function of progress, so that resuming is exact."""

import math
from typing import Literal

Ramp = Literal["linear", "cosine"]


def strength_at(
    progress: float,
    peak: float,
    start: float = 0.0,
    end: float = 1.0,
    warmup: float = 0.0,
    cooldown: float = 0.0,
    ramp: Ramp = "linear",
) -> float:
    """Return the strength at `progress`, the share of training already done, in [0, 1).

    All times are shares of training. Zero before `start` and from `end` on (except that `end` 1 is never
    reached); between them it rises to `peak` over `warmup` and falls back to zero over the last `cooldown`.
    """
    if progress < start or (progress >= end and end < 1.0):
        return 0.0
    level = 1.0
    if warmup > 0:
        level = min(level, (progress - start) / warmup)
    if cooldown > 0:
        level = min(level, (end - progress) / cooldown)
    level = max(level, 0.0)
    if ramp == "cosine":
        level = 0.5 - 0.5 * math.cos(math.pi * level)
    return peak * level
