"""Ranks that come and go: a run of two goes on with one, and grows back, on the same samples, owing the same."""

import hashlib
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
import warm
from ranks import run_ranks

from gmscale import checkpoint, elastic
from gmscale import train as training
from gmscale.parallel import World

STEPS = 6  # global batches of 32 in two epochs

# Nothing that depends on how many images pass through at once, and momentum, a schedule and an average to be kept.
PLAIN: tiny.Sections = {
    "run": {"epochs": 2.0, "log_every": 3, "eval_every_epochs": 2.0},
    "model": {"name": "test_vit", "ema_decay": 0.8},
    "optim": {"lr": 0.05, "lr_batch_size": 64},
    "mask": {"enabled": False},
    "parallel": {"threads": 1, "elastic": True},
}
MASKED = PLAIN | {"mask": {"enabled": True}}


class Trained(NamedTuple):
    finished: bool
    seen: list[list[str]]
    """Of each step the images, as they went in."""
    statistics: dict[str, Tensor]
    """Batch-norm statistics that the first step found."""


def train(rank: int, cache: Path, run_dir: Path, sections: tiny.Sections, stop_after: int | None) -> Trained:
    """Train one rank, the last one asked to stop after so many steps."""
    size = dist.get_world_size()
    if size > 1 or sections["parallel"].get("backend") == "ddp":
        world = World(rank, rank, size, torch.device("cpu"), "ddp", dist.group.WORLD)
    else:
        world = World(0, 0, 1, torch.device("cpu"), "single")
    real, seen, statistics = training.train_step, [], {}

    def step(state: Any, micro_batches: list[Any], *arguments: Any) -> Any:
        if not seen:
            statistics.update({n: b.clone() for n, b in state.wrapped.bare.named_buffers()})
        images = [image.numpy().tobytes() for batch in micro_batches for image in batch.images]
        seen.append([hashlib.sha256(image).hexdigest() for image in images])
        result = real(state, micro_batches, *arguments)
        if len(seen) == stop_after and rank == size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    training.train_step = step
    finished = tiny.train(tiny.config(cache, run_dir, **sections), world).summary is not None
    return Trained(finished, seen, statistics)


class Runs:
    """Starts runs of several ranks, one after another."""

    def __init__(self, cache: Path, folder: Path) -> None:
        self.cache, self.folder = cache, folder
        (folder / "stores").mkdir()

    def start(
        self, name: str, size: int, sections: tiny.Sections, stop_after: int | None = None
    ) -> tuple[list[Trained], list[Counter[str]]]:
        """Return what each rank trained, and the images of each step over all of them."""
        stores, run_dir = self.folder / "stores", self.folder / name
        of_ranks = run_ranks(train, size, stores, self.cache, run_dir, sections, stop_after)
        assert [rank.finished for rank in of_ranks] == [stop_after is None] * size
        steps = zip(*(rank.seen for rank in of_ranks), strict=True)
        return of_ranks, [Counter(image for images in step for image in images) for step in steps]

    def newest(self, name: str) -> Path:
        path = checkpoint.latest(self.folder / name)
        assert path is not None
        return path


@pytest.fixture
def runs(cache: Path, tmp_path: Path) -> Runs:
    return Runs(cache, tmp_path)


def weights_of(path: Path, name: str = "model") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    checkpoint.load_weights(path, found.update, name)
    return found


def about(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose numbers equal others up to rounding."""
    return {k: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for k, v in record.items()}


def mean_residuals(path: Path) -> dict[str, Tensor]:
    """What the run owes to the mean gradient: the mean over ranks of what each holds back."""
    size = checkpoint.read(path)["world_size"]
    held = [checkpoint.load_rank(path, tiny.ALONE, rank)["masks"]["mask"]["residuals"] for rank in range(size)]
    return {name: torch.stack([r[name].double() for r in held]).mean(0) for name in held[0]}


# -- without a mask the mathematics are the same ------------------------------------------------------------------
@pytest.mark.slow
def test_two_ranks_then_one_then_two_train_as_two_throughout(runs: Runs) -> None:
    _, undisturbed = runs.start("undisturbed", 2, PLAIN)
    _, first = runs.start("run", 2, PLAIN, 2)
    _, second = runs.start("run", 1, PLAIN, 2)
    assert checkpoint.read(runs.newest("run"))["world_size"] == 1
    _, third = runs.start("run", 2, PLAIN)
    assert first + second + third == undisturbed  # each step's images, augmented alike
    assert len(undisturbed) == STEPS
    for name in ("model", "model_ema"):
        whole, parts = (weights_of(runs.newest(run), name) for run in ("undisturbed", "run"))
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    whole, parts = (tiny.untimed(tiny.metrics(runs.folder / run)) for run in ("undisturbed", "run"))
    changes = [r for r in parts if r["phase"] == "world"]
    assert [(r["step"], r["world_size"], r["grad_accum_steps"]) for r in changes] == [(3, 1, 2), (5, 2, 1)]
    # the sums since the last line were handed over, twice; the learning rate is that of 32 images
    assert [r for r in parts if r["phase"] != "world"] == [about(r) for r in whole]
    assert [(r["step"], r["lr"] < 0.05 / 2) for r in whole if r["phase"] == "train"] == [(3, True), (6, True)]
    assert (runs.folder / "run" / "config.yaml").read_text().count("grad_accum_steps: 1\n") == 1
    assert checkpoint.read(runs.newest("run"))["shared"]["identity"]["world_sizes"] == [[0, 2], [2, 1], [4, 2]]


# -- with a mask --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_mask_goes_on_with_all_that_is_owed(runs: Runs) -> None:
    """The step after the change: what travels and what is held back add up to what they would have on two ranks.

    With plain SGD, weights - lr * (mean residual) therefore move alike, though weights and residuals do not.
    """
    sections = MASKED | {"optim": {"opt": "momentum", "momentum": 0.0, "sched": "none", "lr": 0.1}}
    runs.start("two", 2, sections, 3)
    runs.start("one", 2, sections, 2)
    before = runs.newest("one")
    owed = mean_residuals(before)
    alone = elastic.inherited(before, tiny.ALONE, seed=0)["masks"]["mask"]["residuals"]
    assert owed.keys() == alone.keys()
    for name, residual in alone.items():
        torch.testing.assert_close(residual.double(), owed[name], rtol=1e-6, atol=1e-12)
    runs.start("one", 1, sections, 1)
    after = {run: weights_of(runs.newest(run)) for run in ("one", "two")}
    held = {run: mean_residuals(runs.newest(run)) for run in ("one", "two")}
    assert any(not torch.allclose(after["one"][name], after["two"][name], atol=1e-5) for name in owed)
    for name in owed:
        one, two = (after[run][name].double() - 0.1 * held[run][name] for run in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("agreement", ["local", "consensus"])
def test_the_same_change_ends_the_same_again(runs: Runs, agreement: str) -> None:
    """Also with dropout and batch norm; ranks that come get the residual that was there, and random states."""
    sections = {
        "run": PLAIN["run"],
        "model": {"drop_rate": 0.3},
        "mask": {"agreement": agreement},
        "parallel": {"threads": 1, "elastic": True, "backend": "ddp", "batch_norm": "reduce"},
    }
    for name in ("first", "again"):
        runs.start(name, 2, sections, 2)
        held = [checkpoint.load_rank(runs.newest(name), tiny.ALONE, r)["back_end"]["statistics"] for r in range(2)]
        assert held[0]
        [alone], _ = runs.start(name, 1, sections, 1)
        for statistics in held[0]:
            mean = (held[0][statistics] + held[1][statistics]) / 2
            torch.testing.assert_close(alone.statistics[statistics], mean)
        grown, _ = runs.start(name, 2, sections, 1)
        for statistics in held[0]:
            assert torch.equal(grown[0].statistics[statistics], grown[1].statistics[statistics])
        runs.start(name, 2, sections)  # the same number: an ordinary resume
    first, again = (tiny.tensors(runs.folder / name) for name in ("first", "again"))
    assert tiny.different(first, again) == []
    drawn = [checkpoint.load_rank(runs.newest("first"), tiny.ALONE, rank)["random"]["torch"] for rank in range(2)]
    assert not torch.equal(*drawn)
    records = [tiny.untimed(tiny.metrics(runs.folder / name)) for name in ("first", "again")]
    assert records[0] == records[1]


# -- the program --------------------------------------------------------------------------------------------------
def program(log: Path, processes: int, flags: list[str]) -> warm.Program:
    torchrun = (*warm.TORCHRUN[:-1], str(processes))
    return warm.Program(log, [*torchrun, "-m", "gmscale", "train", *flags])


@pytest.mark.slow
def test_a_job_that_lost_a_process_for_good_ends_without_it(cache: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    sections = MASKED | {"run": PLAIN["run"] | {"epochs": 8.0, "save_every_steps": 2}}
    flags = tiny.flags(cache, run_dir, **sections)
    job = program(log, 2, flags)
    try:
        deadline = time.monotonic() + 60
        while not tiny.checkpoint_steps(run_dir):
            assert job.poll() is None, job.output
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(warm.ranks(job.pid)[1], signal.SIGKILL)
        assert job.wait() == 1
    finally:
        job.kill()
    start = tiny.checkpoint_steps(run_dir)[-1]

    def status(processes: int, changed: list[str]) -> tuple[int, str]:
        job = program(log, processes, changed)
        try:
            return job.wait(), job.output
        finally:
            job.kill()

    files = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and "heartbeats" not in p.parts}
    rigid = [flag for flag in flags if "elastic" not in flag]
    for changed, said in ((rigid, "set parallel.elastic true"), (flags, "start 1 or 2")):
        code, output = status(1 if changed is rigid else 3, changed)
        assert code == 1  # torchrun's
        assert output.count("gmscale: error:") == 1, output
        assert said in output
    assert {p: p.read_bytes() for p in files} == files  # nothing is lost by asking
    code, output = status(1, flags)
    assert code == 0, output
    assert (
        "goes on with 1 process instead of 2: 2 micro-batches a step accumulate; the mask now sees gradients of 32 "
        "images instead of 16\n" in output
    )
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 4 * STEPS
    assert summary["world_sizes"] == [[0, 2], [start, 1]]
    assert [r["step"] for r in tiny.metrics(run_dir) if r["phase"] == "world"] == [start + 1]
