"""A run goes on with another number of processes: who takes over what, without processes."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_checkpoints as small
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gmscale import checkpoint, costs, dry_run, elastic, rundir
from gmscale import config as configuration
from gmscale.checkpoint import contents
from gmscale.checkpoint.tensors import write_tensors
from gmscale.config import TrainConfig
from gmscale.data import order
from gmscale.dry_run import Options
from gmscale.errors import UsageError
from gmscale.export import export
from gmscale.parallel import World
from gmscale.report import write_report

sizes = st.integers(1, 12)


def world(rank: int, size: int, backend: str = "ddp") -> World:
    return World(rank, rank, size, torch.device("cpu"), backend)


# -- who takes over from whom --------------------------------------------------------------------------------------
@given(before=sizes, now=sizes)
def test_shares_are_those_of_the_samples(before: int, now: int) -> None:
    """The sample order is asked which old rank would have trained on the samples of each new one."""
    samples, step = np.arange(3 * before * now), 1
    slices = [set(order.micro_batches(samples, step, old, before, now, 1)[0].tolist()) for old in range(before)]
    for rank in range(now):
        own = order.micro_batches(samples, step, rank, now, before, 1)[0].tolist()
        found = {old: len(theirs.intersection(own)) for old, theirs in enumerate(slices)}
        expected = {old: Fraction(count, before) for old, count in found.items() if count}
        assert elastic.shares(before, now, rank) == expected


@given(st.data(), sizes, sizes)
def test_what_is_owed_to_the_mean_gradient_stays(data: st.DataObject, before: int, now: int) -> None:
    """Law 10: (1/N') sum r' = (1/N) sum r, in float32, whatever residuals are missing on some ranks."""
    numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)
    given_names = st.lists(st.sampled_from("abc"), unique=True)
    residuals = [
        {name: torch.tensor(data.draw(numbers), dtype=torch.float32) for name in data.draw(given_names)}
        for _ in range(before)
    ]
    handed_over = [
        elastic.weighted_sum((share, residuals[old]) for old, share in elastic.shares(before, now, rank).items())
        for rank in range(now)
    ]
    for name in "abc":
        assert any(name in r for r in residuals) == any(name in r for r in handed_over)
        nothing = torch.zeros(4)
        owed = sum((r.get(name, nothing).double() for r in residuals), nothing.double()) / before
        owes = sum((r.get(name, nothing).double() for r in handed_over), nothing.double()) / now
        largest = max(float(r.get(name, nothing).abs().max()) for r in residuals)
        torch.testing.assert_close(owes, owed, rtol=0, atol=1e-6 * largest)


def test_of_half_the_ranks_each_takes_a_mean_and_of_twice_as_many_the_same_one() -> None:
    assert elastic.shares(4, 2, 1) == {2: Fraction(1, 2), 3: Fraction(1, 2)}
    assert [elastic.shares(2, 4, rank) for rank in range(4)] == [{0: 1}, {0: 1}, {1: 1}, {1: 1}]
    assert elastic.shares(2, 3, 1) == {0: Fraction(1, 2), 1: Fraction(1, 2)}
    residual = torch.tensor([0.1, 1e-30, -3.3])
    assert torch.equal(elastic.weighted_sum([(Fraction(1), {"a": residual})])["a"], residual)


def test_a_residual_keeps_its_layout_in_memory() -> None:
    channels_last = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    found = elastic.weighted_sum([(Fraction(1, 2), {"a": channels_last}), (Fraction(1, 2), {"a": channels_last})])
    assert found["a"].stride() == channels_last.stride()
    assert torch.equal(found["a"], channels_last)


# -- from a checkpoint ---------------------------------------------------------------------------------------------
def saved(folder: Path, per_rank: list[dict[str, Any]]) -> Path:
    """A checkpoint as far as `inherited` reads one."""
    path = folder / f"of-{len(per_rank)}"
    path.mkdir()
    for rank, held in enumerate(per_rank):
        pages = contents.pages(small.contents(per_rank=held), world(rank, len(per_rank)))
        write_tensors(path / f"rank-{rank:05d}.safetensors", *pages[f"rank-{rank:05d}.safetensors"])
    state = {"format": 3, "step": 7, "world_size": len(per_rank)}
    (path / "state.json").write_text(json.dumps(state))
    return path


def held_by(rank: int) -> dict[str, Any]:
    """What a rank of a run saves for itself, other numbers on each."""
    one = torch.ones(2, 3)
    return {
        "masks": {
            "mask": {"grad_scale": 8.0, "residuals": {"conv": one * 2**rank} | ({"head": one} if rank else {})},
            "output": {"grad_scale": 8.0, "residuals": {}},
        },
        "back_end": {"statistics": {"bn.running_mean": torch.full((2,), 3.0**rank)}},
        "random": checkpoint.random_states(torch.device("cpu")),
        "meter": torch.tensor([1.5 + rank, 3.0, 16.0, 0.1 * (rank + 1)], dtype=torch.float64),
    }


@pytest.mark.parametrize(("before", "now"), [(2, 1), (4, 2), (1, 2), (2, 6), (3, 2), (2, 3), (5, 3)])
def test_ranks_inherit_everything_between_them(tmp_path: Path, before: int, now: int) -> None:
    old = [held_by(rank) for rank in range(before)]
    path = saved(tmp_path, old)
    found = [elastic.inherited(path, world(rank, now), seed=3) for rank in range(now)]

    def mean_of(trees: list[dict[str, Any]], name: str) -> Tensor:
        held = [tree["masks"]["mask"]["residuals"].get(name, torch.zeros(2, 3)) for tree in trees]
        return torch.stack(held).double().mean(0)

    for name in ("conv", "head"):
        torch.testing.assert_close(mean_of(found, name), mean_of(old, name))
    assert all(tree["masks"]["mask"]["grad_scale"] == 8.0 for tree in found)
    assert all(tree["masks"]["output"]["residuals"] == {} for tree in found)
    statistics = [
        torch.stack([t["back_end"]["statistics"]["bn.running_mean"] for t in trees]) for trees in (old, found)
    ]
    torch.testing.assert_close(statistics[0].mean(0), statistics[1].mean(0))
    sums, expected = (torch.stack([tree["meter"] for tree in trees]) for trees in (found, old))
    assert torch.equal(sums[:, :3].sum(0), expected[:, :3].sum(0))
    assert sums[:, 3].max() == expected[:, 3].max()


def test_a_loss_that_is_not_a_number_stays_visible(tmp_path: Path) -> None:
    old = [held_by(0), held_by(1)]
    old[1]["meter"][[0, 3]] = math.nan
    sums = elastic.inherited(saved(tmp_path, old), world(0, 1), seed=3)["meter"]
    assert sums.isnan().tolist() == [True, False, False, True]


def test_random_states_are_their_own_and_the_same_each_time(tmp_path: Path) -> None:
    path = saved(tmp_path, [held_by(0)])
    first, again = ([elastic.inherited(path, world(r, 3), seed=3)["random"] for r in range(3)] for _ in range(2))
    other = elastic.inherited(path, world(0, 3), seed=4)["random"]
    draws = []
    for states in (*first, *again, other):
        checkpoint.set_random_states(states, torch.device("cpu"))
        draws.append((float(torch.rand(1)), float(np.random.random())))
    assert draws[:3] == draws[3:6]
    assert len(set(draws)) == 4


# -- the division --------------------------------------------------------------------------------------------------
def config(accumulate: int = 1, /, elastic: bool = True, **sections: dict[str, Any]) -> TrainConfig:
    sections = {"optim": {"grad_accum_steps": accumulate}, "parallel": {"elastic": elastic}} | sections
    return configuration.from_dict({"data": {"batch_size_per_device": 16}} | sections)


@pytest.mark.parametrize(
    ("accumulate", "first", "now", "expected"), [(1, 2, 1, 2), (1, 8, 2, 4), (4, 2, 8, 1), (3, 4, 6, 2)]
)
def test_the_global_batch_stays(accumulate: int, first: int, now: int, expected: int) -> None:
    division = elastic.divide(config(accumulate), world(0, now), [(0, first)], 5)
    assert division.config.optim.grad_accum_steps == expected
    assert replace(division.config, optim=config(accumulate).optim) == config(accumulate)  # nothing else changed
    assert list(division.history) == [(0, first), (5, now)]
    assert division.config.optim.grad_accum_steps * now == accumulate * first


@pytest.mark.parametrize(
    ("accumulate", "history", "now", "said"),
    [
        (1, [(0, 2)], 1, "1 process instead of 2: 2 micro-batches a step accumulate; the mask now sees gradients "
         "of 32 images instead of 16"),
        (1, [(0, 2), (3, 1)], 2, "2 processes instead of 1: 1 micro-batch a step on each; the mask now sees "
         "gradients of 16 images instead of 32"),
    ],
)  # fmt: skip
def test_a_change_is_told(accumulate: int, history: list[tuple[int, int]], now: int, said: str) -> None:
    assert elastic.divide(config(accumulate), world(0, now), history, 5).change == f"goes on with {said}"
    plain = config(accumulate, mask={"enabled": False})
    assert "mask" not in elastic.divide(plain, world(0, now), history, 5).change


def test_without_a_change_the_division_is_that_of_before() -> None:
    """Also with the setting off again: the global batch is still that of the beginning."""
    for setting in (True, False):
        division = elastic.divide(config(1, elastic=setting), world(0, 1), [(0, 2), (3, 1)], 5)
        assert division.change == ""
        assert division.config.optim.grad_accum_steps == 2
        assert list(division.history) == [(0, 2), (3, 1)]


def test_a_change_that_trained_nothing_is_forgotten() -> None:
    assert list(elastic.divide(config(), world(0, 2), [(0, 2), (0, 1)], 0).history) == [(0, 2)]
    assert list(elastic.divide(config(), world(0, 1), [(0, 2), (0, 1)], 0).history) == [(0, 2), (0, 1)]


@pytest.mark.parametrize(
    ("accumulate", "first", "now", "said"),
    [
        (1, 2, 3, "3 processes cannot share the 2 micro-batches of a step .* start 1 or 2"),
        (2, 3, 4, "4 processes cannot share the 6 micro-batches of a step .* start 1, 2, 3 or 6"),
        (1, 1, 2, "2 processes cannot share the 1 micro-batch of a step .* 1 process at .* start 1$"),
    ],
)
def test_a_number_that_does_not_fit_is_refused(accumulate: int, first: int, now: int, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        elastic.divide(config(accumulate), world(0, now), [(0, first)], 5)
    assert "\n" not in str(caught.value)


def test_without_the_setting_another_number_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"saved by 1 process, .* cannot be resumed by 2; .* parallel.elastic true"
    ):
        elastic.divide(config(elastic=False), world(0, 2), [(0, 1)], 5)
    with pytest.raises(UsageError, match=r"start as many as before, or choose another run.dir"):
        elastic.divide(config(elastic=False), world(0, 2, "fsdp2"), [(0, 1)], 5)


@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed"])
def test_back_ends_that_divide_the_state_refuse_at_the_start(backend: str) -> None:
    with pytest.raises(UsageError, match=f"parallel.elastic needs parallel.backend ddp .*; with {backend}"):
        elastic.divide(config(), world(0, 2, backend), [(0, 2)], 0)


def test_streams_refuse_at_the_start() -> None:
    streams = config(1, data={"access": "stream", "batch_size_per_device": 16})
    with pytest.raises(UsageError, match=r"needs data.access index"):
        elastic.divide(streams, world(0, 2), [(0, 2)], 0)


def test_runs_from_before_this_was_recorded_had_one_number(tmp_path: Path) -> None:
    state = {"format": 3, "world_size": 3, "shared": {"identity": {"world_size": 3}}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "environment.json").write_text(json.dumps({"world_size": 4}))
    assert rundir.world_sizes(tmp_path, tmp_path, config(), world(0, 2)) == [(0, 3)]
    assert rundir.world_sizes(tmp_path, None, config(), world(0, 2)) == [(0, 4)]
    assert rundir.world_sizes(tmp_path, None, config(elastic=False), world(0, 2)) == [(0, 2)]  # begins anew


# -- a run of one process ------------------------------------------------------------------------------------------
def rehearsed(config: TrainConfig) -> dict[str, int]:
    """The batch that a dry run foresees; it says what a start would say."""
    link = costs.Link(1e9, 1e-5)
    options = Options(samples=None, classes=None, val_samples=0, devices=None, link=link, json=None)
    try:
        found = dry_run.dry_run(config, options, tiny.ALONE)
    finally:
        torch.use_deterministic_algorithms(False)  # of the whole process: other tests live here too
    assert any(note.startswith("a start goes on with 1 process instead of 2") for note in found["notes"])
    return found["batch"]


def test_a_run_that_lost_its_ranks_before_a_checkpoint_keeps_its_batch(cache: Path, tmp_path: Path) -> None:
    lost = {"world_size": 2, "world_sizes": [[0, 2]]}
    (tmp_path / "environment.json").write_text(json.dumps(lost))
    config = tiny.config(cache, tmp_path, parallel={"elastic": True})
    assert rehearsed(config) == {"global": 32, "ranks": 1, "per_device": 16, "grad_accum_steps": 2}
    summary = tiny.train(config).summary
    assert summary is not None
    assert summary["steps"] == tiny.SIZE // 32
    assert list(summary["world_sizes"]) == [(0, 2), (0, 1)]
    assert json.loads((tmp_path / "environment.json").read_text())["world_sizes"] == [[0, 2], [0, 1]]
    changes = [r for r in tiny.metrics(tmp_path) if r["phase"] == "world"]
    assert [(r["step"], r["world_size"], r["grad_accum_steps"]) for r in changes] == [(1, 1, 2)]
    assert "grad_accum_steps: 1\n" in (tmp_path / "config.yaml").read_text()  # the user's
    assert "2 then 1" in write_report([tmp_path]).read_text()
    export(tmp_path, "hf", out=tmp_path / "exported")
    assert "32 (16 x 2 devices)" in (tmp_path / "exported" / "README.md").read_text()


def test_an_ordinary_run_says_nothing_of_it(finished_run: Path) -> None:
    assert json.loads((finished_run / "summary.json").read_text())["world_sizes"] == [[0, 1]]
    assert not [r for r in tiny.metrics(finished_run) if r["phase"] == "world"]


def test_an_environment_that_says_nothing_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(UsageError, match=r"environment.json does not say with how many processes"):
        tiny.train(tiny.config(cache, tmp_path, parallel={"elastic": True}))
