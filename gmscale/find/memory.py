"""How much memory this machine has left for processes."""

import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")  # of a container: its own group is the root of what it sees


def available_mb() -> float:
    """Return the MiB that new processes may take: what is free, within the limit of this control group.

    Where the system does not say what is free (macOS): all it has.
    """
    if not _MEMINFO.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    free_kib = next(
        int(line.split()[1]) for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable")
    )
    limit, used = (_number(_CONTROL_GROUP / name) for name in ("memory.max", "memory.current"))
    left = (limit - used) / 2**20 if limit is not None and used is not None else float("inf")
    return min(free_kib / 1024, left)


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is none (no limit, or no such file)."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
