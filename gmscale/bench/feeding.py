"""How long a training waits for its data: DDP steps fed by the real loader, its workers beside them."""

import multiprocessing
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gmscale import data, environment
from gmscale.bench.table import print_table
from gmscale.bench.training import PLAIN, VARIANTS, WARM_UP, Setting, Subject, made_up_batch
from gmscale.data import AugmentConfig, Batch, DataConfig, StreamLoader, TrainLoader, to_device
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks
from gmscale.tracking import StepClock

DECODES = ("exact", "fast")
_ASKED = 0.02


def measure(setting: Setting, shards: Path, workers: int, processes: int) -> dict[str, Any]:
    """Return one row for each way to decode on the host."""
    rows: dict[str, dict[str, Any]] = {}
    for decode in DECODES:
        rows[decode] = run_ranks(_waits, processes, setting, shards, workers, decode)
        described = rows[decode].pop("environment")
    return {"environment": described, **vars(setting), "workers": workers, "asked": _ASKED, "decode": rows}


def _waits(world: World, setting: Setting, shards: Path, workers: int, decode: str) -> dict[str, Any]:
    """Return what the slowest rank waited: for the very first batch, and as a share of the steps after it."""
    multiprocessing.current_process().daemon = False  # as ranks are; a daemon may not start loader processes
    config = DataConfig(
        source=str(shards),
        image_size=setting.image_size,
        batch_size_per_device=setting.batch_size,
        workers=workers,
        decode=decode,  # type: ignore[arg-type]
    )
    augment = AugmentConfig(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=0.0)
    loader = data.train_loader(config, augment, 0, world.rank, world.size, 1)
    subject = Subject(VARIANTS[PLAIN], setting, world)
    for _ in range(WARM_UP):
        subject.step(*made_up_batch(setting, world))

    def step(micro_batches: list[Batch]) -> None:
        for batch in micro_batches:
            subject.step(*to_device(batch, config, augment, len(loader.classes), world.device))

    batches, start = _endless(loader), time.perf_counter()
    first = next(batches)
    start_ms = 1e3 * (time.perf_counter() - start)
    step(first)
    clock = StepClock()
    for _ in range(setting.steps):
        with clock.waiting():
            micro_batches = next(batches)
        step(micro_batches)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    said = clock.values(loader.global_batch_size)
    batches.close()
    longest = torch.tensor([start_ms, said["data_ms"] / said["step_ms"], said["step_ms"]], dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=world.control)
    return {
        "first_batch_ms": float(longest[0]),
        "waiting_share": float(longest[1]),
        "step_ms": float(longest[2]),
        "images_per_s": said["images_per_s"],
        "steps_per_epoch": loader.steps_per_epoch,
        "environment": environment.describe(world),
    }


def _endless(loader: TrainLoader | StreamLoader) -> Generator[list[Batch]]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    described = result["environment"]
    title = (
        f"{result['model']}, {result['image_size']} px, batch {result['batch_size']} on each of "
        f"{described['world_size']} processes with {result['workers']} workers ({described['device']}), "
        f"torch {described['torch']}, {result['steps']} steps"
    )
    headings = ("decode", "step ms", "images/s", "waiting", "asked", "first batch ms", "steps an epoch")
    rows = [
        (
            decode,
            f"{row['step_ms']:.0f}",
            f"{row['images_per_s']:.1f}",
            f"{100 * row['waiting_share']:.2f} %",
            f"under {100 * result['asked']:g} %",
            f"{row['first_batch_ms']:.0f}",
            str(row["steps_per_epoch"]),
        )
        for decode, row in result["decode"].items()
    ]
    print_table(title, headings, rows)
