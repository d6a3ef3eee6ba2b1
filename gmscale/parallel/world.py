"""World: this process among the others, and the small collectives that all of them call."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmscale.heartbeat import Heartbeat

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str
    """single, ddp, deepspeed or fsdp2."""
    control: Any = None
    """Process group of CPU tensors, for decisions taken together; None in one process."""
    store: Any = None
    """Key-value store of the job, where a failing rank leaves its mark; None in one process."""
    watch: Any = None
    """Ends this process when another rank has failed, or the launcher is gone."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """Says where this rank is, to those who watch the job."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Return the sum of a small CPU tensor over all ranks."""
    values = values.clone()
    if world.size > 1:
        dist.all_reduce(values, group=world.control)
    return values


def largest_over_ranks(value: float, world: World) -> float:
    """Return the largest of the ranks' values; NaN if one of them is NaN."""
    values = torch.tensor([value], dtype=torch.float64)
    gathered = [values] * world.size
    if world.size > 1:
        gathered = [torch.empty_like(values) for _ in range(world.size)]
        dist.all_gather(gathered, values, group=world.control)
    return float(torch.cat(gathered).max())


def any_rank(flag: bool, world: World) -> bool:
    """Return whether `flag` holds on any rank."""
    return bool(sum_over_ranks(torch.tensor(int(flag)), world) > 0)


def count_over_ranks(world: World, *flags: bool) -> list[int]:
    """Return for each flag on how many ranks it holds."""
    return [int(count) for count in sum_over_ranks(torch.tensor([int(flag) for flag in flags]), world)]


def of_all_ranks(value: T, world: World) -> list[T]:
    """Return the value of each rank, any small object."""
    gathered: list[Any] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, value, group=world.control)
    return gathered


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier(group=world.control)


def broadcast_buffers(model: nn.Module, world: World) -> None:
    """Give all ranks the buffers (batch-norm statistics) of rank 0, as DDP does before each forward pass."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
