"""Steps without a finite gradient: skipped on every rank alike, counted, and fatal only if they do not end."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import tiny
from ranks import run_ranks
from stepping import NO_MASK, Run, world_of

from gmscale import cli
from gmscale import train as training
from gmscale.parallel import Stepped
from gmscale.training_state import Skips

VIT = {"name": "test_vit", "kwargs": {"img_size": 32}}
PLAIN: tiny.Sections = NO_MASK | {"model": VIT, "optim": {"sched": "none", "lr": 0.02}}
ADAMW_BF16 = PLAIN | {"optim": {"opt": "adamw", "lr": 0.001, "sched": "none", "amp": "bf16", "clip_grad": 1.0}}
AGC = PLAIN | {"optim": PLAIN["optim"] | {"clip_mode": "agc", "clip_grad": 0.01}}
ACCUMULATING = PLAIN | {"optim": PLAIN["optim"] | {"clip_mode": "value", "clip_grad": 0.01, "grad_accum_steps": 2}}


def skipping(
    rank: int, size: int, backend: str, cache: Path, folder: Path, cases: dict[str, tiny.Sections]
) -> dict[str, Any]:
    """Train three steps; then the same with a poisoned one between the first and the second, on the last rank."""
    found: dict[str, Any] = {}
    for name, sections in cases.items():
        config, world = tiny.config(cache, folder, **sections), world_of(rank, size, backend)
        undisturbed, disturbed = Run(config, world), Run(config, world)
        for i in range(3):
            undisturbed.step(i)
        disturbed.step(0)
        before = disturbed.everything()
        skipped = disturbed.step(1, poison=rank == size - 1)
        named = disturbed.state.wrapped.nonfinite_gradients()
        after = disturbed.everything()
        went_on = [disturbed.step(i).skipped for i in (1, 2)]
        found[name] = {
            "skipped": skipped.skipped,
            "norm": float(skipped.grad_norm),
            "named": named,
            "changed": tiny.different(before, after),
            "went_on": not any(went_on),
            "different": tiny.different(undisturbed.everything(), disturbed.everything()),
            "moved": tiny.different(before, disturbed.everything()) != [],
        }
    return found


def check(found: dict[str, dict[str, Any]]) -> None:
    for name, result in found.items():
        assert result["skipped"], name
        assert not result["norm"] < torch.inf, name
        assert result["named"][-1].startswith("head."), (name, result["named"])
        assert len(result["named"]) > 20, name  # a poisoned loss reaches every layer
        assert result["changed"] == [], name
        assert result["went_on"], name
        assert result["different"] == [], name
        assert result["moved"], name


# -- the step -----------------------------------------------------------------------------------------------------
def test_one_process_goes_on_as_if_the_step_had_not_been(cache: Path, tmp_path: Path) -> None:
    cases = {"sgd": PLAIN, "adamw": ADAMW_BF16, "agc": AGC, "accumulating": ACCUMULATING}
    check(skipping(0, 1, "single", cache, tmp_path, cases))


def test_ddp_skips_on_all_ranks_when_one_is_poisoned(cache: Path, tmp_path: Path) -> None:
    for found in run_ranks(skipping, 2, tmp_path, 2, "ddp", cache, tmp_path, {"sgd": PLAIN, "value": ACCUMULATING}):
        check(found)


def test_fsdp2_skips_on_all_ranks_when_one_is_poisoned(cache: Path, tmp_path: Path) -> None:
    for found in run_ranks(skipping, 2, tmp_path, 2, "fsdp2", cache, tmp_path, {"sgd": PLAIN, "adamw": ADAMW_BF16}):
        check(found)


def test_deepspeed_skips_on_all_ranks_when_one_is_poisoned(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    cases = {f"stage {n}": PLAIN | {"parallel": {"zero_stage": n}} for n in range(4)}
    cases |= {f"stage {n} bf16": ADAMW_BF16 | {"parallel": {"zero_stage": n}} for n in (0, 3)}
    clipped = {"optim": PLAIN["optim"] | {"clip_grad": 1.0, "grad_accum_steps": 2}}
    cases |= {f"stage {n} accumulating": PLAIN | clipped | {"parallel": {"zero_stage": n}} for n in (2,)}
    for found in run_ranks(skipping, 2, tmp_path, 2, "deepspeed", cache, tmp_path, cases, timeout_s=200):
        check(found)


def test_fp16_skips_as_its_scaler_does(cache: Path, tmp_path: Path) -> None:
    run = Run(tiny.config(cache, tmp_path, **PLAIN | {"optim": PLAIN["optim"] | {"amp": "fp16"}}), tiny.ALONE)
    run.step(0)
    scale, before = run.state.wrapped.loss_scale(), run.everything()
    assert run.step(1, poison=True).skipped
    assert run.state.wrapped.loss_scale() == scale / 2
    assert tiny.different(before, run.everything()) == []


def test_a_gradient_too_large_for_a_norm_is_skipped_too(cache: Path, tmp_path: Path) -> None:
    run = Run(tiny.config(cache, tmp_path, **PLAIN), tiny.ALONE)
    before = run.everything()
    assert run.step(0, scale=1e30).skipped
    assert tiny.different(before, run.everything()) == []


def test_what_the_mask_held_back_of_a_nonfinite_gradient_stays(cache: Path, tmp_path: Path) -> None:
    mask = {"mask": {"enabled": True, "error_feedback": True, "strength": 1.0}}
    run = Run(tiny.config(cache, tmp_path, **PLAIN | mask), tiny.ALONE)
    run.step(0)
    assert run.state.attachment is not None
    residuals = lambda: {n: r.clone() for n, r in run.state.attachment.state_dict()["residuals"].items()}  # noqa: E731
    before = residuals()
    assert run.step(1, poison=True).skipped
    assert before
    assert tiny.different(before, residuals()) == []
    assert not run.step(2).skipped
    assert all(torch.isfinite(r).all() for r in residuals().values())


# -- statistics that a skipped step does not mend -----------------------------------------------------------------
def poisoned_statistics(rank: int, size: int, cache: Path, folder: Path, batch_norm: str, where: int) -> list[str]:
    sections = NO_MASK | {"parallel": {"batch_norm": batch_norm}}
    run = Run(tiny.config(cache, folder, **sections), world_of(rank, size, "ddp"))
    run.step(0)
    with run.images_of_nan(rank == where):
        assert run.step(1).skipped
    names = run.state.wrapped.nonfinite_buffers()
    if not names:  # no harm was done
        assert not run.step(2).skipped
        assert all(b.isfinite().all() for b in run.state.wrapped.bare.buffers())
    return names


@pytest.mark.parametrize(
    ("batch_norm", "where", "harmful"), [("broadcast", 0, True), ("broadcast", 1, False), ("reduce", 1, True)]
)
def test_poisoned_statistics_are_named_unless_they_will_be_replaced(
    cache: Path, tmp_path: Path, batch_norm: str, where: int, harmful: bool
) -> None:
    found = run_ranks(poisoned_statistics, 2, tmp_path, 2, cache, tmp_path, batch_norm, where)
    assert found[0] == found[1]
    assert found[0][:1] == (["stem.bn.running_mean"] if harmful else [])


# -- the run ------------------------------------------------------------------------------------------------------
def poison_steps(monkeypatch: pytest.MonkeyPatch, wanted: Callable[[int], bool]) -> None:
    """Make the loss infinite in some optimizer steps, counted from 1."""
    count, real = 0, training.train_step

    def step(state: Any, *arguments: Any) -> Stepped:
        nonlocal count
        count += 1
        if not wanted(count):
            return real(state, *arguments)
        handle = state.wrapped.bare.register_forward_hook(lambda _, __, logits: logits * float("inf"))
        try:
            return real(state, *arguments)
        finally:
            handle.remove()

    monkeypatch.setattr(training, "train_step", step)


RUN = {"run": {"epochs": 2.0, "save_every_steps": 2, "log_every": 1}}


def test_a_run_counts_what_it_skips_and_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_steps(monkeypatch, lambda step: step in (3, 4, 8))
    summary = tiny.train(tiny.config(cache, tmp_path / "run", **RUN)).summary
    assert summary is not None
    assert summary["skipped_steps"] == 3
    records = tiny.metrics(tmp_path / "run")
    skipped = [(r["step"], r["in_a_row"]) for r in records if r["phase"] == "skipped"]
    assert skipped == [(3, 1), (4, 2), (8, 1)]
    assert {r["step"] for r in records if r["phase"] == "train"} == set(range(1, 13))


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison_steps(monkeypatch, lambda step: step > 5)
    run_dir = tmp_path / "run"
    sections = {"run": {**RUN["run"], "max_nonfinite": 3}}
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *tiny.flags(cache, run_dir, **sections)])
    assert caught.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 steps in a row, up to step 8" in error
    assert "head.fc" in error
    newest = run_dir / "checkpoints" / f"step-{tiny.checkpoint_steps(run_dir)[-1]:08d}"
    assert f"the last good checkpoint is {newest}" in error
    assert all(t.isfinite().all() for n, t in tiny.tensors(run_dir).items() if n.startswith("model."))


def test_broken_statistics_end_the_run_at_once(tmp_path: Path) -> None:
    skips = Skips()
    skips.add(["a"], [])
    assert not skips.too_many(2)
    skips.add(["a"], ["bn.running_mean"])
    assert skips.too_many(20)
    assert re.search(r"step 2 left bn\.running_mean not finite.*no checkpoint yet", str(skips.error(2, tmp_path)))


def test_running_out_of_gpu_memory_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*_: Any) -> Stepped:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(training, "train_step", step)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *tiny.flags(cache, tmp_path / "run")])
    assert caught.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Tried to allocate 2.00 GiB" in error
    assert "lower data.batch_size_per_device" in error
