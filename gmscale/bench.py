"""gmscale bench: what the mask costs, as ratios to plain DDP measured side by side in one run.

Variants take turns, a few steps each, so that a machine's drift hits all of them alike; the ratio is the median
over rounds of (variant / plain in the same round). Peak memory is measured in processes of their own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmscale import environment, parallel
from gmscale.config import ParallelConfig
from gmscale.errors import OneLineParser, RunError, UsageError, nearest
from gmscale.masking import GradientMask
from gmscale.parallel import World
from gmscale.sites import Attachment, attach
from gmscale.tracking import plain_console

PLAIN = "plain DDP"
VARIANTS: dict[str, GradientMask | None] = {
    PLAIN: None,
    "strength 0": GradientMask(strength=0.0),
    "pool": GradientMask(error_feedback=False),
    "pool, error feedback": GradientMask(),
    "log": GradientMask(operator="log", error_feedback=False),
    "random": GradientMask(operator="random", error_feedback=False),
}


@dataclass
class Subject:
    """One variant's model with everything a training step needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    attachment: Attachment | None
    done: int = 0

    def step(self, images: Tensor, labels: Tensor) -> None:
        if self.attachment is not None:
            self.attachment.at(self.done, 10**6, observe=False)
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self.done += 1


def main(argv: list[str]) -> int:
    """Run a benchmark; it starts its own processes."""
    parser = OneLineParser(prog="gmscale bench", description="Cost of the mask, as ratios to plain DDP.")
    parser.add_argument("what", choices=["step"], help="step: a whole training step of each variant")
    parser.add_argument("--model", default="resnet18", help="timm model")
    parser.add_argument("--image_size", type=int, default=64, help="side of the made-up images, in pixels")
    parser.add_argument("--batch_size", type=int, default=64, help="images a process and step")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12, help="trials of each variant")
    parser.add_argument("--steps", type=int, default=2, help="steps of a trial")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--json", help="write the results to this file too")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    _check(options)
    if "WORLD_SIZE" in os.environ:
        return _worker(options)
    return _launch(argv, options)


def _check(options: argparse.Namespace) -> None:
    for name in options.variants:
        if name not in VARIANTS:
            raise UsageError(
                f"--variants: unknown {name!r}{nearest(name, VARIANTS)} (there are {', '.join(VARIANTS)})"
            )
    if not timm.is_model(options.model):
        raise UsageError(
            f"--model: timm has no model {options.model!r}{nearest(options.model, timm.list_models())}"
        )
    for name in ("image_size", "batch_size", "processes", "rounds", "steps"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}; expected at least 1")


def _launch(argv: list[str], options: argparse.Namespace) -> int:
    """Start the timed run, then one short run a variant for its memory; show the table."""
    names = [PLAIN, *(n for n in options.variants if n != PLAIN)]
    with tempfile.TemporaryDirectory() as folder:
        result = _torchrun(argv, options, Path(folder) / "times.json")
        for name in names:
            memory = _torchrun([*argv, "--memory_of", name], options, Path(folder) / "memory.json")
            result["variants"][name]["peak_memory_mb"] = memory["peak_memory_mb"]
    plain = result["variants"][PLAIN]
    for row in result["variants"].values():
        row["memory_ratio"] = row["peak_memory_mb"] / plain["peak_memory_mb"]
    result["command"] = "gmscale bench " + " ".join(argv)
    _show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    return 0


def _torchrun(argv: list[str], options: argparse.Namespace, out: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}",
        "-m", "gmscale", "bench", *argv, "--json", str(out),
    ]  # fmt: skip
    threads = max(1, parallel.cores() // options.processes)
    status = subprocess.run(command, env={"OMP_NUM_THREADS": str(threads), **os.environ}).returncode
    if status != 0:
        raise RunError(f"the benchmark's processes failed with status {status}")
    return json.loads(out.read_text())


def _worker(options: argparse.Namespace) -> int:
    world = parallel.init(ParallelConfig())
    images, labels = _made_up_batch(options, world)
    if options.memory_of:
        subject = _subject(VARIANTS[options.memory_of], options, world)
        for _ in range(4):
            subject.step(images, labels)
        result = {"peak_memory_mb": parallel.peak_memory_mb(world.device)}
    else:
        result = _time(options, world, images, labels)
    if world.is_main:
        Path(options.json).write_text(json.dumps(result))
    parallel.shutdown(world)
    parallel.end_process(0)


def _time(options: argparse.Namespace, world: World, images: Tensor, labels: Tensor) -> dict[str, Any]:
    names = [PLAIN, *(n for n in options.variants if n != PLAIN)]
    subjects = {name: _subject(VARIANTS[name], options, world) for name in names}
    for subject in subjects.values():
        for _ in range(4):  # buckets are rebuilt, allocators filled
            subject.step(images, labels)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, subject in subjects.items():
            times[name].append(_timed(subject, images, labels, options.steps, world))
    rows = {}
    for name in names:
        ratios = [a / b for a, b in zip(times[name], times[PLAIN], strict=True)]
        attachment = subjects[name].attachment
        rows[name] = {
            "step_ms": 1e3 * statistics.median(times[name]) / options.steps,
            "ratio": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios,
            "hook_ms": attachment.report().hook_ms if attachment else None,
        }
    described = environment.describe(world)
    trials = {name: getattr(options, name) for name in ("model", "image_size", "batch_size", "rounds", "steps")}
    return {"environment": described, **trials, "variants": rows}


def _timed(subject: Subject, images: Tensor, labels: Tensor, steps: int, world: World) -> float:
    """Return the seconds that the slowest rank takes for `steps` steps."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        subject.step(images, labels)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX, group=world.control)
    return float(elapsed)


def _subject(mask: GradientMask | None, options: argparse.Namespace, world: World) -> Subject:
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=1000).to(world.device)
    model = model.to(memory_format=torch.channels_last)
    devices = [world.device.index] if world.device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3, momentum=0.9)
    return Subject(ddp, optimizer, attach(ddp, mask, site="ddp") if mask else None)


def _made_up_batch(options: argparse.Namespace, world: World) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(world.rank)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randn(shape, generator=generator).to(world.device, memory_format=torch.channels_last)
    return images, torch.randint(1000, (options.batch_size,), generator=generator).to(world.device)


def _show(result: dict[str, Any]) -> None:
    described = result["environment"]
    title = (
        f"{result['model']}, {result['image_size']} px, batch {result['batch_size']} on each of "
        f"{described['world_size']} processes ({described['device']}), torch {described['torch']}, "
        f"{result['rounds']} rounds of {result['steps']} steps"
    )
    table = Table(title=title, box=SIMPLE)
    for heading in ("variant", "step ms", "ratio", "quartiles", "hook ms", "peak MB", "ratio"):
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
    for name, row in result["variants"].items():
        quartiles = row["ratio_quartiles"]
        table.add_row(
            name,
            f"{row['step_ms']:.1f}",
            f"{row['ratio']:.3f}",
            f"{quartiles[0]:.3f} to {quartiles[-1]:.3f}",
            "-" if row["hook_ms"] is None else f"{row['hook_ms']:.1f}",
            f"{row['peak_memory_mb']:.0f}",
            f"{row['memory_ratio']:.3f}",
        )
    plain_console().print(table)
