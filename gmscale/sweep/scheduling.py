"""Which trials go on: Ray Tune's schedulers, which judge masks against masks and leave the controls alone."""

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from gmscale.config import TrainConfig
from gmscale.sweep import space
from gmscale.sweep.config import SweepConfig
from gmscale.trials import MASK, Record
from gmscale.trials.findings import lower_is_better, merit


def make(sweep: SweepConfig, base: TrainConfig, records: Mapping[int, Record]) -> TrialScheduler:
    """Return the scheduler of a search, which knows what `records` say of trials that have ended."""
    objective, epochs = sweep.objectives[0], base.run.epochs
    mode = "min" if lower_is_better(objective) else "max"
    chosen: TrialScheduler
    if sweep.scheduler in ("asha", "hyperband"):
        np.random.seed(sweep.seed)  # by which Ray draws the bracket of a trial
        chosen = AsyncHyperBandScheduler(
            time_attr="epoch",
            metric=objective,
            mode=mode,
            max_t=epochs,  # type: ignore[arg-type] # a part of an epoch is allowed
            grace_period=sweep.grace_epochs,  # type: ignore[arg-type]
            reduction_factor=sweep.reduction_factor,
            brackets=_brackets(sweep, epochs),
            stop_last_trials=False,  # the last evaluation is the end anyway
        )
        _repeat(chosen, records)
    elif sweep.scheduler == "pbt":
        rng = random.Random(sweep.seed)
        chosen = PopulationBasedTraining(
            time_attr="epoch",
            metric=objective,
            mode=mode,
            perturbation_interval=sweep.perturb_epochs * (1 - 1e-6),  # epochs are no exact numbers
            custom_explore_fn=lambda config: {
                **config,
                "settings": space.perturb(sweep.domains, config["settings"], rng),
            },
            log_config=False,
        )
    else:
        return FIFOScheduler()
    return Controls(chosen, objective, sweep.at_once)


def _brackets(sweep: SweepConfig, epochs: float) -> int:
    """Return how many brackets there are, each with a longer first rung than the one before; asha has one.

    HyperBand's own, synchronous brackets need as many trials as they hold at the same time; Ray's, met with fewer,
    ends none of them early.
    """
    if sweep.scheduler == "asha":
        return 1
    return int(math.log(epochs / sweep.grace_epochs) / math.log(sweep.reduction_factor) + 1e-9) + 1


class Controls(TrialScheduler):
    """Lets the controls of a sweep train to their end, and asks another scheduler about all other trials.

    That one does not wake a trial while `at_once` of them train, 0 being any number.
    """

    _supports_buffered_results = False

    def __init__(self, scheduler: TrialScheduler, objective: str, at_once: int = 0) -> None:
        super().__init__()
        self._of_masks, self._objective, self._at_once = scheduler, objective, at_once

    @property
    def metric(self) -> str | None:
        return self._of_masks.metric

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True  # the scheduler was made with them

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        if _judged(trial):
            self._of_masks.on_trial_add(_seen(tune_controller), trial)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        if _judged(trial):
            self._of_masks.on_trial_error(_seen(tune_controller), trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        if not _judged(trial) or result["last"]:
            return TrialScheduler.CONTINUE
        # a value that is not finite is not reported, and is the worst
        judged = {self._objective: merit(self._objective, -math.inf), **result}
        return self._of_masks.on_trial_result(_seen(tune_controller), trial, judged)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        if _judged(trial):
            self._of_masks.on_trial_complete(_seen(tune_controller), trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        if _judged(trial):
            self._of_masks.on_trial_remove(_seen(tune_controller), trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        for trial in tune_controller.get_live_trials():
            if not _judged(trial) and trial.status == TuneTrial.PENDING:
                return trial
        chosen = self._of_masks.choose_trial_to_run(_seen(tune_controller))
        if chosen is not None and chosen.status == TuneTrial.PAUSED and self._at_once:
            held = sum(is_held(trial) for trial in tune_controller.get_live_trials())
            return None if held >= self._at_once else chosen
        return chosen

    def debug_string(self) -> str:
        return self._of_masks.debug_string()


class _OfMasks:
    """Tune's controller as the scheduler of masks sees it: without controls, and without a searcher.

    Population based training refuses searchers, which could make trials when it perturbs; ours makes none then.
    """

    search_alg = None

    def __init__(self, controller: Any) -> None:
        self._controller = controller

    def get_trials(self) -> list[TuneTrial]:
        return [trial for trial in self._controller.get_trials() if _judged(trial)]

    def get_live_trials(self) -> set[TuneTrial]:
        return {trial for trial in self._controller.get_live_trials() if _judged(trial)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)


def _seen(controller: Any) -> Any:
    return _OfMasks(controller)


def _judged(trial: TuneTrial) -> bool:
    return trial.config["judged"]


def is_held(trial: TuneTrial) -> bool:
    """Return whether a trial has resources, or is about to."""
    return trial.status in (TuneTrial.PENDING, TuneTrial.RUNNING)


class _Earlier:
    """A trial of before, as far as ASHA looks at one."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"earlier-{number}"


def _repeat(scheduler: Any, records: Mapping[int, Record]) -> None:
    """Fill the rungs with what trials that have ended reached; those that go on report again themselves."""
    for record in records.values():
        if record.trial.stage != "search" or record.trial.arm != MASK or not record.ended or not record.results:
            continue
        trial = _Earlier(record.trial.number)
        scheduler.on_trial_add(None, trial)
        for result in record.results:
            scheduler.on_trial_result(None, trial, {**result.values, "epoch": result.epoch})
