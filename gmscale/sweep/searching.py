"""Which configuration is tried next: those of a list, or what Optuna makes of the scores so far."""

from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from gmscale.sweep.config import SweepConfig
from gmscale.sweep.reporting import NotKept
from gmscale.trials import MASK, Record, Trial


class Asked:
    """Optuna's study of a search, taught by the `records` of ended trials; names one configuration at a time."""

    def __init__(
        self, sweep: SweepConfig, distributions: Mapping[str, BaseDistribution], records: Mapping[int, Record]
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers = {"tpe": optuna.samplers.TPESampler, "nsga2": optuna.samplers.NSGAIISampler}
        self._objectives = sweep.objectives
        directions = [
            StudyDirection.MINIMIZE if o.endswith("loss") else StudyDirection.MAXIMIZE for o in self._objectives
        ]
        seed = sweep.seed + len(records)  # one that goes on does not repeat what it asked for before
        self._study = optuna.create_study(sampler=samplers[sweep.search](seed=seed), directions=directions)
        self._distributions = dict(distributions)
        self._asked: dict[int, optuna.Trial] = {}
        for record in records.values():
            self._learn(record)

    def settings(self, number: int) -> dict[str, Any]:
        """Return the configuration that trial `number` is to try."""
        asked = self._study.ask(self._distributions)
        self._asked[number] = asked
        return dict(asked.params)

    def tell(self, number: int, values: Mapping[str, float], state: str) -> None:
        """Say how a trial ended."""
        asked = self._asked.pop(number, None)
        if asked is None:
            return  # of a control, or asked for by an earlier start of the sweep
        if state == "finished":
            self._study.tell(asked, self._scores(values))
        elif state == "diverged":
            self._study.tell(asked, state=TrialState.FAIL)
        elif state == "stopped" and len(self._objectives) == 1:
            asked.report(self._scores(values)[0], 1)
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            self._study.tell(asked, state=TrialState.FAIL)

    def _learn(self, record: Record) -> None:
        if record.trial.arm != MASK or record.trial.stage != "search" or record.state != "finished":
            return
        self._study.add_trial(
            create_trial(
                params=dict(record.trial.settings),
                distributions=self._distributions,
                values=self._scores(record.values),
            )
        )

    def _scores(self, values: Mapping[str, float]) -> list[float]:
        return [values[objective] for objective in self._objectives]


class Planned(NotKept, Searcher):
    """Hands out the trials that `following` returns: None while it waits for results, or when nothing follows."""

    def __init__(
        self,
        following: Callable[[], Trial | None],
        config: Callable[[Trial], dict[str, Any]],
        ended: Callable[[int, Mapping[str, Any] | None], None],
    ) -> None:
        super().__init__()
        self._following, self._config, self._ended = following, config, ended
        self._running: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
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
