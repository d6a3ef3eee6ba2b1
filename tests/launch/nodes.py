"""Nodes on one machine: network namespaces, each with a hostname and a launcher of its own."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import tiny
import warm

from gmscale.bench.link import Link, veth_link
from gmscale.errors import RunError

ROOT = Path(__file__).parent.parent.parent
PORT = 29400


class Launcher(warm.Program):
    """`gmscale launch TOPOLOGY train ARGV` on a node, or on this machine where none is named."""

    def __init__(
        self, log: Path, topology: Sequence[str], argv: Sequence[str], node: tuple[str, str] | None = None
    ):
        network, self.host = node if node else (None, None)
        arguments = ["-m", "gmscale", "launch", *topology, "train", *argv]
        super().__init__(log, arguments, ROOT, network=network, host=self.host)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of those that live."""
        return warm.ranks(self.pid)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        pids = self.ranks().values()
        self.kill()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


class Nodes:
    """Two nodes n1 and n2 and the cable between them; n1 is the head."""

    def __init__(self, link: Link, folder: Path) -> None:
        self._link, self._folder = link, folder
        self.started: list[Launcher] = []

    def launch(self, number: int, *topology: str, argv: Sequence[str], nnodes: str = "2") -> Launcher:
        """Start the launcher of node 1 or 2."""
        node = self._link.namespaces[number - 1], f"n{number}"
        meet = ("--nnodes", nnodes, "--nproc_per_node", "1", "--head", f"{self._link.addresses[0]}:{PORT}")
        log = self._folder / f"log-{len(self.started)}-n{number}"
        launcher = Launcher(log, (*meet, *topology), argv, node)
        self.started.append(launcher)
        return launcher

    def cable(self, state: str) -> None:
        """Set the cable `up` or `down`."""
        subprocess.run(
            ["ip", "-n", self._link.namespaces[1], "link", "set", self._link.interfaces[1], state], check=True
        )


@contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Make the nodes, or skip the test where they cannot be made; end all that runs there."""
    try:
        with veth_link() as link:
            nodes = Nodes(link, folder)
            try:
                yield nodes
            finally:
                for launcher in nodes.started:
                    launcher.end()
    except RunError as error:
        if "network namespaces" not in str(error) and "cannot make its link" not in str(error):
            raise
        pytest.skip(str(error))


def wait_for(
    what: str, launchers: Sequence[Launcher], condition: Callable[[], bool], timeout_s: float = 60
) -> float:
    """Wait until `condition()` holds, while the launchers live; return the seconds that took."""
    began = time.monotonic()
    while not condition():
        for launcher in launchers:
            assert launcher.poll() is None, f"{what}: {launcher.host} ended: {launcher.output}"
        if time.monotonic() - began > timeout_s:
            pytest.fail(f"{what} did not come in {timeout_s} s: " + "\n".join(x.output for x in launchers))
        time.sleep(0.02)
    return time.monotonic() - began


def step_of(run_dir: Path) -> int:
    """Return the last step that metrics.jsonl shows."""
    try:
        return max(r["step"] for r in tiny.metrics(run_dir))
    except (OSError, ValueError):
        return 0
