"""Jobs on a cluster of cluster.py: submitted from this checkout, watched, and read."""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from cluster import Cluster, why_not

ROOT = Path(__file__).parent.parent.parent
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


class Job:
    """A job, or one task of an array, by its id."""

    def __init__(self, cluster: Cluster, name: str, log: Path) -> None:
        self._cluster, self.name, self.log = cluster, name, log

    def shown(self, field: str) -> str:
        """Return a field of `scontrol show job`."""
        text = self._cluster.run("scontrol", "--oneliner", "show", "job", self.name)
        found = re.search(rf"\b{field}=(\S+)", text)
        assert found, text
        return found.group(1)

    @property
    def state(self) -> str:
        return self.shown("JobState")

    @property
    def restarts(self) -> int:
        return int(self.shown("Restarts"))

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, timeout_s: float = 150) -> str:
        """Wait for its end; return state and exit status, such as `FAILED 2:0`."""
        self.wait_until(lambda: self.state in ENDS, "its end", timeout_s, may_end=True)
        return f"{self.state} {self.shown('ExitCode')}"

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Wait until the run's metrics.jsonl shows a step."""

        def there() -> bool:
            try:
                return tiny.metrics(run_dir)[-1].get("step", 0) >= step
            except (OSError, IndexError, ValueError):
                return False  # not there yet, or half a line

        self.wait_until(there, f"step {step}")

    def wait_until(
        self, ready: Callable[[], Any], what: str, timeout_s: float = 150, may_end: bool = False
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            state = self.state
            gone = state in ENDS and not may_end
            if gone or time.monotonic() > deadline:
                raise AssertionError(
                    f"job {self.name} is {state}, without {what}:\n{self.output}\n{self._cluster.log()}"
                )
            time.sleep(0.2)


def submit(
    cluster: Cluster, folder: Path, *command: str, environment: Mapping[str, str] = {}, checkout: Path = ROOT
) -> Job:
    """Submit a batch script with its options; what the job prints goes into `folder`."""
    options = ["--parsable", "--output", f"{folder}/%j.out"]
    mine = {"VENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    given = [f"{name}={value}" for name, value in mine.items()]
    name = cluster.run("env", *given, "sbatch", *options, *command, folder=checkout).split()[-1]
    return Job(cluster, name, folder / f"{name}.out")


def array(cluster: Cluster, folder: Path, indices: str, *command: str) -> dict[int, Job]:
    """Submit an array; return {index: its job}."""
    options = ["--parsable", "--array", indices, "--output", f"{folder}/%A_%a.out"]
    name = cluster.run("env", f"VENV={sys.prefix}", "sbatch", *options, *command, folder=ROOT).split()[-1]
    first, _, last = indices.partition("-")
    numbers = range(int(first), int(last or first) + 1)
    return {n: Job(cluster, f"{name}_{n}", folder / f"{name}_{n}.out") for n in numbers}


def running_cluster(**settings: Any) -> Iterator[Cluster]:
    """Yield a cluster for a fixture, and leave nothing of it behind."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets want short paths
    cluster = Cluster(folder)
    try:
        cluster.up(**settings)
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder)


def check_same(run_dir: Path, undisturbed: Path) -> None:
    """Weights, averages, momenta, residuals, random states: all of the last checkpoint, bit for bit."""
    assert (run_dir / "summary.json").exists()
    assert tiny.checkpoint_steps(run_dir)[-1] == tiny.checkpoint_steps(undisturbed)[-1]
    assert tiny.different(tiny.tensors(run_dir), tiny.tensors(undisturbed)) == []
    assert losses(run_dir) == losses(undisturbed)  # each step once: none was left out or trained twice


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in tiny.metrics(run_dir) if r["phase"] == "train"]
