"""Verdicts: a difference between two runs is rounding, required by the mathematics, or a fault."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MORE = "more than rounding"
Kind = Literal["bitwise equal", "rounding", "required by the mathematics", "UNEXPECTED", "skipped"]


@dataclass(frozen=True)
class Difference:
    """Between a run and its reference: the first step's gradients and the weights after the last step."""

    gradient_abs: float | None
    gradient_rel: float | None
    """Largest difference, over the largest entry of the reference's gradients. None: the back-end shards them."""
    weights_abs: float
    weights_rel: float
    """Largest difference, over the largest change of a weight in the reference run."""


@dataclass(frozen=True)
class Verdict:
    kind: Kind
    reason: str = ""


def classify(
    difference: Difference,
    bound: float,
    weights_bound: float,
    *,
    mask_error: float | None = None,
    must_differ: str = "",
    may_differ: str = "",
) -> Verdict:
    """Return the verdict on a difference.

    `mask_error` beyond `bound` is a fault whatever the difference. `must_differ` says why the mathematics requires
    one beyond rounding, `may_differ` why it allows one.
    """
    if mask_error is not None and not mask_error <= bound:
        return Verdict("UNEXPECTED", "what arrived is not the mean of the ranks' masked gradients")
    relative = (difference.weights_rel, difference.gradient_rel or 0.0)
    if not all(map(math.isfinite, relative)):
        return Verdict("UNEXPECTED", "not finite")
    within = relative[0] <= weights_bound and relative[1] <= bound
    if must_differ:
        if within:
            return Verdict("UNEXPECTED", f"no difference beyond rounding, although {must_differ}")
        return Verdict("required by the mathematics", must_differ)
    if difference.weights_abs == 0 and not difference.gradient_abs:
        return Verdict("bitwise equal")
    if within:
        return Verdict("rounding")
    if may_differ:
        return Verdict("required by the mathematics", may_differ)
    return Verdict("UNEXPECTED", MORE)


def difference(
    ours: tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor]],
    reference: tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor]],
    before: Mapping[str, Tensor],
) -> Difference:
    """Return the difference of two (first gradient, last weights) of runs that began with the weights `before`."""
    absolute = relative = None
    if ours[0] is not None and reference[0] is not None:
        absolute, relative = _largest(ours[0], reference[0], _scale(reference[0]))
    change = {name: x - before[name] for name, x in reference[1].items()}
    return Difference(absolute, relative, *_largest(ours[1], reference[1], _scale(change)))


def _largest(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float) -> tuple[float, float]:
    if a.keys() != b.keys():
        return math.nan, math.nan
    largest = float(torch.stack([(a[name] - b[name]).abs().amax() for name in b if b[name].numel()]).amax())
    return largest, largest / scale if scale else (0.0 if largest == 0 else math.inf)


def _scale(tensors: Mapping[str, Tensor]) -> float:
    return max(float(x.abs().amax()) for x in tensors.values() if x.numel())
