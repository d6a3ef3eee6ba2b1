"""Checkpoints of several ranks: complete only when all have written, and sharded ones that become one file."""

import errno
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import small_checkpoints as small
import tiny
from ranks import run_ranks

from gmscale import checkpoint, parallel
from gmscale.checkpoint import Saver, saving
from gmscale.checkpoint.tensors import write_tensors
from gmscale.errors import RunError
from gmscale.parallel import WeightShard, World

pytestmark = pytest.mark.slow


def world_of(rank: int) -> World:
    return World(rank, rank, 2, torch.device("cpu"), "ddp", dist.group.WORLD)


def boundary(saver: Saver, world: World) -> None:
    """What the training loop does between two steps."""
    saver.advance(*parallel.count_over_ranks(world, *saver.progress))


def own_contents(rank: int, value: float) -> checkpoint.Contents:
    return small.contents(value, per_rank={"held": torch.full((4,), value), "rank": rank})


# -- all ranks or none --------------------------------------------------------------------------------------------
def slow_rank(rank: int, run_dir: Path) -> None:
    """Rank 1 takes several steps to write: training goes on, and there is no checkpoint before it is done."""
    world, opened = world_of(rank), threading.Event()
    if rank == 1:
        saving.write_tensors = lambda *a: opened.wait(30) and write_tensors(*a)
    saver = small.saver(run_dir, world=world, background=True)
    saver.save(1, own_contents(rank, 1.0), None)
    if rank == 0:
        saver._task.wait(30)
        assert saver.progress == (False, False)
    for _ in range(3):
        boundary(saver, world)
        parallel.barrier(world)
        assert checkpoint.latest(run_dir) is None
    opened.set()
    if rank == 1:
        saver._task.wait(30)
    boundary(saver, world)  # rank 0 begins to give it its name
    saver.save(2, own_contents(rank, 2.0), None)
    assert tiny.checkpoint_steps(run_dir) == [1]
    saver.finish()
    for step, path in enumerate(checkpoint.checkpoints(run_dir), start=1):
        held = checkpoint.load_rank(path, world)
        assert (held["rank"], held["held"].tolist()) == (rank, [step] * 4)


def test_a_checkpoint_waits_for_the_slowest_rank(tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    stores.mkdir()
    run_ranks(slow_rank, 2, stores, tmp_path / "run")
    assert tiny.checkpoint_steps(tmp_path / "run") == [1, 2]


def failing_rank(rank: int, run_dir: Path, background: bool) -> tuple[list[str], str]:
    """Rank 1 finds the disk full twice: in the midst of training, and at the end."""
    world, said, full = world_of(rank), [], True

    def write(path: Path, *rest: Any) -> None:
        if rank == 1 and full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_tensors(path, *rest)

    saving.write_tensors = write
    saver = small.saver(run_dir, said, world, background, keep=1)
    folder = run_dir / "checkpoints"
    saver.save(1, own_contents(rank, 1.0), None)
    while saver.progress[0] or saver.step is not None:
        boundary(saver, world)
    full = False
    saver.save(2, own_contents(rank, 2.0), None)
    saver.finish()
    assert [p.name for p in folder.iterdir()] == ["step-00000002"]
    full = True
    saver.save(3, own_contents(rank, 3.0), None)
    with pytest.raises(RunError) as caught:
        saver.finish()
    parallel.barrier(world)
    assert saver.step == 2
    assert [p.name for p in folder.iterdir()] == ["step-00000002"]
    assert isinstance(caught.value, parallel.PeerError) == (rank == 1)
    return said, str(caught.value)


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_a_rank_that_cannot_write_is_named_and_the_others_give_up_too(tmp_path: Path, background: bool) -> None:
    stores, run_dir = tmp_path / "stores", tmp_path / "run"
    stores.mkdir()
    (said, error), (nothing, _) = run_ranks(failing_rank, 2, stores, run_dir, background)
    assert nothing == []
    (warning,) = said
    folder = run_dir / "checkpoints"
    assert f"{folder / 'step-00000001'} cannot be written (rank 1: [Errno 28] No space left on device" in warning
    assert warning.endswith("there is none yet, and the run goes on")
    assert f"{folder / 'step-00000003'} cannot be written (rank 1: [Errno 28]" in error
    assert error.endswith(f"{folder / 'step-00000002'} stands; the same command goes on")


def lost_rank(rank: int, run_dirs: list[Path]) -> str:
    world = world_of(rank)
    saver = small.saver(run_dirs[rank], [], world, background=True)
    saver.save(1, own_contents(rank, 1.0), None)
    with pytest.raises(RunError) as caught:
        saver.finish()
    return str(caught.value)


def test_ranks_that_write_to_different_disks_are_found_out(tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    stores.mkdir()
    error, _ = run_ranks(lost_rank, 2, stores, [tmp_path / "node-0", tmp_path / "node-1"])
    assert "rank-00001.safetensors is not there; run.dir must be one directory for all ranks" in error
    assert list((tmp_path / "node-0" / "checkpoints").iterdir()) == []


# -- sharded weights ----------------------------------------------------------------------------------------------
def made_up_shards(rank: int, run_dir: Path) -> None:
    world = world_of(rank)
    flat = torch.arange(15.0)
    shards = {"weight": WeightShard((5, 3), 9 * rank, flat[9:] if rank else flat[:9])}
    if rank == 0:
        shards["mean"] = WeightShard((2,), 0, torch.ones(2))
    saver = small.saver(run_dir, world=world, background=True)
    saver.save(1, small.contents(weights=None, shards=shards), None)
    saver.finish(whole=True)
    path = checkpoint.latest(run_dir)
    assert path is not None
    loaded = checkpoint.load_shards(path, world)
    assert loaded.keys() == shards.keys()
    assert all(loaded[n][:2] == s[:2] and torch.equal(loaded[n].entries, s.entries) for n, s in shards.items())
    parallel.barrier(world)
    whole = load_file(checkpoint.weights_file(run_dir))
    assert tiny.different(whole, {"weight": flat.view(5, 3), "mean": torch.ones(2)}) == []


def test_each_rank_saves_its_own_part_and_rank_0_makes_one_file_at_the_end(tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    stores.mkdir()
    run_ranks(made_up_shards, 2, stores, tmp_path / "run")


Run = tuple[Path, bool, int | None]
"""Its directory, whether its checkpoints are sharded, and after how many steps it is asked to stop."""


def train(rank: int, backend: str, cache: Path, runs: list[Run]) -> list[bool]:
    """Train one rank of several runs; return which of them finished."""
    if backend == "deepspeed":
        os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
        warnings.simplefilter("ignore")
    sections: tiny.Sections = {
        "run": {"epochs": 1.0, "log_every": 5, "save_every_steps": 2},
        "model": {"drop_rate": 0.3},
        "data": {"batch_size_per_device": 10},
        "optim": {"opt": "adamw", "lr": 0.003},
        "parallel": {"zero_stage": 3},
    }
    finished = []
    for run_dir, sharded, stop_after in runs:
        parts = sections | {"parallel": sections["parallel"] | {"sharded_checkpoints": sharded}}
        finished.append(tiny.train_rank(rank, 2, backend, cache, run_dir, parts, stop_after))
    return finished


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed"])
def test_a_sharded_run_is_resumed_bit_for_bit_and_ends_as_the_whole_one(
    cache: Path, tmp_path: Path, backend: str
) -> None:
    if backend == "deepspeed":
        pytest.importorskip("deepspeed", reason='pip install "gmscale[deepspeed]"')
    stores, run_dir, undisturbed = tmp_path / "stores", tmp_path / "run", tmp_path / "undisturbed"
    stores.mkdir()
    tiny.build(cache)
    go = lambda *runs: run_ranks(train, 2, stores, backend, cache, list(runs), timeout_s=120)  # noqa: E731
    assert go((undisturbed, False, None), (run_dir, True, 3)) == [[True, False]] * 2
    stopped = checkpoint.latest(run_dir)
    assert stopped is not None
    names = {path.name for path in stopped.glob("*.safetensors")}
    assert {"weights-00001-of-00002.safetensors", "weights-00002-of-00002.safetensors"} <= names
    assert "model.safetensors" not in names
    timm.create_model("test_byobnet", num_classes=10, checkpoint_path=str(checkpoint.weights_file(stopped)))
    assert go((run_dir, True, None)) == [[True]] * 2

    wanted, found = tiny.tensors(undisturbed), tiny.tensors(run_dir)
    assert tiny.different(wanted, {n: t for n, t in found.items() if not n.startswith("weights-")}) == []
    halves = [sum(t.numel() for n, t in found.items() if n.startswith(f"weights-0000{i}")) for i in (1, 2)]
    total = sum(t.numel() for n, t in found.items() if n.startswith("model."))
    assert max(halves) < 0.6 * total
    assert tiny.untimed(tiny.metrics(undisturbed)) == tiny.untimed(tiny.metrics(run_dir))
