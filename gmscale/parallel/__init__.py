"""Processes: the group, models made parallel, and failing or stopping together."""

from gmscale.parallel.failure import PeerError, announce_failure, failed_elsewhere, together
from gmscale.parallel.processes import cores, end_process, init, peak_memory_mb, shutdown
from gmscale.parallel.stopping import STOPPED, StopRequest
from gmscale.parallel.world import World, any_rank, barrier, broadcast_buffers, largest_over_ranks, sum_over_ranks
from gmscale.parallel.wrapped import Replicated, Wrapped, wrap

__all__ = [
    "STOPPED",
    "PeerError",
    "Replicated",
    "StopRequest",
    "World",
    "Wrapped",
    "announce_failure",
    "any_rank",
    "barrier",
    "broadcast_buffers",
    "cores",
    "end_process",
    "failed_elsewhere",
    "init",
    "largest_over_ranks",
    "peak_memory_mb",
    "shutdown",
    "sum_over_ranks",
    "together",
    "wrap",
]
