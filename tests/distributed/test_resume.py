"""Three ranks: a sum of three depends on its order, and a resumed run must add in the same one."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
from ranks import run_ranks

from gmscale import train as training
from gmscale.parallel import World

WORLD = 3
CONSENSUS = {"mask": {"agreement": "consensus"}, "output": {"enabled": True, "operator": "random", "start": 0.0}}


def train(rank: int, cache: Path, run_dir: Path, sections: dict[str, Any], stop_after: int | None) -> bool:
    """Train one rank, asked to stop after some steps; return whether the run finished."""
    world = World(rank, rank, WORLD, torch.device("cpu"), "ddp", dist.group.WORLD)
    real, steps = training.train_step, 0

    def step(*arguments: Any) -> Any:
        nonlocal steps
        result = real(*arguments)
        steps += 1
        if steps == stop_after and rank == 1:  # one rank alone hears the signal
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    training.train_step = step
    batch = {"batch_size_per_device": 5}
    config = tiny.config(cache, run_dir, **tiny.EVERYTHING, data=batch, **sections)
    return tiny.train(config, world).summary is not None


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, CONSENSUS], ids=["local", "consensus and layer outputs"])
def test_three_ranks_resume_bit_for_bit(cache: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    undisturbed, run_dir, stores = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "stores"
    stores.mkdir()
    assert run_ranks(train, WORLD, stores, cache, undisturbed, sections, None) == [True] * WORLD
    assert run_ranks(train, WORLD, stores, cache, run_dir, sections, 3) == [False] * WORLD
    assert tiny.checkpoint_steps(run_dir) == [2, 3]
    assert run_ranks(train, WORLD, stores, cache, run_dir, sections, None) == [True] * WORLD
    assert tiny.different(tiny.tensors(undisturbed), tiny.tensors(run_dir)) == []
    assert tiny.untimed(tiny.metrics(undisturbed)) == tiny.untimed(tiny.metrics(run_dir))
    assert {r["count"] for r in tiny.metrics(run_dir) if "count" in r} == {tiny.VALIDATION_SIZE}
    sent = [(r["wire_bytes"], r["dense_bytes"]) for r in tiny.metrics(run_dir) if r["phase"] == "train"]
    assert all(wire < dense for wire, dense in sent) if sections else all(wire == dense for wire, dense in sent)
