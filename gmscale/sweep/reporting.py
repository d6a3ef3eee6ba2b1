"""What Ray Tune tells the driver of a sweep, and how the driver ends it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from gmscale.stopping import StopRequest
from gmscale.sweep import actor, scheduling

if TYPE_CHECKING:
    from gmscale.sweep.driver import Driver


class NotKept:
    """Tune pickles what it is given, to restore a sweep by; ours goes on by its ledger."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Reporter(NotKept, tune.Callback):
    """Writes down what only the driver knows of trials, and keeps the display alive."""

    def __init__(self, driver: "Driver") -> None:
        self._driver = driver

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._driver.show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if "state" not in trial.last_result:
            self._driver.stopped(int(str(trial)))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._driver.lost(int(str(trial)), _error_of(trial), for_good=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._driver.lost(int(str(trial)), _error_of(trial), for_good=True)


class Crowd(NotKept, tune.Callback):
    """Knows whether as many trials as may train at once do; those that are paused do not count."""

    def __init__(self, at_once: int) -> None:
        self._at_once, self._held = at_once, 0

    def is_full(self) -> bool:
        return 0 < self._at_once <= self._held

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._held = sum(scheduling.is_held(trial) for trial in trials)


class Requested(NotKept, tune.Stopper):
    """Ends all trials, after they have saved, when the command is asked to stop."""

    def __init__(self, stop: StopRequest, folder: Path) -> None:
        self._stop, self._folder = stop, folder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._stop.requested:
            actor.ask_to_stop(self._folder)
        return self._stop.requested


def _error_of(trial: Any) -> str:
    error = trial.get_pickled_error() or trial.get_error() or "unknown"
    return " ".join(f"its actor was lost: {error}".split())[:300]
