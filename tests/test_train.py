"""One training run in one process: what it leaves, the order within a step, and that it resumes exactly."""

import copy
import io
import json
import math
import os
import shutil
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gmscale import checkpoint, data, evaluation, models, parallel
from gmscale import train as training
from gmscale.config import TrainConfig, from_dict
from gmscale.data import embedded
from gmscale.data.tars.writer import write_shard
from gmscale.errors import RunError, UsageError
from gmscale.sites import attach
from gmscale.train import train_step
from gmscale.training_state import Meter, TrainingState

STEPS = 9  # of EVERYTHING: 1.5 epochs of 6
CPU = torch.device("cpu")


# ---- the run directory -------------------------------------------------------------------------------------------


def test_a_run_leaves_what_is_promised(finished_run: Path) -> None:
    names = {p.name for p in finished_run.iterdir()}
    assert names == {
        *("config.yaml", "environment.json", "data.json", "touched.json", "metrics.jsonl", "summary.json"),
        *("checkpoints", "heartbeats", "samples", "starts", "tensorboard"),
    }
    assert from_dict(yaml.safe_load((finished_run / "config.yaml").read_text())).run.epochs == 1.5
    environment = json.loads((finished_run / "environment.json").read_text())
    assert {"gmscale", "python", "torch", "timm", "commit", "hostname", "device", "threads"} <= environment.keys()
    assert environment["world_size"] == 1
    touched = json.loads((finished_run / "touched.json").read_text())["mask"]
    assert touched["site"] == "single"
    assert touched["agreement"] == "local"
    model = dict(models.create(TrainConfig(), 10).named_parameters())
    assert {t["name"] for t in touched["touched"]} | set(touched["passed"]) == set(model)
    for entry in touched["touched"]:
        assert entry["shape"] == list(model[entry["name"]].shape)
        assert entry["entries"] == model[entry["name"]].numel()
    samples = json.loads((finished_run / "samples" / "samples.json").read_text())
    assert len(samples) == 24
    assert all((finished_run / "samples" / s["file"]).is_file() and 0 <= s["confidence"] <= 1 for s in samples)
    assert tiny.checkpoint_steps(finished_run) == [8, 9]
    assert list((finished_run / "tensorboard").glob("events.*"))


def test_metrics_are_one_valid_record_a_line(finished_run: Path) -> None:
    records = tiny.metrics(finished_run)
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_phase.setdefault(record["phase"], []).append(record)
        assert record["epoch"] == pytest.approx(record["step"] / 6, abs=1e-4)
    assert {p: [r["step"] for r in found] for p, found in by_phase.items()} == {
        "train": [5, 6, 9],  # every fifth step, and wherever there is an evaluation
        "validation": [6, 9],
        "validation_ema": [6, 9],
        "layers": [6, 9],
    }
    for r in by_phase["train"]:
        assert 0 < r["kept_entries"] < r["kept_energy"] < 1
        assert 0 <= r["top1"] <= 100
        assert r["strength"] == 0.5
        assert all(math.isfinite(r[name]) and r[name] > 0 for name in ("loss", "lr", *tiny.TIMES))
        assert r["data_ms"] < r["step_ms"]
        assert r["hook_share"] == pytest.approx(r["hook_ms"] / r["step_ms"])
    for r in by_phase["validation"] + by_phase["validation_ema"]:
        assert r["count"] == tiny.VALIDATION_SIZE
        assert 0 <= r["top1"] <= r["top5"] <= 100
    touched = {t["name"] for t in json.loads((finished_run / "touched.json").read_text())["mask"]["touched"]}
    assert by_phase["layers"][0]["kept_entries"].keys() == touched == by_phase["layers"][0]["kept_energy"].keys()


def test_the_summary_says_what_the_last_evaluation_said(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    validation = [r for r in tiny.metrics(finished_run) if r["phase"] == "validation"]
    averaged = [r for r in tiny.metrics(finished_run) if r["phase"] == "validation_ema"]
    assert {k: summary[k] for k in ("top1", "top5", "loss")} == {
        k: validation[-1][k] for k in ("top1", "top5", "loss")
    }
    assert summary["best_top1"] == max(r["top1"] for r in validation)
    assert summary["ema_top1"] == averaged[-1]["top1"]
    assert (summary["arm"], summary["seed"], summary["steps"], summary["epochs"]) == ("pool 0.5", 0, STEPS, 1.5)


def test_a_finished_run_is_not_repeated(finished_run: Path) -> None:
    before = (finished_run / "metrics.jsonl").stat().st_mtime_ns
    config = from_dict(yaml.safe_load((finished_run / "config.yaml").read_text()))
    assert tiny.train(config).summary == json.loads((finished_run / "summary.json").read_text())
    assert (finished_run / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["model", "model_ema"])
def test_the_saved_weights_and_average_are_those_evaluated(finished_run: Path, cache: Path, name: str) -> None:
    config = from_dict(yaml.safe_load((finished_run / "config.yaml").read_text()))
    model = models.create(config, 10)
    newest = checkpoint.latest(finished_run)
    assert newest is not None
    model.load_state_dict(load_file(newest / f"{name}.safetensors"))
    phase = "validation" if name == "model" else "validation_ema"
    expected = [r for r in tiny.metrics(finished_run) if r["phase"] == phase][-1]
    found = evaluation.evaluate(model, val_loader(config), config.data, tiny.ALONE)
    assert found == {k: expected[k] for k in found}


# ---- bad samples -------------------------------------------------------------------------------------------------


def test_a_bad_sample_within_the_limit_is_replaced_counted_and_written_down(cache: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(tiny.build(cache), tmp_path / "shards")
    with tarfile.open(shards / "gmscale-train-0000.tar") as tar:
        image = tar.getmember("0000007.jpg")
    with open(shards / "gmscale-train-0000.tar", "r+b") as file:
        file.seek(image.offset_data)
        file.write(bytes(image.size))
    run_dir = tmp_path / "run"
    section = {"source": str(shards), "max_bad_share": 0.01}
    tiny.train(tiny.config(cache, run_dir, run={"epochs": 2.0}, data=section))
    counts = [(r["epoch"], r["bad_samples"]) for r in tiny.metrics(run_dir) if r["phase"] == "train"]
    assert counts[-1] == (2.0, 1)  # counted afresh in each epoch
    assert max(count for _, count in counts) == 1
    (line,) = (run_dir / "bad_samples-rank0.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= {"key": "0000007", "reason": "corrupt image"}.items()

    with pytest.raises(RunError, match=r"0000007\.jpg does not decode.*1 of 100 .*max_bad_share allows 0\.001"):
        tiny.train(tiny.config(cache, tmp_path / "strict", data={"source": str(shards)}))


def test_validation_labels_that_the_model_has_no_output_for_are_refused_at_the_start(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    for name, labels in (
        ("a-0.tar", [0, 1] * 8),
        ("b-0.tar", [0, 3]),
    ):  # without _info.json
        write_shard(
            tmp_path / name,
            [{"__key__": f"{i}", "png": picture.getvalue(), "cls": str(y)} for i, y in enumerate(labels)],
        )
    section = {"source": str(tmp_path), "train_split": "a-{0..0}.tar", "val_split": "b-{0..0}.tar"}
    with pytest.raises(UsageError, match=r"data\.val_split .* has labels up to 3, .*train_split .* up to 1"):
        tiny.train(tiny.config(tmp_path / "cache", tmp_path / "run", data=section))
    assert not (tmp_path / "run").exists()


# ---- evaluation --------------------------------------------------------------------------------------------------


def val_loader(config: TrainConfig, **changes: Any) -> data.ValLoader:
    return data.val_loader(replace(config.data, **changes), 0, 1)


@pytest.mark.parametrize("batch_size", [1, 7, 25, 100])
def test_every_validation_sample_counts_once_in_batches_of_any_size(
    tmp_path: Path, cache: Path, batch_size: int
) -> None:
    config = tiny.config(cache, tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    loader = val_loader(config, eval_batch_size_per_device=batch_size)
    found = evaluation.evaluate(model, loader, config.data, tiny.ALONE)

    correct, top5, losses, seen = 0, 0, [], []
    for images, labels, indices in val_loader(config, eval_batch_size_per_device=1):
        seen += indices.tolist()
        pixels = (images.double() / 255 - torch.tensor(config.data.mean).view(3, 1, 1)) / torch.tensor(
            config.data.std
        ).view(3, 1, 1)
        logits = model(pixels.float())[0]
        correct += int(logits.argmax() == labels[0])
        top5 += int(labels[0] in logits.topk(5).indices)
        losses.append(cross_entropy(logits[None], labels).item())
    assert sorted(seen) == list(range(tiny.VALIDATION_SIZE))
    assert found["count"] == tiny.VALIDATION_SIZE
    assert found["top1"] == pytest.approx(100 * correct / tiny.VALIDATION_SIZE)
    assert found["top5"] == pytest.approx(100 * top5 / tiny.VALIDATION_SIZE)
    assert found["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_evaluation_changes_nothing(tmp_path: Path, cache: Path) -> None:
    config = tiny.config(cache, tmp_path)
    model = models.create(config, 10).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    evaluation.evaluate(model, val_loader(config), config.data, tiny.ALONE)
    assert tiny.different(before, model.state_dict()) == []
    assert model.training
    assert torch.equal(random_state, torch.get_rng_state())


# ---- the order of a step -----------------------------------------------------------------------------------------


def random_batches(count: int, size: int, seed: int = 0) -> list[data.Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        data.Batch(
            torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def state_of(config: TrainConfig, model: nn.Module) -> TrainingState:
    return TrainingState(
        wrapped=parallel.wrap(model, lambda m: models.optimizer(m, config.optim), config, tiny.ALONE),
        attachment=attach(model, config.mask, "single") if config.mask.enabled else None,
        output_attachment=None,
        ema=None,
        meter=Meter(CPU),
    )


def gradients(model: nn.Module, batch: data.Batch, config: TrainConfig) -> dict[str, np.ndarray]:
    model.train()
    loss = cross_entropy(model(data.normalize(batch.images, config.data)), batch.labels)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return {n: g.double().numpy() for (n, _), g in zip(model.named_parameters(), found, strict=True)}


def clipped(grads: dict[str, np.ndarray], bound: float) -> tuple[dict[str, np.ndarray], float]:
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    return {n: g * min(1.0, bound / (norm + 1e-6)) for n, g in grads.items()}, norm


def distance(model: nn.Module, start: dict[str, Tensor], change: dict[str, np.ndarray], lr: float) -> float:
    """How far the model's parameters are from `start - lr * change`, relative to the change."""
    error = sum(
        float(np.square(p.detach().double().numpy() - (start[n].double().numpy() - lr * change[n])).sum())
        for n, p in model.named_parameters()
    )
    size = sum(float(np.square(lr * c).sum()) for c in change.values())
    return math.sqrt(error / size)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_step_accumulates_then_masks_then_unscales_then_clips(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    lr, bound = 0.1, 0.05
    config = tiny.config(
        cache,
        tmp_path,
        optim={
            "opt": "momentum",
            "lr": lr,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "grad_accum_steps": 2,
            "clip_grad": bound,
        },
        mask={"strength": 1.0, "error_feedback": False},
    )
    torch.manual_seed(0)
    model = models.create(config, 10)
    other, start = copy.deepcopy(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    state = state_of(config, model)
    if scale != 1:  # float32 gradients under the loss scale of fp16
        monkeypatch.setattr(state.wrapped, "_scaler", torch.amp.GradScaler("cpu", init_scale=scale))
    assert state.attachment is not None
    touched = {t.name for t in state.attachment.touched}
    micro_batches = random_batches(2, 8)

    state.attachment.at(0, 10, grad_scale=state.wrapped.loss_scale(), observe=False)
    norm = train_step(state, micro_batches, config, tiny.ALONE, 10).grad_norm

    def mask(grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: oracle.apply(g, 1.0) if n in touched else g for n, g in grads.items()}

    def mean(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {n: sum(part[n] for part in parts) / len(parts) for n in parts[0]}

    raw = [gradients(other, batch, config) for batch in micro_batches]
    right, right_norm = clipped(mask(mean(raw)), bound)
    assert norm is not None
    assert float(norm) == pytest.approx(right_norm, rel=1e-4)
    assert right_norm > bound  # or clipping would show nothing
    assert distance(model, start, right, lr) < 1e-3

    clip_first = mask(clipped(mean(raw), bound)[0])
    mask_each = clipped(mean([mask(part) for part in raw]), bound)[0]
    clip_scaled = {
        n: g / 1024 for n, g in clipped({n: 1024 * g for n, g in mask(mean(raw)).items()}, bound)[0].items()
    }
    for wrong in (clip_first, mask_each, clip_scaled, clipped(mean(raw), bound)[0]):
        assert distance(model, start, wrong, lr) > 0.05


def test_two_micro_batches_do_the_same_as_one_of_both(tmp_path: Path, cache: Path) -> None:
    ends = []
    both = random_batches(1, 16)[0]
    halves = [type(both)(both.images[:8], both.labels[:8]), type(both)(both.images[8:], both.labels[8:])]
    for micro_batches in ([both], halves):
        optim = {"grad_accum_steps": len(micro_batches), "weight_decay": 0.0}
        config = tiny.config(cache, tmp_path, optim=optim)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
        state = state_of(config, model)
        for _ in range(3):
            train_step(state, micro_batches, config, tiny.ALONE, 10)
        assert state.meter.values(tiny.ALONE)["loss"] > 0
        ends.append(model.state_dict())
    for name, weights in ends[0].items():
        torch.testing.assert_close(ends[1][name], weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_every_way_of_clipping_bounds_the_step(tmp_path: Path, cache: Path, mode: str) -> None:
    config = tiny.config(
        cache,
        tmp_path,
        optim={
            "opt": "momentum",
            "momentum": 0.0,
            "weight_decay": 0.0,
            "lr": 1.0,
            "clip_grad": 1e-3,
            "clip_mode": mode,
        },
    )
    torch.manual_seed(0)
    model = models.create(config, 10)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_step(state_of(config, model), random_batches(1, 8), config, tiny.ALONE, 10)
    steps = {n: (p.detach() - start[n]).abs() for n, p in model.named_parameters()}
    assert any(s.max() > 0 for s in steps.values())
    if mode == "norm":
        assert math.sqrt(sum(float(s.square().sum()) for s in steps.values())) == pytest.approx(1e-3, rel=1e-2)
    elif mode == "value":
        assert max(float(s.max()) for s in steps.values()) <= 1e-3 * 1.001
    else:
        assert all(s.norm() <= 1e-2 * max(float(start[n].norm()), 1.0) for n, s in steps.items())


# ---- bit for bit -------------------------------------------------------------------------------------------------


def weights(run_dir: Path) -> dict[str, Tensor]:
    return {k: t for k, t in tiny.tensors(run_dir).items() if k.startswith(("model", "optimizer"))}


def test_strength_zero_and_a_disabled_mask_are_the_plain_run(tmp_path: Path, cache: Path) -> None:
    for name, mask in (("plain", {"enabled": False}), ("zero", {"strength": 0.0}), ("masked", {"strength": 0.5})):
        tiny.train(tiny.config(cache, tmp_path / name, mask=mask))
    assert tiny.different(weights(tmp_path / "plain"), weights(tmp_path / "zero")) == []
    assert tiny.different(weights(tmp_path / "plain"), weights(tmp_path / "masked"))
    assert not (tmp_path / "plain" / "touched.json").exists()
    train = [r for r in tiny.metrics(tmp_path / "plain") if r["phase"] == "train"]
    assert not {"strength", "kept_entries", "kept_energy", "hook_ms", "hook_share"} & train[0].keys()


def stop(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal after so many optimizer steps of its next run."""
    tiny.after_step(step, lambda: os.kill(os.getpid(), number), patch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_boundary(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop(patch, 1, number)
        assert tiny.train(tiny.config(cache, tmp_path / "run")).summary is None
    assert tiny.checkpoint_steps(tmp_path / "run") == [1]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert signal.getsignal(number) is before


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "everything": tiny.EVERYTHING,
    "adamw-random-mask": {
        **tiny.EVERYTHING,
        "optim": {"opt": "adamw", "lr": 0.002, "warmup_epochs": 0.5, "clip_grad": 1.0},
        "mask": {"operator": "random", "strength": 1.0, "warmup": 0.2, "end": 0.9},
    },
    # its update depends on norms over its state, which are rounded in the order of the memory
    "lamb-channels-last": {"optim": {"opt": "lamb", "lr": 0.01}, "model": {"channels_last": True}},
    "guided-by-saliency": {
        "augment": {"guided_crop": 0.5, "guided_mix": 0.5, "erase_prob": 0.2},
        "output": {"enabled": True, "sigma": 1.0},
    },
    "accumulation-bf16": {
        "run": {"epochs": 2, "log_every": 2},
        "optim": {"grad_accum_steps": 3, "amp": "bf16", "sched": "poly"},
        "model": {"channels_last": False},
        "data": {"workers": 1},
        "augment": {"auto_augment": "rand-m9-mstd0.5"},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_ends_as_an_undisturbed_one(
    tmp_path: Path, cache: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    variant = VARIANTS[name]
    undisturbed = finished_run
    if name != "everything":
        undisturbed = tmp_path / "undisturbed"
        tiny.train(tiny.config(cache, undisturbed, **variant))
    run_dir = tmp_path / "run"
    config = tiny.config(cache, run_dir, **variant)
    starts = 0
    while True:  # one to three more steps at each start
        starts += 1
        with monkeypatch.context() as patch:
            stop(patch, 1 + starts % 3)
            if tiny.train(config).summary is not None:
                break
    assert starts > 1
    assert tiny.different(tiny.tensors(undisturbed), tiny.tensors(run_dir)) == []
    assert tiny.untimed(tiny.metrics(undisturbed)) == tiny.untimed(tiny.metrics(run_dir))


def test_a_run_that_fails_between_checkpoints_goes_back_to_the_last(
    tmp_path: Path, cache: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGKILL: nothing is saved, metrics.jsonl is ahead of the checkpoint and its last line is torn."""

    def fail() -> None:
        raise MemoryError

    run_dir = tmp_path / "run"
    config = tiny.config(cache, run_dir, **tiny.EVERYTHING)
    for step in (1, 6):
        with monkeypatch.context() as patch:
            tiny.after_step(step, fail, patch)
            with pytest.raises(MemoryError):
                tiny.train(config)
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "epoch": 9.9, "phase": "train"}\n{"step": 7, "pha')
    assert tiny.checkpoint_steps(run_dir) == [2, 4]
    tiny.train(config)
    assert tiny.different(tiny.tensors(finished_run), tiny.tensors(run_dir)) == []
    assert tiny.untimed(tiny.metrics(finished_run)) == tiny.untimed(tiny.metrics(run_dir))


def test_killed_before_the_summary_a_run_still_gets_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(cache, tmp_path / "run", run={"epochs": 0.5}, model={"ema_decay": 0.9})
    summary = tiny.train(config).summary
    before = tiny.metrics(tmp_path / "run")
    assert summary is not None
    (tmp_path / "run" / "summary.json").unlink()
    again = tiny.train(config).summary
    assert again is not None
    for name in ("top1", "top5", "loss", "best_top1", "ema_top1", "steps"):
        assert again[name] == summary[name]
    assert tiny.metrics(tmp_path / "run") == before


# ---- masks of layer outputs, and probes --------------------------------------------------------------------------


def board_tags(run_dir: Path) -> set[str]:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return set(accumulator.Tags()["scalars"])


def test_probes_log_every_layer_and_change_nothing(tmp_path: Path, cache: Path) -> None:
    tiny.train(tiny.config(cache, tmp_path / "plain"))
    console = Console(file=io.StringIO())
    training.train(tiny.config(cache, tmp_path / "probed", run={"probe_every": 2}), tiny.ALONE, console)
    torch.use_deterministic_algorithms(False)
    assert tiny.different(weights(tmp_path / "plain"), weights(tmp_path / "probed")) == []
    found = [r for r in tiny.metrics(tmp_path / "probed") if r["phase"] == "quality"]
    assert [r["step"] for r in found] == [1, 3, 5]
    touched = {t["name"] for t in json.loads((tmp_path / "probed" / "touched.json").read_text())["mask"]["touched"]}
    for record in found:
        assert set(record["layer_gain"]) == set(record["layer_control_gain"]) == touched
        assert 0 < record["kept_entries"] < record["kept_energy"] < 1
        assert record["cost_ms"] > 0
    assert {f"quality_layer_gain/{name}" for name in touched} <= board_tags(tmp_path / "probed")
    assert "quality" not in console.file.getvalue()


def test_layer_outputs_are_masked_beside_the_weights(tmp_path: Path, cache: Path) -> None:
    output = {"enabled": True, "strength": 1.0, "start": 0.0, "end": 1.0, "layers": ["stages"]}
    tiny.train(tiny.config(cache, tmp_path / "one"))
    tiny.train(tiny.config(cache, tmp_path / "both", output=output))
    assert tiny.different(weights(tmp_path / "one"), weights(tmp_path / "both"))
    touched = json.loads((tmp_path / "both" / "touched.json").read_text())
    assert touched["mask"]["site"] == "single"
    assert touched["output"]["touched"][0]["map"] == [16, 16]
    train = [r for r in tiny.metrics(tmp_path / "both") if r["phase"] == "train"]
    assert all(r["strength"] == 0.5 and r["output_strength"] == 1.0 for r in train)
    assert all(0 < r["output_kept_entries"] < 1 for r in train)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"run": {"probe_every": 2}, "mask": {"enabled": False}}, "it needs mask.enabled"),
        ({"run": {"probe_every": 1}}, r"run.probe_every is 1; expected a number in \[2, inf\)"),
        ({"mask": {"agreement": "consensus"}}, "needs site 'ddp'"),
        ({"output": {"enabled": True, "layers": ["RELU"]}}, "'ReLU'"),
        ({"parallel": {"comm_hook": "bf16"}}, "parallel.comm_hook 'bf16' needs ddp; this is single"),
        ({"output": {"error_feedback": True}}, "belongs to no later step"),
    ],
)
def test_what_cannot_be_masked_or_probed_is_refused(
    tmp_path: Path, cache: Path, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        tiny.train(tiny.config(cache, tmp_path / "run", **sections))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# ---- mixed precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_weights_also_on_cpu(tmp_path: Path, cache: Path, amp: str) -> None:
    outcome = tiny.train(tiny.config(cache, tmp_path / "run", run={"epochs": 0.34}, optim={"amp": amp}))
    assert outcome.summary is not None
    assert math.isfinite(outcome.summary["loss"])
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None
    model = load_file(newest / "model.safetensors")
    assert {t.dtype for n, t in model.items() if "num_batches" not in n} == {torch.float32}
    assert ("scale" in checkpoint.optimizer_state(newest)["scaler"]) is (amp == "fp16")


# ---- refused -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after one step."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, 1)
        tiny.train(tiny.config(cache, run_dir))
    return run_dir


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"name": "test_resnet"}}, "model.name was 'test_byobnet' and is 'test_resnet'"),
        ({"mask": {"strength": 0.25}}, "mask.strength was unset and is 0.25"),
        ({"mask": {"enabled": False}}, "mask.enabled was True and is False"),
        ({"optim": {"lr": 0.01}}, "optim.lr was 0.05 and is 0.01"),
        ({"data": {"batch_size_per_device": 8}}, "data.batch_size_per_device was 16 and is 8"),
        ({"run": {"seed": 1}}, "run.seed was 0 and is 1"),
        ({"run": {"resume": "never"}}, "holds a run"),
    ],
)
def test_a_run_is_not_resumed_as_another(stopped_run: Path, cache: Path, change: dict, said: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in stopped_run.rglob("*")}
    with pytest.raises(UsageError, match=said) as caught:
        tiny.train(tiny.config(cache, stopped_run, **change))
    assert "\n" not in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in stopped_run.rglob("*")} == before


def test_a_run_is_not_resumed_on_other_shards(stopped_run: Path, cache: Path, tmp_path: Path) -> None:
    config = tiny.config(cache, stopped_run)
    other = tmp_path / "shards"
    embedded.build(other, tiny.SIZE, tiny.IMAGE_SIZE, seed=1)
    with pytest.raises(UsageError, match="other shards"):
        tiny.train(replace(config, data=replace(config.data, source=str(other))))


def test_what_may_change_on_resume_may(stopped_run: Path, cache: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(stopped_run, moved)
    config = tiny.config(cache, moved, run={"log_every": 3, "arm": "renamed"}, data={"workers": 1})
    summary = tiny.train(config).summary
    assert summary is not None
    assert summary["arm"] == "renamed"
