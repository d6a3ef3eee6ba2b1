"""The files of slurm/, unchanged, on a real Slurm of two nodes: what stops a job does not change where it ends."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import warm
from cluster import Cluster
from jobs import Job, array, check_same, running_cluster, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SECTIONS = {
    "run": {"epochs": 20.0, "log_every": 3, "save_every_steps": 7, "eval_every_epochs": 10.0},
    "model": {"ema_decay": 0.8, "drop_rate": 0.3},
    "data": {"batch_size_per_device": 8},
}
TWO_NODES = ("--nodes=2", "--cpus-per-task=2", "slurm/train.sbatch")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One whose preempted jobs have a minute, and hear it by the signal of `--signal`."""
    yield from running_cluster(grace_s=60, more="SlurmctldParameters=preempt_send_user_signal")


@pytest.fixture(autouse=True)
def left_tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        cluster.run("scancel", "--user", "root")
        cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of two processes on one host, without Slurm, from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    warm.run(
        folder / "log",
        [*warm.TORCHRUN, "-m", "gmscale", "train", *tiny.flags(cache, folder / "run", **SECTIONS)],
        timeout_s=300,
    )
    return folder / "run"


def stops(job: Job) -> list[int]:
    """The steps after which the job says it stopped on request."""
    words = [line.split() for line in job.output.splitlines() if "stopped on request after step" in line]
    return [int(line[line.index("step") + 1]) for line in words]


def test_a_cluster_leaves_nothing_behind() -> None:
    clusters = running_cluster()
    other = next(clusters)
    job = submit(other, other.folder, "--nodes=2", "--wrap=srun sleep 600")
    job.wait_until(lambda: "sleep 600" in other.run("ps", "-eo", "args"), "its tasks")
    assert processes_of(other)
    assert next(clusters, None) is None
    assert processes_of(other) == []
    assert not other.folder.exists()
    assert str(other.folder) not in Path("/proc/self/mounts").read_text()
    assert {"nodes", "n1", "n2"}.isdisjoint(name for _, name in socket.if_nameindex())


def processes_of(cluster: Cluster) -> list[str]:
    """What runs with this cluster's configuration, on this whole machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(cluster.folder).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found


# ---- two nodes --------------------------------------------------------------------------------------------------


def test_preempted_by_a_job_with_a_typing_mistake_it_is_requeued_and_ends_as_undisturbed(
    cluster: Cluster, cache: Path, undisturbed: Path, tmp_path: Path
) -> None:
    flags = tiny.flags(cache, tmp_path / "run", **SECTIONS)
    job = submit(cluster, tmp_path, *TWO_NODES, *flags)
    job.wait_for_step(tmp_path / "run", 6)
    wrong = submit(cluster, tmp_path, "--exclusive", "--partition=high", *TWO_NODES, "--run.epohcs=2")
    job.wait_until(lambda: job.restarts == 1, "a requeue")
    assert not (tmp_path / "run/summary.json").exists(), "the run was over before it was preempted"
    stopped = tiny.checkpoint_steps(tmp_path / "run")[-1]

    assert wrong.wait() == "FAILED 2:0", wrong.output
    assert wrong.restarts == 0
    assert [line for line in wrong.output.splitlines() if line.startswith("gmscale: error:")], wrong.output

    assert job.wait() == "COMPLETED 0:0", job.output
    assert job.restarts == 1
    assert "start 2, on n[1-2]" in job.output
    assert stops(job) == [stopped], job.output
    check_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_scancel_checkpoints_and_ends_for_good(cluster: Cluster, cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, *TWO_NODES, *tiny.flags(cache, run_dir, **SECTIONS))
    job.wait_for_step(run_dir, 10)
    cluster.run("scancel", job.name)
    assert job.wait().startswith("CANCELLED"), job.output
    assert stops(job) == [tiny.checkpoint_steps(run_dir)[-1]], job.output
    assert "it was cancelled" in job.output
    time.sleep(8)  # a requeued job would be back by now
    assert (job.state, job.restarts) == ("CANCELLED", 0)


def test_any_nodes_times_gpus_and_scancel_before_training_ends_for_good(
    cluster: Cluster, cache: Path, tmp_path: Path
) -> None:
    flags = tiny.flags(cache, tmp_path / "run")
    job = submit(cluster, tmp_path, "--gpus-per-node=2", *TWO_NODES, *flags)
    job.wait_until(lambda: "2 nodes x 2 processes" in job.output, "its topology")
    cluster.run("scancel", job.name)
    assert job.wait().startswith("CANCELLED"), job.output
    cluster.wait_for_nodes()  # by then Slurm would have begun to requeue it
    assert (job.state, job.restarts) == ("CANCELLED", 0)


# ---- an array ---------------------------------------------------------------------------------------------------


def test_an_array_trains_each_line_by_itself_and_refuses_bad_lines(
    cluster: Cluster, cache: Path, tmp_path: Path
) -> None:
    sweep = "slurm/array_sweep.sbatch"
    common = tiny.flags(cache, tmp_path / "unused")[1:]  # without --run.dir
    trials = tmp_path / "trials.txt"
    trials.write_text(
        f"# a sweep\n\n--run.dir {tmp_path}/first --optim.lr 0.01\n"
        f"--run.dir='{tmp_path}/second run' --optim.lr 0.02\n"
        f"--run.dir {tmp_path}/third --run.arm 'unclosed\n--optim.lr 0.04\n"
        f"--run.dir {tmp_path}/fifth\n --run.dir={tmp_path}/fifth --optim.lr 1\n"
    )
    good = array(cluster, tmp_path, "1-2", "--cpus-per-task=2", sweep, str(trials), *common)
    bad = array(cluster, tmp_path, "3-7", sweep, str(trials))
    messages = {
        3: "line 5: a quote is not closed",
        4: "line 6: no --run.dir; each trial needs one of its own",
        5: f"line 7: --run.dir {tmp_path}/fifth is also that of line 8",
        6: f"line 8: --run.dir {tmp_path}/fifth is also that of line 7",
        7: "has 6 trials, and --array names 7; expected 1 to 6",
    }
    for number, message in messages.items():
        assert bad[number].wait() == "FAILED 2:0", bad[number].output
        (line,) = bad[number].output.splitlines()
        assert line.startswith(f"gmscale: error: {trials}")
        assert message in line
    for wrong, message in {("slurm/none.txt",): "no such file", (): "expected a file of trials"}.items():
        job = submit(cluster, tmp_path, sweep, *wrong)
        assert job.wait() == "FAILED 2:0"
        assert message in job.output
        assert len(job.output.splitlines()) == 1
    job = submit(cluster, tmp_path, sweep, str(trials))
    assert job.wait() == "FAILED 2:0"
    assert "which of its lines?" in job.output

    for number, (name, rate) in enumerate([("first", 0.01), ("second run", 0.02)], 1):
        assert good[number].wait() == "COMPLETED 0:0", good[number].output
        assert (tmp_path / name / "summary.json").exists()
        assert f"lr: {rate}" in (tmp_path / name / "config.yaml").read_text()
