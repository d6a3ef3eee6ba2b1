"""What is concluded from the trials of a sweep, on cases that can be computed by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from synthetic_sweep import SWEEP, baselines, confirmation, no_mask, numbered, random_twin, record

from gmscale.trials import BASELINE, MASK, RANDOM, Branch, Record
from gmscale.trials.caveats import caveats
from gmscale.trials.confirmation import Conclusion, confirmed, winner
from gmscale.trials.findings import best, configurations, pareto, score
from gmscale.trials.sensitivity import sensitivity

STRONG = {"mask.strength": 0.5, "optim.lr": 0.02}
TUNED = {0.01: 58.0, 0.02: 60.0, 0.04: 57.0}


def conclusion(records: dict[int, Record], objective: str = "top1", **sweep: Any) -> Conclusion:
    return winner(records, objective, SWEEP | sweep, confirmed(records, [objective]).get(objective))


def headings(records: dict[int, Record], **sweep: Any) -> list[str]:
    return [heading for heading, _ in caveats(records, SWEEP | sweep)]


def search(*tops: float) -> list[Record]:
    """Three controls, then one mask configuration per value, the first of them STRONG."""
    masks = [STRONG, *({"mask.strength": 0.1 * i, "optim.lr": 0.02} for i in range(len(tops) - 1))]
    found = [record(10 + i, MASK, masks[i], top1=top1) for i, top1 in enumerate(tops)]
    return [*baselines(TUNED, 1), *found]


# ---- scores -----------------------------------------------------------------------------------------------------


def test_score_is_the_mean_over_seeds_and_a_diverged_one_is_the_worst() -> None:
    two = [record(1, top1=60.0, loss=1.0), record(2, seed=1, top1=62.0, loss=3.0)]
    assert (score(two, "top1"), score(two, "loss")) == (61.0, 2.0)
    diverged = record(3, seed=2, state="diverged", top1=99.0)
    assert score([*two, diverged], "top1") == -math.inf
    assert score([*two, diverged], "loss") == math.inf
    assert score([record(1, loss=math.nan)], "loss") == math.inf


@pytest.mark.parametrize("state", ["planned", "running", "failed"])
def test_a_seed_without_an_end_is_left_out(state: Any) -> None:
    assert score([record(1, top1=60.0), record(2, seed=1, state=state, top1=10.0)], "top1") == 60.0
    assert score([record(2, state=state, top1=10.0)], "top1") is None


def test_a_trial_that_was_stopped_is_no_candidate() -> None:
    records = numbered(
        [record(1, MASK, {"a": 1}, state="stopped", top1=99.0), record(2, MASK, {"a": 2}, top1=60.0)]
    )
    found = best(records, "top1", MASK)
    assert found is not None
    assert found.settings == {"a": 2}


def test_best_takes_the_first_of_equals_in_the_search_of_one_arm() -> None:
    records = numbered(
        [
            record(1, BASELINE, no_mask(0.1), top1=70.0),
            record(2, MASK, {"a": 1}, seed=0, top1=60.0, loss=0.9),
            record(3, MASK, {"a": 1}, seed=1, top1=62.0, loss=0.9),
            record(4, MASK, {"a": 2}, top1=61.0, loss=0.5),
            record(5, MASK, {"a": 3}, state="diverged"),
            record(6, MASK, {"a": 4}, stage="confirm", top1=90.0, loss=0.1),
        ]
    )
    found = best(records, "top1", MASK)
    assert found is not None
    assert (found.settings, found.score, found.seeds, found.trials) == ({"a": 1}, 61.0, (0, 1), (2, 3))
    lowest = best(records, "loss", MASK)
    assert lowest is not None
    assert lowest.settings == {"a": 2}
    assert best(records, "pgd_top1", MASK) is None
    assert best(records, "top1", RANDOM) is None


def test_trials_that_branched_share_their_configuration_with_none() -> None:
    branched = record(2, MASK, {"a": 1}, seed=1, top1=60.0)
    branched.branches.append(Branch(1, 60, 1.0, 1, 0, {"a": 2}))
    records = numbered([record(1, MASK, {"a": 1}, top1=50.0), branched])
    assert [len(c.records) for c in configurations(records, "search")] == [1, 1]
    assert "changed on the way" in configurations(records, "search")[1].label


# ---- Pareto -----------------------------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25)


@given(POINTS)
def test_no_member_of_the_front_dominates_another_and_all_others_are_dominated(
    points: list[tuple[int, int]],
) -> None:
    records = numbered(record(i, MASK, {"a": i}, top1=float(t), loss=float(v)) for i, (t, v) in enumerate(points))
    front = {c.settings["a"] for c in pareto(records, ["top1", "loss"], "search")}

    def dominates(i: int, j: int) -> bool:  # high top1, low loss
        (a, b), (c, d) = points[i], points[j]
        return a >= c and b <= d and (a, b) != (c, d)

    assert front
    for j in range(len(points)):
        assert (j in front) != any(dominates(i, j) for i in front)


def test_what_diverged_or_lacks_an_objective_is_on_no_front() -> None:
    records = numbered(
        [
            record(1, MASK, {"a": 1}, top1=60.0, pruned_top1=1.0),
            record(2, MASK, {"a": 2}, state="diverged"),
            record(3, MASK, {"a": 3}, top1=99.0),
        ]
    )
    assert [c.settings["a"] for c in pareto(records, ["top1", "pruned_top1"], "search")] == [1]
    assert pareto(records, ["top1", "loss"], "search") == []


# ---- sensitivity ------------------------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans_with_ties() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 5, 30).tolist(), rng.normal(size=30).round(1).tolist()
    records = numbered(
        record(i, MASK, {"mask.kappa": a, "i": i}, top1=b) for i, (a, b) in enumerate(zip(x, y, strict=True))
    )
    (found,) = sensitivity(records, "top1", ["mask.kappa", "absent"])
    expected = spearmanr(x, y)
    assert found.effect == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue, abs=0.05)  # by permutation
    assert found.n == 30


def test_clear_effects_are_told_from_none_and_come_first() -> None:
    rng = np.random.default_rng(0)
    records = numbered(
        record(
            i,
            MASK,
            {"noise": float(rng.normal()), "optim.lr": i / 40, "mask.operator": "log" if i % 2 else "pool"},
            top1=float(i + 30 * (i % 2) + rng.normal()),
        )
        for i in range(40)
    )
    found = sensitivity(records, "top1", ["noise", "optim.lr", "mask.operator"])
    assert found[-1].field == "noise"
    words = {one.field: one.words for one in found}
    assert words["optim.lr"].startswith("higher values went with higher top1 (rank correlation +0.")
    assert words["mask.operator"].startswith("top1 differs between the groups (group means 3")
    assert words["mask.operator"].endswith("highest log, lowest pool)")
    assert words["noise"].startswith("no clear rise or fall")


def test_few_configurations_are_called_no_evidence() -> None:
    records = numbered(record(i, MASK, {"optim.lr": float(i)}, top1=float(i)) for i in range(8))
    (found,) = sensitivity(records, "top1", ["optim.lr"])
    assert found.words == "8 configurations: not evidence (rank correlation +1.00)"


def test_stopped_and_branched_trials_are_left_out_and_diverged_ones_have_the_worst_rank() -> None:
    kept = [record(i, MASK, {"optim.lr": float(i)}, top1=50.0 - i) for i in range(12)]
    diverged = record(20, MASK, {"optim.lr": 99.0}, state="diverged")
    stopped = record(21, MASK, {"optim.lr": 5.5}, state="stopped", top1=90.0)
    branched = record(22, MASK, {"optim.lr": 6.5}, top1=90.0)
    branched.branches.append(Branch(1, 60, 1.0, 1, 0, {"optim.lr": 1.0}))
    (found,) = sensitivity(numbered([*kept, diverged, stopped, branched]), "top1", ["optim.lr"])
    assert (found.n, found.effect) == (13, pytest.approx(-1.0))


# ---- confirmation -----------------------------------------------------------------------------------------------


def test_differences_are_paired_with_the_best_unmasked_configuration_of_the_confirmation() -> None:
    records = numbered(confirmation(STRONG, gain=2.0, first=1))
    worse = [record(90 + s, BASELINE, no_mask(0.01), 1000 + s, stage="confirm", top1=50.0) for s in range(5)]
    table = confirmed(records | numbered(worse), ["top1"])["top1"]
    assert table.reference is not None
    assert table.reference.settings == no_mask(0.02)
    mask = next(c for c in table.to_reference if c.configuration.arm == MASK)
    assert mask.seed_differences == pytest.approx({1000: 2.1, 1001: 1.9, 1002: 2.1, 1003: 1.9, 1004: 2.1})
    assert mask.paired.mean == pytest.approx(2.02)
    assert mask.better
    assert mask.verdict.startswith("higher than no mask (lr 0.02) by 2.0 points")
    (twin,) = table.to_twin
    assert twin.against.arm == RANDOM
    assert twin.paired.mean == pytest.approx(2.04)


def test_holm_covers_the_masks_of_all_objectives() -> None:
    other = {"mask.strength": 0.9, "optim.lr": 0.02}
    records = numbered(confirmation(STRONG, gain=2.0, first=1))
    second = [r for r in confirmation(other, gain=1.0, first=50) if r.trial.arm == MASK]
    one, both = (confirmed(given, ["top1", "loss"]) for given in (records, records | numbered(second)))

    def adjusted(tables: Any) -> float:
        return next(
            c.adjusted_p / c.paired.p for c in tables["top1"].to_reference if c.configuration.settings == STRONG
        )

    assert adjusted(one) == pytest.approx(2)  # top1 and loss of one mask
    assert 3 <= adjusted(both) <= 4


def test_a_lower_loss_is_better() -> None:
    table = confirmed(numbered(confirmation(STRONG, gain=2.0, first=1)), ["loss"])["loss"]
    mask = next(c for c in table.to_reference if c.configuration.arm == MASK)
    assert mask.better
    assert mask.verdict.startswith("lower than no mask (lr 0.02) by 0.02 in loss")


@pytest.mark.parametrize("arms", [{MASK}, {BASELINE}, {MASK, BASELINE}])
def test_a_diverged_seed_makes_no_winner(arms: set[str]) -> None:
    records = confirmation(STRONG, gain=2.0, first=50)
    changed = [
        replace(r, state="diverged", values={}) if r.trial.arm in arms and r.trial.seed == 1002 else r
        for r in records
    ]
    found = conclusion(numbered([*search(63.0), *changed]))
    assert not found.confirmed
    assert "not comparable" in found.sentence


def test_a_random_twin_has_the_operator_of_its_mask() -> None:
    pool, log = ({**STRONG, "mask.operator": name} for name in ("pool", "log"))
    records: list[Record] = []
    for settings in (pool, log):
        records += [r for r in confirmation(settings, 1.0, len(records) + 1) if r.trial.arm != BASELINE]
    found = {
        c.configuration.settings["mask.operator"]: c.against.settings["mask.random_like"]
        for c in confirmed(numbered(records), ["top1"])["top1"].to_twin
    }
    assert found == {"pool": "pool", "log": "log"}


# ---- the conclusion ---------------------------------------------------------------------------------------------


def test_a_winner_is_confirmed_against_the_tuned_baseline() -> None:
    found = conclusion(numbered([*search(63.0, 61.0), *confirmation(STRONG, gain=2.0, first=50)]))
    assert found.confirmed
    assert found.sentence.startswith(
        "Confirmed in top1: strength 0.5, lr 0.02, chosen from 2 mask configurations, is higher than no mask (lr "
    )
    assert "against its random twin it is higher than random mask" in found.sentence


def test_a_gain_that_a_random_mask_has_too_is_told() -> None:
    found = conclusion(numbered([*search(63.0), *confirmation(STRONG, gain=2.0, first=50, twin_gain=2.0)]))
    assert found.confirmed
    assert "not shown to be better than a random mask of equal density" in found.sentence
    without = [r for r in confirmation(STRONG, gain=2.0, first=50) if r.trial.arm != RANDOM]
    assert "not compared with a random mask" in conclusion(numbered([*search(63.0), *without])).sentence


@pytest.mark.parametrize("gain", [0.02, -2.0])
def test_no_configuration_beat_the_baseline(gain: float) -> None:
    found = conclusion(numbered([*search(63.0), *confirmation(STRONG, gain=gain, first=50)]))
    assert not found.confirmed
    assert found.sentence.startswith("No configuration beat the tuned baseline in top1")


def test_a_gain_over_one_learning_rate_is_no_winner() -> None:
    untuned = [r for r in search(63.0) if r.trial.number in (2, 10)]
    found = conclusion(numbered([*untuned, *confirmation(STRONG, gain=2.0, first=50)]))
    assert not found.confirmed
    assert found.sentence.startswith("No winner in top1, as the baseline was not tuned")


def test_before_the_end_of_the_confirmation_nothing_wins() -> None:
    records = [*search(63.0), *confirmation(STRONG, gain=2.0, first=50)]
    running = numbered([*records[:-1], replace(records[-1], state="running")])
    assert conclusion(running).sentence.startswith("Not confirmed yet: 14 of 15 confirmation trials have ended.")
    # one more seed than there are trials
    assert not conclusion(numbered(records), confirm_seeds=6).confirmed
    searched = conclusion(numbered(search(63.0)))
    assert searched.sentence.startswith(
        "Not confirmed: strength 0.5, lr 0.02 has the best top1 of 1 mask configuration"
    )
    begun = numbered([*search(63.0)[:-1], record(10, MASK, STRONG, state="running")])
    assert conclusion(begun).sentence == "Not known yet: 3 of 4 search trials have ended."


def test_fewer_than_five_seeds_show_nothing() -> None:
    records = numbered([*search(63.0), *confirmation(STRONG, gain=2.0, first=50, seeds=3)])
    found = conclusion(records, confirm_seeds=3)
    assert not found.confirmed
    assert "fewer than five seeds: not evidence" in found.sentence


def test_without_an_unmasked_arm_it_is_uncontrolled() -> None:
    confirm = [r for r in confirmation(STRONG, gain=2.0, first=50) if r.trial.arm != BASELINE]
    found = conclusion(numbered([record(10, MASK, STRONG, top1=63.0), *confirm]))
    assert not found.confirmed
    assert found.sentence.startswith("Uncontrolled")


# ---- caveats ----------------------------------------------------------------------------------------------------


def test_a_sound_sweep_has_the_number_tried_as_its_only_caveat() -> None:
    records = numbered([*search(63.0), *confirmation(STRONG, gain=2.0, first=50)])
    assert headings(records) == ["Configurations tried"]
    assert "1 mask configuration and 3 configurations without a mask" in caveats(records, SWEEP)[0][1]


@pytest.mark.parametrize(
    ("sweep", "heading"),
    [
        ({"no_mask_lr": []}, "Uncontrolled"),
        ({"random_mask": False}, "Uncontrolled"),
        ({"confirm_seeds": 3}, "Too few seeds"),
        ({"confirm_seeds": 0}, "No confirmation"),
        ({"confirm_seeds": 6}, "Not confirmed yet"),
        ({"search": "tpe"}, "Adaptive search"),
    ],
)
def test_what_a_sweep_lacks_is_said(sweep: dict[str, Any], heading: str) -> None:
    records = numbered([*search(63.0), *confirmation(STRONG, gain=2.0, first=50)])
    assert heading in headings(records, **sweep)


@pytest.mark.parametrize(("state", "heading"), [("stopped", "Stopped early"), ("diverged", "Diverged trials")])
def test_trials_that_did_not_finish_are_told(state: Any, heading: str) -> None:
    assert heading in headings(numbered([*search(63.0), record(99, MASK, {"a": 1}, state=state)]))


def test_the_best_learning_rate_at_the_edge_of_its_sweep() -> None:
    edge = [*baselines({0.01: 58.0, 0.02: 60.0, 0.04: 62.0}, 1), record(10, MASK, STRONG, top1=63.0)]
    assert "The baseline may not be tuned" in headings(numbered(edge))
    # a higher one that diverged bounds it
    beyond = record(4, BASELINE, no_mask(0.08), state="diverged")
    assert "The baseline may not be tuned" not in headings(numbered([*edge, beyond]))
    assert "The baseline is not tuned" in headings(numbered(edge[2:]))


def test_a_twin_is_not_matched_to_other_settings() -> None:
    records = [r for r in confirmation(STRONG, gain=1.0, first=1) if r.trial.arm != RANDOM]
    records.append(record(90, RANDOM, random_twin({"mask.strength": 0.9}), 1000, stage="confirm", top1=60.0))
    assert confirmed(numbered(records), ["top1"])["top1"].to_twin == ()
