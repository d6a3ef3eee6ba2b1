"""Runs so small that a test can train one: their settings, and what they leave behind."""

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from gmscale import config as configuration
from gmscale import train as training
from gmscale.config import TrainConfig
from gmscale.data import DataConfig, embedded
from gmscale.parallel import World

Sections = dict[str, dict[str, Any]]

SIZE, IMAGE_SIZE, VALIDATION_SIZE = 100, 32, 25
ALONE = World(0, 0, 1, torch.device("cpu"), "single")

# Dropout, momentum, residuals, an average and a log interval that no checkpoint falls on: all of it must survive.
EVERYTHING: dict[str, dict[str, Any]] = {
    "run": {"epochs": 1.5, "log_every": 5, "save_every_steps": 2},
    "model": {"ema_decay": 0.8, "drop_rate": 0.3},
}

# What differs between two runs of the same thing.
TIMES = {"images_per_s", "step_ms", "data_ms", "hook_ms", "hook_share", "memory_mb"}
TIMES_OF_SOME = {"output_hook_ms", "output_hook_share", "cost_ms"}


def build(cache_dir: Path) -> Path:
    """Build the embedded set that `settings` asks for; return the directory of its shards."""
    return embedded.ensure(DataConfig(size=SIZE, image_size=IMAGE_SIZE, cache_dir=str(cache_dir)))


def settings(cache: Path, run_dir: Path, /, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Nested settings of a run of 6 steps an epoch, with those of `sections` on top."""
    base: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "epochs": 1.0, "log_every": 2},
        "model": {"name": "test_byobnet"},
        "data": {
            "cache_dir": str(cache),
            "size": SIZE,
            "image_size": IMAGE_SIZE,
            "batch_size_per_device": 16,
            "eval_batch_size_per_device": 10,
            "workers": 0,
        },
        "optim": {"lr": 0.05},
        "parallel": {"threads": 1},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return base


def config(cache: Path, run_dir: Path, /, **sections: dict[str, Any]) -> TrainConfig:
    return configuration.from_dict(settings(cache, run_dir, **sections))


def flags(cache: Path, run_dir: Path, /, **sections: dict[str, Any]) -> list[str]:
    """The same as command-line flags."""
    nested = settings(cache, run_dir, **sections)
    return [
        f"--{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for section, values in nested.items()
        for name, value in values.items()
    ]


def train(config: TrainConfig, world: World = ALONE) -> training.Outcome:
    """Train in this process, quietly."""
    try:
        return training.train(config, world, Console(file=io.StringIO()))
    finally:
        torch.use_deterministic_algorithms(False)  # of the whole process: other tests live here too


def train_rank(
    rank: int,
    size: int,
    backend: str,
    cache: Path,
    run_dir: Path,
    sections: Sections,
    stop_after: int | None = None,
) -> bool:
    """Train one rank in its own process, the last one asked to stop after so many steps; return if it finished."""
    world = World(rank, rank, size, torch.device("cpu"), backend, dist.group.WORLD)
    real, steps = training.train_step, 0

    def step(*arguments: Any) -> Tensor | None:
        nonlocal steps
        result = real(*arguments)
        steps += 1
        if steps == stop_after and rank == size - 1:  # one rank alone hears the signal
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    training.train_step = step
    try:
        return train(config(cache, run_dir, **sections), world).summary is not None
    finally:
        training.train_step = real


def after_step(number: int, action: Callable[[], None], patch: Any) -> None:
    """Do something after so many optimizer steps of the next `train`; `patch` is pytest's monkeypatch."""
    count, real = 0, training.train_step

    def step(*arguments: Any) -> Tensor | None:
        nonlocal count
        result = real(*arguments)
        count += 1
        if count == number:
            action()
        return result

    patch.setattr(training, "train_step", step)


def checkpoint_steps(run_dir: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (run_dir / "checkpoints").glob("step-*"))


def tensors(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint by file and name: weights, momenta, residuals, random states."""
    newest = run_dir / "checkpoints" / f"step-{checkpoint_steps(run_dir)[-1]:08d}"
    return {f"{f.name}/{k}": t for f in sorted(newest.glob("*.safetensors")) for k, t in load_file(f).items()}


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit for bit equal, or not in both."""
    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k]))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what a clock or the system's memory said."""
    return [{k: v for k, v in r.items() if k not in TIMES | TIMES_OF_SOME} for r in records]
