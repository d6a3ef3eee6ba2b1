"""The memory-bandwidth limit: what a copy reaches here, and how many bytes masking must move at least."""

import time
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

_COPY_MB = {"cpu": 128, "cuda": 1024}  # far more than the caches hold
_REPEATS = 3


def copy_gb_per_s(device: torch.device) -> float:
    """Return the bandwidth of `Tensor.copy_` in GB/s, bytes read plus bytes written; the best of a few."""
    source, target = _buffers(device)
    seconds = min(seconds_of(lambda: target.copy_(source), device) for _ in range(_REPEATS))
    return 2 * source.nbytes / seconds / 1e9


def least_bytes(gradients: Iterable[Tensor], error_feedback: bool) -> int:
    """Return the bytes that masking these gradients must move at least.

    Each gradient is read once for its map, read and written once to apply it: 3 times its bytes. Error feedback
    reads and writes a residual of the same size: 5 times. The maps, 1/9 to 1/16 of that, are not counted.
    """
    return (5 if error_feedback else 3) * sum(g.nbytes for g in gradients)


@lru_cache(maxsize=1)
def _buffers(device: torch.device) -> tuple[Tensor, Tensor]:
    source = torch.ones(_COPY_MB[device.type] * 2**18, device=device)
    return source, torch.zeros_like(source)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that an action takes on the device."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.perf_counter()
    action()
    return time.perf_counter() - before
