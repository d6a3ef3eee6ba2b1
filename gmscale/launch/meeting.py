"""Where the launchers of a job meet: a key-value store on the head, and what they tell one another there."""

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gmscale import __version__
from gmscale.errors import RunError, UsageError
from gmscale.launch import network
from gmscale.launch.topology import Topology
from gmscale.stopping import STOPPED, StopRequest

LOST_S = 60.0  # a network that is cut for longer ends the launchers that cannot reach the head
_LEAVE_S = 5.0


@dataclass(frozen=True)
class Verdict:
    """Why the whole job ends; told to all launchers by the first that knows."""

    status: int
    host: str
    """Who says so; empty if nobody does."""
    lines: list[str]
    teller: int
    """Number of the launcher; 0 if there is none."""


class EndedError(Exception):
    """The job is over for this launcher, with a status and what there is to say."""

    def __init__(self, status: int, lines: Sequence[str] = ()) -> None:
        super().__init__(status)
        self.status, self.lines = status, list(lines)


class Meeting:
    """This launcher's connection to the others."""

    def __init__(self, topology: Topology, say: Callable[[str], None], stop: StopRequest) -> None:
        self._topology, self._stop = topology, stop
        self.launch = ""
        """Name of this launch; no other has the same."""
        self.number = 0
        """Of this launcher; no other has the same."""
        if not topology.is_head:
            self._wait_for_head(say)
        self.store = self._connect(topology.port, serves=topology.is_head)
        self._verdict: Verdict | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def agree(self, command: list[str]) -> None:
        """Compare the topology and the command with the head's. Raises UsageError where they differ.

        Before ranks have begun that ends the whole job; later only this launcher, which came to the wrong one.
        """
        t = self._topology
        self.number = self.store.add("joined", 1)
        self.store.set(f"node {self.number}", t.host)
        own = {
            "run id": t.run_id,
            "--nnodes": t.nodes,
            "--nproc_per_node": t.nproc_per_node,
            "gmscale": __version__,
            "torch": torch.__version__,
            "command": command,
        }
        if t.is_head:
            self.launch = f"{t.run_id}-{uuid.uuid4().hex[:8]}"
            self.store.set("terms", json.dumps({"host": t.host, "launch": self.launch, **own}))
        else:
            self.store.wait(["terms"], timedelta(seconds=LOST_S))
            heads: dict[str, Any] = json.loads(self.store.get("terms"))
            for name, value in own.items():
                if heads[name] != value:
                    error = UsageError(
                        f"{t.host} and the head {heads['host']} were not started alike: {name} is {_shown(value)} "
                        f"here and {_shown(heads[name])} there"
                    )
                    if not self.has_begun():
                        self.tell(2, [str(error)])
                    raise error
            self.launch = heads["launch"]

    def names(self) -> list[str]:
        """Return the nodes that have come so far."""
        number = self.store.add("joined", 0)
        return [self.store.get(f"node {i}").decode() for i in range(1, number + 1)]

    def listen(self, interrupt: Callable[[], None]) -> None:
        """Call `interrupt` on another thread as soon as there is a verdict of another launcher."""
        self._thread = threading.Thread(target=self._listen, args=(interrupt,), daemon=True)
        self._thread.start()

    @property
    def verdict(self) -> Verdict | None:
        """What another launcher has found, if one has."""
        return self._verdict

    def report_failure(self, world: str) -> None:
        """Tell the launchers that ranks of this start have failed, and so cannot agree on anything."""
        with suppress(RuntimeError):
            self.store.set(f"failed {world}", "")

    def has_failed(self, world: str) -> bool:
        """Return whether a launcher has told so."""
        return self.store.check([f"failed {world}"])

    def tell(self, status: int, lines: Sequence[str]) -> None:
        """Tell all launchers why the job ends; the first one to do so counts."""
        verdict = Verdict(status, self._topology.host, list(lines), self.number)
        with suppress(RuntimeError):
            self.store.compare_set("verdict", "", json.dumps(asdict(verdict)))

    def has_begun(self) -> bool:
        """Return whether ranks have been started in this job."""
        return self.store.add("attempts", 0) > 0

    def new_attempt(self) -> int:
        """Return the number of a start of the ranks that begins now."""
        return self.store.add("attempts", 1)

    def leave(self) -> None:
        """Say goodbye; the head waits a moment, so that the others can still read what was said."""
        self._ended.set()
        with suppress(RuntimeError):
            self.store.add("left", 1)
            deadline = time.monotonic() + _LEAVE_S
            while self._topology.is_head and time.monotonic() < deadline:
                if self.store.add("left", 0) >= self.store.add("joined", 0):
                    break
                time.sleep(0.05)

    def _listen(self, interrupt: Callable[[], None]) -> None:
        try:
            store = self._connect(self.store.port)  # of its own: a store answers one question at a time
            while not self._ended.wait(0.5):
                if store.check(["verdict"]):
                    self._verdict = Verdict(**json.loads(store.get("verdict")))
                    break
        except RuntimeError:
            head = self._topology.head
            self._verdict = Verdict(1, "", [f"the head {head} is gone: its launcher ended, or is out of reach"], 0)
        if not self._ended.is_set():
            interrupt()

    def _connect(self, port: int, *, serves: bool = False) -> dist.TCPStore:
        t = self._topology
        try:
            return dist.TCPStore(
                t.head,
                port,
                is_master=serves,
                timeout=timedelta(seconds=LOST_S),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise RunError(f"cannot meet at {t.head}:{port}: {' '.join(str(error).split())[:200]}") from None

    def _wait_for_head(self, say: Callable[[str], None]) -> None:
        t, began, told = self._topology, time.monotonic(), False
        while isinstance(answer := network.reach(t.head, t.port, 2.0), str):
            waited = time.monotonic() - began
            if waited > t.join_timeout_s:
                raise RunError(
                    f"{t.host} cannot reach the head {t.head}:{t.port} for {waited:.0f} s: {answer}; does the "
                    "launcher run there, and is the port open? `gmscale doctor --launch` on all nodes finds out"
                )
            if self._stop.requested:
                raise EndedError(STOPPED, [f"asked to stop while it waited for the head {t.head}:{t.port}"])
            if waited > 5 and not told:
                say(f"{t.host} waits for the head {t.head}:{t.port} ({answer})")
                told = True
            time.sleep(0.2)


def interrupt_main_thread() -> None:
    """Make the main thread look up from what it does."""
    os.kill(os.getpid(), signal.SIGUSR2)


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
