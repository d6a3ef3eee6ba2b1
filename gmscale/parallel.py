"""Processes: the group, wrapping a model, and failing or stopping together."""

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmscale.config import ParallelConfig
from gmscale.errors import RunError, UsageError

STOPPED = 75  # sysexits EX_TEMPFAIL: checkpointed on request; the same command goes on


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str
    """ddp or single."""
    control: Any = None
    """Process group of CPU tensors, for decisions taken together; None in one process."""
    store: Any = None
    """Key-value store of the job, where a failing rank leaves its mark; None in one process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class PeerError(RunError):
    """Another rank failed and has reported it: this one ends without a word."""


def init(config: ParallelConfig) -> World:
    """Join the process group that torchrun describes, or stay alone."""
    launched = "WORLD_SIZE" in os.environ
    backend = config.backend if config.backend != "auto" else ("ddp" if launched else "single")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if backend == "ddp" and not launched:
        raise UsageError("parallel.backend is 'ddp', but no launcher set WORLD_SIZE; start with torchrun")
    if backend == "single" and size > 1:
        raise UsageError(f"parallel.backend is 'single', but the launcher started {size} processes; use ddp")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, cores() // local_size))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} visible); "
                f"start at most that many processes a node, or set CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    world = World(int(os.environ.get("RANK", "0")), local_rank, size, device, backend)
    return _join(world, config) if backend == "ddp" else world


def _join(world: World, config: ParallelConfig) -> World:
    timeout = timedelta(seconds=config.timeout_s)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    dist.init_process_group(
        "nccl" if world.device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=world.device if world.device.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout) if world.device.type == "cuda" else dist.group.WORLD
    world = replace(world, control=control, store=dist.PrefixStore("failure", store))
    threading.Thread(target=_end_with_the_others, args=(world,), daemon=True).start()
    return world


def shutdown(world: World) -> None:
    """Leave the process group."""
    if world.backend == "ddp":
        dist.destroy_process_group()


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: allocated on the GPU, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def wrap(model: nn.Module, config: ParallelConfig, world: World) -> nn.Module:
    """Return the model on its device, wrapped for the back-end."""
    model = model.to(world.device)
    if world.backend == "single":
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        bucket_cap_mb=config.bucket_cap_mb,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        static_graph=config.static_graph,
        find_unused_parameters=config.find_unused_parameters,
    )


# -- together ---------------------------------------------------------------------------------------------------
def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Return the sum of a small CPU tensor over all ranks."""
    values = values.clone()
    if world.size > 1:
        dist.all_reduce(values, group=world.control)
    return values


def any_rank(flag: bool, world: World) -> bool:
    """Return whether `flag` holds on any rank."""
    return bool(sum_over_ranks(torch.tensor(int(flag)), world) > 0)


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier(group=world.control)


def broadcast_buffers(model: nn.Module, world: World) -> None:
    """Give all ranks the buffers (batch-norm statistics) of rank 0, as DDP does before each forward pass."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


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


def announce_failure(world: World) -> None:
    """Tell the other ranks that this one has failed and shows its error."""
    if world.store is not None:
        world.store.set(f"rank{world.rank}", "failed")
        world.store.set("any", str(world.rank))


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


def _end_with_the_others(world: World) -> None:
    """Watch for another rank's failure: a collective on a GPU may wait for it until its time-out."""
    while True:
        time.sleep(1.0)
        try:
            if world.store.check(["any"]) and not world.store.check([f"rank{world.rank}"]):
                time.sleep(3.0)  # the main thread usually ends by itself, in order
                os._exit(1)
        except Exception:
            return


# -- stopping ---------------------------------------------------------------------------------------------------
class StopRequest:
    """Whether SIGTERM, SIGUSR1 or SIGINT asked this process to stop; the handler only sets a flag."""

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.requested = True
