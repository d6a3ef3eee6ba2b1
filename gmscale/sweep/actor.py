"""The trainable that Ray Tune runs: it starts a trial's processes, and hands on what they report."""

from pathlib import Path
from typing import Any

from ray import tune

from gmscale import trials
from gmscale.sweep.work import Terms, Work
from gmscale.trials import Result

STOP = "stop"  # a file in the sweep's folder, while all of it is asked to stop


class TrialActor(tune.Trainable):
    """One trial after another, each in processes of its own; every step is an evaluation of the training.

    `config` holds folder, terms (of Terms), settings, epochs, and pause_every (epochs, or None), at which
    population based training may change them. It hands the configuration of one trial to another, so a trial is
    known by its name, which is its number.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._folder = Path(config["folder"])
        record = trials.read(self._folder)[int(self.trial_name)]
        stop = self._folder / STOP
        self._work = Work(self._folder, record, Terms(**config["terms"]), stop.exists)
        self._settings: dict[str, Any] = config["settings"]
        self._pause_every: float | None = config["pause_every"]
        self._epochs: float = config["epochs"]
        self._reported: Result | None = record.reached if self._pause_every else None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in the same process."""
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation, or for the end: then the state of the trial and its final values."""
        while (result := self._work.next_result(self._next_pause())) is not None:
            if self._reported is None or result.step > self._reported.step:
                self._reported = result
                last = result.epoch >= self._epochs - 1e-3
                return {**result.values, "epoch": result.epoch, "last": last}
        outcome = self._work.outcome
        if outcome is None:
            return {"epoch": 0.0, "last": True, "done": True, "state": "interrupted"}
        return {**outcome.values, "epoch": self._epochs, "last": True, "done": True, "state": outcome.state}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Population based: say where the trial stands. Its real checkpoint is kept to branch from."""
        assert self._reported is not None
        self._work.keep_branch_point()
        return {
            "number": self._work.trial.number,
            "segment": self._work.segment,
            "settings": self._settings,
            "reported": self._reported,
        }

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on from what `save_checkpoint` said, of this trial or, with other settings, of another one."""
        assert checkpoint is not None
        at, number = checkpoint["reported"], checkpoint["number"]
        if number == self._work.trial.number and checkpoint["settings"] == self._settings:
            if self._reported is None or self._reported.step < at.step:
                self._reported = at  # else its actor was lost, and the ledger knows more
        elif self._work.branch(number, checkpoint["segment"], at, self._settings):
            self._reported = at

    def cleanup(self) -> None:
        """End the processes, after a checkpoint if they have not ended themselves."""
        self._work.stop()

    def _next_pause(self) -> float | None:
        if not self._pause_every:
            return None
        done = 0.0 if self._reported is None else self._reported.epoch
        following = (int(done / self._pause_every + 1e-6) + 1) * self._pause_every
        return following if following < self._epochs else None


def ask_to_stop(folder: Path) -> None:
    """Make all trials of the sweep in `folder` save and end."""
    (folder / STOP).touch()


def forget_requests(folder: Path) -> None:
    """Let trials run again."""
    (folder / STOP).unlink(missing_ok=True)
