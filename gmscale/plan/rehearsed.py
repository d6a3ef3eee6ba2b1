"""What a plan needs, found on this machine: bytes counted between two processes, and a device's step timed."""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from statistics import median
from typing import Any

import torch

from gmscale import build, data
from gmscale.config import TrainConfig
from gmscale.costs import NOTHING, Traffic
from gmscale.dry_run.rehearsal import Rehearsal
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks
from gmscale.plan.known import MODES, ONE_MODE, PLAIN, Known, Mode, config_of, with_kept
from gmscale.plan.options import Options
from gmscale.training_state import TrainingState

_COUNTED_BATCH = 8  # images a process while bytes are counted, which do not depend on it; even, for mixing
_BEFORE_COUNTING = 8  # steps: error feedback lets more be kept from step to step, until it settles
_ROUNDS = 3  # turns that a mode and plain DDP take, so that a machine's drift hits both alike
_TIMED = 5  # steps of a back-end that is compared with nothing
_STEPS_PER_EPOCH = 1000  # of influence on the schedule alone


def known_here(config: TrainConfig, options: Options) -> Known:
    """Count and, where no step is given, time; each mode in processes of its own, on made data."""
    samples, classes = options.data or _samples_and_classes(config)
    configs = _configs(config, options)
    notes = []
    if config.parallel.batch_norm == "sync":
        notes.append("the traffic of synchronised batch normalisation is not counted")
    step_s = options.step_s or _step_s(config, classes)
    modes = []
    for done, (name, changed) in enumerate(configs.items(), 1):
        ratio = 1.0 if options.step_s or name not in MODES else _ratio(changed, config_of(PLAIN, config), classes)
        mode = _mode(name, changed, classes, step_s * ratio, options.kept)
        print(f"{done}/{len(configs)} {name}", file=sys.stderr, flush=True)
        modes.append(mode)
    if any(mode.awaited.calls for mode in modes):
        notes.append(_where_kept_is_from(modes, options))
        if config.mask.agreement == "local":
            notes.append("consensus has its default strength 1, everything else as configured")
    if options.step_s is not None:
        devices = options.cluster.devices_per_node
        measured = "given, of one node"
        notes.append("the given step holds for every mode: what the masks compute is not told apart (bench mask)")
    else:
        devices = 1
        measured = f"one {'GPU' if torch.cuda.is_available() else 'process on the CPU'}, here"
        notes.append(
            "a device takes as long in a full node as alone, and loading data hides behind its step; masks by "
            f"their ratio to plain DDP, the median of {_ROUNDS} rounds"
        )
    return Known(
        model=config.model.name,
        measured=measured,
        devices=devices,
        images_per_device=config.data.batch_size_per_device * config.optim.grad_accum_steps,
        grad_accum_steps=config.optim.grad_accum_steps,
        samples=samples,
        epochs=config.run.epochs,
        modes=modes,
        notes=notes,
    )


def _configs(config: TrainConfig, options: Options) -> Mapping[str, TrainConfig]:
    backend = config.parallel.backend
    if backend in ONE_MODE:
        name = f"deepspeed, ZeRO {config.parallel.zero_stage}" if backend == "deepspeed" else backend
        return {name: config}
    return {mode: config_of(mode, config) for mode in options.modes or MODES}


def _samples_and_classes(config: TrainConfig) -> tuple[int, int]:
    loader, _ = build.loaders(config, World(0, 0, 1, torch.device("cpu"), "single"))
    return loader.samples, len(loader.classes)


def _step_s(config: TrainConfig, classes: int) -> float:
    """Return the seconds of a device's step, without a mask where that is one of several modes."""
    if config.parallel.backend not in ONE_MODE:
        config = config_of(PLAIN, config)
    return run_ranks(_rehearse, 1, config, classes, _TIMED, parallel=config.parallel)["step_s"]


def _ratio(config: TrainConfig, plain: TrainConfig, classes: int) -> float:
    """Return how much longer a device's step takes than that of plain DDP."""
    if config == plain:
        return 1.0
    return run_ranks(_take_turns, 1, config, plain, classes, parallel=config.parallel)["ratio"]


def _mode(name: str, config: TrainConfig, classes: int, step_s: float, kept: float | None) -> Mode:
    on_gpus = torch.cuda.device_count() >= 2
    environ = [] if on_gpus else [{"CUDA_VISIBLE_DEVICES": ""}] * 2
    counted = config if on_gpus else _for_counting(config)
    seen = run_ranks(_rehearse, 2, counted, classes, _BEFORE_COUNTING, environ=environ, parallel=counted.parallel)
    traffic = {operation: Traffic(*numbers) for operation, numbers in seen["traffic"].items()}
    agrees = MODES.get(name, (None, ""))[0] == "consensus"
    itemsize = 2 if config.parallel.comm_hook != "allreduce" else 4
    awaited = NOTHING
    if agrees:  # each bucket's maps, then its values
        awaited = Traffic(traffic["allreduce"].calls / 2, seen["map_units"] * itemsize)
    mode = Mode(name=name, step_s=step_s, traffic=traffic, awaited=awaited, kept=seen["kept"] if agrees else None)
    if agrees and kept is not None:
        mode = with_kept(mode, kept, seen["entries"], itemsize)
    return mode


def _for_counting(config: TrainConfig) -> TrainConfig:
    """Return the configuration with what changes no byte of gradients made small, and what needs a GPU left out."""
    made = replace(
        config.data,
        batch_size_per_device=min(_COUNTED_BATCH, config.data.batch_size_per_device),
        decode="fast" if config.data.decode == "gpu" else config.data.decode,
    )
    parallel = config.parallel
    if parallel.batch_norm == "sync":
        parallel = replace(parallel, batch_norm="broadcast")
    return replace(config, data=made, parallel=parallel, model=replace(config.model, compile=""))


def _rehearsal(config: TrainConfig, world: World, classes: int) -> tuple[TrainingState, Rehearsal]:
    warnings.simplefilter("ignore")  # training says them once
    if config.data.decode == "gpu":
        data.check_device(world.device)
    build.prepare_process(config, world)
    state = build.training_state(config, world, classes, _STEPS_PER_EPOCH)
    total_steps = max(1, round(config.run.epochs * _STEPS_PER_EPOCH))
    return state, Rehearsal(state, config, world, classes, total_steps)


def _take_turns(world: World, config: TrainConfig, plain: TrainConfig, classes: int) -> dict[str, Any]:
    """Return the median over rounds of a mode's step to that of plain DDP; a body of one process."""
    pair = [_rehearsal(changed, world, classes)[1] for changed in (config, plain)]
    ratios = []
    for done in range(_ROUNDS):
        order = pair if done % 2 else pair[::-1]
        taken = {rehearsal: rehearsal.run(1).step_s for rehearsal in order}
        ratios.append(taken[pair[0]] / taken[pair[1]])
    return {"ratio": median(ratios)}


def _rehearse(world: World, config: TrainConfig, classes: int, steps: int) -> dict[str, Any]:
    """Return a step's time and traffic, and what its mask keeps of how much; a body of processes."""
    state, rehearsal = _rehearsal(config, world, classes)
    rehearsed = rehearsal.run(steps)
    touched = state.attachment.describe()["touched"] if state.attachment is not None else []
    report = rehearsed.reports.get("mask")
    return {
        "step_s": rehearsed.step_s,
        "traffic": {name: (seen.calls, seen.bytes) for name, seen in rehearsed.traffic.items()},
        "kept": report.kept_entries if report is not None else None,
        "entries": sum(t["entries"] for t in touched),
        "map_units": sum(prod(t["map"]) for t in touched),
    }


def _where_kept_is_from(modes: list[Mode], options: Options) -> str:
    if options.kept is not None:
        return f"consensus keeps {100 * options.kept:.0f} % of the masked entries, as given by --kept"
    kept = ", ".join(f"{100 * mode.kept:.0f} %" for mode in modes if mode.kept is not None)
    return (
        f"consensus keeps {kept} of the masked entries, counted on made-up images after {_BEFORE_COUNTING + 1} "
        "steps; on real ones it differs (a run's kept_entries; --kept)"
    )
