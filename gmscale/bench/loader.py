"""gmscale bench loader: images per CPU-second of input pipelines on the same JPEGs, as ratios.

Every pipeline makes batches in this process, one thread, no workers. In each round each takes turns with the one it
is compared with, reading all images once; the first to go changes from round to round, and the ratio is the median
over rounds of the two rates' ratio. A rate counts the CPU time of all threads, so that a busy machine disturbs it
little and hidden threads are not free.

--train asks instead how long a training waits for its data, and --scale what an index of ImageNet's size costs.
"""

import argparse
import gc
import resource
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gmscale import environment
from gmscale.bench import feeding, scale
from gmscale.bench.options import check_model
from gmscale.bench.photographs import Copies, facts, from_shards, photographs
from gmscale.bench.pipelines import BASELINE, PIPELINES, Epoch, Pipeline, Shape
from gmscale.bench.table import number, print_table, write_json
from gmscale.bench.training import Setting, quartiles
from gmscale.errors import OneLineParser, RunError, UsageError, nearest
from gmscale.parallel import World
from gmscale.tracking import plain_console

_AGAIN = "baseline again"

# What is measured, and the options that belong to it with their defaults.
_IMAGES: dict[str, Any] = {"size": 600, "source": None, "split": "train", "image_size": 224}
_OPTIONS: dict[str, dict[str, Any]] = {
    "pipelines": {**_IMAGES, "pipelines": list(PIPELINES), "batch_size": 64, "rounds": 5},
    "--train": {**_IMAGES, "model": "resnet18", "batch_size": 16, "steps": 30, "workers": 2, "processes": 2},
    "--scale": {"shards": 1024, "samples": 1251, "rounds": 3},
}
_LEAST = {"workers": 0}  # of the other numbers 1

_NOTE = """\
In every row: reading, decoding, cropping, flipping and collating. Float rows also normalise; uint8 batches are a
quarter of the bytes and are normalised on the device, which only the row 'gmscale exact, normalised' counts."""


def main(argv: list[str]) -> int:
    """Measure and show."""
    options = _parse(argv)
    if options.scale:
        result = scale.measure(options.shards, options.samples, options.rounds)
        show = scale.show
    else:
        samples = (
            from_shards(options.source, options.split, options.size)
            if options.source
            else photographs(options.size)
        )
        with tempfile.TemporaryDirectory(prefix="gmscale-bench-") as directory:
            copies = Copies(samples, Path(directory))
            if options.train:
                result, show = _train(options, copies), feeding.show
            else:
                shape = Shape(options.batch_size, options.image_size)
                result, show = measure(options.pipelines, copies, shape, options.rounds), _show
        result["set"] = {"source": options.source or "photographs", **facts(samples)}
    result["command"] = " ".join(("gmscale bench loader", *argv))
    show(result)
    write_json(result, options.json)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="gmscale bench loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="a training with DDP: the share of time without data")
    mode.add_argument("--scale", action="store_true", help="start-up, order and memory at ImageNet's size")

    def add(name: str, text: str, kind: Any = int, **more: Any) -> None:
        defaults = [f"{m} {values[name]}" for m, values in _OPTIONS.items() if values.get(name) is not None]
        shown = f" ({'; '.join(defaults)})" if kind is int else ""
        parser.add_argument(f"--{name}", type=kind, help=text + shown, **more)

    add("pipelines", f"of: {'; '.join(PIPELINES)}", str, nargs="+", metavar="NAME")
    add("size", "JPEGs in the set")
    add(
        "source",
        "directory of shards to take the JPEGs from, instead of parts of a few photographs",
        str,
        metavar="DIR",
    )
    add("split", "its split (train)", str)
    add("image_size", "side of the square images, in pixels")
    add("batch_size", "images a batch, and with --train a process")
    add("rounds", "turns of each pipeline, or openings of the index")
    add("model", "timm model that is trained (resnet18)", str)
    add("steps", "steps that are timed")
    add("workers", "loader processes of each rank")
    add("processes", "ranks")
    add("shards", "shards of the made-up set")
    add("samples", "samples of each of its shards")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file too")
    options = parser.parse_args(argv)
    _complete(options)
    return options


def _complete(options: argparse.Namespace) -> None:
    """Fill in the defaults; raise UsageError for an option that does not belong or a value that cannot be."""
    what = "--train" if options.train else "--scale" if options.scale else "pipelines"
    for name, value in vars(options).items():
        if name in ("train", "scale", "json"):
            continue
        owners = [mode for mode, values in _OPTIONS.items() if name in values]
        if what not in owners:
            if value is not None:
                raise UsageError(f"--{name} is for {' and '.join(owners)}, not for {what}")
        elif value is None:
            setattr(options, name, _OPTIONS[what][name])
        elif isinstance(value, int) and value < _LEAST.get(name, 1):
            raise UsageError(f"--{name} is {value}; expected at least {_LEAST.get(name, 1)}")
    if options.source is None and options.split != _IMAGES["split"] and not options.scale:
        raise UsageError("--split is of a --source; name one")
    if options.pipelines:
        options.pipelines = _chosen(options.pipelines)
    if options.train:
        check_model(options.model, "--model")
    one_step = (options.batch_size or 0) * (options.processes or 1)
    if options.size is not None and options.size < one_step:
        raise UsageError(f"--size is {options.size}; expected at least the {one_step} images of one step")


def _chosen(names: list[str]) -> list[str]:
    """Return the pipelines asked for and those that they are compared with, in their usual order."""
    for name in names:
        if name not in PIPELINES:
            raise UsageError(f"--pipelines: unknown {name!r}{nearest(name, PIPELINES)} (--help lists them)")
    needed = {BASELINE, *names, *(PIPELINES[name].against for name in names)}
    return [name for name in PIPELINES if name in needed]


def measure(names: list[str], copies: Copies, shape: Shape, rounds: int) -> dict[str, Any]:
    """Return the environment and one row a pipeline; one that cannot be had says so in its row."""
    missing = {name: PIPELINES[name].missing() for name in names}
    with _one_thread():
        described = environment.describe(World(0, 0, 1, torch.device("cpu"), "single"))
        epochs: dict[str, Epoch] = {}
        for name in (*names, _AGAIN):
            pipeline = PIPELINES.get(name, PIPELINES[BASELINE])
            if not missing.get(name):
                epochs[name] = pipeline.open(copies, shape)
                warm_up(name, pipeline, epochs[name], shape)
                print(f"{name}: ready", file=sys.stderr, flush=True)
        turns = _turns(epochs, [name for name in names if not missing[name]], rounds)
    rows = {name: {"skipped": missing[name]} if missing[name] else _row(name, turns[name]) for name in names}
    described |= {name: environment.package_version(name) for name in _PACKAGES}
    return {"environment": described, "rounds": rounds, **vars(shape), "pipelines": rows}


_PACKAGES = ("pillow", "simplejpeg", "opencv-python-headless", "litdata", "ffcv")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Leave torch one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warm_up(name: str, pipeline: Pipeline, epoch: Epoch, shape: Shape) -> None:
    """Read everything once, and look whether the batches are what they should be."""
    expected = (shape.batch_size, 3, shape.image_size, shape.image_size)
    for images, labels in epoch(0):
        if images.shape != expected or images.dtype != pipeline.dtype or len(labels) != shape.batch_size:
            raise RunError(
                f"{name} makes {images.dtype} {tuple(images.shape)}; expected {pipeline.dtype} {expected}"
            )


def _turns(epochs: Mapping[str, Epoch], names: list[str], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the rates of each pipeline and of what it is compared with, in each round's two turns."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            pair = (_AGAIN if name == BASELINE else name, PIPELINES[name].against)
            rates = {one: _rate(epochs[one], turn + 1) for one in (pair if turn % 2 == 0 else pair[::-1])}
            turns[name].append((rates[pair[0]], rates[pair[1]]))
        print(f"round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
    return turns


def _rate(epoch: Epoch, number: int) -> float:
    """Return images per CPU-second of one pass."""
    gc.collect()  # others' garbage
    before = _cpu_seconds()
    count = sum(len(labels) for _, labels in epoch(number))
    return count / (_cpu_seconds() - before)


def _cpu_seconds() -> float:
    """Return what all threads of this process, and its children that have ended, have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _row(name: str, turns: list[tuple[float, float]]) -> dict[str, Any]:
    pipeline = PIPELINES[name]
    ratios = [own / other for own, other in turns]
    return {
        "images_per_cpu_s": statistics.median(own for own, _ in turns),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "against": pipeline.against,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
    }


def _show(result: dict[str, Any]) -> None:
    described, images = result["environment"], result["set"]
    mean = f"{images['mean_width']:.0f} x {images['mean_height']:.0f}, {images['mean_kb']:.0f} kB"
    title = (
        f"{images['images']} JPEGs ({images['source']}, on average {mean}) to {result['image_size']} px, batch "
        f"{result['batch_size']}, one thread ({described['device']}), torch {described['torch']}, "
        f"{result['rounds']} rounds"
    )
    rows, notes = [], [" ".join(_NOTE.split())]
    for name, row in result["pipelines"].items():
        if "skipped" in row:
            rows.append((name, *["-"] * 3))
            notes.append(f"{name}: not measured: {row['skipped']}")
            continue
        first, third = row["ratio_quartiles"]
        cells = (number(row["images_per_cpu_s"], 0), number(row["ratio"], 2), f"{first:.2f}-{third:.2f}")
        rows.append((name, *cells))
        said = [PIPELINES[name].note] if PIPELINES[name].note else []
        if row["against"] != BASELINE:
            said.append(f"ratio to {row['against']}")
        notes += [f"{name}: {'; '.join(said)}"] if said else []
    print_table(title, ("pipeline", "images per CPU-s", "ratio", "quartiles"), rows)
    for note in notes:
        plain_console().print(note, highlight=False, markup=False, soft_wrap=True)


def _train(options: argparse.Namespace, copies: Copies) -> dict[str, Any]:
    setting = Setting(
        model=options.model,
        image_size=options.image_size,
        batch_size=options.batch_size,
        amp="none",
        rounds=1,
        steps=options.steps,
    )
    return feeding.measure(setting, copies.shards, options.workers, options.processes)
