"""One trial from its first process to its end, for whoever has resources for it: a Ray actor or a job of an array.

What happens is written to the ledger here, where it happens, so it is known even if nobody lives to hear of it.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmscale import scorecards
from gmscale.errors import RunError
from gmscale.sweep.outcome import Outcome, judge
from gmscale.sweep.process import TrialProcess, results_of, run_command
from gmscale.trials import Branch, Ledger, Record, Result, Trial, branch_point, command, run_dir

if TYPE_CHECKING:
    from gmscale.sweep.config import SweepConfig

GRACE_S = 120.0  # in which a training that is asked to stop has to save
HEARD_S = 30.0  # in which a sweep that is asked to stop tells its trials


@dataclass(frozen=True)
class Terms:
    """What of a sweep's settings the training of its trials needs."""

    workers: int
    threads: int
    """Of each worker."""
    retries: int
    evaluation: tuple[str, ...]
    """Arguments of gmscale evaluate after the training; empty where accuracy says it all."""
    prune: float
    eps: float
    cwd: str
    """Where relative paths of the configuration begin."""


def terms(sweep: "SweepConfig") -> Terms:
    """Return the terms of a sweep's trials."""
    return Terms(
        sweep.workers, sweep.cpus_per_worker, sweep.retries, sweep.evaluation(), sweep.prune, sweep.eps, os.getcwd()
    )


class Work:
    """The training of one trial, in processes of its own; what `record` says was done before is not repeated."""

    def __init__(self, folder: Path, record: Record, terms: Terms, stops: Callable[[], bool]) -> None:
        self.outcome: Outcome | None = None
        """How the trial ended; None while it has not, also after it was asked to stop."""
        if record.state in ("finished", "diverged", "failed"):  # its actor was lost before it could say so
            self.outcome = Outcome(record.state, record.values)
        self.trial = record.trial
        self.segment = record.branches[-1].segment if record.branches else 0
        self.settings: Mapping[str, Any] = (record.branches[-1] if record.branches else record.trial).settings
        self._folder = folder
        self._terms = terms
        self._stops = stops
        self._ledger = Ledger(folder)
        self._attempt = record.attempts
        self._failures = len(record.failures)
        self._known = record.reached.step if record.reached else 0
        self._process: TrialProcess | None = None
        self._began = 0.0
        self._pauses_at: float | None = None
        self._branch: Branch | None = record.branches[-1] if record.branches else None
        self._paused = False
        self._paused_at: float | None = None

    @property
    def _log(self) -> Path:
        return _log(self._folder, self.trial)

    @property
    def run_dir(self) -> Path:
        """Where it trains now."""
        return run_dir(self._folder, self.trial, self.segment)

    def branch(self, parent: int, parent_segment: int, at: Result, settings: Mapping[str, Any]) -> bool:
        """Go on with other settings from the checkpoint that was kept there, in a run directory of its own.

        Return False, and do nothing, if that is what it did last.
        """
        branch = Branch(self.segment + 1, at.step, at.epoch, parent, parent_segment, settings)
        if self._branch is not None and replace(branch, segment=self.segment) == self._branch:
            return False
        self._ledger.branch(self.trial, branch)
        self.segment, self.settings, self._branch = branch.segment, branch.settings, branch
        self._known = branch.step
        return True

    def next_result(self, pause_at: float | None = None) -> Result | None:
        """Train until the next evaluation and return it; None when the trial has ended or was asked to stop.

        `pause_at` is the epoch at which the processes end, to be started again by the next call.
        """
        while self.outcome is None:
            if self._process is None:
                self._follow_schedule()
                pause = pause_at if pause_at is not None else self._next_change()
                if pause is not None and pause == self._paused_at:
                    self._give_up_pausing(pause)
                    break
                self._start(pause)
            assert self._process is not None
            result = self._process.next_result(timeout_s=0.5)
            if result is not None:
                if result.step > self._known:
                    self._ledger.result(self.trial, result)
                    self._known = result.step
                return result
            if self._stops():
                self.stop()
                return None
            if self._process.poll() is not None:
                self._conclude()
        return None

    def keep_branch_point(self) -> None:
        """Wait for processes that pause, and keep their checkpoint, from which trials may branch."""
        self._wait_until_paused()
        point = branch_point(self._folder, self.trial.number, self.segment, self._known)
        if not point.exists():
            from gmscale import checkpoint  # with it torch, which no other trial needs in this process

            newest = checkpoint.latest(self.run_dir)
            if newest is None or checkpoint.read(newest)["step"] != self._known:
                raise RunError(f"{self.run_dir} has no checkpoint of step {self._known}, at which it was to pause")
            _link_tree(newest, point)

    def _next_change(self) -> float | None:
        """Return the epoch at which the trial's own schedule changes its settings next."""
        changes = self.trial.schedule[self.segment :]
        return changes[0][0] if changes else None

    def _follow_schedule(self) -> None:
        """Go on with the next settings of the trial's own schedule, if it has paused for them."""
        if self._paused and self._next_change() is not None:
            epoch, settings = self.trial.schedule[self.segment]
            self.keep_branch_point()
            self.branch(self.trial.number, self.segment, Result(self._known, epoch, {}), settings)
        self._paused = False

    def _wait_until_paused(self) -> None:
        """Wait for the end of processes that pause at the evaluation that was returned last."""
        while self._process is not None and self.outcome is None and not self._stops():
            if self._process.poll() is not None:
                self._conclude()
            else:
                time.sleep(0.05)

    def stop(self) -> None:
        """End the processes after a checkpoint; the trial can go on later."""
        if self._process is not None:
            self._process.stop(GRACE_S)
            self._process = None

    def _start(self, pause_at: float | None) -> None:
        self._attempt += 1
        self._ledger.start(self.trial, self._attempt, socket.gethostname())
        self._began, self._pauses_at = time.monotonic(), pause_at
        extra: dict[str, Any] = {"run.dir": str(self.run_dir), "parallel.threads": self._terms.threads}
        if pause_at is not None:
            extra["run.pause_after_epochs"] = pause_at
        if self._branch is not None:
            began = self._branch
            point = branch_point(self._folder, began.parent, began.parent_segment, began.step)
            extra["run.branch_from"] = str(point)
        trial = replace(self.trial, settings=self.settings)
        self._process = TrialProcess(
            command(self._folder, trial, self._terms.workers, extra),
            self.run_dir,
            self._log,
            {"OMP_NUM_THREADS": str(self._terms.threads)},
            self._terms.cwd,
            after_step=self._known if pause_at is not None else 0,
        )

    def _conclude(self) -> None:
        """Judge processes that have ended: they have paused, the trial has ended, or it is to be tried again."""
        assert self._process is not None
        status, took = self._process.poll(), time.monotonic() - self._began
        found = judge(self.run_dir, status, self._log)
        if found.state == "interrupted" and self._pauses_at is not None:
            self._process, self._paused, self._paused_at = None, True, self._pauses_at
            return
        if found.state == "interrupted":
            if self._is_asked_to_stop():
                return
            found = Outcome("failed", error="its processes got a signal that asks to stop, and not from the sweep")
        self._process = None
        if found.state == "finished":
            found = _evaluated(found, self.run_dir, self._log, self._terms)
        if found.state == "failed" and found.may_be_tried_again and self._failures < self._terms.retries:
            self._failures += 1
            self._ledger.failure(self.trial, found.error, took)
            return
        self.outcome = found
        _end(self._ledger, self.trial, found, took)

    def _give_up_pausing(self, epoch: float) -> None:
        """End a trial that pauses where it was not evaluated, so that it could wait there for ever."""
        error = f"paused after epoch {epoch:g} without an evaluation there; an epoch has no whole number of "
        error += "run.eval_every_epochs, in steps: take 1, and whole sweep.perturb_epochs"
        self.outcome = Outcome("failed", error=error)
        _end(self._ledger, self.trial, self.outcome, 0.0)

    def _is_asked_to_stop(self) -> bool:
        """Return whether the whole sweep is: a signal to all processes of a job may reach the training first."""
        deadline = time.monotonic() + HEARD_S
        while not self._stops() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._stops()


def record(folder: Path, known: Record, terms: Terms) -> None:
    """Write into the ledger what a job left of a trial that it trained; nothing if it has not ended."""
    trial, ledger = known.trial, Ledger(folder)
    where, log = run_dir(folder, trial), _log(folder, trial)
    if not where.exists():
        return  # its job has not begun
    found = judge(where, None, log)
    if found.state == "interrupted":
        return
    for result in results_of(where):
        if not known.results or result.step > known.results[-1].step:
            ledger.result(trial, result)
    if found.state == "finished":
        found = _evaluated(found, where, log, terms)
    _end(ledger, trial, found, found.values.get("wall_s", 0.0))


def _end(ledger: Ledger, trial: Trial, found: Outcome, took: float) -> None:
    if found.state != "interrupted":
        ledger.end(trial, found.state, found.values, took, found.error)


def _log(folder: Path, trial: Trial) -> Path:
    return folder / "logs" / f"{trial.name}.log"


def _evaluated(found: Outcome, where: Path, log: Path, terms: Terms) -> Outcome:
    """Add what the objectives ask for beyond accuracy to how a training ended."""
    if not terms.evaluation:
        return found
    arguments = ["gmscale", "evaluate", str(where), *terms.evaluation]
    status = run_command(arguments, log, {"OMP_NUM_THREADS": str(terms.threads)}, terms.cwd)
    if status != 0:
        return Outcome("failed", found.values, f"gmscale evaluate ended with status {status}; see {log}")
    values = scorecards.values(where, prune=terms.prune, eps=terms.eps)
    return replace(found, values={**found.values, **values})


def _link_tree(source: Path, destination: Path) -> None:
    """Keep the files of a complete checkpoint when its run removes it; all of them, or none."""
    destination.parent.mkdir(exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=os.link)
    os.replace(temporary, destination)
