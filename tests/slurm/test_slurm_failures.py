"""What else happens to jobs: nodes that die, time that runs out, stops before anything has begun; shards, Ray."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import warm
from cluster import Cluster
from jobs import ENDS, array, check_same, running_cluster, submit
from PIL import Image

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

EPOCHS = 200.0  # Slurm takes twenty seconds to miss a daemon whose tasks go on: a run must be longer
SECTIONS = {"run": {"epochs": EPOCHS, "log_every": 5, "save_every_steps": 20, "eval_every_epochs": EPOCHS}}
TWO_NODES = ("--nodes=2", "--cpus-per-task=2", "slurm/train.sbatch")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One that gives preempted jobs no time but KillWait's, and no signal but SIGTERM."""
    yield from running_cluster(grace_s=0)


@pytest.fixture(autouse=True)
def left_tidy(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.run("scancel", "--user", "root")
    cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = tiny.flags(cache, folder / "run", **SECTIONS)
    warm.run(folder / "log", [*warm.TORCHRUN, "-m", "gmscale", "train", *flags], timeout_s=500)
    return folder / "run"


def test_a_crashed_node_a_dead_daemon_and_preemption_without_grace_do_not_change_the_end(
    cluster: Cluster, cache: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, *TWO_NODES, *tiny.flags(cache, run_dir, **SECTIONS))

    job.wait_for_step(run_dir, 30)
    cluster.crash_node("n2")
    job.wait_until(lambda: job.restarts == 1, "the requeue after a crash")
    cluster.start_node("n2")

    job.wait_for_step(run_dir, tiny.checkpoint_steps(run_dir)[-1] + 20)
    cluster.kill_daemon("n1")  # of the batch script and the head
    job.wait_until(lambda: job.restarts == 2, "the requeue after slurmd died")
    cluster.crash_node("n1")
    cluster.start_node("n1")

    begun = tiny.checkpoint_steps(run_dir)[-1]
    job.wait_for_step(run_dir, begun + 7)
    submit(cluster, tmp_path, "--nodes=2", "--exclusive", "--partition=high", "--wrap=true")
    job.wait_until(lambda: job.restarts == 3, "the requeue after preemption")

    assert not (run_dir / "summary.json").exists(), "the run was over before it was preempted"
    assert job.wait() == "COMPLETED 0:0", job.output
    check_same(run_dir, undisturbed)


def test_before_its_time_limit_a_job_checkpoints_and_is_queued_again(
    cluster: Cluster, cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    sections = {"run": SECTIONS["run"] | {"epochs": 1000.0, "eval_every_epochs": 1000.0}}
    flags = tiny.flags(cache, run_dir, **sections)
    job = submit(cluster, tmp_path, "--time=2", "--signal=B:USR1@60", *TWO_NODES, *flags)
    job.wait_until(lambda: job.restarts == 1, "a requeue")
    assert "stopped on request after step" in job.output
    assert "stopped and is queued again" in job.output
    assert job.state not in ENDS


def test_a_stop_while_srun_begins_is_heard_and_after_so_many_requeues_a_job_says_how_to_go_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(
        cluster, tmp_path, *TWO_NODES, "--run.dir", str(tmp_path / "run"), environment={"MAX_REQUEUES": "0"}
    )
    job.wait_until(lambda: "start 1" in job.output, "its beginning")
    cluster.run("scancel", "--batch", "--signal=USR1", job.name)
    assert job.wait() == "FAILED 75:0", job.output
    assert "was requeued 0 times, no more (MAX_REQUEUES); the same sbatch goes on" in job.output
    assert job.restarts == 0


def test_a_stopped_task_of_an_array_is_requeued_without_the_others(
    cluster: Cluster, cache: Path, tmp_path: Path
) -> None:
    trials = tmp_path / "trials.txt"
    trials.write_text(f"--run.dir {tmp_path}/one\n--run.dir {tmp_path}/two\n")
    common = tiny.flags(cache, tmp_path / "unused")[1:]
    options = ["--cpus-per-task=2", "slurm/array_sweep.sbatch", str(trials)]
    tasks = array(cluster, tmp_path, "1-2", *options, *common)
    # the last task has the job id of the whole array
    tasks[2].wait_until(lambda: "gmscale launch:" in tasks[2].output, "its beginning")
    cluster.run("scancel", "--batch", "--signal=USR1", tasks[2].name)
    assert [tasks[n].wait() for n in (1, 2)] == ["COMPLETED 0:0"] * 2, tasks[2].output
    assert [tasks[n].restarts for n in (1, 2)] == [0, 1]
    assert (tmp_path / "two/summary.json").exists()


def test_the_doctor_sees_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--nodes=2", "--cpus-per-task=2", "slurm/doctor.sbatch"]
    job = submit(cluster, tmp_path, *options, "--dir", str(tmp_path))
    assert job.wait() == "COMPLETED 0:0", job.output
    assert "n2" in job.output


def test_shards_stopped_by_a_signal_are_built_by_the_next_start(cluster: Cluster, tmp_path: Path) -> None:
    for number in range(40):
        image = tmp_path / "images" / f"class{number % 4}" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), number * 6, np.uint8)).save(image)
    options = ["--cpus-per-task=2", "slurm/shards.sbatch"]
    job = submit(cluster, tmp_path, *options, str(tmp_path / "images"), str(tmp_path / "shards"))
    job.wait_until(lambda: "start 1" in job.output, "its beginning")
    cluster.run("scancel", "--batch", "--signal=USR1", job.name)
    assert job.wait() == "COMPLETED 0:0", job.output
    assert job.restarts == 1, job.output
    assert json.loads((tmp_path / "shards/_info.json").read_text())["splits"]["train"]["num_samples"] == 40
    wrong = submit(cluster, tmp_path, *options, str(tmp_path / "none"), str(tmp_path / "other"))
    assert wrong.wait() == "FAILED 2:0", wrong.output
    assert "gmscale: error:" in wrong.output


# ---- Ray --------------------------------------------------------------------------------------------------------

SWEEP = """
import os, socket, sys, time, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=2)
def host(number):
    time.sleep(3)
    return socket.gethostname()
print("hosts", sorted(set(ray.get([host.remote(n) for n in range(2)]))), flush=True)
sys.exit(3)
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'gmscale[sweep]'")
def test_a_ray_cluster_spans_the_nodes_and_ends_with_its_command(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--nodes=2", "--cpus-per-task=2", "slurm/ray_sweep.sbatch"]
    (tmp_path / "sweep.py").write_text(SWEEP)
    job = submit(cluster, tmp_path, *options, "python", str(tmp_path / "sweep.py"))
    assert job.wait() == "FAILED 3:0", job.output
    assert "hosts ['n1', 'n2']" in job.output
    cluster.wait_for_nodes()
    assert "raylet" not in cluster.run("ps", "-eo", "args")

    # a node on which nothing starts
    broken = tmp_path / "broken"
    (broken / "bin").mkdir(parents=True)
    python = f'[ "$(hostname)" != n2 ] || exit 1\nexec {sys.prefix}/bin/python "$@"\n'
    (broken / "bin/python").write_text(f"#!/bin/bash\n{python}")
    (broken / "bin/python").chmod(0o755)
    (broken / "bin/activate").write_text(f"PATH={broken}/bin:{sys.prefix}/bin:$PATH\n")
    job = submit(cluster, tmp_path, *options, "true", environment={"VENV": str(broken), "JOIN_TIMEOUT_S": "15"})
    assert job.wait() == "FAILED 1:0", job.output
    assert "waited 15 s for 2 nodes; Ray has: n1" in job.output
    job = submit(cluster, tmp_path, *options)
    assert job.wait() == "FAILED 2:0"
    assert "expected a command" in job.output
