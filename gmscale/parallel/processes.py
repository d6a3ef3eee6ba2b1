"""The process group: joining it, leaving it, and what this process has of the machine."""

import os
import resource
import sys
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from gmscale.config import ParallelConfig
from gmscale.errors import UsageError
from gmscale.heartbeat import Heartbeat
from gmscale.parallel.failure import Watch
from gmscale.parallel.world import World


def init(config: ParallelConfig) -> World:
    """Join the process group that torchrun describes, or stay alone."""
    launched = "WORLD_SIZE" in os.environ
    backend = config.backend if config.backend != "auto" else ("ddp" if launched else "single")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if backend != "single" and not launched:
        raise UsageError(f"parallel.backend is {backend!r}, but no launcher set WORLD_SIZE; start with torchrun")
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
    rank = int(os.environ.get("RANK", "0"))
    world = World(rank, local_rank, size, device, backend, heartbeat=Heartbeat(rank, size))
    return world if backend == "single" else _join(world, config)


def _join(world: World, config: ParallelConfig) -> World:
    timeout = timedelta(seconds=config.timeout_s)
    world.heartbeat.at("joining the others")
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's restarts share one store: addresses and failures of an earlier attempt are not this one's
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        _warn_of_restarts(world)
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
    return replace(world, watch=Watch(world))


def _warn_of_restarts(world: World) -> None:
    """Say that nodes under plain torchrun may count their restarts differently, and then never meet again."""
    nodes, restarts = (os.environ.get(name, "0") for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if world.rank == 0 and int(nodes) > 1 and int(restarts) > 0:
        warnings.warn(
            "torchrun --max-restarts on several nodes may wait for parallel.timeout_s after a failure; use "
            "launch/torchrun.sh, or set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            stacklevel=2,
        )


def shutdown(world: World) -> None:
    """Leave the process group."""
    if world.watch is not None:
        world.watch.stop()
    if world.backend != "single":
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
    if sys.platform == "linux":  # where getrusage would count what the launcher had before it started this process
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
