"""gmscale find batch_size: the largest batch size of a device that fits, and the fastest one.

The global batch of the configuration stays: larger micro-batches, fewer of them in a step. Each size is tried by
processes of its own, with a few masked steps on made data. Nothing is applied; copy the flags that are printed.
"""

import json
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from gmscale import build
from gmscale import config as configuration
from gmscale.config import TrainConfig
from gmscale.dry_run.rehearsal import Rehearsal
from gmscale.errors import RunError, UsageError, check_range
from gmscale.find.memory import available_mb
from gmscale.find.search import divisors, largest_fitting, predicted, round_sizes
from gmscale.find.table import show_sizes
from gmscale.parallel import World
from gmscale.parallel.local_ranks import MemoryRunOutError, run_ranks

_START = 8  # a size at which nearly everything fits and little time is lost


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One size that was tried, or ruled out."""

    batch_size: int
    grad_accum_steps: int
    refused: str = ""
    """Why it does not fit; empty if it does."""
    peak_mb: float = 0.0
    images_per_s: float = 0.0
    step_ms: float = 0.0
    normalises_batches: bool = False
    """Whether the model's batch normalisation makes results depend on the size."""


def main(argv: list[str]) -> int:
    """Find and show; the exit status."""
    parser = configuration.build_parser("gmscale find batch_size")
    _add_options(parser)
    config, given = configuration.parse(argv, "gmscale find batch_size", parser)
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            "gmscale find batch_size starts its own processes: start it without a launcher (--processes)"
        )
    processes = given.processes if given.processes is not None else max(1, torch.cuda.device_count())
    check_range(processes, "--processes", 1)
    check_range(given.steps, "--steps", 1)
    check_range(given.most, "--most", 1)
    check_range(given.memory_share, "--memory_share", 0, 1, open_low=True)
    if given.classes is not None:
        check_range(given.classes, "--classes", 1)
    if given.json is not None and not os.access(Path(given.json).parent, os.W_OK):
        raise UsageError(f"--json {given.json}: expected a file in a directory that can be written")
    classes = given.classes or _classes(config)
    search = Search(config, classes, processes, given.steps, given.memory_share, free=given.free)
    trials = search.run(_sizes(config, free=given.free, most=given.most))
    show_sizes([vars(trial) for trial in trials], config, free=given.free)
    if given.json is not None:
        Path(given.json).write_text(
            json.dumps([vars(trial) for trial in trials], indent=1) + "\n", encoding="utf-8"
        )
    return 0


def _add_options(parser: ArgumentParser) -> None:
    parser.description = __doc__
    group = parser.add_argument_group("finding")
    group.add_argument(
        "--free",
        action="store_true",
        help="Let the global batch change: no accumulation, any size. Then the learning rate has to follow; the "
        "value by a usual rule is printed.",
    )
    group.add_argument("--most", type=int, default=4096, help="With --free: the largest size to try.")
    group.add_argument(
        "--processes", type=int | None, default=None,
        help="Processes that train together in each trial; default one a GPU, or one on the CPU. Where a back-end "
        "divides the model, memory depends on it.",
    )  # fmt: skip
    group.add_argument("--steps", type=int, default=3, help="Timed steps of each trial.")
    group.add_argument(
        "--memory_share", type=float, default=0.9,
        help="CPU: share of the memory now available that the trials may take. A size is not tried if the smaller "
        "ones predict more. (On a GPU a size fits if it runs.)",
    )  # fmt: skip
    group.add_argument(
        "--classes", type=int | None, default=None, help="Classes of data that is not there; then none is opened."
    )
    group.add_argument("--json", type=str | None, default=None, help="Write the trials to this file too.")


def _classes(config: TrainConfig) -> int:
    loader, _ = build.loaders(config, World(0, 0, 1, torch.device("cpu"), "single"))
    return len(loader.classes)


def _sizes(config: TrainConfig, *, free: bool, most: int) -> list[int]:
    """Return the sizes to choose from: those that leave the global batch as it is, or any; mixing takes pairs."""
    if free:
        return round_sizes(most, even=config.augment.takes_pairs)
    images = config.data.batch_size_per_device * config.optim.grad_accum_steps
    sizes = divisors(images, even=config.augment.takes_pairs)
    if not sizes:
        raise UsageError(
            f"augment.mixup, cutmix and guided_mix mix pairs, and {images} images a device and step have no even "
            "part; change data.batch_size_per_device or optim.grad_accum_steps"
        )
    return sizes


class Search:
    """Tries sizes, each in new processes, and remembers what they took."""

    def __init__(
        self, config: TrainConfig, classes: int, processes: int, steps: int, memory_share: float, *, free: bool
    ) -> None:
        self._config, self._classes, self._processes, self._steps = config, classes, processes, steps
        self._budget_mb = None if torch.cuda.is_available() else memory_share * available_mb() / processes
        self._free = free
        self._images = config.data.batch_size_per_device * config.optim.grad_accum_steps
        self._trials: list[Trial] = []

    def run(self, sizes: list[int]) -> list[Trial]:
        """Return the trials that led to the largest size that fits, by size; RunError if none does."""
        if largest_fitting(sizes, _START, lambda size: not self._try(size).refused) is None:
            reason = min(self._trials, key=lambda t: t.batch_size).refused
            raise RunError(f"not even data.batch_size_per_device {sizes[0]} fits: {reason}")
        return sorted(self._trials, key=lambda t: t.batch_size)

    def _try(self, size: int) -> Trial:
        accumulate = 1 if self._free else self._images // size
        trial = Trial(batch_size=size, grad_accum_steps=accumulate)
        guess = predicted([(t.batch_size, t.peak_mb) for t in self._trials if not t.refused], size)
        if self._budget_mb is not None and guess is not None and guess > self._budget_mb:
            trial = replace(trial, refused=f"{guess:.0f} MiB predicted", peak_mb=guess)
        else:
            trial = self._measured(trial)
        if self._budget_mb is not None and not trial.refused and trial.peak_mb > self._budget_mb:
            trial = replace(trial, refused=f"{trial.peak_mb:.0f} MiB of {self._budget_mb:.0f}")
        self._trials.append(trial)
        fits = f"does not fit: {trial.refused}" if trial.refused else f"{trial.images_per_s:.0f} images/s"
        print(f"batch size {size} x {accumulate}: {fits}", file=sys.stderr, flush=True)
        return trial

    def _measured(self, trial: Trial) -> Trial:
        config = replace(
            self._config,
            data=replace(self._config.data, batch_size_per_device=trial.batch_size),
            optim=replace(self._config.optim, grad_accum_steps=trial.grad_accum_steps),
        )
        try:
            found = run_ranks(
                _measure, self._processes, config, self._classes, self._steps, parallel=config.parallel
            )
        except MemoryRunOutError as error:
            return replace(trial, refused=str(error)[:100])
        return replace(trial, **found)


def _measure(world: World, config: TrainConfig, classes: int, steps: int) -> dict[str, Any]:
    """Body of the processes of a trial."""
    warnings.simplefilter("ignore")  # training says them once
    build.prepare_process(config, world)
    steps_per_epoch = 1000  # of no influence but on the schedule, whose first learning rate is used throughout
    state = build.training_state(config, world, classes, steps_per_epoch)
    rehearsal = Rehearsal(state, config, world, classes, max(1, round(config.run.epochs * steps_per_epoch)))
    rehearsed = rehearsal.run(steps)
    images = config.data.batch_size_per_device * config.optim.grad_accum_steps * world.size
    return {
        "peak_mb": rehearsed.peak_mb,
        "images_per_s": images / rehearsed.step_s,
        "step_ms": 1e3 * rehearsed.step_s,
        "normalises_batches": any(
            isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in state.wrapped.bare.modules()
        ),
    }
