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
from typing import Any, NoReturn

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
    watch: "_Watch | None" = None
    """Ends this process when another rank has failed."""

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
        gpus = torch.cuda.device_count()
        if local_size > gpus:
            raise UsageError(
                f"{local_size} processes were started on a node with {gpus} visible GPUs; start at most one a GPU, "
                f"or set CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    world = World(int(os.environ.get("RANK", "0")), local_rank, size, device, backend)
    return _join(world, config) if backend == "ddp" else world


def _join(world: World, config: ParallelConfig) -> World:
    timeout = timedelta(seconds=config.timeout_s)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    # torchrun's restarts may share one store: addresses and failures of an earlier attempt are not this one's
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
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
    return replace(world, watch=_Watch(world))


def shutdown(world: World) -> None:
    """Leave the process group."""
    if world.watch is not None:
        world.watch.stop()
    if world.backend == "ddp":
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """Exit at once, without tearing the interpreter down.

    gloo's threads may hold Python objects a moment longer than the process group lives, and a process whose
    interpreter ends first aborts (seen in 2 of 12 runs of a plain DDP script with torch 2.14).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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


def settle_buckets(model: nn.Module, image_size: int) -> None:
    """Let DDP arrange its gradient buckets now, by a backward pass on black images that leaves no other trace.

    By itself it would do so after the first steps of every start. A gradient's place in its bucket decides in which
    order three or more ranks are summed, so the first steps after a resume would be rounded in another way than
    those of an undisturbed run.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    device = next(model.parameters()).device
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2 if model.static_graph else 1):
            model(torch.zeros(2, 3, image_size, image_size, device=device)).sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


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


class _Watch:
    """A thread that ends this process when another rank has failed.

    Its collectives may wait for that rank until their time-out, on a GPU without ever returning to Python.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; left inside the store at interpreter exit it would abort the process."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        store = self._world.store
        while not self._stopped.wait(1.0):
            try:
                failed = store.check(["any"]) and not store.check([f"rank{self._world.rank}"])
            except Exception:  # the store's host is gone; the collectives will say so
                return
            if failed and not self._stopped.wait(3.0):  # the main thread usually ends by itself, in order
                os._exit(1)


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
