"""A node of a Ray cluster: Ray on it, on the head also the command, and what the nodes tell one another."""

import argparse
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from torch.distributed import DistError

from gmscale import diagnosis
from gmscale.launch import network
from gmscale.launch.console import say
from gmscale.launch.meeting import EndedError, Meeting
from gmscale.launch.topology import Topology
from gmscale.stopping import STOPPED, StopRequest
from gmscale.sweep import tether
from gmscale.sweep.process import Process

_RESTARTS = 3  # of Ray on a node, in a job that goes on without it
_LOOK_S = 0.2
_LONGEST = 300  # characters of an error of Ray's

# Prints the nodes that are there until there are enough. A process of its own: Ray listens for signals.
_COUNT = """
import sys, time, ray
alive = []
while len(alive) < int(sys.argv[1]):
    try:
        ray.init(log_to_driver=False, logging_level="CRITICAL", ignore_reinit_error=True)
        alive = sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])
    except (ConnectionError, RuntimeError):
        pass  # the head is about to come
    print("Ray has:", ", ".join(alive) or "no node", flush=True)
    time.sleep(0.3)
"""


class RayNode:
    """Ray on this machine, and on the head the command, for as long as this process lives."""

    def __init__(
        self,
        topology: Topology,
        options: argparse.Namespace,
        ports: Mapping[str, int],
        own_token: str,
        meeting: Meeting,
        stop: StopRequest,
        folder: Path,
    ) -> None:
        self._topology, self._options, self._ports = topology, options, ports
        self._own_token = own_token
        self._meeting, self._stop, self._folder = meeting, stop, folder
        self._ray: Process | None = None
        self._command: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        meeting.listen(self._ended.set)

    def lead(self, command: list[str]) -> int:
        """Start the cluster and the command on it; return the command's status. Raises EndedError."""
        t = self._topology
        token, salt = self._own_token or secrets.token_hex(32), secrets.token_hex(16)
        shown = {"made": "" if self._own_token else token, "salt": salt, "proof": _proof(token, salt)}
        self._meeting.store.set("token", json.dumps(shown))
        if t.max_nodes > 1 and not self._own_token:
            say(
                f"whoever reaches {t.head}:{t.port} can read the token of this cluster; "
                "RAY_AUTH_TOKEN, the same on all nodes, sets one of yours"
            )
        address = _address(t.route.address, self._ports["port"])
        self._start_ray(["--head"], token)
        while isinstance(network.reach(t.route.address, self._ports["port"], 1.0), str):
            self._look_before_command()
        self._meeting.store.set("ray", address)
        environment = {**_environment(token), "RAY_ADDRESS": address}
        self._wait_for_nodes(environment)
        self._meeting.new_attempt()  # from here on a node that comes to the wrong job does not end this one
        self._command = _start(command, environment)
        status = self._watch(self._command)
        self._meeting.tell(status, [])
        return status

    def _watch(self, command: subprocess.Popen[bytes]) -> int:
        """Wait for the command, hand a request to stop to it, and return its status."""
        asked: float | None = None
        while (status := command.poll()) is None:
            if asked is None and self._asked_to_stop():
                asked = time.monotonic()
                command.terminate()
            if asked is not None and time.monotonic() - asked > self._topology.grace_s:
                said = f"asked to stop {self._topology.grace_s:.0f} s ago, and the command still runs; it is killed"
                raise self._end(STOPPED, [said])
            self._look()
        status = status if status >= 0 else 128 - status
        if asked is not None and status not in (0, STOPPED) and self._ray_has_ended():
            say(f"the command ended with status {status}, having lost Ray after it was asked to stop; it can go on")
            return STOPPED
        return status

    def follow(self) -> int:
        """Join the head's cluster and stay until the job is over. Raises EndedError."""
        told, failures, token = False, 0, ""
        try:
            while True:
                self._look(rejoins=failures < _RESTARTS)
                if self._stop.requested and not told:
                    self._meeting.store.set("stop", self._topology.host)
                    told = True
                if not token and self._meeting.store.check(["token"]):
                    token = self._agreed_token()
                if self._ray_has_ended() and not self._asked_to_stop():
                    failures += 1
                    say(f"{self._said_by_ray()}; it starts again ({failures} of {_RESTARTS})")
                    self._ray = None
                if self._ray is None and self._meeting.store.check(["ray"]):
                    self._start_ray(["--address", self._meeting.store.get("ray").decode()], token)
        except DistError:
            self._ended.wait(5)  # for the other thread to find out what that means
            verdict = self._meeting.verdict
            raise EndedError(verdict.status if verdict else 1, verdict.lines if verdict else []) from None

    def take_down(self) -> None:
        """End what this node has started, also what has moved away from it."""
        if self._command is not None:
            assert self._command.stdin is not None
            self._command.stdin.close()  # by which its tether knows
            self._command.wait()
        if self._ray is not None:
            self._ray.kill()

    def _agreed_token(self) -> str:
        """Return the token of the cluster. Raises EndedError if the head has another than this node."""
        head = json.loads(self._meeting.store.get("token"))
        token: str = self._own_token or head["made"]
        if _proof(token, head["salt"]) == head["proof"]:
            return token
        said = f"RAY_AUTH_TOKEN of {self._topology.host} is not that of the head; set the same on all nodes"
        raise self._leave(2, [said])

    def _start_ray(self, role: list[str], token: str) -> None:
        o = self._options
        # one below ours, which stays closed to other users: Ray opens its own to all
        arguments = ["start", *role, "--block", "--disable-usage-stats", "--temp-dir", str(self._folder / "ray")]
        arguments += ["--node-ip-address", self._topology.route.address, "--num-cpus", str(o.num_cpus)]
        arguments += [] if o.num_gpus is None else ["--num-gpus", str(o.num_gpus)]
        arguments += ["--min-worker-port", "0", "--max-worker-port", "0"]
        for name, port in self._ports.items():
            arguments += [f"--{name}", str(port)]
        if self._topology.is_head:
            arguments += ["--include-dashboard", str(o.dashboard).lower()]
        # Slurm sends SIGUSR1, by which it asks a job to stop, to all its processes, and Ray's would end
        program = ["sh", "-c", "trap '' USR1; exec \"$@\"", "sh", sys.executable, "-m", "ray.scripts.scripts"]
        self._ray = Process([*program, *arguments], self._log, _environment(token))

    def _wait_for_nodes(self, environment: Mapping[str, str]) -> None:
        t, deadline = self._topology, time.monotonic() + self._topology.join_timeout_s
        log = self._folder / "nodes.log"
        counter = Process([sys.executable, "-c", _COUNT, str(t.min_nodes)], log, environment)
        try:
            while counter.poll() is None:
                self._look_before_command()
                if time.monotonic() > deadline:
                    counted = [line for line in log.read_text().splitlines() if line.startswith("Ray has: ")]
                    said = counted[-1] if counted else "Ray does not answer"
                    raise self._end(1, [f"waited {t.join_timeout_s:.0f} s for {t.nodes} nodes; {said}"])
            if counter.poll() != 0:
                raise self._end(1, [f"Ray does not answer: {log.read_text().splitlines()[-1]}"])
        finally:
            counter.kill()

    def _asked_to_stop(self) -> bool:
        return self._stop.requested or self._meeting.store.check(["stop"])

    def _look_before_command(self) -> None:
        self._look()
        if self._asked_to_stop():
            raise self._end(STOPPED, ["asked to stop before the command had begun"])

    def _look(self, *, rejoins: bool = False) -> None:
        """Wait a moment. Raises EndedError if the job is over, or Ray here has ended and may not start again."""
        if self._ended.wait(_LOOK_S):
            verdict = self._meeting.verdict
            assert verdict is not None
            raise EndedError(verdict.status, verdict.lines)
        # Slurm asks every process to stop, Ray's too: then it is the command that counts
        if not self._ray_has_ended() or self._asked_to_stop():
            return
        if self._topology.is_head:
            raise self._end(1, [self._said_by_ray()])
        if not rejoins or not self._meeting.has_begun():
            raise self._leave(1, [self._said_by_ray()])

    def _ray_has_ended(self) -> bool:
        return self._ray is not None and self._ray.poll() is not None

    def _leave(self, status: int, lines: list[str]) -> EndedError:
        """Return what to raise where this node cannot take part; that ends it all, unless the command has begun."""
        return EndedError(status, lines) if self._meeting.has_begun() else self._end(status, lines)

    def _end(self, status: int, lines: list[str]) -> EndedError:
        """Tell the other nodes that it is over, and return what to raise."""
        self._meeting.tell(status, lines)
        return EndedError(status, lines)

    @property
    def _log(self) -> Path:
        return self._folder / "ray.log"

    def _said_by_ray(self) -> str:
        assert self._ray is not None
        lines = self._log.read_text(errors="replace").splitlines()
        errors = [" ".join(line.split()) for line in lines if re.search(r"[Ee]rror|exit code", line)]
        status = self._ray.poll()
        why = errors[-1][:_LONGEST] if errors else "" if status is None else diagnosis.describe_status(status)
        return f"Ray on {self._topology.host} has ended: {why}"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _proof(token: str, salt: str) -> str:
    """Return what shows that somebody has the token, without showing it."""
    return hashlib.scrypt(token.encode(), salt=bytes.fromhex(salt), n=2**14, r=8, p=1).hex()


def _environment(token: str) -> dict[str, str]:
    """Return what Ray and its clients read."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the command so that nothing of it outlives this process, and SIGTERM is handed to it alone."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *command],
        stdin=subprocess.PIPE,
        env={**os.environ, **environment},
        start_new_session=True,
    )
