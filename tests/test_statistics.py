"""Statistics against hand-computed values, and the words that may be said about them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmscale.statistics import (
    Paired,
    Summary,
    bootstrap_interval,
    equivalence,
    equivalent,
    holm,
    not_worse,
    paired_difference,
    summary,
    verdict,
)


def test_summary_uses_the_sample_standard_deviation() -> None:
    assert summary([2.0, 4.0, 6.0]) == Summary(3, 4.0, 2.0)


def test_summary_of_few_values_has_no_spread() -> None:
    assert summary([]) == Summary(0, None, None)
    assert summary([3.0]) == Summary(1, 3.0, None)


def test_paired_difference_by_hand() -> None:
    # Differences 1, 2, 3, 4, 5: mean 3, std sqrt(2.5), standard error sqrt(0.5), t = 4.2426 with 4 degrees
    # of freedom. Two-sided p from t tables: 0.01324; 97.5 % quantile 2.77645.
    paired = paired_difference([11, 12, 13, 14, 15], [10, 10, 10, 10, 10])
    margin = 2.7764451 * math.sqrt(0.5)
    assert (paired.n, paired.mean) == (5, 3.0)
    assert paired.low == pytest.approx(3 - margin)
    assert paired.high == pytest.approx(3 + margin)
    assert paired.p == pytest.approx(0.0132356, rel=1e-4)
    assert paired.effect_size == pytest.approx(3 / math.sqrt(2.5))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=12))
def test_exchanging_the_sides_mirrors_the_result(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert one.p == other.p
    assert one.mean == -(other.mean or 0.0)
    if one.low is not None and other.high is not None:
        assert one.low == -other.high


@settings(max_examples=50)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=12), st.lists(st.floats(-9, 9), min_size=12, max_size=12))
def test_significant_exactly_where_the_interval_excludes_zero(base: list[float], shifts: list[float]) -> None:
    paired = paired_difference([b + s for b, s in zip(base, shifts, strict=False)], base)
    if paired.low is not None and paired.high is not None and paired.p is not None:
        assert (paired.p < 0.05) == (paired.low > 0 or paired.high < 0)


def test_one_pair_has_a_mean_only() -> None:
    assert paired_difference([3.0], [1.0]) == Paired(1, 2.0, None, None, None, None)
    assert paired_difference([], []) == Paired(0, None, None, None, None, None)


def test_equal_differences() -> None:
    assert paired_difference([60.1, 70.1], [60.1, 70.1]) == Paired(2, 0.0, 0.0, 0.0, 1.0, 0.0)
    # 0.1 is not exact in binary, so these equal differences differ in their last bits.
    shifted = paired_difference([60.1, 70.1, 80.1], [60.0, 70.0, 80.0])
    assert shifted.mean == pytest.approx(0.1)
    assert (shifted.low, shifted.high, shifted.p, shifted.effect_size) == (None, None, None, None)


def test_unequal_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match="equal lengths; got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_holm_by_hand() -> None:
    # Ordered 0.01, 0.03, 0.04 with factors 3, 2, 1: 0.03, 0.06, and 0.04 lifted to 0.06.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


FEW = "fewer than five seeds: not evidence"
HIGHER = Paired(5, 2.1, 0.4, 3.8, 0.02, 1.5)
CONSTANT = Paired(5, 0.5, None, None, None, None)
DIVERGED = Paired(5, math.nan, None, None, None, None)


@pytest.mark.parametrize(
    ("paired", "adjusted_p", "words"),
    [
        (HIGHER, None, "higher than no mask by 2.1 points (95 % interval 0.4 to 3.8, 5 paired seeds)"),
        (
            Paired(6, -2.1, -3.8, -0.04, 0.04, -1.5),
            None,
            "lower than no mask by 2.10 points (95 % interval 0.04 to 3.80, 6 paired seeds)",
        ),
        (HIGHER, 0.06, "no significant difference (5 paired seeds)"),
        (Paired(5, 0.3, -1.0, 1.6, 0.5, 0.3), None, "no significant difference (5 paired seeds)"),
        (Paired(4, 9.0, 8.0, 10.0, 0.001, 9.0), None, f"{FEW} (+9.0 points, 4 paired seeds)"),
        (Paired(1, -2.0, None, None, None, None), None, f"{FEW} (-2.0 points, 1 paired seed)"),
        (CONSTANT, None, "no spread to test: the same +0.50 points for each of 5 paired seeds"),
        (DIVERGED, None, "not comparable: a value is not finite (5 paired seeds)"),
        (Paired(0, None, None, None, None, None), None, "no paired seeds"),
    ],
)  # fmt: skip
def test_verdict(paired: Paired, adjusted_p: float | None, words: str) -> None:
    assert verdict(paired, adjusted_p) == words


def test_a_run_that_diverged_is_not_comparable() -> None:
    paired = paired_difference([math.nan, 1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert "not finite" in verdict(paired)


def test_bootstrap_of_few_pairs_takes_every_resample() -> None:
    values, baseline = [3.0, 5.0, 4.5, 9.0], [2.0, 2.5, 4.0, 4.0]
    differences = [1.0, 2.5, 0.5, 5.0]
    means = sorted(sum(taken) / 4 for taken in itertools.product(differences, repeat=4))
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(values, baseline) == pytest.approx(tuple(expected))


def test_bootstrap_of_many_pairs_is_near_the_t_interval() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 200)
    found, paired = (
        bootstrap_interval(values.tolist(), [0.0] * 200),
        paired_difference(values.tolist(), [0.0] * 200),
    )
    assert found == bootstrap_interval(values.tolist(), [0.0] * 200)  # the same each time
    assert found == pytest.approx((paired.low, paired.high), abs=0.02)


@settings(max_examples=50)
@given(st.lists(st.floats(-50, 50), min_size=3, max_size=8))
def test_bootstrap_of_few_pairs_is_narrower_than_the_t_interval(differences: list[float]) -> None:
    paired = paired_difference(differences, [0.0] * len(differences))
    found = bootstrap_interval(differences, [0.0] * len(differences))
    assert found is not None
    assert min(differences) - 1e-9 <= found[0] <= found[1] <= max(differences) + 1e-9
    if paired.low is not None and paired.high is not None:
        assert found[1] - found[0] <= paired.high - paired.low + 1e-9


def test_bootstrap_needs_two_finite_pairs() -> None:
    assert bootstrap_interval([1.0], [0.0]) is None
    assert bootstrap_interval([], []) is None
    assert bootstrap_interval([1.0, math.nan], [0.0, 0.0]) is None
    with pytest.raises(ValueError, match="equal lengths; got 2 and 1"):
        bootstrap_interval([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("low", "high", "n", "both", "higher", "lower"),
    [
        (-0.9, 0.9, 5, True, True, True),
        (-0.9, 1.1, 5, False, True, False),
        (-1.1, 0.9, 5, False, False, True),
        (-1.0, 0.5, 5, False, False, True),  # the margin itself is too much
        (-0.9, 0.9, 4, False, False, False),  # too few seeds
        (None, None, 5, False, False, False),
    ],
)
def test_equivalence_within_a_margin_of_one(
    low: float | None, high: float | None, n: int, both: bool, higher: bool, lower: bool
) -> None:
    paired = Paired(n, 0.0, low, high, 0.5, 0.1)
    assert equivalent(paired, 1.0) == both
    assert not_worse(paired, 1.0) == higher
    assert not_worse(paired, 1.0, higher_is_better=False) == lower


def test_words_of_equivalence() -> None:
    assert equivalence(Paired(5, 0.1, -0.4, 0.6, 0.5, 0.1), 1.0) == "equal within ±1 points"
    better = Paired(5, 1.5, 0.4, 2.6, 0.01, 1.0)
    assert equivalence(better, 1.0) == "not worse by 1 points"
    assert equivalence(better, 1.0, higher_is_better=False) == "not shown to be equal within ±1 points"
    assert equivalence(Paired(5, 0.1, -4.0, 4.2, 0.9, 0.1), 0.5) == "not shown to be equal within ±0.5 points"
