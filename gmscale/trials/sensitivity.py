"""How an objective went with the hyper-parameters that a search tried."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmscale.statistics import ALPHA, holm
from gmscale.trials.findings import configurations, plain
from gmscale.trials.ledger import Record
from gmscale.trials.trial import MASK

ENOUGH_CONFIGURATIONS = 10
_PERMUTATIONS = 2000


@dataclass(frozen=True)
class Sensitivity:
    """How an objective went with one hyper-parameter over the `n` mask configurations of a search.

    `effect` is Spearman's rank correlation of a number, or how far the group means of a word lie apart; `p` is
    that of a permutation test of ranks, corrected for the number of fields by Holm's method, and None where there
    is nothing to permute.
    """

    field: str
    numeric: bool
    effect: float | None
    p: float | None
    n: int
    words: str


def sensitivity(records: Mapping[int, Record], objective: str, fields: Iterable[str]) -> list[Sensitivity]:
    """Return how the objective went with each field over the search's mask configurations, the clearest first.

    Diverged configurations have the worst rank. Trials whose settings changed on the way, and those that were
    stopped early, are left out. Fields that took a single value are too.
    """
    scored = [
        (configuration.settings, value)
        for configuration in configurations(records, "search", MASK)
        if not any(record.branches for record in configuration.records)
        and (value := configuration.score(objective)) is not None
    ]
    found = []
    for field in fields:
        pairs = [(settings[field], value) for settings, value in scored if field in settings]
        if len({str(given) for given, _ in pairs}) > 1:
            found.append(_effect(field, [given for given, _ in pairs], np.array([value for _, value in pairs])))
    tested = [i for i, one in enumerate(found) if one.p is not None]
    adjusted = dict(zip(tested, holm([found[i].p or 0.0 for i in tested]), strict=True))
    corrected = [_in_words(one, adjusted.get(i), objective) for i, one in enumerate(found)]
    return sorted(corrected, key=lambda one: 2.0 if one.p is None else one.p)


def is_number(value: Any) -> bool:
    """Whether a setting lies on a scale; yes and no do not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _effect(field: str, given: Sequence[Any], values: NDArray[np.float64]) -> Sensitivity:
    numeric, n = all(map(is_number, given)), len(given)
    if len(set(values)) < 2:
        return Sensitivity(field, numeric, None, None, n, "")
    outcome = _standard(_ranks(values))
    shuffled = np.random.default_rng(0).permuted(np.tile(outcome, (_PERMUTATIONS, 1)), axis=1)
    if numeric:
        ranks = _standard(_ranks(np.array(given, dtype=np.float64)))
        effect = float(ranks @ outcome)
        return Sensitivity(field, True, effect, _permutation_p(abs(effect), np.abs(shuffled @ ranks)), n, "")
    groups, member = np.unique([str(one) for one in given], return_inverse=True)
    one_hot = np.eye(len(groups))[member]
    sizes = one_hot.sum(axis=0)
    observed, drawn = (((x @ one_hot) ** 2 / sizes).sum(axis=-1) for x in (outcome, shuffled))
    means = group_means(given, values)
    spread = max(means.values()) - min(means.values()) if means else None
    ends = (max(means, key=means.__getitem__), min(means, key=means.__getitem__)) if means else ("none", "none")
    apart = f": highest {ends[0]}, lowest {ends[1]}"
    return Sensitivity(field, False, spread, _permutation_p(float(observed), drawn), n, apart)


def group_means(given: Sequence[Any], values: Iterable[float]) -> dict[str, float]:
    """Return the mean of the finite values for each word that was given."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for word, value in zip(given, values, strict=True):
        if math.isfinite(value):
            groups[plain(word)].append(value)
    return {word: statistics.fmean(group) for word, group in groups.items()}


def _permutation_p(observed: float, drawn: NDArray[np.float64]) -> float:
    """The share of draws at least as extreme, the observed one among them, so that it is never zero."""
    return float((1 + np.count_nonzero(drawn >= observed - 1e-9)) / (1 + len(drawn)))


def _standard(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of mean 0 and length 1, so that a scalar product is a correlation."""
    centred = ranks - ranks.mean()
    scaled: NDArray[np.float64] = centred / np.linalg.norm(centred)
    return scaled


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return means[inverse]


def _in_words(one: Sensitivity, p: float | None, objective: str) -> Sensitivity:
    if one.effect is None:
        size = "all alike"
    elif one.numeric:
        size = f"rank correlation {one.effect:+.2f}"
    else:
        size = f"group means {one.effect:.2f} apart{one.words}"
    if one.n < ENOUGH_CONFIGURATIONS:
        sentence = f"{one.n} configurations: not evidence ({size})"
    elif p is None or p >= ALPHA or one.effect is None:
        sentence = f"no clear {'rise or fall' if one.numeric else 'difference'} ({size})"
    elif one.numeric:
        direction = "higher" if one.effect > 0 else "lower"
        sentence = f"higher values went with {direction} {objective} ({size})"
    else:
        sentence = f"{objective} differs between the groups ({size})"
    return Sensitivity(one.field, one.numeric, one.effect, p, one.n, sentence)
