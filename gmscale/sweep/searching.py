"""Which configuration is tried next: those of a list, or what Optuna makes of the scores so far."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.tune.search import Searcher

from gmscale.sweep.config import SweepConfig
from gmscale.sweep.reporting import NotKept
from gmscale.trials import MASK, Record, Trial
from gmscale.trials.findings import lower_is_better, merit


class Asked:
    """Optuna's study of a search, taught by the `records` of ended trials; names one configuration at a time."""

    def __init__(
        self, sweep: SweepConfig, distributions: Mapping[str, BaseDistribution], records: Mapping[int, Record]
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._objectives = sweep.objectives
        directions = [
            StudyDirection.MINIMIZE if lower_is_better(o) else StudyDirection.MAXIMIZE for o in self._objectives
        ]
        seed = sweep.seed + len(records)  # one that goes on does not repeat what it asked for before
        sampler: optuna.samplers.BaseSampler
        if sweep.search == "tpe":
            sampler = optuna.samplers.TPESampler(seed=seed)
        else:  # Optuna's own population is 50, and until it is full it draws at random
            population = min(50, max(4, sweep.trials // 4))
            sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        self._study = optuna.create_study(sampler=sampler, directions=directions)
        self._distributions = dict(distributions)
        self._asked: dict[int, optuna.Trial] = {}
        for record in records.values():
            if record.ended:
                self.tell(record.trial, record.values, record.state)

    def settings(self, number: int) -> dict[str, Any]:
        """Return the configuration that trial `number` is to try."""
        asked = self._study.ask(self._distributions)
        self._asked[number] = asked
        return dict(asked.params)

    def tell(self, trial: Trial, values: Mapping[str, float], state: str) -> None:
        """Say how a trial ended, whoever asked for it: this start of the sweep, or one before."""
        if trial.arm != MASK or trial.stage != "search":
            return
        asked = self._asked.pop(trial.number, None)
        if asked is None:
            asked = self._ask_for(trial.settings)
        scores = self._scores(values, state)
        if scores is None:
            self._study.tell(asked, state=TrialState.FAIL)
        elif state == "stopped":
            asked.report(scores[0], 1)
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            self._study.tell(asked, scores)

    def _ask_for(self, settings: Mapping[str, Any]) -> optuna.Trial:
        """Ask for this configuration, so that the sampler counts it as one of its own (nsga2: to a generation)."""
        sampler = self._study.sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study.sampler = optuna.samplers.PartialFixedSampler(dict(settings), sampler)
        try:
            return self._study.ask(self._distributions)
        finally:
            self._study.sampler = sampler

    def _scores(self, values: Mapping[str, float], state: str) -> list[float] | None:
        """Return what Optuna is told, of a diverged trial the worst there is; None if that is nothing."""
        if state == "diverged":
            return [merit(objective, -math.inf) for objective in self._objectives]
        known = state in ("finished", "stopped") and all(objective in values for objective in self._objectives)
        return [values[objective] for objective in self._objectives] if known else None


class Planned(NotKept, Searcher):
    """Hands out the trials that `following` returns: None while it waits for results, or when nothing follows.

    None is handed out while it `is_full`.
    """

    def __init__(
        self,
        following: Callable[[], Trial | None],
        config: Callable[[Trial], dict[str, Any]],
        ended: Callable[[int, Mapping[str, Any] | None], None],
        is_full: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._following, self._config, self._ended, self._is_full = following, config, ended, is_full
        self._running: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        if self._is_full():
            return None
        trial = self._following()
        if trial is None:
            return None if self._running else Searcher.FINISHED
        self._running[trial_id] = trial.number
        return self._config(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._ended(self._running.pop(trial_id), None if error else result)

    def save(self, checkpoint_path: str) -> None:
        """Not needed: the ledger knows."""

    def restore(self, checkpoint_path: str) -> None:
        """Not needed: the ledger knows."""
