"""What a model hands to collectives, counted where they are called, DDP's own in C++ included."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

# What a communication hook may call from a callback, on a thread where the counting mode is not switched on.
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")

Operations = dict[str, dict[str, int]]


class _Counting(TorchDispatchMode):
    """Sees the operations of the thread that it is switched on in, and of the backward passes started there."""

    def __init__(self, operations: Operations, lock: threading.Lock) -> None:
        super().__init__()
        self._operations, self._lock = operations, lock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args]
            with self._lock:
                seen = self._operations.setdefault(func._opname.strip("_"), {"calls": 0, "bytes": 0})
                seen["calls"] += 1
                seen["bytes"] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Operations]:
    """Count the collectives of a block: {operation: {"calls", "bytes"}}.

    The bytes are those of an operation's full buffer; for an all-reduce between two processes each sends as many.
    """
    operations: Operations = {}
    lock = threading.Lock()

    def on_any_thread(collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            if isinstance(_get_current_dispatch_mode(), _Counting):
                return collective(*args, **kwargs)
            with _Counting(operations, lock):
                return collective(*args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in _COLLECTIVES}
    try:
        for name, collective in originals.items():
            setattr(dist, name, on_any_thread(collective))
        with _Counting(operations, lock):
            yield operations
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)


def total_bytes(operations: Operations) -> int:
    """Return the bytes of all operations together."""
    return sum(seen["bytes"] for seen in operations.values())
