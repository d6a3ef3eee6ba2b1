"""Whole sweeps by the command, on Ray: what they train, how they stop, what they survive."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import sweeping
import tiny

from gmscale import trials
from gmscale.trials import BASELINE, MASK, RANDOM

pytestmark = pytest.mark.slow

SPACE = {"mask.strength": [0.5, 1.0]}


def test_a_sweep_has_controls_and_confirms_its_winner_on_fresh_seeds(cache: Path, tmp_path: Path) -> None:
    file = sweeping.write(
        tmp_path, cache, {"space": SPACE, "search": "grid", "no_mask_lr": [1, 2], "confirm_seeds": 2}
    )
    said = sweeping.run(tmp_path / "log", "--config", str(file))
    records = sweeping.records(tmp_path)
    assert {record.state for record in records.values()} == {"finished"}
    search = [record.trial for record in records.values() if record.trial.stage == "search"]
    assert sorted(trial.arm for trial in search) == sorted([BASELINE, BASELINE, RANDOM, MASK, MASK])
    confirm = [record.trial for record in records.values() if record.trial.stage == "confirm"]
    assert sorted(trial.arm for trial in confirm) == sorted([BASELINE, MASK, RANDOM] * 2)
    assert {trial.seed for trial in confirm}.isdisjoint({trial.seed for trial in search})
    assert (tmp_path / "sweep" / "report.html").exists()
    assert "fewer than five seeds: not evidence" in said

    # a trial's command reproduces it alone, to the bit
    trial = search[-1]
    again = tmp_path / "again"
    command = trials.command(tmp_path / "sweep", trial, extra={"run.dir": str(again), "parallel.threads": 1})
    from gmscale import config, train

    train.train(config.parse(command[2:])[0], tiny.ALONE)
    assert tiny.different(tiny.tensors(again), tiny.tensors(tmp_path / "sweep" / "trials" / trial.name)) == []

    # the same command finds nothing to do, other settings are refused
    before = (tmp_path / "sweep" / "trials.jsonl").read_text()
    sweeping.run(tmp_path / "log2", "--config", str(file))
    assert (tmp_path / "sweep" / "trials.jsonl").read_text() == before
    refused = sweeping.run(tmp_path / "log3", "--config", str(file), "--run.epochs", "2", status=2)
    assert "run.epochs was 1.0 and is 2.0" in refused


def test_asha_stops_trials_early_and_no_control(cache: Path, tmp_path: Path) -> None:
    file = sweeping.write(
        tmp_path,
        cache,
        {
            "space": {"optim.lr": [0.05, 1e-6, 2e-6, 3e-6, 4e-6, 5e-6]},
            "search": "grid",
            "scheduler": "asha",
            "reduction_factor": 2,
            "confirm_seeds": 0,
        },
        run={"epochs": 8.0},
    )
    sweeping.run(tmp_path / "log", "--config", str(file))
    states = [(record.trial.arm, record.state) for record in sweeping.records(tmp_path).values()]
    assert (MASK, "stopped") in states
    assert (MASK, "finished") in states
    assert {state for arm, state in states if arm != MASK} == {"finished"}


def test_trials_of_two_workers(cache: Path, tmp_path: Path) -> None:
    file = sweeping.write(
        tmp_path,
        cache,
        {"space": SPACE, "search": "grid", "no_mask_lr": [1], "confirm_seeds": 0, "workers": 2},
        data={"batch_size_per_device": 8},
    )
    sweeping.run(tmp_path / "log", "--config", str(file))
    records = sweeping.records(tmp_path)
    assert [record.state for record in records.values()] == ["finished"] * 4
    environment = (tmp_path / "sweep" / "trials" / "0001" / "environment.json").read_text()
    assert '"world_size": 2' in environment


def test_killed_and_moved_it_goes_on_without_repeating_anything(cache: Path, tmp_path: Path) -> None:
    """SIGKILL of a training, then of the driver; then the folder is moved."""
    file = sweeping.write(
        tmp_path,
        cache,
        {"space": SPACE, "search": "grid", "no_mask_lr": [1, 2], "confirm_seeds": 0, "at_once": 1},
        run={"epochs": 20.0, "save_every_steps": 3},
    )
    sweep = sweeping.Sweep(tmp_path / "log", "--config", str(file))
    sweeping.wait_until("a result", sweep, lambda: any(r.results for r in sweeping.records(tmp_path).values()))
    _kill_training(tmp_path / "sweep" / "trials" / "0001")
    sweeping.wait_until("two ends", sweep, lambda: sum(r.ended for r in sweeping.records(tmp_path).values()) >= 2)
    sweeping.wait_until("a third start", sweep, lambda: len(sweeping.events(tmp_path, "started")) >= 4)
    os.kill(sweep.process.pid, signal.SIGKILL)
    sweep.wait()
    ended = {number for number, record in sweeping.records(tmp_path).items() if record.ended}
    assert ended == {1, 2}

    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "sweep", tmp_path / "elsewhere" / "sweep")
    sweeping.run(tmp_path / "log2", "--resume", str(tmp_path / "elsewhere" / "sweep"))
    records = sweeping.records(tmp_path / "elsewhere")
    assert {record.state for record in records.values()} == {"finished"}
    ends = [event["trial"] for event in sweeping.events(tmp_path / "elsewhere", "ended")]
    assert sorted(ends) == sorted(records)
    assert len(records[1].failures) == 1
    assert "killed" in records[1].failures[0]


def test_a_stop_saves_all_trials_and_the_same_command_goes_on(cache: Path, tmp_path: Path) -> None:
    file = sweeping.write(
        tmp_path,
        cache,
        {"space": SPACE, "search": "grid", "no_mask_lr": [1], "confirm_seeds": 0},
        run={"epochs": 20.0},
    )
    sweep = sweeping.Sweep(tmp_path / "log", "--config", str(file))
    sweeping.wait_until("a result", sweep, lambda: any(r.results for r in sweeping.records(tmp_path).values()))
    sweep.process.send_signal(signal.SIGTERM)
    assert sweep.wait(60) == 75, sweep.output
    assert "goes on" in sweep.output
    stopped = sweeping.records(tmp_path)
    assert not any(record.ended for record in stopped.values())
    # which of the two places was first to train is chance; the other may have had nothing to save yet
    trained = [number for number, record in stopped.items() if record.results]
    assert trained
    for number in trained:
        assert tiny.checkpoint_steps(tmp_path / "sweep" / "trials" / f"{number:04d}")
    sweeping.run(tmp_path / "log2", "--config", str(file))
    records = sweeping.records(tmp_path)
    assert {record.state for record in records.values()} == {"finished"}
    assert {len(record.failures) for record in records.values()} == {0}


def test_what_fails_and_what_diverges_does_not_end_the_sweep(cache: Path, tmp_path: Path) -> None:
    """A trial without finite gradients is a result; one that cannot be trained is reported with its error."""
    file = sweeping.write(
        tmp_path,
        cache,
        {
            "space": {"optim.lr": [0.05, 1e30]},
            "search": "grid",
            "no_mask_lr": [1],
            "confirm_seeds": 0,
        },
        run={"epochs": 6.0, "max_nonfinite": 3},
    )
    blocked = tmp_path / "sweep" / "trials" / "0002"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    sweeping.run(tmp_path / "log", "--config", str(file))
    records = sweeping.records(tmp_path)
    assert [record.state for record in records.values()] == ["finished", "failed", "finished", "diverged"]
    assert "is not a directory" in records[2].failures[-1]
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "is not a directory" in page


def test_population_based_training_carries_the_state_over(cache: Path, tmp_path: Path) -> None:
    file = sweeping.write(
        tmp_path,
        cache,
        {
            "space": {"optim.lr": {"loguniform": [1e-6, 0.1]}},
            "scheduler": "pbt",
            "trials": 4,
            "perturb_epochs": 2.0,
            "no_mask_lr": [1],
            "confirm_seeds": 2,
        },
        run={"epochs": 6.0},
    )
    sweeping.run(tmp_path / "log", "--config", str(file), timeout_s=500)
    records = sweeping.records(tmp_path)
    assert {record.state for record in records.values()} == {"finished"}
    branched = [record for record in records.values() if record.branches and record.trial.stage == "search"]
    assert branched
    one = branched[0]
    began = one.branches[-1]
    assert began.settings != records[began.parent].trial.settings or began.parent != one.trial.number

    # its commands train it alone, one after another
    from gmscale import config, train

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "sweep", again, ignore=shutil.ignore_patterns("trials"))
    for command in trials.commands(again, records, one.trial.number):
        train.train(config.parse([*command[2:], "--parallel.threads", "1"])[0], tiny.ALONE)
    segment = one.branches[-1].segment
    ours = trials.run_dir(again, one.trial, segment)
    theirs = trials.run_dir(tmp_path / "sweep", one.trial, segment)
    assert tiny.different(tiny.tensors(ours), tiny.tensors(theirs)) == []


def _kill_training(run_dir: Path) -> None:
    """SIGKILL the processes that train there."""
    killed = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train" in words and f"--run.dir={run_dir}".encode() in words and b"tether" not in b"".join(words):
            os.kill(int(entry.name), signal.SIGKILL)
            killed += 1
    assert killed
