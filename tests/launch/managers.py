"""A training on two nodes, and who starts it again when something ends: by hand on namespaces, or Slurm."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nodes import Launcher, Nodes

from gmscale.bench.link import Link, veth_link

sys.path.insert(0, str(Path(__file__).parent.parent / "slurm"))
import jobs
from cluster import NODES, Cluster

JOIN_S = 30  # how long a launcher waits for one that will not come, because it has finished
NOTICE_S = 1.0  # until the manager has noticed that a launcher ended
DAEMON_S = 10.0  # until a dead slurmd is started again: longer than Slurm's patience with it
SLURM_S = 0.5  # between two looks at the job


class Training(Protocol):
    """What the trials need of it."""

    limit_s: float
    """By when it has to be over."""
    statuses: list[str]
    """How launchers, or jobs, have ended so far."""

    def start(self) -> None:
        """Start it."""

    def tend(self) -> bool:
        """Do what a cluster manager does, now and then; return whether all has ended well."""

    def find(self, victim: str) -> int | None:
        """Return the process to kill, or None if there is none now."""

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of those that live."""

    def left(self) -> list[str]:
        """Return the processes that should not be there any more when all has ended."""


# -- by hand -------------------------------------------------------------------------------------------------------


class ByHand:
    """The launchers of two nodes. One that ends with another status than 0 is started again, both if both ended."""

    victims = ("worker of n1", "worker of n2", "launcher of n1", "launcher of n2")
    limit_s = 180.0

    def __init__(self, link: Link, folder: Path, argv: list[str]) -> None:
        self._link, self._nodes, self._argv = link, Nodes(link, folder), argv
        self._launchers: list[Launcher] = []
        self._noticed: float | None = None
        self.statuses: list[str] = []

    def start(self) -> None:
        self._launchers = [self._launch(1), self._launch(2)]

    def tend(self) -> bool:
        ended = [launcher.poll() for launcher in self._launchers]
        if all(status == 0 for status in ended):
            self.statuses += ["n1 0", "n2 0"]
            return True
        if not any(ended):  # all live, or one has finished and the other will
            return False
        if self._noticed is None:
            self._noticed = time.monotonic()
        if time.monotonic() - self._noticed > NOTICE_S:
            self._noticed = None
            for number, status in enumerate(ended):
                if status is not None:
                    self.statuses.append(f"n{number + 1} {status}")
                    self._launchers[number] = self._launch(number + 1)
        return False

    def find(self, victim: str) -> int | None:
        kind, _, host = victim.partition(" of ")
        launcher = self._launchers[int(host.removeprefix("n")) - 1]
        if kind == "worker":
            return next(iter(launcher.ranks().values()), None)
        return launcher.pid if launcher.poll() is None else None

    def ranks(self) -> dict[int, int]:
        return {rank: pid for launcher in self._launchers for rank, pid in launcher.ranks().items()}

    def left(self) -> list[str]:
        return [_shown(pid) for pid in self._pids()]

    def end(self) -> None:
        """Kill all that lives on the nodes."""
        for launcher in self._nodes.started:
            end(launcher)
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _launch(self, number: int) -> Launcher:
        return self._nodes.launch(number, "--join_timeout_s", str(JOIN_S), argv=self._argv)

    def _pids(self) -> list[int]:
        found: list[int] = []
        for namespace in self._link.namespaces:
            shown = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
            found += map(int, shown.stdout.split())
        return found


@contextmanager
def by_hand(folder: Path, argv: list[str]) -> Iterator[ByHand]:
    """Make two nodes; remove them with all that runs there."""
    with veth_link(asked_by="kills.py") as link:
        training = ByHand(link, folder, argv)
        try:
            yield training
        finally:
            training.end()


def end(launcher: Launcher) -> None:
    """Kill a launcher and its ranks, also if it was forked a moment ago and has no session of its own yet."""
    try:
        launcher.end()
    except ProcessLookupError:
        os.kill(launcher.pid, signal.SIGKILL)


# -- Slurm ---------------------------------------------------------------------------------------------------------


class OnSlurm:
    """A job of slurm/train.sbatch, which Slurm requeues. Its user submits it again should it fail for good."""

    # n1 is the node of the batch script and of the head
    victims = (
        *(f"{kind} of {node}" for kind in ("worker", "launcher", "slurmd", "slurmstepd") for node in NODES),
        "batch slurmstepd of n1",
    )
    limit_s = 400.0

    def __init__(self, cluster: Cluster, folder: Path, argv: list[str]) -> None:
        self._cluster, self._folder, self._argv = cluster, folder, argv
        self._looked = 0.0
        self._gone: dict[str, float] = {}
        self.statuses: list[str] = []

    def start(self) -> None:
        (self._folder / "output").mkdir(exist_ok=True)
        options = ("--nodes=2", "--cpus-per-task=2", "slurm/train.sbatch")
        settings = {"JOIN_TIMEOUT_S": str(2 * JOIN_S)}  # Python starts slowly here
        self._job = jobs.submit(self._cluster, self._folder / "output", *options, *self._argv, environment=settings)
        self._restarts = 0

    def tend(self) -> bool:
        if time.monotonic() - self._looked < SLURM_S:
            return False
        self._looked = time.monotonic()
        self._revive()
        state, restarts = self._job.state, self._job.restarts
        if restarts > self._restarts:
            self.statuses.append("requeued")
        self._restarts = restarts
        if state not in jobs.ENDS:
            return False
        self.statuses.append(f"{state} {self._job.shown('ExitCode')}")
        if state == "COMPLETED":
            return True
        if (
            restarts == int(self._job.shown("Restarts")) and self._job.state in jobs.ENDS
        ):  # not about to be requeued
            self.start()
        return False

    def find(self, victim: str) -> int | None:
        kind, _, node = victim.partition(" of ")
        return next((p.pid for p in self._processes(node) if p.is_a(kind)), None)

    def ranks(self) -> dict[int, int]:
        workers = [p for node in NODES for p in self._processes(node) if p.is_a("worker")]
        return {int(w.environment["RANK"]): w.pid for w in sorted(workers, key=lambda w: w.birth)}

    def left(self) -> list[str]:
        return [_shown(p.pid) for node in NODES for p in self._processes(node) if "gmscale" in p.command]

    def _revive(self) -> None:
        """Start a slurmd again that has been gone for a while, as systemd does."""
        for node in NODES:
            if any(p.is_a("slurmd") for p in self._processes(node)):
                self._gone.pop(node, None)
            elif time.monotonic() - self._gone.setdefault(node, time.monotonic()) > DAEMON_S:
                self._cluster.run("slurmd", "-N", node, on=node)
                self._gone[node] = time.monotonic()

    def _processes(self, node: str) -> list["_Process"]:
        """Return all that runs on a node but its first process."""
        first = int((self._cluster.folder / node / "pid").read_text().split()[0])
        parents = dict(_parents())

        def is_within(pid: int) -> bool:
            while (parent := parents.get(pid)) is not None:
                if parent == first:
                    return True
                pid = parent
            return False

        found = (_Process.read(pid) for pid in parents if is_within(pid))
        return [process for process in found if process is not None]


@contextmanager
def on_slurm(folder: Path, argv: list[str]) -> Iterator[OnSlurm]:
    """Make a cluster in `folder`; end it with all that runs there."""
    cluster = Cluster(folder / "c")
    try:
        (folder / "c").mkdir()
        cluster.up()
        yield OnSlurm(cluster, folder, argv)
    finally:
        cluster.down()


# -- processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    pid: int
    name: str
    command: str
    environment: Mapping[str, str]
    birth: float

    @classmethod
    def read(cls, pid: int) -> "_Process | None":
        folder = Path(f"/proc/{pid}")
        try:
            name = (folder / "comm").read_text().strip()
            command = (folder / "cmdline").read_text().replace("\0", " ")
            variables = (folder / "environ").read_text(errors="replace").split("\0")
        except OSError:
            return None
        environment = dict(variable.partition("=")[::2] for variable in variables)
        born = birth(pid)
        return None if born is None else cls(pid, name, command, environment, born)

    def is_a(self, kind: str) -> bool:
        match kind:
            case "worker":
                return "-m gmscale train " in self.command and "RANK" in self.environment
            case "launcher":
                return "-m gmscale launch " in self.command
            case "slurmstepd":
                return self.name == kind and ".batch" not in self.command
            case "batch slurmstepd":
                return self.name == "slurmstepd" and ".batch" in self.command
        return self.name == kind


def birth(pid: int) -> float | None:
    """Return when a living process began, in seconds of CLOCK_BOOTTIME."""
    stat = _stat(pid)
    return None if stat is None else int(stat[19]) / os.sysconf("SC_CLK_TCK")


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*"):
        stat = _stat(int(path.name))
        if stat is not None:
            yield int(path.name), int(stat[1])


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None for a dead process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def _shown(pid: int) -> str:
    with suppress(OSError):
        return f"{Path(f'/proc/{pid}/comm').read_text().strip()} ({pid})"
    return str(pid)
