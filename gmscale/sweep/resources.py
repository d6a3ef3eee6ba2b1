"""What a trial occupies, and whether there is a machine that has it."""

import os
from collections.abc import Mapping, Sequence

from gmscale.errors import UsageError
from gmscale.sweep.config import SweepConfig


def needed(sweep: SweepConfig) -> dict[str, float]:
    """Return the CPUs and GPUs of one trial, all of them on one node."""
    found = {"CPU": float(sweep.workers * sweep.cpus_per_worker)}
    if sweep.gpus_per_worker:
        found["GPU"] = sweep.workers * sweep.gpus_per_worker
    return found


def places(sweep: SweepConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many trials train at once on `nodes`, each {CPU: n, GPU: n}."""
    fit = sum(int(min(node.get(kind, 0) / amount for kind, amount in needed(sweep).items())) for node in nodes)
    return min(fit, sweep.at_once) if sweep.at_once else fit


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_this_machine(sweep: SweepConfig) -> None:
    """Raise UsageError if no trial fits on this machine and there is no cluster to join."""
    if "RAY_ADDRESS" not in os.environ:
        import torch

        check(sweep, [{"CPU": cores(), "GPU": torch.cuda.device_count()}])


def check(sweep: SweepConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise UsageError if none of `nodes`, each {CPU: n, GPU: n}, has room for a trial."""
    wanted = needed(sweep)
    if any(all(node.get(kind, 0) >= amount for kind, amount in wanted.items()) for node in nodes):
        return
    for kind, field in (("CPU", "cpus_per_worker"), ("GPU", "gpus_per_worker")):
        most = max((node.get(kind, 0) for node in nodes), default=0)
        if wanted.get(kind, 0) > most:
            raise UsageError(
                f"a trial needs {wanted[kind]:g} {kind}s on one node (sweep.workers {sweep.workers} x "
                f"sweep.{field} {getattr(sweep, field):g}), and the largest here has {most:g}"
            )
    raise UsageError(f"no node has {' and '.join(f'{n:g} {kind}s' for kind, n in wanted.items())} for a trial")
