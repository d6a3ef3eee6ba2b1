"""Loader processes: started, seeded, signalled and ended in order."""

import gc
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gmscale.errors import RunError, UsageError

T = TypeVar("T")
Failure = RunError | UsageError


class Requests(Generic[T]):
    """What a DataLoader asks its workers for in its next pass; replaced between passes, which workers outlive."""

    current: Iterable[T] = ()

    def __iter__(self) -> Iterator[T]:
        return iter(self.current)


def data_loader(dataset: Dataset[T | Failure], requests: Iterable[Any], workers: int) -> DataLoader[T | Failure]:
    """Return a DataLoader whose workers answer each of `requests`."""
    workers = min(workers, available_cores())
    return DataLoader(
        dataset,
        sampler=requests,  # one request is one batch
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        # Also where another way is the default: workers share the index, and know their rank as their parent.
        multiprocessing_context="fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a seed from it, by default from the training process's generator.
        generator=torch.Generator(),
    )


def results(loader: Iterable[T | Failure]) -> Iterator[T]:
    """Yield what the workers made; an error that one of them handed over is raised here.

    Raised in a worker it would reach the user wrapped in that process's traceback.
    """
    with _termination_blocked():  # what starts now inherits it, in every thread
        iterator = iter(loader)
    for result in iterator:
        if isinstance(result, Failure):
            try:
                raise result
            finally:
                # Else the error, its traceback and this frame would hold each other, and with them the workers.
                del result
        yield result


def seed_all(seed: int) -> None:
    """Seed the three generators that timm's transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would take 300 us to visit every device


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the random states as they were: without workers, they are the training process's own."""
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _termination_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread, and in the processes that it starts for good."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_worker_id: int) -> None:
    # A scheduler signals every process of a job, but it is the main process that decides when to stop, and it needs
    # its workers until then. Of SIGTERM the sender matters: the main process ends its workers with it.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        threading.Thread(target=_await_termination, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    # Were a worker to collect another loader that it inherited as garbage, it would shut that one's workers down.
    gc.freeze()


def _await_termination(main_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
