"""gmscale bench loop: images/s and start-up of whole training runs without a mask, as ratios to other loops.

Every run is made of fresh processes, as torchrun or python starts them. In each round every loop has its turn, in
an order that changes from round to round, and a ratio is the median over rounds of (gmscale / the other, same
round).

start: seconds from the start of a rank's process to the end of its first optimizer step, imports and loader
processes included. gmscale also opens its index, builds the validation loader, and writes its run directory.
images/s: from the end of a few steps of warm-up to the end of the last step, without evaluation or checkpoints.
memory: the peak of a rank's process, without its loader processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gmscale import environment
from gmscale.bench.loops import WARM_UP, Task
from gmscale.bench.options import check_model
from gmscale.bench.photographs import Copies, Sample, facts, photographs
from gmscale.bench.table import print_table, write_json
from gmscale.bench.training import quartiles
from gmscale.data.tars.writer import write_shard
from gmscale.errors import OneLineParser, RunError, UsageError
from gmscale.parallel import World, cores
from gmscale.tracking import plain_console

_OTHERS = {"timm": "webdataset", "Accelerate": "accelerate"}  # and the package that gmscale may lack
_OURS = ("gmscale exact", "gmscale fast")
_DIFFERENT = 240  # photographs; a larger set repeats them
_CLASSES = 10  # of the photographs
_VALIDATION = _CLASSES  # images, one a class: every run ends with an evaluation that is not measured
_LIMIT_S = 900.0  # for one run
_LAUNCHERS = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}  # not of these runs
_ASKED = {"images_per_s": 1.0, "start_s": 1.1}
_SHOWN = ("images_per_s", "start_s")


class Run(NamedTuple):
    """What one run measured."""

    images_per_s: float
    start_s: float
    peak_memory_mb: float


def main(argv: list[str]) -> int:
    """Measure and show."""
    options = _parse(argv)
    loops = [*(name for name, package in _OTHERS.items() if find_spec(package)), *_OURS]
    described = environment.describe(World(0, 0, 1, torch.device("cpu"), "single"))
    samples = photographs(min(_images(options, max(options.processes)), _DIFFERENT))
    measured = {}
    for count in options.processes:
        with tempfile.TemporaryDirectory(prefix="gmscale-bench-") as directory:
            task = _prepared(options, samples, count, Path(directory))
            measured[count] = _rounds(task, loops, count, options.rounds)
    described |= {name: environment.package_version(name) for name in ("accelerate", "webdataset")}
    result = {
        "command": " ".join(("gmscale bench loop", *argv)),
        "environment": described,
        "rounds": options.rounds,
        "warm_up_steps": WARM_UP,
        **{name: value for name, value in vars(options).items() if name in Task.__dataclass_fields__},
        "set": facts(samples),
        "asked": _ASKED,
        "skipped": {name: package for name, package in _OTHERS.items() if name not in loops},
        "processes": {count: rows_of(rounds) for count, rounds in measured.items()},
    }
    show(result)
    write_json(result, options.json)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog="gmscale bench loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def number(name: str, default: int, text: str, **more: Any) -> None:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)", **more)

    parser.add_argument("--model", default="resnet18", help="timm model (%(default)s)")
    number("image_size", 64, "side of the square images, in pixels")
    number("batch_size", 16, "images a process and step")
    number("steps", 24, f"steps of a run, of which the first {WARM_UP} are not counted in images/s")
    number("workers", 1, "loader processes of each rank")
    number("rounds", 3, "runs of each loop")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="torch.autocast (%(default)s)")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of processes (1 2)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to this file too")
    options = parser.parse_args(argv)
    for name in ("image_size", "batch_size", "rounds", "workers"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}; expected at least 1")
    if options.steps <= WARM_UP:
        raise UsageError(f"--steps is {options.steps}; expected at least {WARM_UP + 1}")
    if min(options.processes) < 1:
        raise UsageError(f"--processes has {min(options.processes)}; expected at least 1")
    check_model(options.model, "--model")
    return options


def _images(options: argparse.Namespace, processes: int) -> int:
    """Return the images of one epoch: a step more than is trained, so that no loop's rounding is one too few."""
    return int((options.steps + 1) * options.batch_size * processes)


def _prepared(options: argparse.Namespace, samples: list[Sample], processes: int, directory: Path) -> Task:
    """Write the data of one epoch and return what is to be done with it, by no loop yet."""
    copies = Copies([samples[i % len(samples)] for i in range(_images(options, processes))], directory)
    _add_validation(copies.shards, samples[:_VALIDATION])
    return Task(
        loop="",
        model=options.model,
        image_size=options.image_size,
        batch_size=options.batch_size,
        steps=options.steps,
        workers=options.workers,
        amp=options.amp,
        classes=_CLASSES,
        shards=str(copies.shards),
        folders=str(copies.folders),
        directory=str(directory),
    )


def _add_validation(shards: Path, samples: list[Sample]) -> None:
    """Add a small split `validation` to the shards."""
    name, info = "validation-0000.tar", shards / "_info.json"
    members: list[dict[str, str | bytes]] = [
        {"__key__": f"{i:07}", "jpg": jpeg, "cls": str(label)} for i, (jpeg, label) in enumerate(samples)
    ]
    write_shard(shards / name, members)
    splits = json.loads(info.read_text())
    splits["splits"]["validation"] = {
        "name": "validation",
        "num_samples": len(samples),
        "filenames": [name],
        "shard_lengths": [len(samples)],
    }
    info.write_text(json.dumps(splits))


# -- runs -------------------------------------------------------------------------------------------------------
def _rounds(task: Task, loops: list[str], processes: int, rounds: int) -> list[dict[str, Run]]:
    """Return what every loop measured in each round."""
    done = []
    for number in range(rounds):
        runs: dict[str, Run] = {}
        for name in loops if number % 2 == 0 else loops[::-1]:
            with tempfile.TemporaryDirectory(dir=task.directory) as directory:
                runs[name] = run(replace(task, loop=name, directory=directory), processes)
        done.append(runs)
        said = "; ".join(f"{name} {runs[name].images_per_s:.1f} images/s" for name in loops)
        print(f"{processes} processes, round {number + 1}/{rounds}: {said}", file=sys.stderr, flush=True)
    return done


def run(task: Task, processes: int) -> Run:
    """Return what a task measures in fresh processes; those end with this one, whatever ends it."""
    file, log = Path(task.directory) / "task.json", Path(task.directory) / "log"
    task.write(file)
    command = [sys.executable, "-m", "gmscale.bench.loops", str(file), *([str(processes)] if processes > 1 else [])]
    threads = max(1, cores() // processes)
    surroundings = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    surroundings["OMP_NUM_THREADS"] = str(threads)  # for all loops what gmscale chooses
    with open(log, "wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=surroundings)
        try:
            status = child.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RunError(f"{task.loop} on {processes} processes took more than {_LIMIT_S:.0f} s") from None
        finally:
            child.kill()
            child.wait()
    answers = [task.answer(rank) for rank in range(processes)]
    if status != 0 or not all(answer.exists() for answer in answers):
        raise RunError(f"{task.loop} on {processes} processes failed (status {status}): {_reason(log)}")
    return _measured([json.loads(answer.read_text()) for answer in answers], task)


def _measured(answers: list[dict[str, Any]], task: Task) -> Run:
    """Return the rate of all ranks together, and the start and memory of the worst of them."""
    images = (task.steps - WARM_UP) * task.batch_size * len(answers)
    return Run(
        images / max(a["ends"][-1] - a["ends"][WARM_UP - 1] for a in answers),
        max(a["ends"][0] - a["started"] for a in answers),
        max(a["peak_memory_mb"] for a in answers),
    )


def _reason(log: Path) -> str:
    """Return the line of a log that says most likely why a process ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    # torchrun's own words come last and say only that a process ended
    named = [line for line in errors if "ChildFailedError" not in line and "elastic" not in line]
    return next(reversed(named or errors or lines), "it said nothing")[:300]


# -- results ----------------------------------------------------------------------------------------------------
def rows_of(rounds: list[dict[str, Run]]) -> dict[str, dict[str, Any]]:
    """Return a row a loop: medians, and for gmscale's the ratios to each of the others with their quartiles."""
    rows: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        rows[name] = {field: statistics.median(getattr(r[name], field) for r in rounds) for field in Run._fields}
        if name in _OTHERS:
            continue
        for other in (other for other in _OTHERS if other in rounds[0]):
            for field in Run._fields:
                ratios = [getattr(r[name], field) / getattr(r[other], field) for r in rounds]
                rows[name][f"{field}_to_{other}"] = statistics.median(ratios)
                rows[name][f"{field}_to_{other}_quartiles"] = quartiles(ratios)
    return rows


def show(result: dict[str, Any]) -> None:
    """Print a table for each number of processes."""
    described = result["environment"]
    others = [name for name in _OTHERS if name not in result["skipped"]]
    headings = ["loop", "images/s", *(f": {o}" for o in others), "start s", *(f": {o}" for o in others), "MiB"]
    for processes, rows in result["processes"].items():
        title = (
            f"{result['model']}, {result['image_size']} px, batch {result['batch_size']} on each of {processes} "
            f"processes with {result['workers']} workers ({described['device']}), amp {result['amp']}, "
            f"torch {described['torch']}, {result['steps']} steps, {result['rounds']} rounds"
        )
        cells = []
        for name in (*others, *_OURS):
            row = rows[name]
            line = [name]
            for field, digits in zip(_SHOWN, (1, 2), strict=True):
                line += [f"{row[field]:.{digits}f}", *(_ratio(row, f"{field}_to_{other}") for other in others)]
            cells.append([*line, f"{row['peak_memory_mb']:.0f}"])
        print_table(title, headings, cells)
    notes = [
        f"Asked: images/s at least {_ASKED['images_per_s']:g} times, start at most {_ASKED['start_s']:g} times "
        "that of each other loop. In brackets: the quartiles over rounds.",
        *(f"{name} not measured: {package} is not installed" for name, package in result["skipped"].items()),
    ]
    for note in notes:
        plain_console().print(note, highlight=False, markup=False, soft_wrap=True)


def _ratio(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:.2f} ({low:.2f}-{high:.2f})"
