"""What must not happen to a sweep: two drivers, a forgotten branch, an endless wait, a search that never learns."""

import importlib.util
import math
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sweeping
import yaml

from gmscale import sweep as command
from gmscale import trials
from gmscale.errors import RunError, UsageError
from gmscale.sweep import scheduling, searching, space, work
from gmscale.sweep.config import SweepConfig
from gmscale.trials import BASELINE, MASK, Branch, Ledger, Result, Trial
from gmscale.trials.ledger import driving

LR = {"optim.lr": {"loguniform": [0.01, 1.0]}}


# -- who may drive a sweep, and from where ------------------------------------------------------------------------


def test_a_second_driver_is_refused_until_the_first_has_left(tmp_path: Path) -> None:
    folder, own = tmp_path / "sweep", os.getpid()
    with driving(folder), pytest.raises(UsageError, match=rf"driven already, by process {own} on"), driving(folder):
        pass
    with driving(tmp_path / "sweep"):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UsageError, match=r"sweep\.dir .*file/sweep cannot be written"),
        driving(tmp_path / "file" / "sweep"),
    ):
        pass


@pytest.mark.parametrize("name", ["ray", "optuna"])
def test_without_ray_nothing_is_written(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    file = sweeping.write(tmp_path, cache, {"space": LR})
    with pytest.raises(UsageError, match=rf"needs {name}; pip install \"gmscale\[sweep\]\""):
        command.main(["--config", str(file)])
    assert not (tmp_path / "sweep").exists()


@pytest.mark.skipif(importlib.util.find_spec("aiohttp_cors") is not None, reason="Ray's dashboard is installed")
def test_a_dashboard_that_is_not_installed_is_refused_before_ray_starts(cache: Path, tmp_path: Path) -> None:
    file = sweeping.write(tmp_path, cache, {"space": LR, "dashboard": True})
    with pytest.raises(UsageError, match=r"sweep\.dashboard needs more of Ray .* pip install \"ray\[default\]\""):
        command.main(["--config", str(file)])


def test_a_cluster_that_is_not_there_is_noticed_at_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    file = sweeping.write(tmp_path, cache, {"space": LR})
    with pytest.raises(RunError, match=rf"nobody answers at RAY_ADDRESS 127\.0\.0\.1:{port}"):
        command.main(["--config", str(file)])


def test_relative_data_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "shards").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    file = sweeping.write(
        tmp_path,
        Path("data"),
        {"space": {"mask.strength": [0.5, 1.0]}, "search": "grid"},
        data={"source": "shards"},
    )
    command.main(["--config", str(file), "--plan"])
    data = yaml.safe_load((tmp_path / "sweep" / "base.yaml").read_text())["data"]
    assert data["cache_dir"] == str(tmp_path / "here" / "data")
    assert data["source"] == str(tmp_path / "here" / "shards")


# -- trials that branch -------------------------------------------------------------------------------------------


class Recorded:
    """A process that is only written down, and has paused at once."""

    def __init__(self, argv: list[str], *_: Any, **__: Any) -> None:
        started.append(argv)

    def next_result(self, timeout_s: float) -> None:
        return None

    def poll(self) -> int:
        return 75


started: list[list[str]] = []
TERMS = work.Terms(workers=1, threads=1, retries=1, evaluation=(), prune=0.8, eps=0.1, cwd=".")


@pytest.fixture
def branched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep whose first trial, evaluated at step 12, went on from step 6 of the second when all was killed."""
    monkeypatch.setattr(work, "TrialProcess", Recorded)
    started.clear()
    one, two = (Trial(number, "search", MASK, {"optim.lr": 0.1}, 0) for number in (1, 2))
    ledger = Ledger(tmp_path)
    ledger.begin([one, two])
    for step in (6, 12):
        ledger.result(one, Result(step, step / 6, {"top1": 1.0}))
    ledger.branch(one, Branch(1, 6, 1.0, 2, 0, {"optim.lr": 0.2}))
    return tmp_path


def test_what_came_after_a_branch_is_given_up(branched: Path) -> None:
    record = trials.read(branched)[1]
    assert [result.step for result in record.results] == [6]
    Ledger(branched).branch(record.trial, Branch(2, 18, 3.0, 2, 0, {"optim.lr": 0.3}))
    assert trials.read(branched)[1].reached == Result(18, 3.0, {})


def test_a_branch_that_had_no_checkpoint_yet_begins_where_it_branched(branched: Path) -> None:
    trial = work.Work(branched, trials.read(branched)[1], TERMS, lambda: False)
    trial.next_result(pause_at=2.0)
    assert f"--run.branch_from={branched}/branches/0002.0-step-6" in started[0]
    assert "--optim.lr=0.2" in started[0]


def test_a_lost_actor_does_not_branch_again(branched: Path) -> None:
    trial = work.Work(branched, trials.read(branched)[1], TERMS, lambda: False)
    at = Result(6, 1.0, {"top1": 1.0})
    assert not trial.branch(2, 0, at, {"optim.lr": 0.2})
    assert trial.branch(2, 0, at, {"optim.lr": 0.3})
    assert [branch.segment for branch in trials.read(branched)[1].branches] == [1, 2]


def test_a_trial_that_pauses_without_an_evaluation_does_not_do_so_for_ever(branched: Path) -> None:
    trial = work.Work(branched, trials.read(branched)[1], TERMS, lambda: False)
    assert trial.next_result(pause_at=0.5) is None
    record = trials.read(branched)[1]
    assert len(started) == 1
    assert record.state == "failed"
    assert "run.eval_every_epochs" in record.failures[-1]


def test_what_has_ended_is_not_trained_again(branched: Path) -> None:
    Ledger(branched).end(trials.read(branched)[1].trial, "diverged", {}, 1.0, "not finite")
    trial = work.Work(branched, trials.read(branched)[1], TERMS, lambda: False)
    assert trial.next_result() is None
    assert trial.outcome is not None
    assert trial.outcome.state == "diverged"
    assert started == []


# -- schedulers and searches --------------------------------------------------------------------------------------


class OfTune:
    """What a scheduler looks at of Tune's trial, or of its controller."""

    config: Mapping[str, Any] = {"judged": True}


@pytest.mark.parametrize(("objective", "worst"), [("top1", -math.inf), ("loss", math.inf)])
def test_a_value_that_is_not_finite_is_judged_as_the_worst(objective: str, worst: float) -> None:
    judged = []

    class Judge(scheduling.FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            judged.append(result[objective])
            return "CONTINUE"

    controls = scheduling.Controls(Judge(), objective)
    controls.on_trial_result(None, OfTune(), {"last": False})  # type: ignore[arg-type]
    controls.on_trial_result(None, OfTune(), {"last": False, objective: 3.0})  # type: ignore[arg-type]
    assert judged == [worst, 3.0]


@pytest.mark.parametrize(
    ("search", "objectives"), [("tpe", ["top1"]), ("tpe", ["top1", "loss"]), ("nsga2", ["top1", "loss"])]
)
def test_a_search_learns_from_what_diverged_also_when_it_goes_on(search: str, objectives: list[str]) -> None:
    """Half of the space diverges, and the sweep stops after every tenth trial, with that one still training."""
    sweep = SweepConfig(
        space={"optim.lr": {"uniform": [0.0, 1.0]}, "mask.strength": [0.1, 0.2], "mask.kappa": [1.0, 2.0]},
        search=search,  # type: ignore[arg-type]
        trials=60,
        objectives=objectives,
    )
    records = {
        1: trials.Record(Trial(1, "search", BASELINE, {"optim.lr": 0.1}, 0), "finished", values={"top1": 9.0})
    }
    asked = None
    for number in range(2, 62):
        if asked is None or number % 10 == 0:
            asked = searching.Asked(sweep, space.to_optuna(sweep.domains), records)
            if number > 2:
                tell(asked, records[number - 1])
        records[number] = trials.Record(Trial(number, "search", MASK, asked.settings(number), 0))
        if number % 10 != 9:
            tell(asked, records[number])
    late = [record.state for record in records.values()][31:]
    assert late.count("diverged") < 0.3 * len(late)


def tell(asked: searching.Asked, record: trials.Record) -> None:
    lr = record.trial.settings["optim.lr"]
    if lr > 0.5:
        record.state = "diverged"
    else:
        record.state, record.values = "finished", {"top1": 50.0 - 40 * abs(lr - 0.2), "loss": abs(lr - 0.2)}
    asked.tell(record.trial, record.values, record.state)


# -- a whole sweep ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_living_sweep_has_one_driver_and_survives_the_loss_of_an_actor(cache: Path, tmp_path: Path) -> None:
    file = sweeping.write(
        tmp_path,
        cache,
        {
            "space": {"optim.lr": [0.05, 1e30]},
            "search": "grid",
            "no_mask_lr": [],
            "random_mask": False,
            "confirm_seeds": 0,
            "at_once": 1,
        },
        run={"epochs": 20.0, "save_every_steps": 3, "max_nonfinite": 3},
    )
    sweep = sweeping.Sweep(tmp_path / "log", "--config", str(file))
    sweeping.wait_until("a result", sweep, lambda: any(r.results for r in sweeping.records(tmp_path).values()))
    assert kill_actor(tmp_path / "sweep" / "trials" / "0001")
    refused = sweeping.run(tmp_path / "log2", "--resume", str(tmp_path / "sweep"), status=2)
    assert f"driven already, by process {sweep.process.pid}" in refused
    assert refused.count("\n") == 1
    assert sweep.wait() == 0, sweep.output
    records = sweeping.records(tmp_path)
    assert [record.state for record in records.values()] == ["finished", "diverged"]
    assert records[2].attempts == 1  # before any evaluation: Tune finds nothing to save
    assert "its actor was lost" in records[1].failures[0]
    assert "warning" not in sweep.output
    steps = [event["step"] for event in sweeping.events(tmp_path, "result") if event["trial"] == 1]
    assert steps == list(range(6, 121, 6))


def kill_actor(run_dir: Path) -> int | None:
    """SIGKILL the actor whose processes train there; return its number."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"tether.py" in words and f"--run.dir={run_dir}".encode() in words:
            actor = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            os.kill(actor, signal.SIGKILL)
            return actor
    return None
