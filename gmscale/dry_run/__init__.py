"""gmscale train --dry_run: build everything, train a few steps on made data, say what the run will take.

Whatever a run would refuse at its start is refused here too, and nothing is written into the run directory.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gmscale import build, checkpoint, costs, elastic, environment, parallel, rundir
from gmscale.build import Validation
from gmscale.config import TrainConfig
from gmscale.data import ValLoader, order
from gmscale.dry_run.options import Options, add_options, options_of
from gmscale.dry_run.rehearsal import Rehearsal, Rehearsed
from gmscale.dry_run.sizes import CheckpointSize, checkpoint_size, memory_parts, numels
from gmscale.dry_run.table import print_found
from gmscale.errors import RunError, UsageError
from gmscale.parallel import World
from gmscale.training_state import TrainingState

_TIMED_STEPS = 5
_DISK_BYTES_PER_S = 0.5e9
_WIRE_BYTES = {"allreduce": 4, "bf16": 2, "fp16": 2}

__all__ = ["Options", "add_options", "dry_run", "options_of", "show"]


def dry_run(config: TrainConfig, options: Options, world: World) -> dict[str, Any]:
    """Rehearse the run and return what was found, the same on every rank but for what the masks report."""
    idle_mb = parallel.peak_memory_mb(world.device)
    run_dir = Path(config.run.dir)
    with parallel.together(world):
        done = rundir.finished(run_dir, config)
        newest = checkpoint.latest(run_dir)
        start = checkpoint.read(newest)["step"] if newest else 0
        # without its data the run in that directory cannot be told to be this one
        known = rundir.world_sizes(run_dir, newest, config, world) if options.samples is None else [(0, world.size)]
        division = elastic.divide(config, world, known, start)
        asked, config = config, division.config
    build.prepare_process(config, world)
    data = _known_data(config, options, world)
    devices = options.devices or world.size
    if data.samples < _global_batch(config, devices):
        raise UsageError(
            f"--devices is {devices}: one step would take {_global_batch(config, devices)} samples, the training "
            f"split has {data.samples}"
        )
    total_steps = max(1, round(config.run.epochs * data.steps_per_epoch))
    state = build.training_state(config, world, data.classes, data.steps_per_epoch, resumes=newest is not None)
    with parallel.together(world):
        build.probe(state.attachment, config)
        if newest is not None and data.fingerprint is not None:
            identity = rundir.identity(asked, division.history, data.fingerprint, state.attachments)
            rundir.check_identity(newest, identity, asked)

    rehearsal = Rehearsal(state, config, world, data.classes, total_steps)
    try:
        rehearsed = rehearsal.run(_TIMED_STEPS)
        eval_images_per_s = rehearsal.evaluate(
            data.val_samples // world.size or config.data.eval_batch_size_per_device
        )
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of GPU memory with data.batch_size_per_device {config.data.batch_size_per_device} and "
            f"data.eval_batch_size_per_device {config.data.eval_batch_size_per_device}; lower them (gmscale find "
            "batch_size tells the largest that fits)"
        ) from error
    peak_mb = parallel.largest_over_ranks(parallel.peak_memory_mb(world.device), world)
    size = checkpoint_size(state, config, world)

    steps_per_epoch = order.steps_per_epoch(data.samples, _global_batch(config, devices))
    measured = costs.Measured(
        devices=world.size,
        step_s=rehearsed.step_s,
        first_step_s=rehearsed.first_step_s,
        grad_accum_steps=config.optim.grad_accum_steps,
        traffic=_traffic(state, config, world, rehearsed),
        eval_images_per_s=eval_images_per_s,
        save_s=size.copy_s + (0.0 if config.run.background_save else size.on(devices) / _DISK_BYTES_PER_S),
    )
    recipe = _recipe(config, steps_per_epoch, data.val_samples)
    estimate = costs.estimate(measured, recipe, devices, options.link)
    notes = []
    if done is not None:
        notes.append(f"{run_dir} holds this run, finished; a start would do nothing")
    elif newest is not None:
        notes.append(f"{run_dir} holds this run; a start goes on after step {start}")
    if division.change:
        notes.append(f"a start {division.change}")
    if state.loaded is not None:
        notes.append(state.loaded.summary())
    if options.samples is not None:
        notes.append("no data was opened: --samples and --classes stand for it")
    if world.backend in ("deepspeed", "fsdp2") and world.size == 1 and devices > 1:
        notes.append(f"{world.backend} on one device hands nothing to collectives: start two to have them counted")
    return {
        "environment": environment.describe(world),
        "model": _model(state, config, data.classes),
        "masks": {name: _touched(state, name, rehearsed) for name in state.attachments},
        "measured_at_step": rehearsal.at,
        "batch": {
            "global": _global_batch(config, world.size),
            "ranks": world.size,
            "per_device": config.data.batch_size_per_device,
            "grad_accum_steps": config.optim.grad_accum_steps,
        },
        "steps": {"samples": data.samples, "per_epoch": data.steps_per_epoch, "epochs": config.run.epochs}
        | {"total": total_steps},
        "step_ms": 1e3 * rehearsed.step_s,
        "first_step_ms": 1e3 * rehearsed.first_step_s,
        "images_per_s": _global_batch(config, world.size) / rehearsed.step_s,
        "eval_images_per_s": eval_images_per_s,
        "memory": _memory(state, config, world, idle_mb, rehearsed.peak_mb, peak_mb),
        "collectives": {name: vars(seen) for name, seen in rehearsed.traffic.items()},
        "expected_collectives": {name: vars(seen) for name, seen in measured.traffic.items()},
        "checkpoint": _checkpoint(config, size, devices),
        "loader": {
            "workers": config.data.workers,
            "cores": parallel.cores(),
            "ranks_here": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "core_images_per_s": 1 / rehearsal.made.loading_s,
        },
        "estimate": {
            **{name: getattr(estimate, name) for name in estimate.__dataclass_fields__},
            "total_s": estimate.total_s,
            "global_batch": _global_batch(config, devices),
            "steps_per_epoch": steps_per_epoch,
            "steps": recipe.steps,
            "eval_images": recipe.eval_images,
            "saves": recipe.saves,
            "link_gb_per_s": options.link.bytes_per_s / 1e9,
            "latency_us": options.link.latency_s * 1e6,
            "background_save": config.run.background_save,
        },
        "notes": notes,
    }


@dataclass(frozen=True)
class _Data:
    """What has to be known of the data, whether it is there or not."""

    samples: int
    classes: int
    steps_per_epoch: int
    val_samples: int
    fingerprint: str | None


def _known_data(config: TrainConfig, options: Options, world: World) -> _Data:
    if options.samples is not None and options.classes is not None:
        with parallel.together(world):
            steps_per_epoch = order.steps_per_epoch(options.samples, _global_batch(config, world.size))
        return _Data(options.samples, options.classes, steps_per_epoch, options.val_samples, None)
    loader, validation = build.loaders(config, world)
    images = _validation_images(validation, config, world)
    return _Data(loader.samples, len(loader.classes), loader.steps_per_epoch, images, loader.fingerprint)


def _validation_images(validation: Validation, config: TrainConfig, world: World) -> int:
    if isinstance(validation, ValLoader):
        return len(validation.index)
    batches = parallel.sum_over_ranks(torch.tensor([len(validation)]), world)
    return int(batches) * config.data.eval_batch_size_per_device


def _global_batch(config: TrainConfig, devices: int) -> int:
    return config.data.batch_size_per_device * config.optim.grad_accum_steps * devices


def _recipe(config: TrainConfig, steps_per_epoch: int, val_samples: int) -> costs.Recipe:
    """Return how much the run has to do, by the rules of train: the last step is always evaluated and saved."""
    steps = max(1, round(config.run.epochs * steps_per_epoch))
    eval_every = max(1, round(config.run.eval_every_epochs * steps_per_epoch))
    evaluations = -(-steps // eval_every)
    averaged = 2 if config.model.ema_decay > 0 else 1
    saves = -(-steps // (config.run.save_every_steps or eval_every))
    return costs.Recipe(steps=steps, eval_images=evaluations * averaged * val_samples, saves=saves)


def _traffic(
    state: TrainingState, config: TrainConfig, world: World, rehearsed: Rehearsed
) -> Mapping[str, costs.Traffic]:
    """Return what a step hands to collectives; of a process without any, what plain DDP would."""
    if world.backend != "single":
        return rehearsed.traffic
    trained = numels(state.wrapped.bare.parameters(), trained=True)
    nbytes = trained * _WIRE_BYTES[config.parallel.comm_hook]
    expected = {
        "allreduce": costs.Traffic(costs.buckets(4 * trained, config.parallel.bucket_cap_mb * 2**20), nbytes)
    }
    statistics = sum(buffer.nbytes for buffer in state.wrapped.bare.buffers())
    if statistics and config.parallel.batch_norm == "broadcast":
        calls = config.optim.grad_accum_steps
        expected["broadcast"] = costs.Traffic(calls, calls * statistics)
    return expected


def _model(state: TrainingState, config: TrainConfig, classes: int) -> dict[str, Any]:
    return {
        "name": config.model.name,
        "classes": classes,
        "image_size": config.data.image_size,
        "parameters": numels(state.wrapped.bare.parameters()),
        "trained": numels(state.wrapped.bare.parameters(), trained=True),
    }


def _touched(state: TrainingState, name: str, rehearsed: Rehearsed) -> dict[str, Any]:
    attachment, report = state.attachments[name], rehearsed.reports[name]
    described = attachment.describe()
    hook_s = (report.hook_ms or 0.0) / 1e3
    return {
        "site": described["site"],
        "agreement": described["agreement"],
        "operator": attachment.mask.operator,
        "strength": report.strength,
        "touched": [touched["name"] for touched in described["touched"]],
        "entries": sum(touched["entries"] for touched in described["touched"]),
        "passed": described["passed"],
        "kept_entries": report.kept_entries,
        "kept_energy": report.kept_energy,
        "hook_ms": report.hook_ms,
        "hook_share": hook_s / rehearsed.step_s,
        "wire_bytes": report.wire_bytes,
        "dense_bytes": report.dense_bytes,
    }


def _memory(
    state: TrainingState, config: TrainConfig, world: World, idle_mb: float, training_mb: float, peak_mb: float
) -> dict[str, Any]:
    """Return MiB: the peaks of the rank with the largest, and rank 0's parts."""
    parts = {name: size / 2**20 for name, size in memory_parts(state, config).items()}
    if world.device.type == "cpu":
        parts["interpreter and libraries"] = idle_mb
    parts["activations and other"] = max(0.0, training_mb - sum(parts.values()))
    return {"peak_mb": peak_mb, "training_peak_mb": training_mb, "parts_mb": parts}


def _checkpoint(config: TrainConfig, size: CheckpointSize, devices: int) -> dict[str, Any]:
    kept = config.run.keep_checkpoints + config.run.keep_best
    return {
        "mb": size.on(devices) / 2**20,
        "of_masks_mb": size.masks * devices / 2**20,
        "copy_s": size.copy_s,
        "kept": kept,
        "kept_mb": kept * size.on(devices) / 2**20,
        "keep_checkpoints": config.run.keep_checkpoints,
        "keep_best": config.run.keep_best,
    }


def show(config: TrainConfig, options: Options, world: World) -> int:
    """Rehearse the run, print what was found, and write it to a file where one is asked for; the exit status."""
    found = dry_run(config, options, world)
    if world.is_main:
        print_found(found)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0
