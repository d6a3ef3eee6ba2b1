"""The main path: one training run, read top to bottom.

Everything that decides the result is a function of the configuration and of the checkpoint, so an interrupted run
ends as an undisturbed one. What a step does stands in step.py, what a run is made of in build.py.
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
from torch import nn

from gmscale import build, checkpoint, elastic, evaluation, ownership, parallel, records, rundir, tracking
from gmscale.build import Training
from gmscale.checkpoint import Saver
from gmscale.config import TrainConfig
from gmscale.data import Batch, FaultLog
from gmscale.errors import RunError
from gmscale.files import write_atomically
from gmscale.parallel import World
from gmscale.profiling import StepProfiler
from gmscale.step import train_step
from gmscale.stopping import StopRequest
from gmscale.tracking import StepClock, Tracker, plain_console


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished with `summary`, or stopped as asked after a checkpoint (summary None)."""

    summary: dict[str, Any] | None


def train(config: TrainConfig, world: World, console: Console | None = None) -> Outcome:
    """Train the run that `config` describes, from its newest checkpoint, or that which it branches from, if any.

    Called by every rank of `world`. Raises UsageError for what cannot be asked for, before anything is written
    to the run directory, and RunError for what fails on the way.
    """
    console = console or plain_console()
    run_dir = Path(config.run.dir)
    with parallel.together(world):
        if world.is_main:
            tracking.check(config)
        done = rundir.finished(run_dir, config)
    if done is not None:
        if world.is_main:
            console.print(f"{run_dir} is finished already; its summary.json stands", highlight=False)
        return Outcome(done)

    # -- data, model, mask, optimizer -------------------------------------------------------------------------
    with parallel.together(world):
        newest = checkpoint.latest(run_dir)
        origin = None if newest else rundir.origin(config, world)
        given = newest or origin
        start = checkpoint.read(given)["step"] if given else 0
        division = elastic.divide(config, world, rundir.world_sizes(run_dir, given, config, world), start)
    build.prepare_process(config, world)
    loader, val_loader = build.loaders(division.config, world)
    steps_per_epoch, classes = loader.steps_per_epoch, len(loader.classes)
    total_steps = max(1, round(config.run.epochs * steps_per_epoch))
    state = build.training_state(
        division.config, world, classes, steps_per_epoch, step=start, resumes=given is not None
    )
    with parallel.together(world):
        probe = build.probe(state.attachment, config)

    # -- resume, branch, or begin -----------------------------------------------------------------------------
    parent = rundir.branched_from(newest, origin)
    identity = rundir.identity(config, division.history, loader.fingerprint, state.attachments, parent)
    with parallel.together(world):
        if newest is not None:
            rundir.check_identity(newest, identity, config)
        elif origin is not None:
            rundir.check_branch(origin, identity, config, total_steps)
    if given is not None:
        state.restore(given, world, config.run.seed, branches=origin is not None)
    with parallel.together(world):
        owner = ownership.take(run_dir) if world.is_main else None
        if world.is_main:
            rundir.begin(run_dir, config, world, state.attachments, state.loaded, identity, anew=newest is None)
            rundir.write_data(run_dir, loader.classes, loader.samples)
    tracker = None
    with parallel.together(world):
        if world.is_main:
            tracker = Tracker(run_dir, config, total_steps, start, console)
    say = tracker.say if tracker else lambda message: None
    if state.loaded is not None:
        say(state.loaded.summary())
    if given is not None:
        say(f"{f'branches from {origin}, ' if origin else ''}goes on after step {start} of {total_steps}")
    if tracker and division.change and start < total_steps:
        tracker.say(division.change)
        now = {"world_size": world.size, "grad_accum_steps": division.config.optim.grad_accum_steps}
        tracker.log("world", start + 1, now)  # the first step they do: a resume from before it drops the record
    faults = FaultLog(
        run_dir / f"bad_samples-rank{world.rank}.jsonl", loader.faults, loader.samples, config.data.max_bad_share
    )
    if world.is_main:
        faults.write(loader.faults)
    saver = Saver(
        run_dir,
        world,
        keep=config.run.keep_checkpoints,
        keep_best=config.run.keep_best,
        background=config.run.background_save,
        warn=say,
        check_owner=owner.check if owner else lambda: None,
    )
    profiler = StepProfiler(run_dir / "profile", config.run.profile_steps, world, start, total_steps, say)
    eval_every = max(1, round(config.run.eval_every_epochs * steps_per_epoch))
    save_every = config.run.save_every_steps or eval_every
    pause = config.run.pause_after_epochs
    pauses_at = max(1, round(pause * steps_per_epoch)) if pause else total_steps
    unfreezes_at = build.unfreeze_step(config, steps_per_epoch)
    batches = _steps(loader, start, total_steps)
    clock, began = StepClock(), time.monotonic()

    def validate(model: nn.Module) -> dict[str, float]:
        world.heartbeat.at("evaluation")
        return evaluation.evaluate(model, val_loader, config.data, world, lockstep=state.wrapped.lockstep)

    def save(step: int, top1: float | None = None) -> None:
        if step > (saver.step or start):
            world.heartbeat.at("saving")
            if tracker:
                tracker.sync()
            saver.save(step, state.contents(identity, world, sharded=config.parallel.sharded_checkpoints), top1)

    with StopRequest() as stop, world.heartbeat.shared(run_dir), tracker or nullcontext(), profiler:
        # -- the loop: `step` optimizer steps are done -----------------------------------------------------------
        for step in range(start, total_steps):
            world.heartbeat.at("agreement", step + 1)
            stops, *writing = parallel.count_over_ranks(world, stop.requested, *saver.progress)
            saver.advance(*writing)
            if stops or step >= pauses_at:
                save(step)
                saver.finish()
                stopped = "stopped on request" if stops else "paused, as run.pause_after_epochs asks,"
                again = "the same command" if stops else "the same command without it, or with more,"
                say(f"{stopped} after step {step} of {total_steps}; {again} goes on")
                return Outcome(None)
            last = step + 1 == total_steps
            due_eval = last or (step + 1) % eval_every == 0
            due_log = due_eval or (step + 1) % config.run.log_every == 0

            world.heartbeat.at("data")
            with clock.waiting():
                micro_batches = next(batches)
            for batch in micro_batches:
                faults.add(batch.faults, step // steps_per_epoch)
            if state.schedule is not None:
                state.schedule.before(step)
            for mask in state.attachments.values():
                mask.at(step, total_steps, grad_scale=state.wrapped.loss_scale(), observe=due_log)
            if probe is not None:
                probe.before(step)
            profiler.before(step + 1)
            stepped = train_step(state, micro_batches, config, world, classes)
            profiler.after(step + 1)
            quality = probe.after(step) if probe is not None else None
            if step == start and tracker:
                rundir.write_touched(run_dir, state.attachments)
            if stepped.skipped:
                state.skips.add(state.wrapped.nonfinite_gradients(), state.wrapped.nonfinite_buffers())
                if tracker:
                    tracker.log("skipped", step + 1, {"in_a_row": state.skips.in_a_row, "cause": state.skips.last})
                if state.skips.too_many(config.run.max_nonfinite):
                    saver.settle()  # what was saved before is good
                    raise state.skips.error(step + 1, run_dir)
            else:
                state.skips.end_row()
                if state.ema is not None:
                    state.ema.update(state.wrapped.bare, step=step)

            world.heartbeat.at("after the step")
            if due_log:
                reports = {name: mask.report() for name, mask in state.attachments.items()}
                values = state.meter.values(world) | clock.values(loader.global_batch_size)
                values["lr"] = max(group["lr"] for group in state.wrapped.optimizer.param_groups)
                values["grad_norm"] = float(stepped.grad_norm)
                values |= records.mask_values(reports, values["step_ms"])
                values["skipped_steps"] = state.skips.total
                values["bad_samples"] = _bad_samples(faults, world, saver)
                values["memory_mb"] = parallel.peak_memory_mb(world.device)
                if tracker:
                    tracker.log("train", step + 1, values)
            if tracker and quality is not None:
                tracker.log("quality", quality.step + 1, records.quality_values(quality))
            top1 = None
            if due_eval:
                with clock.paused():
                    state.wrapped.average_statistics()
                    result = validate(state.wrapped.eval_model)
                    averaged = validate(state.ema.module) if state.ema else None
                top1 = max(result["top1"], averaged["top1"] if averaged else 0.0)
                if state.schedule is not None:
                    state.schedule.observe(step + 1, result["top1"])
                if tracker:
                    tracker.log("validation", step + 1, result)
                    if averaged:
                        tracker.log("validation_ema", step + 1, averaged)
                    if reports:
                        tracker.log("layers", step + 1, records.layer_values(reports))
            if step + 1 == unfreezes_at:  # after the masks have reported, before the state is saved
                with clock.paused():
                    build.unfreeze(state, config, world)
                identity = rundir.identity(config, division.history, loader.fingerprint, state.attachments, parent)
                if tracker:
                    rundir.write_touched(run_dir, state.attachments)
                say(f"everything trains from step {step + 2} on")
            is_best = top1 is not None and saver.is_best(top1)
            state.best_top1 = max(state.best_top1, top1 or 0.0)
            if last or (step + 1) % save_every == 0 or is_best:
                with clock.paused():
                    save(step + 1, top1)

        # -- the end: summary.json last, its presence means finished ---------------------------------------------
        world.heartbeat.at("finishing")
        saver.finish(whole=True)
        if start == total_steps:  # killed between the last checkpoint and the summary
            result = validate(state.wrapped.eval_model)
            averaged = validate(state.ema.module) if state.ema else None
        pictured = build.replica(state, config, classes) if state.wrapped.lockstep else state.wrapped.eval_model
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
            "skipped_steps": state.skips.total,
            "world_sizes": division.history,
            "branched_from": parent,
            "wall_s": round(time.monotonic() - began, 3),
        }
        if tracker:
            medians = ("images_per_s", "hook_ms", "hook_share", "kept_entries", "kept_energy", "wire_share")
            summary |= tracker.medians(*medians)
            evaluation.write_samples(pictured, val_loader, config.data, run_dir / "samples")
            write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1))
    parallel.barrier(world)
    return Outcome(summary)


def _bad_samples(faults: FaultLog, world: World, saver: Saver) -> int:
    """Return the bad samples of the epoch so far over all ranks. Too many are a RunError on every rank."""
    found = int(parallel.sum_over_ranks(torch.tensor([faults.found], dtype=torch.float64), world))
    try:
        faults.check(found)
    except RunError:
        saver.settle()
        raise
    return len(faults.known) + found


def _steps(loader: Training, start: int, total_steps: int) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step from `start` on, through all epochs."""
    while start < total_steps:
        epoch, offset = divmod(start, loader.steps_per_epoch)
        yield from loader.epoch(epoch, offset)
        start = (epoch + 1) * loader.steps_per_epoch
