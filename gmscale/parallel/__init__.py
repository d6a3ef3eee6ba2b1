"""Processes: the group, models made parallel, and failing or stopping together."""

from torch import OutOfMemoryError

from gmscale.parallel.back_ends import wrap
from gmscale.parallel.batch_norm import set_batch_norm
from gmscale.parallel.failure import PeerError, announce_failure, failed_elsewhere, is_of_a_collective, together
from gmscale.parallel.processes import cores, end_process, init, peak_memory_mb, shutdown
from gmscale.parallel.replicated import Replicated
from gmscale.parallel.world import (
    World,
    any_rank,
    barrier,
    broadcast_buffers,
    count_over_ranks,
    largest_over_ranks,
    of_all_ranks,
    sum_over_ranks,
)
from gmscale.parallel.wrapped import Stepped, WeightShard, Wrapped

__all__ = [
    "OutOfMemoryError",
    "PeerError",
    "Replicated",
    "Stepped",
    "WeightShard",
    "World",
    "Wrapped",
    "announce_failure",
    "any_rank",
    "barrier",
    "broadcast_buffers",
    "cores",
    "count_over_ranks",
    "end_process",
    "failed_elsewhere",
    "init",
    "is_of_a_collective",
    "largest_over_ranks",
    "of_all_ranks",
    "peak_memory_mb",
    "set_batch_norm",
    "shutdown",
    "sum_over_ranks",
    "together",
    "wrap",
]
