"""A real Slurm, one controller and two nodes, on this machine: for tests, and by hand (as root):

    python tests/slurm/cluster.py up /tmp/c
    python tests/slurm/cluster.py run /tmp/c sinfo
    python tests/slurm/cluster.py down /tmp/c

Controller and nodes are network, mount, host name and process namespaces: the machine and other clusters see
nothing of them, and when the first process of the outer ones is killed, everything in them is gone.
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

HEAD, NODES = "10.11.12.1", {"n1": "10.11.12.2", "n2": "10.11.12.3"}
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv")
SPACES = ("--mount", "--net", "--uts", "--pid")  # the namespaces that make a machine
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"

# Two partitions on the same nodes: jobs in `high` preempt those in `low`, which hear it {grace_s} seconds before.
# The GPUs are counted by Slurm and do not exist.
CONFIG = """\
ClusterName=gmscale
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/head/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/head/state
SlurmctldPidFile={folder}/head/slurmctld.pid
SlurmctldLogFile={folder}/head/slurmctld.log
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
SlurmdSpoolDir={folder}/%n/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SlurmdTimeout=6
ReturnToService=2
KillWait={kill_wait_s}
MinJobAge=600
GresTypes=gpu
NodeName=n1 NodeAddr={n1} CPUs=4 Gres=gpu:2
NodeName=n2 NodeAddr={n2} CPUs=4 Gres=gpu:2
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace_s}
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
{more}
"""
T = TypeVar("T")


class ClusterError(Exception):
    """What a cluster could not do, with the last lines of its logs where they help."""


def why_not() -> str | None:
    """Return why this machine cannot hold a cluster, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed: tests/slurm/install.sh"
    link = ["ip", "link", "add", "a0", "type", "veth", "peer", "name", "b0"]
    tried = subprocess.run(["unshare", *SPACES, "--fork", *link], capture_output=True, text=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Nodes n1 and n2, of 4 CPUs each, under one controller. Its files are in `folder`, whose path must be short.

    It lives until `down`, or, if not `detached`, until the process that started it ends in whatever way.
    """

    def __init__(self, folder: Path, *, detached: bool = False) -> None:
        self.folder = folder
        self._detached = detached
        self._started: list[subprocess.Popen[bytes]] = []
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment = {**mine, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    # -- start and end ------------------------------------------------------------------------------------------

    def up(self, *, grace_s: int = 60, kill_wait_s: int = 30, more: str = "") -> None:
        """Start everything; return when both nodes are idle.

        Args:
            grace_s: how long a job in `low` may go on after it was preempted.
            kill_wait_s: what a job gets between SIGTERM and SIGKILL when it is cancelled or its time is over.
            more: further lines of slurm.conf.
        """
        if len(str(self.folder)) > 60:
            raise ClusterError(f"{self.folder}: too long for the sockets below it; take a directory under /tmp")
        if self._pid("head") is not None:
            raise ClusterError(f"{self.folder}: a cluster runs here already")
        for name in ("head", *NODES):
            shutil.rmtree(self.folder / name, ignore_errors=True)  # what an earlier cluster left here
        for name in ("head/state", *(f"{node}/spool" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        addresses = {"head": HEAD, **NODES}
        settings = {"folder": self.folder, "grace_s": grace_s, "kill_wait_s": kill_wait_s, "more": more}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**settings, **addresses))
        (self.folder / "gres.conf").write_text("AutoDetect=off\nName=gpu Count=2 File=/dev/null,/dev/zero\n")
        lines = [f"{address} {name}\n" for name, address in addresses.items()]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        key = self.folder / "head/munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        try:
            self._start_machine("head")
            self._wait_for(lambda: (self.folder / "head/ready").exists(), "the controller's network")
            for name in NODES:
                self.start_node(name)
            self.wait_for_nodes()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End all that runs in the cluster; its namespaces, links and mounts end with it. The files stay."""
        self._kill_machine("head")
        for process in self._started:
            process.wait()
        self._started.clear()

    def start_node(self, name: str) -> None:
        """Start a node that is not there, with its slurmd."""
        pid = self._start_machine(name)
        link = ["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        network = ["nsenter", "--target", str(self._pid("head")), "--net"]  # not --pid: `pid` is of this namespace
        self._run([*network, *link])
        self._run([*network, "ip", "link", "set", name, "master", "nodes", "up"])

    def crash_node(self, name: str) -> None:
        """Kill all that runs on a node at the same moment, as a power cut does."""
        self._kill_machine(name)

    def kill_daemon(self, name: str) -> None:
        """Kill a node's slurmd alone: what it started lives on."""
        pid = (self.folder / name / "slurmd.pid").read_text().strip()
        self.run("kill", "-KILL", pid, on=name)

    def wait_for_nodes(self, state: str = "idle", names: Sequence[str] = tuple(NODES)) -> None:
        def there() -> bool:
            shown = self.run("sinfo", "-h", "-p", "low", "-N", "-n", ",".join(names), "-o", "%T", check=False)
            return shown.split() == [state] * len(names)

        self._wait_for(there, f"{' and '.join(names)} to be {state}")

    # -- use ----------------------------------------------------------------------------------------------------

    def run(self, *command: str, on: str = "head", check: bool = True, folder: Path | None = None) -> str:
        """Run a command on a machine of the cluster; return what it printed."""
        pid = self._pid(on)
        if pid is None:
            raise ClusterError(f"{self.folder}: {on} is not up")
        enter = ["nsenter", "--target", str(pid), *SPACES, f"--wd={folder or Path.cwd()}"]
        return self._run([*enter, *command], check)

    def log(self) -> str:
        """Return the last lines of every log."""
        found = sorted(self.folder.glob("**/*.log"))
        lines = {path: path.read_text(errors="replace").splitlines()[-8:] for path in found}
        return "\n".join(f"--- {p.relative_to(self.folder)}\n" + "\n".join(text) for p, text in lines.items())

    # -- within -------------------------------------------------------------------------------------------------

    def _run(self, command: Sequence[str], check: bool = True) -> str:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
        )
        if check and done.returncode != 0:
            raise ClusterError(f"{shlex.join(command)}: status {done.returncode}: {done.stdout}")
        return done.stdout

    def _start_machine(self, name: str) -> int:
        """Start the first process of new namespaces; return its id out here."""
        command = ["unshare", *SPACES, "--fork", "--kill-child", "--mount-proc"]
        command += [sys.executable, str(Path(__file__).resolve()), "be", str(self.folder), name]
        if not self._detached:
            command = ["setpriv", "--pdeathsig", "SIGKILL", *command]
        if name != "head":
            command = ["nsenter", "--target", str(self._pid("head")), *SPACES, *command]
        (self.folder / name / "ready").unlink(missing_ok=True)
        with (self.folder / name / "machine.log").open("ab") as log:
            self._started.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                    start_new_session=True,
                )
            )
        depth = 2 if name == "head" else 3
        pid = self._wait_for(lambda: _first_process(self._started[-1].pid, depth), f"{name} to start")
        (self.folder / name / "pid").write_text(f"{pid} {_birth(pid)}")
        return pid

    def _kill_machine(self, name: str) -> None:
        while (pid := self._pid(name)) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _pid(self, name: str) -> int | None:
        """Return the first process of a machine that is up."""
        try:
            pid, birth = map(int, (self.folder / name / "pid").read_text().split())
        except (OSError, ValueError):
            return None
        return pid if _birth(pid) == birth else None

    def _wait_for(self, ready: Callable[[], T], what: str, timeout_s: float = 30) -> T:
        deadline = time.monotonic() + timeout_s
        while not (found := ready()):
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {timeout_s:.0f} s for {what}\n{self.log()}")
            time.sleep(0.05)
        return found


def _birth(pid: int) -> int | None:
    """Return when a living process began, in clock ticks; None for a dead one: ids are used again."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _first_process(pid: int, depth: int) -> int | None:
    """Return the descendant of `pid` that is number 1 of a process namespace `depth` levels down."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    ids = next(line.split()[1:] for line in text.splitlines() if line.startswith("NSpid:"))
    if len(ids) >= depth and ids[-1] == "1":
        return pid
    return next((found for child in children if (found := _first_process(int(child), depth))), None)


# -- what the first process of a machine does -------------------------------------------------------------------


def _be(folder: Path, name: str) -> NoReturn:
    """Be this machine's first process: set up its network, start its daemons, collect the dead."""
    socket.sethostname(name)
    commands = ["ip link set lo up"]
    if name == "head":
        commands += [f"mount --bind {folder}/hosts /etc/hosts", "ip link add nodes type bridge"]
        commands += [f"ip address add {HEAD}/24 dev nodes", "ip link set nodes up"]
        munge = f"munged --foreground --force --num-threads 2 --socket {folder}/head/munge.socket"
        munge += "".join(f" --{kind}-file {folder}/head/munge.{kind}" for kind in ("key", "log", "pid", "seed"))
        daemons = [munge, "slurmctld -D"]
    else:
        while "eth0" not in [interface for _, interface in socket.if_nameindex()]:  # /sys still shows the machine's
            time.sleep(0.02)
        commands += [f"ip address add {NODES[name]}/24 dev eth0", "ip link set eth0 up"]
        daemons = [f"slurmd -D -N {name}"]
    for command in commands:
        subprocess.run(shlex.split(command), check=True)
    for command in daemons:
        subprocess.Popen(shlex.split(command))
    (folder / name / "ready").touch()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "run", "log", "down", "be"])
    parser.add_argument("folder", type=Path, help="a directory of the cluster's own, best right under /tmp")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="after run: a command, on the controller's machine"
    )
    arguments = parser.parse_args()
    cluster = Cluster(arguments.folder.resolve(), detached=True)
    if arguments.action == "be":
        _be(arguments.folder, *arguments.command)
    reason = why_not()
    if reason:
        sys.exit(f"error: {reason}")
    try:
        match arguments.action:
            case "up":
                cluster.up()
            case "run":
                print(cluster.run(*arguments.command), end="")
            case "log":
                print(cluster.log())
            case "down":
                cluster.down()
    except ClusterError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
