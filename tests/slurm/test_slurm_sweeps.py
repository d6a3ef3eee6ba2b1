"""Sweeps on a real Slurm of two nodes: as the jobs of an array, and by Ray; stopped and queued again on the way."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import ROOT, array, running_cluster, submit

sys.path.insert(0, str(ROOT / "tests/sweep"))
import sweeping

pytest.importorskip("ray")
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

# A control without and one with a random mask, and two masks.
SWEEP = {"space": {"mask.strength": [0.25, 0.75]}, "search": "grid", "no_mask_lr": [1.0]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One whose preempted jobs have a minute, and hear it by the signal of `--signal`."""
    yield from running_cluster(grace_s=60, more="SlurmctldParameters=preempt_send_user_signal")


@pytest.fixture(autouse=True)
def left_tidy(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.run("scancel", "--user", "root")
    cluster.wait_for_nodes()


def test_an_array_trains_the_trials_of_a_plan_records_them_and_the_next_plan_confirms(
    cluster: Cluster, cache: Path, tmp_path: Path
) -> None:
    config = sweeping.write(tmp_path, cache, {**SWEEP, "confirm_seeds": 2}, run={"epochs": 3.0})
    folder = tmp_path / "sweep"
    said = sweeping.run(tmp_path / "log", "--config", str(config), "--plan")
    assert f"sbatch --array=1-4 slurm/array_sweep.sbatch {folder}" in said
    planned = (folder / "trials.txt").read_text().splitlines()
    (folder / "trials.txt").write_text("\n".join([*planned[:3], f"{planned[3]} --optim.lr=-1"]))

    tasks = array(cluster, tmp_path, "1-4", "--cpus-per-task=2", "slurm/array_sweep.sbatch", str(folder))
    log = folder / "logs/0002.log"
    tasks[2].wait_until(lambda: log.exists() and "gmscale launch:" in log.read_text(), "its beginning")
    cluster.run("scancel", "--batch", "--signal=USR1", tasks[2].name)
    assert [task.wait() for task in tasks.values()] == [*["COMPLETED 0:0"] * 3, "FAILED 2:0"], tasks[2].output
    assert [task.restarts for task in tasks.values()] == [0, 1, 0, 0]
    records = sweeping.records(tmp_path)
    assert [records[n].state for n in (1, 2, 3, 4)] == ["finished", "finished", "finished", "failed"]
    assert records[4].failures == ["optim.lr is -1.0; expected a number in (0, inf)"]
    assert "trial 4; its output is in" in tasks[4].output
    for n in (1, 2, 3):
        assert records[n].values["top1"] == json.loads((run_dir(folder, n) / "summary.json").read_text())["top1"]
        assert [result.step for result in records[n].results] == [6, 12, 18]

    said = sweeping.run(tmp_path / "log-2", "--resume", str(folder), "--plan")
    records = sweeping.records(tmp_path)
    arms = [record.trial.arm for n, record in records.items() if n > 4]
    assert sorted(arms) == ["mask", "mask", "no mask", "no mask", "random mask", "random mask"]
    assert "sbatch --array=5-10 slurm/array_sweep.sbatch" in said
    assert len((folder / "trials.txt").read_text().splitlines()) == 10

    job = submit(cluster, tmp_path, "--array=1", "slurm/array_sweep.sbatch", str(tmp_path))
    assert job.wait() == "FAILED 2:0"
    assert f"{tmp_path} holds no planned sweep; gmscale sweep --config FILE --sweep.dir" in job.output


def test_a_ray_sweep_of_two_nodes_that_is_preempted_goes_on_where_it_was(
    cluster: Cluster, cache: Path, tmp_path: Path
) -> None:
    sweep = {**SWEEP, "confirm_seeds": 0, "workers": 2}
    sections = {"run": {"epochs": 6.0, "save_every_steps": 3}, "data": {"batch_size_per_device": 8}}
    config = sweeping.write(tmp_path, cache, sweep, **sections)
    options = [
        "--nodes=2",
        "--cpus-per-task=2",
        "slurm/ray_sweep.sbatch",
        "gmscale",
        "sweep",
        "--config",
        str(config),
    ]
    job = submit(cluster, tmp_path, *options)
    job.wait_until(lambda: any(r.results for r in sweeping.records(tmp_path).values()), "an evaluation")
    submit(cluster, tmp_path, "--nodes=2", "--exclusive", "--partition=high", "--wrap=true")
    job.wait_until(lambda: job.restarts == 1, "the requeue after preemption")
    before = {number: record.state for number, record in sweeping.records(tmp_path).items()}
    assert "running" in before.values(), "the sweep was over before it was preempted"

    assert job.wait(400) == "COMPLETED 0:0", job.output
    records = sweeping.records(tmp_path)
    assert [record.state for record in records.values()] == ["finished"] * 4, job.output
    assert [record.failures for record in records.values()] == [[]] * 4
    assert {number for number, record in records.items() if record.attempts > 1} == {
        number for number, state in before.items() if state == "running"
    }
    assert {host for number in records for host in hosts(tmp_path / "sweep", number)} == {"n1", "n2"}
    for number in records:
        trained = json.loads((run_dir(tmp_path / "sweep", number) / "environment.json").read_text())
        assert trained["world_size"] == 2
    cluster.wait_for_nodes()
    assert "raylet" not in cluster.run("ps", "-eo", "args")


def run_dir(folder: Path, number: int) -> Path:
    return folder / f"trials/{number:04d}"


def hosts(folder: Path, number: int) -> set[str]:
    """Where a trial was trained."""
    events = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return {event["where"] for event in events if event["event"] == "started" and event["trial"] == number}
