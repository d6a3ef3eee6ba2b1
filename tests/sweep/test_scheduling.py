"""Which trials a scheduler ends: judged among masks alone, and the same after the sweep goes on."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from gmscale.config import RunConfig, TrainConfig
from gmscale.errors import UsageError
from gmscale.sweep import planning, resources, scheduling
from gmscale.sweep.config import SweepConfig
from gmscale.trials import MASK, RANDOM, Record, Result, Trial

BASE = TrainConfig(run=RunConfig(epochs=9.0))
ASHA = SweepConfig(space={"mask.strength": [0.5, 1.0]}, scheduler="asha", reduction_factor=3, trials=2)
CONTINUE, STOP = "CONTINUE", "STOP"


def trial(number: int, *, judged: bool = True) -> Any:
    return SimpleNamespace(trial_id=str(number), config={"judged": judged}, status="RUNNING")


def report(scheduler: Any, one: Any, epoch: float, top1: float) -> str:
    return scheduler.on_trial_result(None, one, {"epoch": epoch, "top1": top1, "last": epoch >= 9})


def test_the_worse_are_stopped_at_rungs_and_controls_never() -> None:
    scheduler = scheduling.make(ASHA, BASE, {})
    masks = [trial(number) for number in range(6)]
    control = trial(9, judged=False)
    for one in [*masks, control]:
        scheduler.on_trial_add(None, one)
    decisions = [report(scheduler, one, 1, 50 + n) for n, one in enumerate(masks)]
    assert decisions == [CONTINUE] * 6
    assert report(scheduler, masks[0], 2, 0) == CONTINUE  # no rung
    late = trial(10)
    scheduler.on_trial_add(None, late)
    assert report(scheduler, late, 1, 20) == STOP
    assert report(scheduler, control, 1, 0) == CONTINUE
    assert report(scheduler, masks[0], 9, 0) == CONTINUE  # the end comes by itself


def test_a_sweep_that_goes_on_judges_by_what_ended_before() -> None:
    records: dict[int, Record] = {
        number: Record(Trial(number, "search", MASK, {}, 0), "stopped", results=[Result(1, 1.0, {"top1": 50.0})])
        for number in range(1, 4)
    }
    fresh, again = scheduling.make(ASHA, BASE, {}), scheduling.make(ASHA, BASE, records)
    for scheduler, decision in ((fresh, CONTINUE), (again, STOP)):
        one = trial(7)
        scheduler.on_trial_add(None, one)
        assert report(scheduler, one, 1, 10) == decision


@pytest.mark.parametrize(("grace", "factor", "brackets"), [(1.0, 3, 3), (3.0, 3, 2), (9.0, 3, 1), (1.0, 2, 4)])
def test_hyperband_has_brackets_of_longer_and_longer_first_rungs(grace: float, factor: int, brackets: int) -> None:
    sweep = replace(ASHA, scheduler="hyperband", grace_epochs=grace, reduction_factor=factor)
    found = scheduling.make(sweep, BASE, {})._of_masks._brackets
    firsts = [min(milestone for milestone, _ in bracket._rungs) for bracket in found]
    assert firsts == [grace * factor**n for n in range(brackets)]


def test_loss_is_better_when_it_is_lower() -> None:
    scheduler = scheduling.make(replace(ASHA, objectives=["loss"]), BASE, {})
    decisions = []
    for number, loss in enumerate((1.0, 1.0, 2.0)):
        one = trial(number)
        scheduler.on_trial_add(None, one)
        decisions.append(scheduler.on_trial_result(None, one, {"epoch": 1.0, "loss": loss, "last": False}))
    assert decisions == [CONTINUE, CONTINUE, STOP]


def test_as_many_trials_train_at_once_as_fit_on_the_nodes() -> None:
    two = replace(ASHA, workers=2, cpus_per_worker=2, gpus_per_worker=1.0)
    nodes = [{"CPU": 16.0, "GPU": 3.0}, {"CPU": 7.0, "GPU": 8.0}, {"CPU": 64.0}]
    assert resources.places(two, nodes) == 2
    assert resources.places(replace(two, at_once=1), nodes) == 1
    assert resources.places(ASHA, nodes) == 87


def test_seeds_of_the_confirmation_are_fresh_also_after_a_search_of_many_seeds() -> None:
    sweep = replace(ASHA, scheduler="none", seeds=1500, confirm_seeds=2, no_mask_lr=[], random_mask=False)
    records = {one.number: Record(one, "finished", values={"top1": 50.0}) for one in planning.search(BASE, sweep)}
    confirmed = {one.seed for one in planning.confirmation(BASE, sweep, records)}
    assert confirmed
    assert confirmed.isdisjoint(record.trial.seed for record in records.values())


def test_every_configuration_may_have_its_random_twin_from_the_start() -> None:
    grid = {"mask.strength": [0.5, 1.0], "mask.error_feedback": [True, False]}
    sweep = SweepConfig(space=grid, search="grid", no_mask_lr=[1], random_twins=True, seeds=2)
    trials = planning.search(BASE, sweep)
    of_arm = {arm: [dict(t.settings) for t in trials if t.arm == arm and t.seed == 0] for arm in (MASK, RANDOM)}
    twin = {"mask.operator": "random", "mask.random_like": "pool"}
    assert [settings | twin for settings in of_arm[MASK]] == of_arm[RANDOM][1:]
    assert of_arm[RANDOM][0] == twin, "that of the base comes first"
    with pytest.raises(UsageError, match=r"sweep\.random_twins"):
        SweepConfig(space=grid, search="tpe", random_twins=True)
