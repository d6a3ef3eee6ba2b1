"""`gmscale launch` on one machine, what it refuses before anything starts, and the scripts that call it."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
from nodes import ROOT, Launcher, step_of, wait_for

from gmscale import launch
from gmscale.errors import OneLineParser, UsageError
from gmscale.launch import network
from gmscale.launch.topology import Topology, add_options, topology_of

HERE = socket.gethostname()


def topology(*argv: str, gpus: int = 0) -> Topology:
    parser = OneLineParser(prog="gmscale launch")
    add_options(parser)
    return topology_of(parser.parse_args(list(argv)), gpus)


# ---- topology ---------------------------------------------------------------------------------------------------


def test_one_node_needs_no_options() -> None:
    found = topology(gpus=4)
    assert (found.nodes, found.nproc_per_node, found.is_head, found.port) == ("1", 4, True, 0)
    assert network.is_loopback(found.route.address)
    assert topology().nproc_per_node == 1


def test_two_nodes_on_one_machine_need_their_rank() -> None:
    argv = ("--nnodes", "1:2", "--head", "localhost:29512")
    assert topology(*argv).is_head
    other = topology(*argv, "--node_rank", "1")
    assert (other.is_head, other.min_nodes, other.max_nodes, other.nodes) == (False, 1, 2, "1:2")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--nnodes", "0"], "--nnodes is '0'; expected a number of nodes such as 4, or least:most such as 2:4"),
        (["--nnodes", "3:2"], "--nnodes is '3:2'; expected"),
        (["--nnodes", "two"], "--nnodes is 'two'; expected"),
        (
            ["--nnodes", "2"],
            r"--nnodes is 2, and --head \(MASTER_ADDR\) is not given; name the node where all meet",
        ),
        (["--nproc_per_node", "0"], r"--nproc_per_node is 0; expected a number in \[1, inf\)$"),
        (["--nproc_per_node", "many"], "--nproc_per_node: invalid int value: 'many'"),
        (
            ["--nnodes", "2", "--head", "no.such.host.invalid"],
            "host name 'no.such.host.invalid' does not resolve on",
        ),
        (["--nnodes", "2", "--head", "localhost:port"], "--head is 'localhost:port'; expected HOST, HOST:PORT"),
        (
            ["--nnodes", "2", "--head", "localhost:99999"],
            r"--head: the port is 99999; expected a number in \[1, 65535\]$",
        ),
        (
            ["--nnodes", "2", "--head", "192.0.2.1", "--node_rank", "0"],
            "--node_rank is 0, and --head 192.0.2.1 is not",
        ),
        (["--head", "192.0.2.1"], "--head 192.0.2.1 is not this machine, and --nnodes is 1"),
        (["--node_rank", "1"], "--node_rank is 1, and --nnodes is 1; expected 0"),
        (["--run_id", "a b"], "--run_id is 'a b'; expected letters"),
        (["--max_restarts", "-1"], r"--max_restarts is -1; expected a number in \[0, inf\)$"),
        (["--grace_s", "0"], r"--grace_s is 0.0; expected a number in \(0, inf\)$"),
        (["--nodes", "2"], "unrecognized arguments: --nodes 2"),
    ],
)
def test_a_wrong_topology_is_refused_in_one_line(argv: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        topology(*argv)
    assert "\n" not in str(caught.value)


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--nproc_per_node is 8, and .* has 4 visible GPUs; start at most one"):
        topology("--nproc_per_node", "8", gpus=4)


def test_a_head_that_others_cannot_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "addresses_of", lambda host: ["127.0.1.1"])  # as Debian's /etc/hosts has it
    with pytest.raises(
        UsageError, match=r"--head node0 resolves to 127.0.1.1 on .*, which other nodes cannot reach"
    ):
        topology("--nnodes", "2", "--head", "node0")


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(UsageError, match=f"--head localhost:{port}: another program listens on it"):
            topology("--nnodes", "2", "--head", f"localhost:{port}")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no command; expected gmscale launch"),
        (["trian"], "the command is 'trian'; expected one of train, compare, find, evaluate; did you mean 'train'"),
        (["train", "--optim.lrr", "1"], "lrr"),
        (["train", "--config", "no/such.yaml"], "no/such.yaml"),
    ],
)
def test_a_wrong_command_is_refused_before_any_rank_starts(argv: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        launch.main(argv)


def assert_gone(pids: Iterable[int | str]) -> None:
    """Processes that were killed may take a moment on a busy machine."""
    deadline = time.monotonic() + 3
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


# ---- one machine ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_statuses_and_last_lines(cache: Path, tmp_path: Path) -> None:
    """0 done and again, 75 stopped, 1 after too many failures, and nothing is left of any of them."""
    run_dir = tmp_path / "run"
    sections: tiny.Sections = {"run": {"epochs": 6.0, "log_every": 1}, "data": {"batch_size_per_device": 8}}
    argv = tiny.flags(cache, run_dir, **sections)
    job = Launcher(tmp_path / "killed", ["--nproc_per_node", "2", "--max_restarts", "0"], argv)
    wait_for("step 3", [job], lambda: step_of(run_dir) >= 3)
    pids = job.ranks()
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    assert job.wait(30) == 1
    assert time.monotonic() - began < 8
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    said = job.output.splitlines()[-2:]
    assert f"rank 1 (host {HERE}, process {pids[1]}) was killed by SIGKILL" in said[0]
    assert said[1] == "gmscale launch: failed, and --max_restarts is 0"

    job = Launcher(tmp_path / "stopped", ["--nproc_per_node", "2"], argv)
    step = step_of(run_dir)
    wait_for("some steps", [job], lambda: step_of(run_dir) >= step + 2)
    job.signal(signal.SIGUSR1)
    assert job.wait(30) == 75
    assert job.output.splitlines()[-1] == "gmscale launch: stopped on request; the same command goes on"

    for name in ("goes on", "finished already"):
        job = Launcher(tmp_path / name, ["--nproc_per_node", "2"], argv)
        assert job.wait(60) == 0, job.output
    assert "is finished already" in job.output


@pytest.mark.slow
def test_mistakes_that_only_the_ranks_find_cost_one_start(cache: Path, tmp_path: Path) -> None:
    argv = [*tiny.flags(cache, tmp_path / "run"), "--parallel.backend=single"]
    job = Launcher(tmp_path / "log", ["--nproc_per_node", "2"], argv)
    assert job.wait(90) == 2, job.output
    assert job.output.count("the launcher started 2 processes; use ddp") == 1
    assert "start again" not in job.output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_while_ranks_are_being_started_leaves_none(
    cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    job = Launcher(
        tmp_path / "log", ["--nproc_per_node", "12", "--grace_s", "2"], tiny.flags(cache, tmp_path / "run")
    )
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    deadline = time.monotonic() + 90
    while not children.read_text() and time.monotonic() < deadline:
        time.sleep(0.001)
    job.signal(number)
    pids: set[str] = set()
    while job.poll() is None:
        with suppress(OSError):
            pids |= set(children.read_text().split())
        time.sleep(0.01)
    assert job.poll() == 75, job.output
    assert pids
    assert_gone(pids)


@pytest.mark.slow
def test_more_interrupts_end_it_at_once_and_leave_none(cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    sections: tiny.Sections = {"run": {"epochs": 9.0, "log_every": 1}, "data": {"batch_size_per_device": 8}}
    job = Launcher(tmp_path / "log", ["--nproc_per_node", "2"], tiny.flags(cache, run_dir, **sections))
    wait_for("step 3", [job], lambda: step_of(run_dir) >= 3)
    pids = job.ranks()
    os.kill(pids[1], signal.SIGSTOP)
    for _ in range(4):
        job.signal(signal.SIGINT)
        time.sleep(0.3)
    assert job.wait(40) == 75, job.output
    assert_gone(pids.values())


# ---- scripts ----------------------------------------------------------------------------------------------------


def script(name: str, *argv: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a `python` that prints its arguments."""
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    path = {"PATH": f"{python.parent}:{os.environ['PATH']}", "VENV": str(folder / "none")}
    return subprocess.run(
        [ROOT / "launch" / name, *argv], env={**path, **environment}, capture_output=True, text=True, cwd=folder
    )


def test_torchrun_sh_passes_the_topology_and_the_arguments_on(tmp_path: Path) -> None:
    done = script("torchrun.sh", "--config", "a b.yaml", folder=tmp_path)
    assert done.stdout == "-m|gmscale|launch|--nnodes|1|train|--config|a b.yaml|"
    topology = {
        "NNODES": "1:2",
        "NPROC_PER_NODE": "8",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "5",
        "NODE_RANK": "1",
    }
    rest = {"RUN_ID": "77", "MAX_RESTARTS": "9", "JOIN_TIMEOUT_S": "10", "GRACE_S": "20"}
    done = script("torchrun.sh", folder=tmp_path, **topology, **rest)
    assert done.stdout == (
        "-m|gmscale|launch|--nnodes|1:2|--nproc_per_node|8|--head|node0:5|--node_rank|1|--run_id|77|"
        "--max_restarts|9|--join_timeout_s|10|--grace_s|20|train|"
    )


def test_deepspeed_sh_reads_a_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# the cluster\nnode0 slots=4\n\nnode1 slots=4  # rack 2\n")
    done = script("deepspeed.sh", "--config", "x", folder=tmp_path, HOSTFILE="hosts")
    assert done.stdout == (
        "-m|gmscale|launch|--nnodes|2|--nproc_per_node|4|--head|node0:29400|train|--parallel.backend|deepspeed|"
        "--config|x|"
    )
    done = script("deepspeed.sh", folder=tmp_path)
    assert done.stdout == "-m|gmscale|launch|--nnodes|1|train|--parallel.backend|deepspeed|"


@pytest.mark.parametrize("text", ["", "node0\n", "node0 slots=4\nnode1 slots=8\n", "node0 slots=none\n"])
def test_deepspeed_sh_refuses_a_hostfile_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "hosts").write_text(text)
    done = script("deepspeed.sh", folder=tmp_path, HOSTFILE="hosts")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "gmscale: error: HOSTFILE hosts: expected lines such as: node0 slots=8, with the same slots on all nodes"
    ]
    assert script("deepspeed.sh", folder=tmp_path, HOSTFILE="none").returncode == 2
