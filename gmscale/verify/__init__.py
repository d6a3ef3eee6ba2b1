"""gmscale verify: which differences between ways to run one training are rounding, which the mathematics requires.

All ways start from the same weights and see the same global batches, on the CPU. Each is run with the mask off,
where only rounding may differ, and with it on, where two things more may: mask-then-average is not
average-then-mask, and a hard gate turns rounding at its threshold into a step. To tell these from a fault, what
arrives in the gradients is compared in every step with the masks of the ranks' own gradients, computed one
parameter at a time and averaged plainly.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.table import Table

from gmscale import config as configuration
from gmscale import data, models
from gmscale.config import TrainConfig
from gmscale.errors import RunError, UsageError, check_choice, check_range
from gmscale.parallel.local_ranks import run_ranks
from gmscale.tracking import plain_console
from gmscale.verify.comparisons import NAMES, run
from gmscale.verify.verdict import Difference
from gmscale.verify.ways import Batches

_MADE_UP_CLASSES = 10
_NOTES = """\
Differences are absolute and, in brackets, relative: of the first step's gradients to the largest entry of the
reference's, of the last step's weights to the largest change of a weight there. Mask error: what arrived against
the ranks' masked gradients, relative, in all steps. Batch norm keeps the statistics of the first global batch and
dropout is off, since both would differ between ranks; the learning rate is scaled to the batch; the mask has its
full strength from the first step on."""


def main(argv: list[str]) -> int:
    """Run the comparisons in processes of its own; return 1 if one is unexpected, else 0."""
    parser = configuration.build_parser("gmscale verify")
    parser.add_argument("--steps", type=int, default=3, help="Optimizer steps of every run.")
    parser.add_argument("--ranks", type=int, default=2, help="Processes that are compared with one.")
    parser.add_argument("--images", type=int, default=8, help="Images of the global batch, on any number of ranks.")
    parser.add_argument(
        "--compare", nargs="+", default=list(NAMES), metavar="NAME", help=f"Comparisons, among {', '.join(NAMES)}."
    )
    parser.add_argument("--json", default="", help="Write the results to this file too.")
    config, options = configuration.parse(argv, "gmscale verify", parser)
    _check(options)
    batches, origin = _batches(config, options.steps, options.images)
    config = _scaled(config, options.images, options.ranks)
    environ = {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    rows = run_ranks(run, options.ranks, config, batches, options.compare, environ=[environ] * options.ranks)[
        "rows"
    ]
    title = (
        f"{config.model.name}, {config.arm}; {options.images} {origin} images of {config.data.image_size} px, "
        f"{options.steps} steps of {config.optim.opt}"
    )
    _show(title, rows)
    if options.json:
        _write(options.json, {"title": title, "torch": torch.__version__, "ranks": options.ranks, "rows": rows})
    return int(any(row["verdict"]["kind"] == "UNEXPECTED" for row in rows))


def _check(options: Any) -> None:
    if "WORLD_SIZE" in os.environ:
        raise UsageError("gmscale verify starts its own processes; call it without torchrun and set --ranks")
    check_range(options.steps, "--steps", 1, whole=True)
    check_range(options.ranks, "--ranks", 2, 64, whole=True)
    check_range(options.images, "--images", 2, whole=True)
    if options.images % 2 or options.images % options.ranks:
        raise UsageError(f"--images is {options.images}; expected a multiple of 2 and of --ranks {options.ranks}")
    for name in options.compare:
        check_choice(name, NAMES, "--compare")


def _scaled(config: TrainConfig, images: int, ranks: int) -> TrainConfig:
    """Return the configuration with the learning rate scaled to a global batch of `images`."""
    size = config.data.batch_size_per_device * config.optim.grad_accum_steps * ranks
    return replace(config, optim=replace(config.optim, lr=config.optim.lr * min(1.0, images / size)))


def _batches(config: TrainConfig, steps: int, images: int) -> tuple[Batches, str]:
    """Return the first global batches of the configured data, or made-up ones where its shards are not here."""
    models.create(config, 10)
    section = config.data
    if section.source != "embedded" and not Path(section.source).is_dir():
        draws = np.random.default_rng(config.run.seed)
        side = section.image_size
        pixels = draws.standard_normal((steps, images, 3, side, side), dtype=np.float32)
        return Batches(pixels, draws.integers(_MADE_UP_CLASSES, size=(steps, images)), _MADE_UP_CLASSES), "made-up"
    loader = _loader(config, images)
    found = list(islice(_endless(loader), steps))
    pixels = np.stack([_normalized(batch, section) for batch in found])
    return Batches(pixels, np.stack([batch.labels.numpy() for batch in found]), len(loader.classes)), "training"


def _loader(config: TrainConfig, images: int) -> data.TrainLoader | data.StreamLoader:
    settings = replace(config.data, batch_size_per_device=images, workers=0, decode="exact")
    return data.train_loader(settings, config.augment, config.run.seed, 0, 1, 1)


def _normalized(batch: data.Batch, section: data.DataConfig) -> np.ndarray:
    assert isinstance(batch.images, torch.Tensor)  # decoded by the loader
    return data.normalize(batch.images, section).numpy()


def _endless(loader: data.TrainLoader | data.StreamLoader) -> Iterator[data.Batch]:
    epoch = 0
    while True:
        yield from (batches[0] for batches in loader.epoch(epoch))
        epoch += 1


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("comparison", "mask", "gradient", "weights", "bound", "mask error", "verdict"):
        text = heading in ("comparison", "mask", "verdict")
        table.add_column(heading, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        found = row["difference"] or dict.fromkeys(f.name for f in fields(Difference))
        differences = [
            f"{_short(found[f'{x}_abs'])} ({_short(found[f'{x}_rel'])})" for x in ("gradient", "weights")
        ]
        table.add_row(
            row["title"],
            row["mask"],
            *differences,
            _short(row["bound"]),
            _short(row["mask_error"]),
            row["verdict"]["kind"],
        )
    console = plain_console()
    console.print(table)
    for reason in dict.fromkeys((row["verdict"]["kind"], row["verdict"]["reason"]) for row in rows):
        if reason[1]:
            console.print(": ".join(reason), highlight=False, markup=False, soft_wrap=True)
    console.print(_NOTES, highlight=False, markup=False, soft_wrap=True)


def _pair(absolute: float | None, relative: float | None) -> str:
    return "-" if absolute is None else f"{_short(absolute)} ({_short(relative)})"


def _short(x: float | None) -> str:
    return "-" if x is None else f"{x:.0e}" if x else "0"


def _write(path: str, result: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--json {path}: {error.strerror}") from error
