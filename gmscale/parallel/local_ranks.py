"""Ranks on this machine, forked from a process that has imported torch and timm once, so a start is cheap."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from gmscale.config import ParallelConfig
from gmscale.errors import RunError, UsageError
from gmscale.parallel.processes import end_process, init

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["timm", "gmscale.sites", "gmscale.parallel"])
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET

# What other errors than torch's own say when memory runs out: CUDA's libraries, and the CPU.
_NO_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


class MemoryRunOutError(RunError):
    """A rank asked for more memory than there is, or was killed, as the system does then."""


def run_ranks(
    function: Callable[..., dict[str, Any]],
    size: int,
    *args: Any,
    namespaces: Sequence[str] = (),
    environ: Sequence[dict[str, str]] = (),
    parallel: ParallelConfig | None = None,
) -> dict[str, Any]:
    """Return what `function(world, *args)` returns on rank 0 of `size` new processes that share a process group.

    With `namespaces`, each rank lives in the network namespace of that name; its `environ` says where rank 0 is.
    `parallel` says how the ranks talk. They end with this process, however it ends.
    Raises the UsageError that a rank raised, MemoryRunOutError, and RunError for everything else that goes wrong.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # for the forks: an address without a name is no news
    store = None
    everyone = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    if not namespaces:  # the store lives here, on a port that the system chooses
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        everyone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        everyone["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    pipes, processes = [], []
    try:
        for rank in range(size):
            ours, theirs = _context.Pipe()
            own = everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environ[rank] if environ else {})
            namespace = namespaces[rank] if namespaces else None
            process = _context.Process(
                target=_rank, args=(function, own, namespace, parallel, theirs, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        return _answers(pipes, processes)[0]
    finally:
        for process in reversed(processes):  # rank 0 may hold the store that the others look at
            process.kill()
        for process in processes:
            process.join()
        del store


def _answers(pipes: list[Connection], processes: list[Any]) -> list[dict[str, Any]]:
    answers: dict[int, dict[str, Any]] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = wait(list(waiting.values()))
        for rank in [r for r, pipe in waiting.items() if pipe in ready]:
            try:
                kind, answer = waiting.pop(rank).recv()
            except EOFError:
                processes[rank].join()
                if processes[rank].exitcode == -signal.SIGKILL:
                    raise MemoryRunOutError(f"rank {rank} was killed (out of memory?)") from None
                raise RunError(f"rank {rank} ended with status {processes[rank].exitcode}") from None
            if kind == "usage":
                raise UsageError(answer)
            if kind == "memory":
                raise MemoryRunOutError(f"rank {rank} ran out of memory: {answer}")
            if kind == "error":
                raise RunError(f"rank {rank} failed: {answer}")
            answers[rank] = answer
    return [answers[rank] for rank in range(len(pipes))]


def _rank(
    function: Callable[..., dict[str, Any]],
    environ: dict[str, str],
    namespace: str | None,
    parallel: ParallelConfig | None,
    pipe: Connection,
    args: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    try:
        os.environ.update(environ)
        if namespace is not None:
            enter_network(namespace)
        world = init(parallel or ParallelConfig())
        pipe.send(("done", function(world, *args)))
        pipe.poll(None)  # a rank that leaves early breaks the collectives of the others: all wait to be ended
    except UsageError as error:
        pipe.send(("usage", str(error)))
    except RunError as error:
        pipe.send(("error", str(error)))
    except BaseException as error:
        if not isinstance(error, BrokenPipeError):
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if _lacks_memory(error):
                pipe.send(("memory", message))
            else:
                traceback.print_exc(file=sys.stderr)
                pipe.send(("error", message))
    end_process(0)


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in _NO_MEMORY
    )


def _end_with(pipe: Connection) -> None:
    """End this process when the one that started it is gone: nothing is ever sent to a rank."""
    pipe.poll(None)
    os._exit(1)


def enter_network(namespace: str) -> None:
    """Move this process into a named network namespace (os.setns needs Python 3.12)."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEW_NETWORK) != 0:
            raise RunError(f"cannot enter network namespace {namespace}: {os.strerror(ctypes.get_errno())}")
