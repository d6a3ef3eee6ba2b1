"""launch/ray_cluster.sh: real Ray on two nodes, which are network namespaces; joined, left, killed, stopped."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import warm
from nodes import ROOT, wait_for

from gmscale.bench.link import Link, veth_link
from gmscale.errors import RunError, UsageError

pytest.importorskip("ray")
from gmscale.sweep import cluster

# Says who is there whenever that changes, until it hears that it is to stop, and then whether it hears more.
COMMAND = """
import os, signal, sys, time, ray
heard = []
ray.init(log_to_driver=False, logging_level="CRITICAL")
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
before = None
while not heard:
    now = sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])
    if now != before:
        print("nodes", now, flush=True)
    before = now
    time.sleep(0.2)
time.sleep(1)
print("heard", len(heard), flush=True)
os._exit(75)
"""

# Ray misses a node that is gone within a second, not fifteen.
IMPATIENT = {"RAY_health_check_period_ms": "300", "RAY_health_check_failure_threshold": "3"}


# ---- before anything starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no command; expected launch/ray_cluster.sh gmscale sweep --config FILE"),
        (["gmscael"], "the command 'gmscael' is not a program here"),
        (["--nnodes", "two", "true"], "--nnodes is 'two'; expected a number of nodes such as 4"),
        (["--nnodes", "2", "true"], r"--nnodes is 2, and --head \(MASTER_ADDR\) is not given"),
        (["--head", "192.0.2.1", "true"], "--head 192.0.2.1 is not this machine, and --nnodes is 1"),
        (["--num_cpus", "0", "true"], r"NUM_CPUS is 0; expected a number in \[1, inf\)$"),
        (["--num_gpus", "-1", "true"], r"NUM_GPUS is -1; expected a number in \[0, inf\)$"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(argv: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        cluster.main(argv)
    assert "\n" not in str(caught.value)


def test_a_dashboard_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiohttp_cors" else object())
    with pytest.raises(UsageError, match=r"DASHBOARD=1 needs .* pip install 'ray\[default\]'$"):
        cluster.main(["--dashboard", "true"])


def test_a_port_of_ray_that_is_taken_is_refused() -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(
            UsageError, match=rf"port {port} \(port of Ray\): another program listens on it; choose"
        ):
            cluster.main(["--head", f"localhost:{port - 1}", "true"])


def test_a_token_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"RAY_AUTH_TOKEN_PATH .*none cannot be read: .*; expected a token's file"):
        cluster.main(["--head", "localhost:29590", "true"])


def test_the_script_hands_on_the_topology_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").write_text(f"PATH={tmp_path}/bin:$PATH\n")
    (tmp_path / "bin/python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)

    def handed_on(**environment: str) -> list[str]:
        mine = {"PATH": os.environ["PATH"], "VENV": str(tmp_path), **environment}
        command = ["launch/ray_cluster.sh", "gmscale", "sweep", "--sweep.dir", "a b"]
        return subprocess.run(command, cwd=ROOT, env=mine, text=True, capture_output=True).stdout.splitlines()

    program, command = ["-m", "gmscale.sweep.cluster"], ["gmscale", "sweep", "--sweep.dir", "a b"]
    assert handed_on() == [*program, "--nnodes", "1", *command]
    names = ("NNODES", "MASTER_ADDR", "NODE_RANK", "RUN_ID", "NUM_CPUS", "NUM_GPUS", "JOIN_TIMEOUT_S", "GRACE_S")
    found = handed_on(**dict.fromkeys(names, "3"), MASTER_PORT="5", DASHBOARD="1")
    flags = [f"--{name.lower()}" for name in names]
    flags[1] = "--head"
    pairs = [word for flag in flags for word in (flag, "3:5" if flag == "--head" else "3")]
    assert found == [*program, *pairs, "--dashboard", *command]
    assert cluster._parser().parse_args(found[2:]).command == command


# ---- two nodes --------------------------------------------------------------------------------------------------


class Node(warm.Program):
    """What launch/ray_cluster.sh runs, on node 1 or 2 of a link."""

    def __init__(self, folder: Path, link: Link, number: int, environment: Mapping[str, str] = {}) -> None:
        self.host, self._network = f"n{number}", link.namespaces[number - 1]
        (folder / "command.py").write_text(COMMAND)
        arguments = ["-m", "gmscale.sweep.cluster", "--nnodes", "2", "--head", f"{link.addresses[0]}:29400"]
        arguments += ["--join_timeout_s", "60", "--num_cpus", "1", "--num_gpus", "0"]
        arguments += [sys.executable, str(folder / "command.py")]
        log = folder / f"log-{len(list(folder.glob('log-*')))}-{self.host}"
        super().__init__(log, arguments, ROOT, environment, network=self._network, host=self.host)

    def living(self) -> list[str]:
        """Return the ids of all processes on this node."""
        return subprocess.check_output(["ip", "netns", "pids", self._network], text=True).split()

    def files(self) -> list[Path]:
        """Return what it has in the directory for temporary files."""
        return list(Path(tempfile.gettempdir()).glob(f"gmscale-ray-{self.pid}-*"))


@pytest.fixture
def link() -> Iterator[Link]:
    try:
        with veth_link(asked_by="this test") as made:
            yield made
            for network in made.namespaces:  # whatever a failing test has left there
                for pid in subprocess.check_output(["ip", "netns", "pids", network], text=True).split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
    except RunError as error:
        pytest.skip(str(error))


def there(head: Node, hosts: list[str]) -> bool:
    said = [line for line in head.output.splitlines() if line.startswith("nodes")]
    return bool(said) and said[-1] == f"nodes {hosts}"


def kill(node: Node) -> None:
    os.kill(node.pid, signal.SIGKILL)
    for folder in node.files():
        shutil.rmtree(folder, ignore_errors=True)  # Ray's last processes may still write there


def ended(nodes: list[Node], status: int) -> None:
    for node in nodes:
        assert node.wait(60) == status, "\n".join(n.output for n in nodes)
        assert node.files() == []
    wait_for("the end of all processes", [], lambda: not any(node.living() for node in nodes), 10)


@pytest.mark.slow
def test_a_node_is_killed_and_comes_back_and_a_stop_there_reaches_the_command_once(
    link: Link, tmp_path: Path
) -> None:
    head, other = (Node(tmp_path, link, number, IMPATIENT) for number in (1, 2))
    wait_for("the command", [head, other], lambda: there(head, ["n1", "n2"]))
    assert "can read the token of this cluster" in head.output

    kill(other)
    wait_for("its end", [head], lambda: not other.living(), 10)
    wait_for("one node", [head], lambda: there(head, ["n1"]))
    other = Node(tmp_path, link, 2)
    wait_for("two nodes", [head, other], lambda: there(head, ["n1", "n2"]))

    for _ in range(2):
        os.kill(other.pid, signal.SIGTERM)
    ended([head, other], 75)
    assert head.output.count("heard 1") == 1


@pytest.mark.slow
def test_when_the_head_is_killed_everything_ends(link: Link, tmp_path: Path) -> None:
    token = {"RAY_AUTH_TOKEN": "0123456789" * 4}
    head, other = (Node(tmp_path, link, number, token) for number in (1, 2))
    wait_for("the command", [head, other], lambda: there(head, ["n1", "n2"]))
    assert "can read the token" not in head.output
    kill(head)
    ended([other], 1)
    assert "is gone: its launcher ended, or is out of reach" in other.output
    wait_for("the end on the head", [], lambda: not head.living(), 10)


@pytest.mark.slow
def test_a_node_with_another_token_ends_the_cluster_before_the_command(link: Link, tmp_path: Path) -> None:
    head, other = (Node(tmp_path, link, n, {"RAY_AUTH_TOKEN": f"{n}" * 40}) for n in (1, 2))
    ended([head, other], 2)
    assert "RAY_AUTH_TOKEN of n2 is not that of the head" in head.output
    assert "nodes" not in [line.split()[0] for line in head.output.splitlines()]


@pytest.mark.slow
def test_a_node_on_which_ray_does_not_start_ends_the_cluster_before_the_command(link: Link, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/__init__.py").write_text("raise ImportError('broken')")
    head, other = Node(tmp_path, link, 1), Node(tmp_path, link, 2, {"PYTHONPATH": str(tmp_path)})
    ended([head, other], 1)
    assert "gmscale launch: Ray on n2 has ended: ImportError: broken" in head.output
