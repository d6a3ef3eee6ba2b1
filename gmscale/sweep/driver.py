"""A sweep on Ray: Tune finds resources for the trials, asks what to try next, and says which go on.

What is true of a trial stands in the ledger; what Ray keeps is thrown away at the end of every session.
"""

import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from gmscale.config import TrainConfig
from gmscale.errors import RunError
from gmscale.stopping import StopRequest
from gmscale.sweep import planning, resources, space, work
from gmscale.sweep.config import SweepConfig
from gmscale.trials import MASK, Follower, Ledger, Record, Trial

# Before Ray is imported; what the user has set stays.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as Ray is about to do anyway, without its warning
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger is ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # we listen
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no metric
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_NUM_REDIS_GET_RETRIES": "2",  # tries, of 40 s each, to reach a cluster; Ray makes 20
}
_ANSWERS_S = 10.0  # in which whoever listens at RAY_ADDRESS has to accept a connection


class View(Protocol):
    """Whoever is to see what the ledger says as it grows."""

    def update(self, records: Mapping[int, Record]) -> None: ...


class Driver:
    """Trains the trials of the sweep in `folder` that have not ended, each in an actor of the class `trainable`."""

    def __init__(
        self,
        folder: Path,
        base: TrainConfig,
        sweep: SweepConfig,
        display: View,
        stop: StopRequest,
        trainable: type | None = None,
    ) -> None:
        self._folder, self._base, self._sweep = folder.absolute(), base, sweep
        self._display, self._stop = display, stop
        self._ledger, self._follower = Ledger(folder), Follower(folder)
        self._search_is_over = False
        self._trainable = trainable

    def run(self) -> bool:
        """Search, then confirm; return False if it was asked to stop."""
        if self._is_not_done():
            try:
                with _ray(self._sweep):
                    self._train()
            except SystemExit:  # Ray's own answer to SIGTERM, while it starts
                self._stop.requested = True
            if self._is_not_done() and not self._stop.requested:
                raise RunError(f"Ray gave up before all trials had ended; gmscale sweep --resume {self._folder}")
        return not self._stop.requested

    def _is_not_done(self) -> bool:
        return bool(self._open()) or planning.next_number(self._sweep, self._follower.records) is not None

    def _open(self) -> list[Trial]:
        records = self._follower.update()
        if not self._search_is_over:
            self._search_is_over = planning.plan_confirmation(self._ledger, self._base, self._sweep, records)
            records = self._follower.update()
        return [record.trial for record in records.values() if not record.ended]

    def _train(self) -> None:
        """Let Tune train what is planned, what an adaptive search comes up with, and then the confirmation."""
        from ray import tune

        from gmscale.sweep import actor, reporting, scheduling, searching

        handed_out: set[int] = set()
        asked = None
        if self._sweep.search in planning.ADAPTIVE:
            distributions = space.to_optuna(self._sweep.domains)
            asked = searching.Asked(self._sweep, distributions, self._follower.records)

        def following() -> Trial | None:
            trial = next((trial for trial in self._open() if trial.number not in handed_out), None)
            if trial is None and asked is not None:
                number = planning.next_number(self._sweep, self._follower.records)
                if number is not None:
                    settings = asked.settings(number)
                    trial = Trial(number, "search", MASK, settings, self._base.run.seed)
                    self._ledger.plan(trial)
            if trial is not None:
                handed_out.add(trial.number)
            return trial

        def ended(number: int, result: Mapping[str, Any] | None) -> None:
            if asked is not None:
                state = "failed" if result is None else result.get("state", "stopped")
                asked.tell(self._follower.records[number].trial, result or {}, state)

        place = tune.PlacementGroupFactory([resources.needed(self._sweep)])
        actor.forget_requests(self._folder)
        storage = self._folder / ".ray"
        shutil.rmtree(storage, ignore_errors=True)  # of a driver that was killed
        crowd = reporting.Crowd(self._sweep.at_once)
        try:
            tune.Tuner(
                tune.with_resources(self._trainable or actor.TrialActor, place),
                tune_config=tune.TuneConfig(
                    search_alg=searching.Planned(following, self._config, ended, crowd.is_full),
                    scheduler=scheduling.make(self._sweep, self._base, self._follower.records),
                    num_samples=-1,
                    reuse_actors=True,
                    trial_name_creator=lambda trial: f"{trial.config['number']:04d}",
                    trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}",
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(storage),
                    verbose=int(self._sweep.ray_output),
                    # a trial that ends has nothing to save, and may never have been evaluated
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=self._sweep.retries),
                    callbacks=[reporting.Reporter(self), crowd],
                    stop=reporting.Requested(self._stop, self._folder),
                    log_to_file=False,
                ),
            ).fit()
        finally:
            shutil.rmtree(storage, ignore_errors=True)
            actor.forget_requests(self._folder)
        self.show()

    def _config(self, trial: Trial) -> dict[str, Any]:
        """Return what Tune hands to the actor of a trial."""
        sweep = self._sweep
        record = self._follower.records.get(trial.number)
        branches = record.branches if record else []
        judged = trial.arm == MASK and trial.stage == "search"
        return {
            "folder": str(self._folder),
            "number": trial.number,
            "terms": asdict(work.terms(sweep)),
            "settings": dict((branches[-1] if branches else trial).settings),
            "epochs": self._base.run.epochs,
            "pause_every": sweep.perturb_epochs if judged and sweep.scheduler == "pbt" else None,
            "judged": judged,
        }

    def show(self) -> None:
        """Bring the display up to date."""
        self._display.update(self._follower.update())

    def stopped(self, number: int) -> None:
        """Write down that the scheduler has ended a trial."""
        record = self._follower.update()[number]
        if not record.ended:
            last = record.results[-1].values if record.results else {}
            self._ledger.end(record.trial, "stopped", last, 0.0)

    def lost(self, number: int, error: str, *, for_good: bool) -> None:
        """Write down that the process or the node that trained a trial is gone."""
        record = self._follower.update()[number]
        if record.ended or self._stop.requested:  # what a stop interrupts has not failed
            return
        if for_good:
            self._ledger.end(record.trial, "failed", {}, 0.0, error)
        else:
            self._ledger.failure(record.trial, error, 0.0)


@contextmanager
def _ray(sweep: SweepConfig) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS, or start Ray on this machine; leave it when done."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        _check_answers(address)
    level = logging.INFO if sweep.ray_output else logging.CRITICAL
    options: dict[str, Any] = {"log_to_driver": sweep.ray_output, "logging_level": level}
    if address is None:
        options |= {"num_cpus": resources.cores(), "include_dashboard": sweep.dashboard}
        options["object_store_memory"] = 100 * 2**20  # trials hand nothing but numbers to one another
    try:
        context: Any = ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        where = f"at RAY_ADDRESS {address}" if address else f"on {socket.gethostname()}"
        raise RunError(f"Ray {where} does not answer: {' '.join(str(error).split())[:200]}") from None
    if sweep.dashboard and address is None:
        print(f"Ray's dashboard: http://{context.dashboard_url}", flush=True)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        resources.check(sweep, nodes)
        # Actors are asked for ahead, as many as there are places: one that takes seconds to start would else lose
        # its trial to whichever has just become free, for ever. Where results decide what is tried, few are ahead.
        ahead = resources.places(sweep, nodes)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(
            min(ahead, 2) if sweep.search in planning.ADAPTIVE else ahead
        )
        with StopRequest():  # again: Ray has put handlers of its own in place
            yield
    finally:
        ray.shutdown()
    if address is None:
        shutil.rmtree(context.address_info["session_dir"], ignore_errors=True)


def _check_answers(address: str) -> None:
    """Raise RunError if nobody listens at `address`, for which Ray would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # auto, which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_S).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"nobody answers at RAY_ADDRESS {address}: {error}") from None
