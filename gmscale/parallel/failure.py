"""Failing together: one error message a job, and no rank that waits for a dead one."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.distributed as dist

from gmscale.errors import RunError
from gmscale.launched import launcher_pid
from gmscale.parallel.world import World


def is_of_a_collective(error: BaseException) -> bool:
    """Return whether an operation between ranks failed: a peer is gone, or did not come."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


class PeerError(RunError):
    """Another rank failed and has reported it: this one ends without a word."""


@contextmanager
def together(world: World) -> Iterator[None]:
    """Run a block without collectives on all ranks; if it fails on any of them, it fails on all.

    The first rank that failed raises its own error, the others PeerError, so that it is shown once.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed: list[Any] = [error is not None]
    if world.size > 1:
        failed = [None] * world.size
        dist.all_gather_object(failed, error is not None, group=world.control)
    if True in failed and failed.index(True) != world.rank:
        raise PeerError(f"rank {failed.index(True)} failed") from error
    if error is not None:
        raise error


def announce_failure(world: World) -> bool:
    """Tell the other ranks that this one has failed; return whether it is the first, which shows its error."""
    if world.store is None:
        return True
    world.store.set(f"rank{world.rank}", "failed")
    first = world.store.add("failures", 1) == 1
    world.store.set("any", str(world.rank))
    return bool(first)


def failed_elsewhere(world: World, wait_s: float = 3.0) -> bool:
    """Return whether another rank has announced a failure, waiting a moment for its word.

    A rank that dies breaks the collectives of all others: what those then raise is not the cause.
    """
    if world.size == 1:
        return False
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        try:
            if world.store.check(["any"]):
                return True
        except Exception:  # the store's host is gone, and so is the job
            return True
        time.sleep(0.1)
    return False


class Watch:
    """A thread that ends this process when another rank has failed, or when who started it is gone.

    Its collectives may wait for that rank until their time-out, on a GPU without ever returning to Python.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._parent = launcher_pid()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; left inside the store at interpreter exit it would abort the process."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(1.0):
            if os.getppid() != self._parent:  # a launcher that was killed ended nobody, and may be started again
                self._end("the launcher is gone")
            if self._failed_elsewhere() and not self._stopped.wait(3.0):  # usually the main thread ends, in order
                self._end("another rank failed")

    def _failed_elsewhere(self) -> bool:
        store = self._world.store
        try:
            return store.check(["any"]) and not store.check([f"rank{self._world.rank}"])
        except Exception:  # the store's host is gone; the collectives will say so
            return False

    def _end(self, reason: str) -> NoReturn:
        leave = threading.Thread(target=lambda: self._world.heartbeat.leave(1, reason, by_peer=True), daemon=True)
        leave.start()
        leave.join(timeout=1.0)  # a file system that hangs must not keep this process
        os._exit(1)
