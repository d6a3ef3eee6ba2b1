"""Means, paired differences and the plain words for them: what may be said about a handful of seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

ALPHA = 0.05
ENOUGH_SEEDS = 5

_ALL_RESAMPLES_UP_TO = 6  # pairs: 6**6 = 46,656 resamples
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and sample standard deviation; None where `n` is too small to have one."""

    n: int
    mean: float | None
    std: float | None


@dataclass(frozen=True, slots=True)
class Paired:
    """Mean difference over `n` pairs, with its 95 % Student-t interval and two-sided p value.

    `effect_size` is the mean difference in units of the differences' standard deviation. What cannot be
    computed is None: everything for no pairs; all but the mean for one pair, or for differences that are
    not zero and yet all equal, which have no spread to test against.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    effect_size: float | None


def summary(values: Sequence[float]) -> Summary:
    """Return count, mean and sample standard deviation (n - 1 in the denominator)."""
    if not values:
        return Summary(0, None, None)
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), std)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare `values[i]` with `baseline[i]`, measured at the same seed."""
    if len(values) != len(baseline):
        raise ValueError(f"paired values need equal lengths; got {len(values)} and {len(baseline)}")
    n = len(values)
    if n == 0:
        return Paired(0, None, None, None, None, None)
    differences = np.subtract(values, baseline, dtype=np.float64)
    mean = float(differences.mean())
    if n == 1 or not math.isfinite(mean):
        return Paired(n, mean, None, None, None, None)

    # Equal differences of rounded decimals leave a spread of a few float64 steps; that is no spread.
    std = float(differences.std(ddof=1))
    rounding = 1e-12 * float(np.max(np.abs([values, baseline])))
    if std <= rounding:
        if abs(mean) <= rounding:
            return Paired(n, 0.0, 0.0, 0.0, 1.0, 0.0)
        return Paired(n, mean, None, None, None, None)

    error = std / math.sqrt(n)
    margin = float(stdtrit(n - 1, 1 - ALPHA / 2)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error))
    return Paired(n, mean, mean - margin, mean + margin, p, mean / std)


def bootstrap_interval(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % percentile-bootstrap interval of the mean of `values[i] - baseline[i]`.

    Up to six pairs all n**n resamples are taken, beyond that 10,000 with a fixed seed (Efron 1979). It assumes no
    distribution, but for few pairs it is too narrow: the spread of resamples is that of the sample with n in the
    denominator, and they never leave its range. So it stands beside the Student-t interval, on which verdicts rest.
    None below two pairs and where a value is not finite.
    """
    if len(values) != len(baseline):
        raise ValueError(f"paired values need equal lengths; got {len(values)} and {len(baseline)}")
    differences = np.subtract(values, baseline, dtype=np.float64)
    n = len(differences)
    if n < 2 or not np.isfinite(differences).all():
        return None
    if n <= _ALL_RESAMPLES_UP_TO:
        taken = np.indices((n,) * n).reshape(n, -1).T
    else:
        taken = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    low, high = np.quantile(differences[taken].mean(axis=1), (ALPHA / 2, 1 - ALPHA / 2))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p values, in the order given.

    Rejecting where the adjusted value is below ALPHA keeps the chance of any false claim below ALPHA.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def significant(paired: Paired, adjusted_p: float | None = None) -> bool:
    """Whether there are enough pairs and the (adjusted, where given) p value is below ALPHA."""
    p = paired.p if adjusted_p is None else adjusted_p
    return paired.n >= ENOUGH_SEEDS and p is not None and p < ALPHA


def equivalent(paired: Paired, margin: float) -> bool:
    """Whether there are enough pairs and the 95 % interval lies within `margin` of zero on both sides.

    That is two one-sided t tests, each at 2.5 % (Schuirmann 1987). A difference that is merely not significant
    shows no such thing.
    """
    return not_worse(paired, margin) and not_worse(paired, margin, higher_is_better=False)


def not_worse(paired: Paired, margin: float, *, higher_is_better: bool = True) -> bool:
    """Whether there are enough pairs and the 95 % interval ends less than `margin` on the worse side of zero."""
    worst = paired.low if higher_is_better else paired.high
    if paired.n < ENOUGH_SEEDS or worst is None:
        return False
    return worst > -margin if higher_is_better else worst < margin


def equivalence(paired: Paired, margin: float, *, higher_is_better: bool = True, unit: str = "points") -> str:
    """Say in plain words what the comparison shows about a difference of `margin`, which matters to the reader."""
    if equivalent(paired, margin):
        return f"equal within ±{margin:g} {unit}"
    if not_worse(paired, margin, higher_is_better=higher_is_better):
        return f"not worse by {margin:g} {unit}"
    return f"not shown to be equal within ±{margin:g} {unit}"


def verdict(
    paired: Paired, adjusted_p: float | None = None, reference: str = "no mask", unit: str = "points"
) -> str:
    """Say in plain words what the comparison with `reference` shows; `adjusted_p` replaces `paired.p`."""
    if paired.mean is None:
        return "no paired seeds"
    seeds = f"{paired.n} paired seed{'s' if paired.n > 1 else ''}"
    if paired.n < ENOUGH_SEEDS:
        digits = _digits(paired.mean)
        return f"fewer than five seeds: not evidence ({paired.mean:+.{digits}f} {unit}, {seeds})"
    if paired.low is None or paired.high is None:
        if not math.isfinite(paired.mean):
            return f"not comparable: a value is not finite ({seeds})"
        return f"no spread to test: the same {paired.mean:+.2f} {unit} for each of {seeds}"
    if not significant(paired, adjusted_p):
        return f"no significant difference ({seeds})"
    low, high = sorted((abs(paired.low), abs(paired.high)))
    digits = _digits(paired.mean, low)
    direction = "higher" if paired.mean > 0 else "lower"
    return (
        f"{direction} than {reference} by {abs(paired.mean):.{digits}f} {unit} "
        f"(95 % interval {low:.{digits}f} to {high:.{digits}f}, {seeds})"
    )


def _digits(*values: float) -> int:
    """One decimal, or two where a nonzero value would be rounded to almost nothing."""
    return 2 if any(0 < abs(value) < 0.1 for value in values) else 1
