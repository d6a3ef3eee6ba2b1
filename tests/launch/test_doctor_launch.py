"""gmscale doctor --launch: every failure is found where it is, has a remedy, and spoils the status of all nodes.

Nodes are processes on this machine; where the network matters, in network namespaces with a link between them.
"""

import argparse
import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import tiny
import warm
import yaml

from gmscale import cli, doctor
from gmscale.bench.link import UNLIMITED, Link, limit, run, veth_link
from gmscale.config import from_dict
from gmscale.doctor import equality, launch, link, local, nodes, shards, shared
from gmscale.doctor.plan import Plan, plan_of
from gmscale.errors import RunError, UsageError
from gmscale.launch import network

NEW_NETWORK, NEW_NAMES, NEW_MOUNTS = 0x40000000, 0x04000000, 0x00020000  # of clone(2)
PRIVATE = 0x40000  # MS_PRIVATE | ...
Change = Callable[..., None]


@pytest.fixture
def pair() -> Iterator[Link]:
    try:
        with veth_link(2, asked_by="this test") as made:
            yield made
    except RunError as error:
        pytest.skip(str(error))


@pytest.fixture
def port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


class Node:
    """`gmscale doctor --launch ARGUMENTS` in a process of its own, which a `change` prepares first."""

    def __init__(
        self, log: Path, *arguments: str, name: str = "", namespace: str = "", change: Sequence[Any] = ()
    ) -> None:
        warm.begin()
        self.log, options = log, ["doctor", "--launch", *arguments]
        self._process = warm.context.Process(target=_node, args=(log, options, name, namespace, change))
        self._process.start()

    def status(self, timeout_s: float = 60) -> int | None:
        self._process.join(timeout_s)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def output(self) -> str:
        return self.log.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    started: list[Node] = []

    def start(*arguments: str, **options: Any) -> Node:
        started.append(Node(tmp_path / f"log-{len(started)}", *arguments, **options))
        return started[-1]

    yield start
    for node in started:
        node.kill()


def _node(log: Path, arguments: list[str], name: str, namespace: str, change: Sequence[Any]) -> NoReturn:
    for stream, path in ((1, log), (2, log.with_suffix(".errors"))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - of the process, until it ends
    system = ctypes.CDLL(None, use_errno=True)
    if namespace:
        with open(f"/run/netns/{namespace}") as file:
            assert system.setns(file.fileno(), NEW_NETWORK) == 0
        assert system.unshare(NEW_NAMES | NEW_MOUNTS) == 0
        assert system.mount(None, b"/", None, PRIVATE | 0x4000, None) == 0  # what follows stays in here
        socket.sethostname(name)
    elif name:
        socket.gethostname = lambda: name
    status: Any = 1
    try:
        if change:
            change[0](*change[1:])
        cli.main(arguments)
    except SystemExit as left:
        status = left.code
    finally:
        sys.stdout.flush()
        os._exit(status)


class InstantTransfer:
    """An all-reduce that is not done: for tests of everything else."""

    def __init__(self, *_: Any) -> None:
        pass

    def finish(self) -> dict[str, Any]:
        return {"small_s": 1e-4, "large_s": 0.1}


def without_transfer() -> None:
    launch.Transfer = InstantTransfer  # type: ignore


def dies_later() -> None:
    without_transfer()
    launch.check_directory = lambda *_: os._exit(9)  # type: ignore


def astray(directory: str) -> None:
    """A node with another timm, a clock three seconds ahead, and a directory of its own under the same path."""
    without_transfer()
    real = equality.package_version
    equality.package_version = lambda name: "0.9.0" if name == "timm" else real(name)
    nodes.now = lambda: time.time() + 3
    shared._SOON_S = 1.0
    system = ctypes.CDLL(None, use_errno=True)
    assert system.mount(b"none", directory.encode(), b"tmpfs", 0, None) == 0


def impatient(seconds: float) -> None:
    without_transfer()
    shared._SOON_S = seconds


def limited(interface: str, rate: str) -> None:
    limit(interface, rate)


def asked(*arguments: str, **environ: str) -> Plan:
    """The plan of a command line, in an environment that holds no more than is given."""
    seen: list[argparse.Namespace] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "check_launch", lambda options: seen.append(options) or 0)
        doctor.main(["--launch", *arguments])
    return plan_of(seen[0], environ)


# Two nodes


def localhost(
    port: int, rank: int, tmp_path: Path, *more: str, nnodes: int = 2, timeout_s: float = 20
) -> list[str]:
    where = ["--head", f"localhost:{port}", "--nnodes", str(nnodes), "--node_rank", str(rank)]
    return [*where, "--timeout_s", str(timeout_s), "--dir", str(tmp_path), *more]


def test_two_nodes_that_fit_are_found_well(start, port, tmp_path, cache):
    shared_directory = tmp_path / "runs"
    shared_directory.mkdir()
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny.settings(cache, tmp_path / "run")))
    more = ("--config", str(config), "--nproc_per_node", "2")
    other = start(
        *localhost(port, 1, shared_directory, *more), name="node-b", change=[without_transfer]
    )  # before the head
    head = start(*localhost(port, 0, shared_directory, *more), name="node-a", change=[without_transfer])
    assert (head.status(), other.status()) == (0, 0), head.output + other.output
    assert "ok   nodes                  2: node-a, node-b" in head.output
    for name in ("versions", "settings", "hardware", "clocks", "directory", "files of others", "appended lines"):
        assert f"ok   {name:<22} " in head.output
    assert "100 samples in 1 shards" in head.output
    assert "3, of 64 samples each" not in head.output  # 100 samples make one step of 2 x 2 x 16
    assert "1, of 64 samples each" in head.output
    assert head.output.count(" ok ") == 2  # the table's last column
    assert "ok   " not in other.output
    assert list(shared_directory.iterdir()) == []  # nothing is left behind


def test_what_differs_is_found_where_it_is(start, pair, tmp_path):
    where = ["--head", pair.addresses[0], "--nnodes", "2", "--timeout_s", "20", "--dir", str(tmp_path / "runs")]
    (tmp_path / "runs").mkdir()
    head = start(*where, name="node-a", namespace=pair.namespaces[0], change=[impatient, 1.0])
    other = start(*where, name="node-b", namespace=pair.namespaces[1], change=[astray, str(tmp_path / "runs")])
    assert (head.status(), other.status()) == (1, 1), head.output + other.output
    for line in other.output.splitlines():
        assert line.startswith("node-b: ")
    assert "node-b: FAIL timm                   1.0.31 on node-a, 0.9.0 on node-b" in other.output
    assert "node-b: FAIL clocks                 node-b is 3 s ahead of the head" in other.output
    assert "nothing of node-a after 1 s" in other.output
    assert "nothing of node-b after 1 s" in head.output
    assert "0.9.0 on node-b" in head.output
    assert head.output.count("FAIL") == other.output.count("FAIL") + 2  # and in both rows of the table
    assert head.output.count("->") >= 3
    *_, first, second = [line for line in head.output.splitlines() if line.strip()]
    assert first.split()[:3] == ["node-a", pair.addresses[0], pair.interfaces[0]]
    assert second.split()[:3] == ["node-b", pair.addresses[1], pair.interfaces[1]]
    assert "FAIL: timm, clocks, files of others" in second
    assert "+3000" in second


def test_a_node_that_does_not_come_is_missed(start, port, tmp_path):
    head = start(*localhost(port, 0, tmp_path, nnodes=3, timeout_s=2), name="node-a")
    other = start(*localhost(port, 1, tmp_path, nnodes=3, timeout_s=2), name="node-b")
    assert (head.status(), other.status()) == (1, 1)
    for node in (head, other):
        assert "FAIL nodes                  2 of 3 came in 2 s (node-a, node-b); 1 missing" in node.output


def test_slurm_knows_the_names_of_those_that_are_missing():
    here = replace(asked(), nnodes=3, expected=("node-a", "node-b", "node-c"))
    some = nodes.Nodes.__new__(nodes.Nodes)
    some.plan, some._number, some._roll = (
        here,
        0,
        [{"host": "node-a", "nnodes": 3}, {"host": "node-c", "nnodes": 3}],
    )
    (finding,) = some.roll_call()
    assert "missing node-b" in finding.detail


def test_more_processes_than_nodes_are_noticed(start, port, tmp_path):
    extra = localhost(port, 1, tmp_path, timeout_s=5)
    started = [start(*extra, name=f"node-{i}", change=[without_transfer]) for i in range(2)]
    time.sleep(1)  # both wait for the head
    started.append(start(*localhost(port, 0, tmp_path, timeout_s=5), name="node-a", change=[without_transfer]))
    assert 1 in [node.status() for node in started]
    said = "".join(node.output for node in started)
    assert "3 came for 2" in said or "complete without this one" in said


def test_another_number_of_nodes_is_another_job(start, port, tmp_path):
    head = start(*localhost(port, 0, tmp_path), name="node-a", change=[without_transfer])
    other = start(*localhost(port, 1, tmp_path, nnodes=4), name="node-b", change=[without_transfer])
    assert (head.status(), other.status()) == (1, 1)
    assert "node-b: FAIL --nnodes               4 here, 2 on the head" in other.output
    assert "FAIL: --nnodes" in head.output


def test_a_node_that_dies_is_named(start, port, tmp_path):
    head = start(*localhost(port, 0, tmp_path, timeout_s=3), name="node-a", change=[without_transfer])
    other = start(*localhost(port, 1, tmp_path, timeout_s=3), name="node-b", change=[dies_later])
    assert (head.status(), other.status()) == (1, 9)
    assert "node-b said nothing for 3 s" in head.output
    assert list(tmp_path.glob(".gmscale-doctor-*")) == []


def test_a_head_that_dies_is_named(start, port, tmp_path):
    head = start(*localhost(port, 0, tmp_path, timeout_s=3), name="node-a", change=[dies_later])
    other = start(*localhost(port, 1, tmp_path, timeout_s=3), name="node-b", change=[without_transfer])
    assert (head.status(), other.status()) == (9, 1)
    assert "the head node-a is gone" in other.output


# The network


@pytest.mark.slow
def test_all_is_well_over_a_real_link(start, pair, tmp_path):
    where = ["--head", pair.addresses[0], "--nnodes", "2", "--dir", str(tmp_path)]
    started = [
        start(*where, name=f"node-{n[-1]}", namespace=n, change=[limited, interface, UNLIMITED])
        for n, interface in zip(pair.namespaces, pair.interfaces, strict=True)
    ]
    assert [node.status(120) for node in started] == [0, 0], started[0].output + started[1].output
    (line,) = [line for line in started[0].output.splitlines() if "gloo all-reduce" in line]
    assert 0.002 < float(line.split("2 processes:")[1].split()[0]) < 100
    assert "wrong" not in line


@pytest.mark.slow
def test_a_slow_link_is_measured_and_no_failure(start, pair, tmp_path):
    where = ["--head", pair.addresses[0], "--nnodes", "2", "--dir", str(tmp_path)]
    started = [
        start(*where, name=f"node-{n[-1]}", namespace=n, change=[limited, interface, "200mbit"])
        for n, interface in zip(pair.namespaces, pair.interfaces, strict=True)
    ]
    assert [node.status(120) for node in started] == [0, 0], started[0].output + started[1].output
    (line,) = [line for line in started[0].output.splitlines() if "gloo all-reduce" in line]
    assert line.startswith("- ")
    assert 0.002 < float(line.split("2 processes:")[1].split()[0]) < 0.026  # 200 Mbit/s are 0.025 GB/s
    assert f"GLOO_SOCKET_IFNAME names another: lo (127.0.0.1, ::1), {pair.interfaces[0]}" in started[0].output


def test_nobody_listening_is_refused(start, pair, tmp_path):
    where = ["--head", pair.addresses[0], "--nnodes", "2", "--timeout_s", "1"]
    node = start(*where, name="node-b", namespace=pair.namespaces[1])
    assert node.status() == 1
    assert f"FAIL head reachable         {pair.addresses[0]}:29400: connection refused, for 1 s" in node.output
    assert "run `gmscale doctor --launch` on the head too" in node.output


def test_a_link_that_is_down_is_seen_from_either_end(start, pair):
    where = ["--head", "10.0.0.9", "--nnodes", "2", "--timeout_s", "5"]
    node = start(*where, name="node-b", namespace=pair.namespaces[1])
    assert node.status() == 1
    assert "FAIL head reachable         10.0.0.9:29400: no route, for 5 s" in node.output
    assert "compare its addresses with this node's (127.0.0.1, ::1, 10.0.0.2" in node.output
    where[1] = pair.addresses[0]
    run("ip", "-n", pair.namespaces[0], "link", "set", pair.interfaces[0], "down")
    node = start(*where, name="node-b", namespace=pair.namespaces[1])
    assert node.status() == 1
    assert f"FAIL way to the head        10.0.0.2 on {pair.interfaces[1]}, which has no link" in node.output
    run("ip", "-n", pair.namespaces[1], "link", "set", pair.interfaces[1], "down")
    node = start(*where, name="node-b", namespace=pair.namespaces[1])
    assert node.status() == 1
    assert "FAIL way to the head        node-b has no route to 10.0.0.1" in node.output


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [(network.REFUSED, "nothing listens"), (network.NO_ANSWER, "firewall"), (network.NO_ROUTE, "is off")],
)
def test_each_way_not_to_reach_the_head_has_its_remedy(monkeypatch, answer, remedy):
    monkeypatch.setattr(local.network, "reach", lambda *_: answer)
    finding = local.reach_head(asked("--head", "192.0.2.1", "--nnodes", "2", "--timeout_s", "0.1"))
    assert not finding.ok
    assert answer in finding.detail
    assert remedy in finding.remedy


def found(plan: Plan) -> dict[str, Any]:
    return {finding.name: finding for finding in local.look_around(plan)}


def test_a_name_that_does_not_resolve(capsys):
    assert doctor.main(["--launch", "--head", "no-such-host.invalid", "--nnodes", "2"]) == 1
    assert "'no-such-host.invalid' does not resolve" in capsys.readouterr().out


def test_a_head_that_is_everybody_is_nobody(monkeypatch):
    monkeypatch.setattr(network, "addresses_of", lambda host: ["127.0.1.1"])
    finding = found(asked("--head", "node-a", "--nnodes", "2"))["name of the head"]
    assert "127.0.1.1" in finding.detail
    assert "/etc/hosts" in finding.remedy
    assert found(asked("--head", "node-a", "--nnodes", "1"))["name of the head"].ok


def test_a_port_that_is_taken():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen(1)
        plan = asked("--port", str(holder.getsockname()[1]))
        finding = found(plan)["port of the head"]
        assert "another program" in finding.detail
        assert "ss -ltnp" in finding.remedy
    assert found(plan)["port of the head"].ok


@pytest.mark.parametrize(
    ("variable", "value", "ok", "optional"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", True, True),
        ("GLOO_SOCKET_IFNAME", "l", False, False),
        ("NCCL_SOCKET_IFNAME", "l", True, True),  # a prefix
        ("NCCL_SOCKET_IFNAME", "=l", False, False),
        ("NCCL_SOCKET_IFNAME", "^docker", True, True),
        ("NCCL_SOCKET_IFNAME", "^lo", False, True),
    ],
)
def test_interfaces_that_were_chosen(monkeypatch, variable, value, ok, optional):
    others = {"lo": ["127.0.0.1"], "eth7": ["192.0.2.7"]}
    monkeypatch.setattr(network, "interfaces", lambda: others)
    monkeypatch.setenv(variable, value)
    finding = found(asked())[variable]
    assert finding.ok is ok
    assert finding.ok or finding.optional is optional
    assert finding.ok or "lo" in finding.remedy


def test_an_all_reduce_that_fails_names_the_node_and_the_interfaces(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    good = {"small_s": 1e-4, "large_s": 0.1}
    finding = link.link_finding("gloo", 2, [good, {"error": "no end in sight"}], ["a", "b"])
    assert finding.failed
    assert finding.detail == "no end in sight on b"
    assert "eth7" in finding.remedy
    assert "lo (127.0.0.1" in finding.remedy
    assert link.link_finding("gloo", 2, [good, good], ["a", "b"]).detail.startswith("2 processes: 0.64 GB/s")
    assert link.bytes_on_the_link(100, 4) == 150  # reduce-scatter and all-gather: 3 quarters each


def test_a_transfer_that_cannot_begin_says_so(port):
    answer = link.Transfer("gloo", ("127.0.0.1", port), "gloo", [0], 1, 1.0).finish()
    assert "timed out" in answer["error"] or "connect" in answer["error"]


# The data


def data_of(cache: Path, tmp_path: Path, number: int = 0, **changes: Any) -> dict[str, Any]:
    config = from_dict(tiny.settings(cache, tmp_path, data={**tiny.settings(cache, tmp_path)["data"], **changes}))
    return shards.look_at_data(asked("--nproc_per_node", "2"), config, number, 2)


def test_all_nodes_see_the_same_data(cache, tmp_path):
    first, second = data_of(cache, tmp_path), data_of(cache, tmp_path, 1)
    assert first == second
    assert (first["samples"], first["steps"]) == (tiny.SIZE, 1)


def test_data_that_is_too_little_or_not_there_is_said(cache, tmp_path):
    assert "batch_size_per_device is too large" in data_of(cache, tmp_path, batch_size_per_device=64)["error"]
    source = tmp_path / "copy"
    source.mkdir()
    for path in tiny.build(cache).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    copied = data_of(cache, tmp_path, source=str(source))
    assert copied == data_of(cache, tmp_path)
    streamed = data_of(cache, tmp_path, source=str(source), access="stream")
    assert streamed["samples"] == tiny.SIZE
    next(source.glob("*train*.tar")).unlink()
    assert "there is no such file" in data_of(cache, tmp_path, source=str(source))["error"]
    assert "No such file" in data_of(cache, tmp_path, source=str(source), access="stream")["error"]
    assert "not a directory" in data_of(cache, tmp_path, source=str(tmp_path / "none"))["error"]


def compared(config: Any, answers: list[dict[str, Any]], number: int = 0) -> dict[str, Any]:
    here = SimpleNamespace(number=number, is_head=number == 0, hosts=["a", "b"])
    return {f.name: f for f in shards.shard_findings(asked("--nproc_per_node", "2"), config, here, answers)}


def test_other_data_on_a_node_is_said_there_and_by_the_head(cache, tmp_path):
    one = {"samples": 100, "shards": 4, "steps": 1, "fingerprint": "aa"}
    config = tiny.config(cache, tmp_path)
    assert compared(config, [one, one])["same data"].ok
    for number, said in ((0, "other data on b"), (1, "fingerprint bb here")):
        finding = compared(config, [one, one | {"fingerprint": "bb"}], number)["same data"]
        assert finding.failed
        assert said in finding.detail
    assert compared(config, [one, {"error": "gone"}], 1)["data"].detail == "gone"


def test_streams_want_a_shard_for_each_worker_and_an_index_none(cache, tmp_path):
    few = {"samples": 100, "shards": 4, "steps": 1, "fingerprint": "aa"}
    indexed = tiny.config(cache, tmp_path, data={**tiny.settings(cache, tmp_path)["data"], "workers": 2})
    streamed = replace(indexed, data=replace(indexed.data, access="stream"))
    assert compared(indexed, [few, few])["shards for workers"].ok
    finding = compared(streamed, [few, few])["shards for workers"]
    assert (finding.ok, finding.optional) == (False, True)
    assert "4 shards for 4 ranks x 2 workers" in finding.detail
    assert "make at least 8" in finding.remedy
    assert "data.workers to 1" in finding.remedy
    assert compared(streamed, [few | {"shards": 8}] * 2)["shards for workers"].ok


# The options


def test_the_environment_has_the_defaults():
    environ = {
        "NNODES": "2:4",
        "MASTER_ADDR": "node-a",
        "MASTER_PORT": "1234",
        "NPROC_PER_NODE": "8",
        "NODE_RANK": "1",
    }
    plan = asked(**environ)
    assert (plan.nnodes, plan.head, plan.port, plan.nproc_per_node, plan.node_rank) == (4, "node-a", 1234, 8, 1)
    plan = asked("--head", "node-b:99", "--nnodes", "3", **environ)
    assert (plan.nnodes, plan.head, plan.port) == (3, "node-b", 99)
    assert asked("--head", "node-b:99", "--port", "7").port == 7
    assert (asked("--head", "[fd00::1]:99").head, asked("--head", "[fd00::1]:99").port) == ("fd00::1", 99)
    assert asked("--head", "fd00::1").head == "fd00::1"
    assert (asked().nnodes, asked().head, asked().port) == (1, "localhost", 29400)


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["--nnodes", "2"], {}, "name the one where all meet"),
        (["--nnodes", "many"], {}, "--nnodes is 'many'; expected a whole number, 1 or more"),
        ([], {"NNODES": "0"}, "NNODES is '0'"),
        ([], {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'; expected a whole number, 1 to 65535"),
        (["--nproc_per_node", "-1"], {}, "--nproc_per_node is '-1'"),
        (["--timeout_s", "0"], {}, "--timeout_s is 0"),
        (["--head", "a:b:c:"], {}, "expected HOST"),
        (["--config", "nowhere.yaml"], {}, "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(arguments, environ, words):
    with pytest.raises(UsageError) as error:
        asked(*arguments, **environ)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_step_of_a_slurm_job_needs_no_options(tmp_path, monkeypatch):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    step = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_PROCID": "0"}
    plan = asked(**step)
    assert (plan.nnodes, plan.head, plan.expected) == (3, "n1", ("n1", "n2", "n3"))
    assert asked("--nnodes", "2", **step).expected == ()
    assert asked(**step, MASTER_ADDR="n2").head == "n2"
    assert asked(SLURM_JOB_NODELIST="n[1-3]", SLURM_PROCID="0").nnodes == 1  # a batch script is on one node
