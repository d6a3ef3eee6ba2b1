"""What `gmscale launch` tells its ranks, by environment variables; torchrun's ranks do without."""

import os
import socket

LAUNCHER = "GMSCALE_LAUNCHER"  # its process id
WORLD = "GMSCALE_WORLD"  # its name of this start of all ranks
HEARTBEATS = "GMSCALE_HEARTBEATS"  # the folder in which it wants to find its ranks' records
MOST_RANKS = "GMSCALE_MOST_RANKS"  # when all nodes have come


def by_launcher() -> bool:
    """Return whether `gmscale launch` started this process; it finds its status and its errors in its record."""
    return LAUNCHER in os.environ


def launcher_pid() -> int:
    """Return the process that started this one and is to live as long: a launcher of ours, or any."""
    return int(os.environ.get(LAUNCHER, os.getppid()))


def world_name() -> str:
    """Return the name of this start of the ranks, the same on all of them and on no others: LAUNCH.ATTEMPT."""
    given = os.environ.get(WORLD)
    if given:
        return given
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run, attempt = (os.environ[f"TORCHELASTIC_{name}"] for name in ("RUN_ID", "RESTART_COUNT"))
        return f"{run}-{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}.{attempt}"
    return f"{socket.gethostname()}-{os.getpid()}.0"


def most_ranks(size: int) -> int:
    """Return how many ranks there are when all nodes have come, of a world that has `size` now."""
    return int(os.environ.get(MOST_RANKS, size))
