"""The nodes that came: they meet in a key-value store on the head, tell one another things, and compare clocks."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from gmscale.doctor.finding import Finding
from gmscale.doctor.plan import Plan
from gmscale.errors import RunError

_POLL_S = 0.02
_GRACE_S = 15.0
_PINGS = 10
_LARGEST_SKEW_S = 1.0

now: Callable[[], float] = time.time
"""The clock that nodes compare."""


class Nodes:
    """This node among those that came. All of them make the same calls in the same order."""

    def __init__(self, plan: Plan, *, is_head: bool) -> None:
        """Meet at the head. Raises RunError if that fails."""
        self.plan, self.is_head = plan, is_head
        timeout = timedelta(seconds=plan.timeout_s + _GRACE_S)
        try:
            self.store = dist.TCPStore(
                plan.head, plan.port, is_master=is_head, wait_for_workers=False, timeout=timeout
            )
            self._number = 0 if is_head else self.store.add("came", 1)
            self.store.set(f"node {self._number}", json.dumps({"host": plan.host, "nnodes": plan.nnodes}))
            if is_head:
                self._await_all()
            with self._bounded(plan.timeout_s):
                self._roll = json.loads(self.store.get("roll"))
        except RuntimeError as error:
            raise RunError(f"cannot meet at {plan.head}:{plan.port}: {_first_line(error)}") from None

    @property
    def number(self) -> int:
        """0 is the head; the others are numbered as they came."""
        return self._number

    @property
    def hosts(self) -> list[str]:
        """The names of the nodes, by number, made different where nodes are called alike."""
        names = [node["host"] for node in self._roll]
        return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]

    @property
    def others(self) -> list[int]:
        return [number for number in range(len(self._roll)) if number != self._number]

    @property
    def complete(self) -> bool:
        """Whether those came that were expected, and no more."""
        return len(self._roll) == self._wanted

    @property
    def late(self) -> bool:
        """Whether the others began without this one."""
        return self._number >= len(self._roll)

    def roll_call(self) -> Iterator[Finding]:
        """Yield who is here; it is not ok unless as many came as the head expects."""
        here, wanted = len(self._roll), self._wanted
        names = ", ".join(self.hosts)
        if self.late:
            remedy = "start doctor once on each node, on all at about the same time, and give --nnodes as it is"
            yield Finding("nodes", False, f"the job's {wanted} are complete without this one: {names}", remedy)
        elif self.complete:
            yield Finding("nodes", True, f"{here}: {names}")
        elif here > wanted:
            remedy = "start doctor once on each node (srun --ntasks-per-node 1), and give --nnodes as it is"
            yield Finding("nodes", False, f"{here} came for {wanted}: {names}", remedy)
        else:
            missing = [name for name in self.plan.expected if name not in self.hosts]
            known = f"missing {', '.join(missing)}" if missing else f"{wanted - here} missing"
            remedy = "what keeps a node away is said there: look at its output, and start doctor on all at once"
            detail = f"{here} of {wanted} came in {self.plan.timeout_s:.0f} s ({names}); {known}"
            yield Finding("nodes", False, detail, remedy)
        if self.plan.nnodes != wanted:
            yield Finding(
                "--nnodes",
                False,
                f"{self.plan.nnodes} here, {wanted} on the head",
                "give all nodes the same number",
            )

    def gather(self, topic: str, value: Any, timeout_s: float | None = None) -> list[Any]:
        """Return what each node says to a topic, by number. Raises RunError if one does not, naming it."""
        limit = self.plan.timeout_s if timeout_s is None else timeout_s
        keys = [f"{topic}/{number}" for number in range(len(self._roll))]
        deadline = time.monotonic() + limit
        try:
            with self._bounded(limit):
                self.store.set(keys[self._number], json.dumps(value))
                while not self.store.check(keys):
                    if time.monotonic() > deadline:
                        silent = [h for h, key in zip(self.hosts, keys, strict=True) if not self.store.check([key])]
                        raise RunError(f"{', '.join(silent)} said nothing for {limit:.0f} s, asked for: {topic}")
                    time.sleep(_POLL_S)
                return [json.loads(answer) for answer in self.store.multi_get(keys)]
        except RuntimeError as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"the head {self.hosts[0]} is gone, asked for: {topic}") from None

    def leave(self) -> None:
        """Say that all is printed; the head waits for that, and for a moment only."""
        with suppress(RuntimeError):
            self.store.add("left", 1)
            deadline = time.monotonic() + _GRACE_S
            while self.is_head and self.store.add("left", 0) < len(self._roll) and time.monotonic() < deadline:
                time.sleep(_POLL_S)

    @property
    def _wanted(self) -> int:
        return int(self._roll[0]["nnodes"])

    def _await_all(self) -> None:
        deadline = time.monotonic() + self.plan.timeout_s
        while (came := self.store.add("came", 0)) < self.plan.nnodes - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self.store.set(
            "roll", json.dumps([json.loads(self.store.get(f"node {number}")) for number in range(came + 1)])
        )

    @contextmanager
    def _bounded(self, limit_s: float) -> Iterator[None]:
        """End this process if the head's machine falls silent: the store would wait for it for ever."""
        if self.is_head:
            yield
            return
        timer = threading.Timer(limit_s + _GRACE_S, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        sys.stdout.flush()
        where = f"{self.plan.head}:{self.plan.port}"
        print(f"gmscale: error: {self.plan.host}: no answer from {where} any more", file=sys.stderr, flush=True)
        os._exit(1)


def clocks(nodes: Nodes) -> list[tuple[float, float]]:
    """Return for each node how many seconds its clock is ahead of the head's, and how wrong that can be at most.

    As in NTP: the head says its time in answer to a node, which takes it for the time halfway between question and
    answer; the quickest answer of a few counts.
    """
    measured = (0.0, 0.0)
    if nodes.is_head:
        for number in nodes.others:
            for ping in range(_PINGS):
                with suppress(RuntimeError):  # a node that is gone is missed at the end
                    nodes.store.wait([f"ping {number} {ping}"], timedelta(seconds=nodes.plan.timeout_s))
                    nodes.store.set(f"pong {number} {ping}", repr(now()))
    else:
        answers = []
        for ping in range(_PINGS):
            asked, began = now(), time.monotonic()
            try:
                nodes.store.set(f"ping {nodes.number} {ping}", "")
                heads = float(nodes.store.get(f"pong {nodes.number} {ping}"))
            except RuntimeError:
                raise RunError("the head did not answer when clocks were compared") from None
            took = time.monotonic() - began
            answers.append((took / 2, asked + took / 2 - heads))
        error, ahead = min(answers)
        measured = ahead, error
    return [(ahead, error) for ahead, error in nodes.gather("clock", measured)]


def clock_findings(nodes: Nodes, measured: list[tuple[float, float]]) -> Iterator[Finding]:
    """Yield what is to be said of this node's clock; the head says it of all."""
    remedy = (
        "synchronise the clocks (chronyc makestep; timedatectl set-ntp true): launchers take a node for dead whose "
        "heartbeats look six seconds old, and file times on the shared directory mislead"
    )
    wrong = {
        number: f"{nodes.hosts[number]} is {abs(ahead):.3g} s {'ahead of' if ahead > 0 else 'behind'} the head"
        for number, (ahead, error) in enumerate(measured)
        if abs(ahead) - error > _LARGEST_SKEW_S
    }
    said = list(wrong.values()) if nodes.is_head else [wrong[nodes.number]] if nodes.number in wrong else []
    if said:
        yield Finding("clocks", False, "; ".join(said), remedy)
    else:
        ahead, error = max(measured, key=lambda of: abs(of[0]))
        yield Finding("clocks", True, f"within {1e3 * abs(ahead):.2g} ms (+- {1e3 * error:.2g} ms)")


def _first_line(error: BaseException) -> str:
    return " ".join((str(error).splitlines() or [type(error).__name__])[0].split())[:200]
