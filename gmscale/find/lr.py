"""gmscale find lr: the learning-rate range test on the configured run, mask and all.

Trains on real training data while the learning rate rises exponentially, and says where the loss falls most steeply
and where it is smallest. It writes nothing into the run directory and changes no configuration.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from gmscale import build, parallel
from gmscale import config as configuration
from gmscale.build import Training
from gmscale.config import TrainConfig
from gmscale.data import Batch
from gmscale.dry_run.rehearsal import strongest_step
from gmscale.errors import RunError, UsageError, check_range
from gmscale.files import write_atomically
from gmscale.find.curve import Curve, Point, Suggestion, rates, suggestions
from gmscale.find.figure import figure
from gmscale.parallel import World
from gmscale.step import train_step
from gmscale.tracking import plain_console

_LINES = 20  # printed on the way

InWorld = Callable[[Any, Callable[[Any], int]], int]


def main(argv: list[str], in_world: InWorld) -> int:
    """Test, print, and write the figure and the numbers; the exit status."""
    parser = configuration.build_parser("gmscale find lr")
    _add_options(parser)
    config, given = configuration.parse(argv, "gmscale find lr", parser)
    low, high = getattr(given, "from"), given.to
    check_range(low, "--from", 0, open_low=True)
    check_range(high, "--to", low, open_low=True)
    check_range(given.steps, "--steps", 10)
    out = Path(given.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is not a directory")

    def body(world: World) -> int:
        with parallel.together(world):
            if world.is_main:
                try:
                    out.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UsageError(f"--out {out} cannot be made: {error.strerror}") from None
        curve = measure(config, world, rates(low, high, given.steps))
        with parallel.together(world):
            if world.is_main:
                _tell(curve, config, world, out)
        return 0

    return in_world(config.parallel, body)


def _add_options(parser: ArgumentParser) -> None:
    parser.description = __doc__
    group = parser.add_argument_group("finding")
    group.add_argument("--from", type=float, default=1e-6, help="First learning rate.")
    group.add_argument("--to", type=float, default=1.0, help="Last learning rate, unless the loss diverges before.")
    group.add_argument("--steps", type=int, default=100, help="Optimizer steps from the first to the last.")
    group.add_argument(
        "--out", type=str, default="lr_find", help="Directory for lr_find.png and lr_find.json; made where missing."
    )


def measure(config: TrainConfig, world: World, tested: list[float]) -> Curve:
    """Return the loss of each step of a training whose learning rates are `tested`, until it diverges.

    A mask with a schedule is held at its strongest. A collective; the same on every rank.
    """
    build.prepare_process(config, world)
    loader, _ = build.loaders(config, world)
    classes, total_steps = len(loader.classes), max(1, round(config.run.epochs * loader.steps_per_epoch))
    state = build.training_state(config, world, classes, loader.steps_per_epoch)
    strongest = strongest_step([a.mask for a in state.attachments.values()], total_steps)
    batches = _steps(loader)
    curve = Curve()
    for i, lr in enumerate(tested):
        micro_batches = next(batches)
        for group in state.wrapped.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # of layer_decay
        for mask in state.attachments.values():
            mask.at(strongest, total_steps, grad_scale=state.wrapped.loss_scale(), observe=False)
        train_step(state, micro_batches, config, world, classes)
        point = curve.add(lr, state.meter.values(world)["loss"])
        if world.is_main and (i % max(1, len(tested) // _LINES) == 0 or curve.diverged or i + 1 == len(tested)):
            _show(i + 1, point)
        if curve.diverged:
            break
    return curve


def _steps(loader: Training) -> Iterator[list[Batch]]:
    for epoch in count():
        yield from loader.epoch(epoch)


def _show(step: int, point: Point) -> None:
    line = f"step {step:>4}   lr {point.lr:<9.2e} loss {point.loss:<9.4g} smoothed {point.smoothed:.4g}"
    plain_console().print(line, highlight=False, markup=False)


def _tell(curve: Curve, config: TrainConfig, world: World, out: Path) -> None:
    found = suggestions(curve.points)
    record = {
        "arm": config.arm,
        "model": config.model.name,
        "global_batch": config.data.batch_size_per_device * config.optim.grad_accum_steps * world.size,
        "diverged": curve.diverged,
        "suggestions": [asdict(suggestion) for suggestion in found],
        # JSON has no NaN; null says that there was no number
        "points": [{k: v if abs(v) < float("inf") else None for k, v in asdict(p).items()} for p in curve.points],
    }
    try:
        write_atomically(out / "lr_find.json", json.dumps(record, indent=1))
        write_atomically(out / "lr_find.png", figure(curve.points, found, f"{config.model.name}, {config.arm}"))
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror}") from error
    for line in (*_words(curve, found), f"wrote {out / 'lr_find.png'} and {out / 'lr_find.json'}"):
        plain_console().print(line, highlight=False, markup=False, soft_wrap=True)


def _words(curve: Curve, found: list[Suggestion]) -> Iterator[str]:
    for suggestion in found:
        yield f"--optim.lr {suggestion.lr:.2g}   {suggestion.why} (there {suggestion.loss:.4g})"
    if not found:
        yield "the loss does not fall clearly: nothing to suggest; try more --steps, or a smaller --from"
    elif not curve.diverged and min(curve.points, key=lambda p: p.smoothed) is curve.points[-1]:
        yield "the loss still falls at the last rate: raise --to"
    yield "nothing is applied: copy the flag that you choose, or write it into the configuration"
