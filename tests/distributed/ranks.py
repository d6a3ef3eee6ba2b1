"""Real processes over gloo: a function runs on every rank, its results come back, its error too."""

import io
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import warm


def run_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout_s: float = 60
) -> list:
    """Return [function(rank, *args) of each rank], run in `world_size` processes that share a gloo group."""
    warm.begin()
    store = folder / f"store-{len(list(folder.iterdir()))}"
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = warm.context.Pipe()
        process = warm.context.Process(target=_rank, args=(function, rank, world_size, store, theirs, args))
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        answers = [pipe.recv() if pipe.poll(timeout_s) else ("no answer", None) for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for rank, (error, _) in enumerate(answers):
        assert error is None, f"rank {rank}: {error}"
    return [torch.load(io.BytesIO(value), weights_only=False) for _, value in answers]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, store: Path, pipe: Connection, args: tuple
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size
        )
        answer = io.BytesIO()
        torch.save(function(rank, *args), answer)  # a tensor sent as it is would need this process to live on
        pipe.send((None, answer.getvalue()))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
