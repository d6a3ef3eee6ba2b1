"""gmscale bench evaluate: images/s of evaluation, as a ratio to a loop as in timm's validate.py.

Both judge the same model on the same JPEGs at the same size, with as many loader processes, in one process. timm's
loop reads a folder with create_dataset and create_loader (its prefetcher on), and reads loss, top1 and top5 of each
batch; gmscale's reads shards and also finds calibration and accuracy by class. They take turns, and the ratio is
the median over rounds of (gmscale / timm, same round). Each has had one pass before, in which its processes start.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader
from timm.utils import AverageMeter, accuracy
from torch import nn

from gmscale import data, environment
from gmscale.bench.options import check_model
from gmscale.bench.photographs import Copies, facts, from_shards, photographs
from gmscale.bench.table import number, print_table, write_json
from gmscale.bench.training import quartiles
from gmscale.config import TrainConfig
from gmscale.data import DataConfig
from gmscale.errors import OneLineParser, RunError, UsageError, check_range
from gmscale.evaluation.accuracy import Accuracy
from gmscale.evaluation.subject import Subject
from gmscale.parallel import World

_TIMM, _AGAIN, _OURS = "timm validate.py", "timm validate.py against itself", "gmscale evaluate"
_SPLIT = "train"  # of the copies
_ASKED = 1.0

Pass = Callable[[], float]
"""One evaluation of all images; returns top1 in percent."""


class _Setting(NamedTuple):
    """What both are given."""

    model: nn.Module
    config: DataConfig
    world: World


def main(argv: list[str]) -> int:
    """Measure and show; returns 0."""
    options = _parse(argv)
    samples = (
        from_shards(options.source, options.split, options.size) if options.source else photographs(options.size)
    )
    with tempfile.TemporaryDirectory(prefix="gmscale-bench-") as directory:
        copies = Copies(samples, Path(directory))
        result = measure(options, copies, 1 + max(label for _, label in samples))
    result["set"] = {"source": options.source or "photographs", **facts(samples)}
    result["command"] = " ".join(("gmscale bench evaluate", *argv))
    _show(result)
    write_json(result, options.json)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="gmscale bench evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet18", help="timm model, of random weights (resnet18)")
    add("--size", type=int, default=512, help="JPEGs in the set (512)")
    add("--source", metavar="DIR", help="directory of shards to take them from, instead of parts of photographs")
    add("--split", help="its split (train)")
    add("--image_size", type=int, default=224, help="side of the square images, in pixels (224)")
    add("--batch_size", type=int, default=64, help="images a batch (64)")
    add("--workers", type=int, default=2, help="loader processes of each, 0 for none (2)")
    add("--rounds", type=int, default=5, help="turns of each (5)")
    add("--json", metavar="FILE", help="write the results to this file too")
    options = parser.parse_args(argv)
    check_model(options.model, "--model")
    for name in ("image_size", "batch_size", "rounds"):
        check_range(getattr(options, name), f"--{name}", 1, whole=True)
    check_range(options.size, "--size", 4, whole=True)  # a shard each
    check_range(options.workers, "--workers", 0, whole=True)
    if options.split and not options.source:
        raise UsageError("--split is of a --source; name one")
    options.split = options.split or "train"
    return options


def measure(options: argparse.Namespace, copies: Copies, classes: int) -> dict[str, Any]:
    """Return the environment and a row for each way. Raises RunError if they do not find the same."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, 0, 1, device, "single")
    config = DataConfig(
        source=str(copies.shards),
        val_split=_SPLIT,
        image_size=options.image_size,
        eval_batch_size_per_device=options.batch_size,
        workers=options.workers,
        crop_pct=0.875,
    )
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=classes).eval().requires_grad_(False).to(device)
    setting = _Setting(model, config, world)
    passes = {_TIMM: _as_timm(setting, copies.folders), _OURS: _as_gmscale(setting)}
    found = {name: one() for name, one in passes.items()}
    if abs(found[_TIMM] - found[_OURS]) > 1 + 100 / options.size:  # normalisation rounds otherwise
        raise RunError(f"timm's loop finds top1 {found[_TIMM]:.2f} %, gmscale's {found[_OURS]:.2f} %: not the same")
    ratios: dict[str, list[float]] = {_AGAIN: [], _OURS: []}
    rates: dict[str, list[float]] = {_TIMM: [], _OURS: []}
    for turn in range(options.rounds):
        # beside timm's first turn, now after it and now before it
        names = (_TIMM, _OURS, _TIMM) if turn % 2 == 0 else (_OURS, _TIMM, _TIMM)
        seen = [(name, _rate(passes[name], options.size)) for name in names]
        first, second = (rate for name, rate in seen if name == _TIMM)
        own = next(rate for name, rate in seen if name == _OURS)
        ratios[_AGAIN].append(second / first)
        ratios[_OURS].append(own / first)
        rates[_TIMM] += [first, second]
        rates[_OURS].append(own)
        print(f"round {turn + 1}/{options.rounds}", file=sys.stderr, flush=True)
    rows = {
        name: {
            "images_per_s": statistics.median(rates[_OURS if name == _OURS else _TIMM]),
            "ratio": statistics.median(values),
            "ratio_quartiles": quartiles(values),
            "top1": found[_OURS if name == _OURS else _TIMM],
        }
        for name, values in ratios.items()
    }
    asked = {"model": options.model, "rounds": options.rounds, "workers": options.workers, "asked": _ASKED}
    shape = {"image_size": options.image_size, "batch_size": options.batch_size}
    return {"environment": environment.describe(world), **asked, **shape, "ways": rows}


def _rate(evaluation: Pass, images: int) -> float:
    """Return the images/s of one pass; each ends with a number, for which the device has to finish."""
    began = time.perf_counter()
    evaluation()
    return images / (time.perf_counter() - began)


def _as_gmscale(setting: _Setting) -> Pass:
    loader = data.val_loader(setting.config, 0, 1)
    config = TrainConfig(data=setting.config)
    subject = Subject(setting.model, config, loader, setting.world, tuple(loader.classes))
    return lambda: float(Accuracy().measure(subject)["top1"])


def _as_timm(setting: _Setting, folder: Path) -> Pass:
    config, device = setting.config, setting.world.device
    loader = create_loader(
        create_dataset("", root=str(folder), split="validation", is_training=False),
        input_size=(3, config.image_size, config.image_size),
        batch_size=config.eval_batch_size_per_device,
        interpolation=config.eval_interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=device.type == "cuda",
        device=device,
    )

    @torch.inference_mode()
    def validate() -> float:
        losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
        for images, labels in loader:
            logits = setting.model(images)
            first, fifth = accuracy(logits, labels, topk=(1, 5))
            losses.update(F.cross_entropy(logits, labels).item(), len(labels))
            top1.update(first.item(), len(labels))
            top5.update(fifth.item(), len(labels))
        return float(top1.avg)

    return validate


def _show(result: dict[str, Any]) -> None:
    images, described = result["set"], result["environment"]
    title = (
        f"{result['model']}, {images['images']} JPEGs ({images['source']}) at {result['image_size']} px, batch "
        f"{result['batch_size']}, {result['workers']} loader processes, {described['device']}, torch "
        f"{described['torch']}, {result['rounds']} rounds"
    )
    rows = []
    for name, row in result["ways"].items():
        first, third = row["ratio_quartiles"]
        cells = (number(row["images_per_s"], 0), number(row["ratio"], 2), f"{first:.2f}-{third:.2f}")
        rows.append((name, *cells, number(row["top1"], 2)))
    print_table(title, ("", "images/s", "ratio", "quartiles", "top1 %"), rows)
