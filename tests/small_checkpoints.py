"""Checkpoints so small that a test can save many: every entry of every tensor in them holds one value."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gmscale import checkpoint
from gmscale.checkpoint import Contents, Saver
from gmscale.parallel import World

ALONE = World(0, 0, 1, torch.device("cpu"), "single")
FILES = ("state.json", "model.safetensors", "optimizer.safetensors", "rank-00000.safetensors")


def contents(value: float = 1.0, entries: int = 3, **changes: Any) -> Contents:
    """What a run of a linear model would save, every number being `value`."""
    model = nn.Linear(entries, 2)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.weight] = {"momentum_buffer": torch.full((2, entries), value)}
    given: dict[str, Any] = {
        "weights": model.state_dict(),
        "shards": None,
        "ema": None,
        "optimizer": optimizer.state_dict(),
        "shared": {"value": value},
        "per_rank": {"held": torch.full((4,), value)},
    }
    return Contents(**given | changes)


def saver(
    run_dir: Path,
    said: list[str] | None = None,
    world: World = ALONE,
    background: bool = False,
    **changes: int,
) -> Saver:
    """A saver whose warnings go to `said`; without it there must be none."""

    def warn(message: str) -> None:
        assert said is not None, message
        said.append(message)

    rule = {"keep": 2, "keep_best": 0} | changes
    return Saver(run_dir, world, **rule, background=background, warn=warn, check_owner=lambda: None)


def save(run_dir: Path, step: int, value: float = 1.0, **changes: Any) -> Path:
    """Save a checkpoint and wait for it."""
    own = saver(run_dir, **changes)
    own.save(step, contents(value), None)
    own.finish()
    return run_dir / "checkpoints" / f"step-{step:08d}"


def load(path: Path, entries: int = 3) -> set[float]:
    """Load everything of a checkpoint; return the values found in it."""
    model = nn.Linear(entries, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoint.load_weights(path, model.load_state_dict)
    optimizer.load_state_dict(checkpoint.optimizer_state(path))
    found = [model.weight.detach(), optimizer.state[model.weight]["momentum_buffer"]]
    found.append(checkpoint.load_rank(path, ALONE)["held"])
    return {float(v) for tensor in found for v in tensor.flatten()} | {checkpoint.read(path)["shared"]["value"]}
