"""Sizes of a training state: in memory, and as a checkpoint."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from gmscale import parallel
from gmscale.checkpoint.contents import pages
from gmscale.config import TrainConfig
from gmscale.parallel import World
from gmscale.training_state import TrainingState


def memory_parts(state: TrainingState, config: TrainConfig) -> dict[str, int]:
    """Return the bytes that a step leaves on this rank's device, by what they are."""
    trained = [p for p in state.wrapped.bare.parameters() if p.requires_grad]
    gradients = _bytes(p.grad if p.grad is not None else p for p in trained)
    in_buckets_too = isinstance(state.wrapped.model, DistributedDataParallel) and not (
        config.parallel.gradient_as_bucket_view
    )
    return {
        "weights": _bytes(state.wrapped.bare.parameters()) + _bytes(state.wrapped.bare.buffers()),
        "gradients": gradients * (2 if in_buckets_too else 1),
        "optimizer": _bytes(tree_leaves(list(state.wrapped.optimizer.state.values()))),
        "average": _bytes(_tensors(state.ema.module)) if state.ema else 0,
        "error feedback": _bytes(tree_leaves([mask.state_dict() for mask in state.attachments.values()])),
    }


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint."""

    shared: int
    """What does not depend on the number of devices, even where they divide it."""
    masks: int
    """What each rank adds: what its masks hold back."""
    copy_s: float
    """Seconds for a copy in memory, on the slowest rank."""

    def on(self, devices: int) -> int:
        """Return the bytes of a checkpoint of a run on so many devices."""
        return self.shared + self.masks * devices


def checkpoint_size(state: TrainingState, config: TrainConfig, world: World) -> CheckpointSize:
    """Return how large a checkpoint is, without writing one; a collective."""
    contents = state.contents({}, world, sharded=config.parallel.sharded_checkpoints)
    started = time.perf_counter()
    nbytes = 0
    for file in pages(contents, world).values():
        nbytes += sum(tensor.detach().to("cpu", copy=True).nbytes for tensor in file.tensors.values())
    copy_s = time.perf_counter() - started
    masks = _bytes(tree_leaves(contents.per_rank["masks"]))
    shared = parallel.sum_over_ranks(torch.tensor([nbytes - masks], dtype=torch.float64), world)
    return CheckpointSize(int(shared), masks, parallel.largest_over_ranks(copy_s, world))


def numels(parameters: Iterable[nn.Parameter], *, trained: bool = False) -> int:
    """Return the entries of whole parameters, also of those that a back-end shards; only of what is `trained`."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad or not trained)


def _bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes that tensors take on this device; what is no tensor takes none."""
    return sum(_local(t).nbytes for t in tensors if isinstance(t, Tensor))


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of what a back-end shards: FSDP2 as a DTensor, ZeRO-3 beside an empty parameter."""
    for part in ("_local_tensor", "ds_tensor"):
        tensor = getattr(tensor, part, tensor)
    return tensor


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
