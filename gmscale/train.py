"""The main path: one training run, read top to bottom.

A step is: accumulate micro-batches -> mask -> reduce over ranks -> unscale -> clip -> optimizer step. The mask
sits before the reduction because each rank removes the noise of its own gradient; unscaling and clipping come
after it because they act on what the optimizer will see. Everything that decides the result is a function of the
configuration and of the checkpoint, so an interrupted run ends as an undisturbed one.
"""

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook

from gmscale import checkpoint, data, evaluation, models, parallel, records, rundir
from gmscale.config import TrainConfig
from gmscale.data import Batch, FaultLog, StreamLoader, StreamValLoader, TrainLoader, ValLoader
from gmscale.errors import UsageError
from gmscale.files import write_atomically
from gmscale.parallel import StopRequest, World, Wrapped
from gmscale.sites import Attachment, attach
from gmscale.sites.probe import GradientProbe
from gmscale.tracking import StepClock, Tracker, plain_console
from gmscale.training_state import Meter, TrainingState

Training = TrainLoader | StreamLoader
Validation = ValLoader | StreamValLoader

_COMM_HOOKS = {"allreduce": None, "bf16": bf16_compress_hook, "fp16": fp16_compress_hook}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished with `summary`, or stopped on request after a checkpoint (summary None)."""

    summary: dict[str, Any] | None


def train(config: TrainConfig, world: World, console: Console | None = None) -> Outcome:
    """Train the run that `config` describes, from its newest checkpoint if there is one.

    Called by every rank of `world`. Raises UsageError for what cannot be asked for, before anything is written
    to the run directory, and RunError for what fails on the way.
    """
    console = console or plain_console()
    run_dir = Path(config.run.dir)
    with parallel.together(world):
        done = rundir.finished(run_dir, config)
    if done is not None:
        if world.is_main:
            console.print(f"{run_dir} is finished already; its summary.json stands", highlight=False)
        return Outcome(done)

    # -- data, model, mask, optimizer -------------------------------------------------------------------------
    random_seed(config.run.seed, world.rank)
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
    loader, val_loader = _loaders(config, world)
    total_steps = max(1, round(config.run.epochs * loader.steps_per_epoch))
    with parallel.together(world):
        bare = models.create(config.model, len(loader.classes))
        models.check_image_size(bare, config.model.name, config.data.image_size)
    wrapped = parallel.wrap(bare, lambda model: models.optimizer(model, config.optim), config, world)
    with parallel.together(world):
        schedule = models.schedule(wrapped.optimizer, config.optim, config.run.epochs, loader.steps_per_epoch)
        attachment, output_attachment = _attach(wrapped, config, world)
        ema = _average(wrapped, config)
        probe = _probe(attachment, config)
    state = TrainingState(wrapped, attachment, output_attachment, ema, Meter(world.device))

    # -- resume, or begin -------------------------------------------------------------------------------------
    start = 0
    identity = rundir.identity(config, world, loader.fingerprint, state.attachments)
    with parallel.together(world):
        newest = checkpoint.latest(run_dir)
        if newest is not None:
            rundir.check_identity(newest, identity, config)
            start = state.restore(newest, world)
    with parallel.together(world):
        if world.is_main:
            rundir.begin(run_dir, config, world, state.attachments)
    tracker = (
        Tracker(run_dir, config.arm, total_steps, config.run.epochs, start, console) if world.is_main else None
    )
    faults = FaultLog(
        run_dir / f"bad_samples-rank{world.rank}.jsonl", loader.faults, loader.samples, config.data.max_bad_share
    )
    if world.is_main:
        faults.write(loader.faults)
    eval_every = max(1, round(config.run.eval_every_epochs * loader.steps_per_epoch))
    save_every = config.run.save_every_steps or eval_every
    batches = _steps(loader, start, total_steps)
    clock, began, saved_at = StepClock(), time.monotonic(), start

    def validate(model: nn.Module) -> dict[str, float]:
        return evaluation.evaluate(model, val_loader, config.data, world, lockstep=wrapped.lockstep)

    def save(step: int) -> None:
        nonlocal saved_at
        if step > saved_at:
            if tracker:
                tracker.sync()
            state.save(run_dir, step, identity, config.run.keep_checkpoints, world)
            saved_at = step

    with StopRequest() as stop, tracker or nullcontext():
        # -- the loop: `step` optimizer steps are done -----------------------------------------------------------
        for step in range(start, total_steps):
            if parallel.any_rank(stop.requested, world):
                save(step)
                if tracker:
                    tracker.say(f"stopped on request after step {step} of {total_steps}; the same command goes on")
                return Outcome(None)
            last = step + 1 == total_steps
            due_eval = last or (step + 1) % eval_every == 0
            due_log = due_eval or (step + 1) % config.run.log_every == 0

            with clock.waiting():
                micro_batches = next(batches)
            for batch in micro_batches:
                faults.add(batch.faults, step // loader.steps_per_epoch)
            if schedule is not None:
                schedule.step_update(step)
            for mask in state.attachments.values():
                mask.at(step, total_steps, grad_scale=wrapped.loss_scale(), observe=due_log)
            if probe is not None:
                probe.before(step)
            grad_norm = train_step(state, micro_batches, config, world, len(loader.classes))
            quality = probe.after(step) if probe is not None else None
            if step == start and tracker:
                rundir.write_touched(run_dir, state.attachments)
            if ema is not None:
                ema.update(bare, step=step)

            if due_log:
                reports = {name: mask.report() for name, mask in state.attachments.items()}
                values = state.meter.values(world) | clock.values(loader.global_batch_size)
                values["lr"] = wrapped.optimizer.param_groups[0]["lr"]
                values |= {} if grad_norm is None else {"grad_norm": float(grad_norm)}
                values |= records.mask_values(reports, values["step_ms"])
                values["bad_samples"] = _bad_samples(faults, world)
                values["memory_mb"] = parallel.peak_memory_mb(world.device)
                if tracker:
                    tracker.log("train", step + 1, values)
            if tracker and quality is not None:
                tracker.log("quality", quality.step + 1, records.quality_values(quality))
            if due_eval:
                with clock.paused():
                    result = validate(wrapped.eval_model)
                    averaged = validate(ema.module) if ema else None
                state.best_top1 = max(state.best_top1, result["top1"])
                if tracker:
                    tracker.log("validation", step + 1, result)
                    if averaged:
                        tracker.log("validation_ema", step + 1, averaged)
                    if reports:
                        tracker.log("layers", step + 1, records.layer_values(reports))
            if last or (step + 1) % save_every == 0:
                with clock.paused():
                    save(step + 1)

    # -- the end: summary.json last, its presence means finished -------------------------------------------------
    if start == total_steps:  # killed between the last checkpoint and the summary
        result = validate(wrapped.eval_model)
        averaged = validate(ema.module) if ema else None
    pictured = _replica(wrapped, config, len(loader.classes)) if wrapped.lockstep else wrapped.eval_model
    summary = {
        "arm": config.arm,
        "seed": config.run.seed,
        "steps": total_steps,
        "epochs": config.run.epochs,
        "top1": result["top1"],
        "top5": result["top5"],
        "loss": result["loss"],
        "best_top1": state.best_top1,
        "ema_top1": averaged["top1"] if averaged else None,
        "wall_s": round(time.monotonic() - began, 3),
    }
    if tracker:
        summary |= tracker.medians("images_per_s", "hook_ms", "hook_share", "kept_entries", "kept_energy")
        evaluation.write_samples(pictured, val_loader, config.data, run_dir / "samples")
        write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1))
    parallel.barrier(world)
    return Outcome(summary)


def train_step(
    state: TrainingState, micro_batches: list[Batch], config: TrainConfig, world: World, classes: int
) -> Tensor | None:
    """Do one optimizer step on this rank's micro-batches; return the gradient norm if clipping by norm is on."""
    wrapped = state.wrapped
    wrapped.model.train()
    wrapped.zero_grad()
    for i, batch in enumerate(micro_batches):
        images, targets = data.to_device(batch, config.data, config.augment, classes, world.device)
        last = i + 1 == len(micro_batches)
        with nullcontext() if last else state.no_sync():  # the last backward pass masks and reduces
            with torch.autocast(world.device.type, wrapped.autocast, enabled=wrapped.autocast is not None):
                logits = wrapped.model(images)
                loss = nn.functional.cross_entropy(logits, targets, label_smoothing=config.optim.label_smoothing)
            # the mean over the global batch: this divides by the micro-batches, the back-end by the world size
            wrapped.backward(loss / len(micro_batches))
        state.meter.add(loss.detach(), logits.detach(), batch.labels.to(world.device, non_blocking=True))
    return wrapped.step()


def _loaders(config: TrainConfig, world: World) -> tuple[Training, Validation]:
    def open_both() -> tuple[Training, Validation]:
        seed, accumulate = config.run.seed, config.optim.grad_accum_steps
        loader = data.train_loader(config.data, config.augment, seed, world.rank, world.size, accumulate)
        validation = data.val_loader(config.data, world.rank, world.size)
        if len(validation.classes) > len(loader.classes):
            raise UsageError(
                f"data.val_split {config.data.val_split!r} has labels up to {len(validation.classes) - 1}, and "
                f"data.train_split {config.data.train_split!r} up to {len(loader.classes) - 1}; the model would "
                "have no output for some"
            )
        return loader, validation

    with parallel.together(world):
        if config.data.decode == "gpu":
            data.check_device(world.device)
        if world.local_rank == 0:  # builds the embedded set where it is missing
            loaders = open_both()
    with parallel.together(world):
        if world.local_rank != 0:
            loaders = open_both()
    return loaders


def _attach(wrapped: Wrapped, config: TrainConfig, world: World) -> tuple[Attachment | None, Attachment | None]:
    """Return the masks of the weight gradients and of the layer outputs that the configuration asks for."""
    weights = outputs = None
    hook = _COMM_HOOKS[config.parallel.comm_hook]
    if hook is not None and world.backend != "ddp":
        raise UsageError(f"parallel.comm_hook {config.parallel.comm_hook!r} needs ddp; this is {world.backend}")
    if config.mask.enabled:
        site = world.backend if config.mask.site == "auto" else config.mask.site
        weights = attach(wrapped.model, config.mask, site, hook=hook)
    elif hook is not None:
        wrapped.model.register_comm_hook(None, hook)  # type: ignore[operator]
    if config.output.enabled:
        layers, sigmas = config.output.layers or None, config.output.sigmas or None
        outputs = attach(wrapped.model, config.output, "output", layers=layers, sigmas=sigmas)
    return weights, outputs


def _probe(attachment: Attachment | None, config: TrainConfig) -> GradientProbe | None:
    if config.run.probe_every == 0:
        return None
    if attachment is None:
        raise UsageError("run.probe_every measures what a mask does to weight gradients; it needs mask.enabled")
    return GradientProbe(attachment, config.run.probe_every)


def _average(wrapped: Wrapped, config: TrainConfig) -> ModelEmaV3 | None:
    if config.model.ema_decay == 0:
        return None
    if wrapped.lockstep:
        raise UsageError(
            "model.ema_decay needs the whole weights on every rank, which this back-end shards; set it to 0, or "
            "take parallel.backend ddp or a lower parallel.zero_stage"
        )
    return ModelEmaV3(wrapped.bare, decay=config.model.ema_decay)


def _replica(wrapped: Wrapped, config: TrainConfig, classes: int) -> nn.Module:
    """Return the model with its whole weights on the main rank, where one forward pass needs no other rank."""
    model = models.create(config.model, classes)
    weights = wrapped.weights()
    if weights:
        model.load_state_dict(weights)
    return model


def _bad_samples(faults: FaultLog, world: World) -> int:
    """Return the bad samples of the epoch so far over all ranks. Too many are a RunError on every rank."""
    found = int(parallel.sum_over_ranks(torch.tensor([faults.found], dtype=torch.float64), world))
    faults.check(found)
    return len(faults.known) + found


def _steps(loader: Training, start: int, total_steps: int) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step from `start` on, through all epochs."""
    while start < total_steps:
        epoch, offset = divmod(start, loader.steps_per_epoch)
        yield from loader.epoch(epoch, offset)
        start = (epoch + 1) * loader.steps_per_epoch
