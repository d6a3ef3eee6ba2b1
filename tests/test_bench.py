"""gmscale bench: what it counts and what it refuses; its times are for people, not for tests."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from gmscale import bench
from gmscale.bench import training
from gmscale.bench.mask import Gradients, Masking
from gmscale.bench.memory import copy_gb_per_s, least_bytes
from gmscale.bench.step import attempt
from gmscale.errors import RunError, UsageError
from gmscale.masking import GradientMask
from gmscale.parallel import World, local_ranks
from gmscale.sites.selection import select

TINY = training.Setting(model="test_byobnet", image_size=32, batch_size=2, amp="none", rounds=1, steps=1)
SIZE = ["--model", "test_byobnet", "--image_size", "32", "--batch_size", "2"]
ENTRIES = sum(p.numel() for p in timm.create_model("test_byobnet", num_classes=1000).parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepp"], "did you mean 'step'"),
        (["step", "--model", "resnet81"], "did you mean 'resnet"),
        (["step", "--variants", "poool"], "did you mean 'pool'"),
        (["step", "--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["step", *SIZE, "--processes", "0"], "--processes is 0; expected at least 1"),
        (["step", "--model", "test_convnext", "--image_size", "8"], "--image_size 8: test_convnext cannot take"),
        (["step", "--amp", "fp8"], "invalid choice: 'fp8'"),
        (["mask", "--models", "resnet81"], "did you mean 'resnet"),
        (["mask", "--operators", "lgo"], "did you mean 'log'"),
        (["mask", "--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["comm", *SIZE, "--rates", "100mb"], "'100mb'; expected unlimited, or a rate such as 100mbit"),
        (["comm", "--variants", "pol"], "did you mean 'pool'"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "_context", None)
    with pytest.raises(UsageError, match=message):
        bench.main(arguments)


def test_variants_mask_what_they_say() -> None:
    kernels = training.kernel_names(timm.create_model("resnet18"))
    assert len(kernels) == 17  # of 20 convolutions three are 1 x 1
    assert "conv1.weight" in kernels
    assert "layer2.0.downsample.0.weight" not in kernels
    with pytest.raises(UsageError, match="no k x k convolution"):
        training.kernel_names(torch.nn.Linear(2, 2))
    assert training.VARIANTS["output site"].mask.strength_at(0, 10) == 0.25  # no schedule that has it off


def test_an_image_size_is_given_to_models_that_need_it() -> None:
    model = training.create(replace(TINY, model="test_vit", image_size=64))
    assert model.patch_embed.img_size == (64, 64)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


# -- processes --------------------------------------------------------------------------------------------------
def who(world: World, word: str) -> dict[str, Any]:
    return {"size": world.size, "rank": world.rank, "word": word}


def fails(world: World, error: type[Exception]) -> dict[str, Any]:
    if world.rank == 1:
        raise error("the reason")
    return who(world, "")


def is_killed(world: World) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_ranks_answer_and_their_errors_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    assert local_ranks.run_ranks(who, 2, "hello") == {"size": 2, "rank": 0, "word": "hello"}
    with pytest.raises(UsageError, match=r"^the reason$"):
        local_ranks.run_ranks(fails, 2, UsageError)
    with pytest.raises(RunError, match="rank 1 failed: KeyError: 'the reason'"):
        local_ranks.run_ranks(fails, 2, KeyError)
    with pytest.raises(RunError, match="was killed"):
        local_ranks.run_ranks(is_killed, 1)


@pytest.mark.parametrize(("error", "key"), [(UsageError, "skipped"), (RunError, "failed")])
def test_a_variant_that_cannot_run_says_so_and_plain_ddp_must_run(error: type[Exception], key: str) -> None:
    def measured() -> dict[str, Any]:
        raise error("why")

    assert attempt("pool", measured) == {key: "why"}
    with pytest.raises(error):
        attempt(training.PLAIN, measured)


# -- what is counted --------------------------------------------------------------------------------------------
def traffic(world: World, names: list[str]) -> dict[str, Any]:
    return {name: training.alone(world, TINY, name) for name in names}


def test_bytes_are_those_that_the_gradients_have() -> None:
    names = [training.PLAIN, "bf16 hook", "PowerSGD", "pool", "consensus", "consensus + bf16"]
    rows = local_ranks.run_ranks(traffic, 2, names)
    reduced = {name: rows[name]["collectives"]["allreduce"]["bytes"] / 3 for name in names}
    assert reduced["plain DDP"] == reduced["pool"] == 4 * ENTRIES
    assert reduced["bf16 hook"] == 2 * ENTRIES
    assert rows["PowerSGD"]["collectives"]["allreduce"]["calls"] == 3 * 3  # rest, P and Q, from callbacks too
    assert reduced["PowerSGD"] < ENTRIES
    for name in ("consensus", "consensus + bf16"):
        assert reduced[name] == pytest.approx(rows[name]["reported_wire_bytes"])
    assert reduced["consensus + bf16"] < reduced["consensus"] < reduced["plain DDP"]
    for row in rows.values():
        buffers = row["collectives"]["broadcast"]["bytes"] + row["collectives"]["allreduce"]["bytes"]
        assert row["bytes_per_step"] == pytest.approx(buffers / 3)
        assert row["peak_memory_mb"] > 50


@pytest.mark.slow
def test_step_reports_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    few = ["--rounds", "2", "--steps", "1", "--processes", "2", "--amp", "bf16"]
    variants = ["--variants", "pool, error feedback", "output site"]
    assert bench.main(["step", *SIZE, *few, *variants, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["variants"]) == ["plain DDP", *variants[1:]]
    assert result["environment"]["torch"]
    assert result["command"].startswith("gmscale bench step --model test_byobnet")
    for row in result["variants"].values():
        assert row["step_ms"] > 0
        assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        assert row["memory_ratio"] > 0.5
    assert result["variants"]["plain DDP"]["memory_ratio"] == 1.0
    pool = result["variants"]["pool, error feedback"]
    assert pool["hook_ms"] > 0
    assert pool["share_of_copy"] == pytest.approx(
        pool["hook_least_bytes"] / pool["hook_ms"] / 1e6 / pool["copy_gb_per_s"]
    )
    assert "pool, error feedback" in capsys.readouterr().out


# -- the masking alone ------------------------------------------------------------------------------------------
def test_least_bytes_are_three_or_five_accesses() -> None:
    gradients = [torch.zeros(10, 10), torch.zeros(7, dtype=torch.bfloat16)]
    assert least_bytes(gradients, error_feedback=False) == 3 * (400 + 14)
    assert least_bytes(gradients, error_feedback=True) == 5 * (400 + 14)
    assert copy_gb_per_s(torch.device("cpu")) > 0.01


def test_masking_alone_masks_as_the_mask_does_and_can_be_undone() -> None:
    model = timm.create_model("test_byobnet").to(memory_format=torch.channels_last)
    mask = GradientMask(error_feedback=False)
    selection = select(model, mask)
    gradients = Gradients(model, set(selection.parameters), torch.float32, torch.device("cpu"))
    gradients.refresh()
    raw = [g.clone() for g in gradients.tensors()]
    assert {n: tuple(g.shape) for b in gradients.buckets for n, g in b} == {
        t.name: t.shape for t in selection.touched
    }
    masking = Masking(mask, selection, rank=0)
    masking.step(gradients.buckets)
    for masked, before in zip(gradients.tensors(), raw, strict=True):
        torch.testing.assert_close(masked, mask.apply(before))
    assert any(not torch.equal(a, b) for a, b in zip(gradients.tensors(), raw, strict=True))
    gradients.refresh()
    assert all(torch.equal(a, b) for a, b in zip(gradients.tensors(), raw, strict=True))


def test_mask_reports_every_operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mask.json"
    few = ["--rounds", "1", "--threads", "1", "--device", "cpu", "--dtype", "bfloat16"]
    assert bench.main(["mask", "--models", "test_byobnet", "test_vit", *few, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    for model in result["models"].values():
        rows = model["rows"]
        assert len(rows) == 2 * 6
        for row in rows:
            accesses = 5 if row["error_feedback"] else 3
            assert row["least_bytes"] == accesses * 2 * model["masked_entries"]
            assert row["gb_per_s"] == pytest.approx(row["least_bytes"] / row["ms"] / 1e6)
    assert "a copy reaches" in capsys.readouterr().out


def test_a_bench_needs_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setitem(bench._BENCHES, "step", lambda argv: asked.append(argv) or 0)
    assert bench.main(["step"]) == 0
    assert asked == [[]]
