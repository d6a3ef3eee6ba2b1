"""What an index of ImageNet's size costs: opening it, ordering an epoch, going on within one, and memory.

The set is made up: shards whose headers and labels are real and whose images are a few photographs, all of them
one file under many names, so that 140 GB take 140 MB. They come from memory; a disk is slower.
"""

import os
import statistics
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from gmscale import environment
from gmscale.bench.photographs import photographs
from gmscale.bench.table import print_table
from gmscale.data import AugmentConfig, DataConfig, ShardIndex, open_index, open_split, train_loader
from gmscale.data.order import augmentation_seeds, epoch_order
from gmscale.errors import RunError
from gmscale.parallel import World

_IMAGES = 20  # photographs of ImageNet's mean size, again and again
_CLASSES = 1000
_BATCH_SIZE, _WORKERS = 64, 2
_ASKED = {"open_s": 3.0, "order_s": 1.0, "resume_s": 5.0, "memory_mib": 100.0}


def measure(shards: int, samples: int, rounds: int) -> dict[str, Any]:
    """Return the seconds that opening and ordering take, and MiB of memory."""
    with tempfile.TemporaryDirectory(prefix="gmscale-bench-") as path:
        directory = Path(path)
        split = make(directory, shards, samples)
        first = _seconds(lambda: _open(directory, split))
        opened = [_seconds(lambda: _open(directory, split)) for _ in range(rounds)]
        ordered = [_seconds(partial(_order, _open(directory, split))) for _ in range(rounds)]
        resumed = [_seconds(lambda: _resume(directory, split)) for _ in range(rounds)]
        memory = _memory(directory, split)
    return {
        "environment": environment.describe(World(0, 0, 1, torch.device("cpu"), "single")),
        "shards": shards,
        "samples": shards * samples,
        "rounds": rounds,
        "asked": _ASKED,
        "first_open_s": first,
        "open_s": statistics.median(opened),
        "order_s": statistics.median(ordered),
        "resume_s": statistics.median(resumed),
        **memory,
    }


def make(directory: Path, shards: int, samples: int) -> str:
    """Write the shards and return their names."""
    images = [encoded for encoded, _ in photographs(_IMAGES)]
    try:
        first = directory / f"{0:06}.tar"
        with open(first, "wb") as file:
            for number in range(samples):
                _add(file, f"{number:07}.cls", str(number % _CLASSES).encode())
                _add(file, f"{number:07}.jpg", images[number % _IMAGES])
            file.write(bytes(2 * tarfile.BLOCKSIZE))
        for number in range(1, shards):
            os.link(first, directory / f"{number:06}.tar")
    except OSError as error:
        raise RunError(f"the made-up shards cannot be written in {directory}: {error.strerror}") from error
    return f"{{{0:06}..{shards - 1:06}}}.tar"


def _add(file: BinaryIO, name: str, content: bytes) -> None:
    """Append a member."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    file.write(header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE))


def _open(directory: Path, split: str) -> ShardIndex:
    config = DataConfig(source=str(directory), train_split=split)
    return open_index(open_split(config, split), config.label, directory)


def _order(index: ShardIndex) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    return epoch_order(index.lengths, 0, 0), augmentation_seeds(len(index), 0, 0)


def _resume(directory: Path, split: str) -> None:
    """Open the set as a run does, and wait for the first batch of the second half of an epoch."""
    config = DataConfig(
        source=str(directory),
        train_split=split,
        image_size=224,
        batch_size_per_device=_BATCH_SIZE,
        workers=_WORKERS,
    )
    loader = train_loader(config, AugmentConfig(), 0, 0, 1, 1)
    next(iter(loader.epoch(0, loader.steps_per_epoch // 2)))


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _memory(directory: Path, split: str) -> dict[str, float]:
    """Return the MiB that an index and an epoch's order take, and the peaks of what was allocated on the way."""
    tracemalloc.start()
    try:
        index = _open(directory, split)
        allocated, opening = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        epoch = _order(index)
        ordered, ordering = tracemalloc.get_traced_memory()
        del epoch
    finally:
        tracemalloc.stop()
    mapped = index.stored.rows.nbytes if index.stored.table else 0
    sizes = {
        "mapped": mapped,
        "index": allocated,
        "memory": ordered + mapped,
        "opening": opening,
        "ordering": ordering,
    }
    return {f"{name}_mib": size / 2**20 for name, size in sizes.items()}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    described = result["environment"]
    title = (
        f"{result['samples']} samples in {result['shards']} shards ({described['device']}), "
        f"torch {described['torch']}, {result['rounds']} rounds"
    )
    words = {
        "first_open_s": ("first opening: every header read", "s"),
        "open_s": ("opening again, from the cache", "s"),
        "order_s": ("order and seeds of one epoch", "s"),
        "resume_s": ("a resume: opening again to the first batch of the epoch's second half", "s"),
        "mapped_mib": ("the index's table, mapped from its file and shared by processes", "MiB"),
        "index_mib": ("the rest of the index", "MiB"),
        "memory_mib": ("both, and an epoch's order and seeds", "MiB"),
        "opening_mib": ("allocated at most while opening", "MiB"),
        "ordering_mib": ("allocated at most while ordering", "MiB"),
    }
    rows = []
    for key, (what, unit) in words.items():
        asked = result["asked"].get(key)
        rows.append((what, f"{result[key]:.2f} {unit}", "" if asked is None else f"under {asked:g} {unit}"))
    print_table(title, ("what", "measured", "asked"), rows)
