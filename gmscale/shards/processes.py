"""Work spread over processes that share nothing with this one and do not outlive it."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from gmscale.errors import RunError, UsageError

Task = TypeVar("Task")
Message = TypeVar("Message")


def spread(
    work: Callable[[Task], Iterator[Message]], tasks: Iterable[Task], workers: int
) -> Generator[Message, None, None]:
    """Yield what `work` yields for each task, as it comes, from `workers` processes; from this one with 0.

    `work` is a generator function of a module. It should yield now and then: that is where a process notices that
    this one is gone. An error in it is raised here; a process that was killed is a RunError. Close the iterator to
    end the processes.
    """
    if workers == 0:
        for task in tasks:
            yield from work(task)
        return
    # Not forked from this process, which may have threads and torch; from a server that has imported `work` once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    waiting = iter(tasks)
    processes: dict[Connection, BaseProcess] = {}
    try:
        for task in islice(waiting, workers):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(work, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            _send(ours, task)
        while processes:
            for ready in wait(list(processes)):
                assert isinstance(ready, Connection)
                try:
                    finished, message = ready.recv()
                except (EOFError, ConnectionResetError):
                    raise RunError(_how_it_ended(processes[ready])) from None
                if isinstance(message, Exception):
                    raise message
                if not finished:
                    yield message
                    continue
                for task in islice(waiting, 1):
                    _send(ready, task)
                    break
                else:
                    ready.close()
                    processes.pop(ready).join()
    finally:
        for process in processes.values():
            process.kill()
        for connection, process in processes.items():
            process.join()
            connection.close()


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _send(connection: Connection, task: Task) -> None:
    # If the process has died, the next receive says so.
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.send(task)


def _serve(work: Callable[[Task], Iterator[Message]], connection: Connection) -> None:
    # A terminal or a scheduler signals all processes; the main one decides, and ends these.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        while True:
            for message in work(connection.recv()):
                connection.send((False, message))
            connection.send((True, None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the main process has no more work, or is gone
    except Exception as error:
        if not isinstance(error, UsageError | RunError | OSError):
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        connection.send((False, error))


def _how_it_ended(process: BaseProcess) -> str:
    process.join()
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    hint = ", perhaps for want of memory (fewer --workers need less)" if code == -signal.SIGKILL else ""
    return f"a worker process {how}{hint}; start the command again to go on"
