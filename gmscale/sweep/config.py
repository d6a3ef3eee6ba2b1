"""The settings of a sweep, beside those of the training that its trials share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from gmscale import config as configuration
from gmscale.config import MaskConfig, OutputConfig, RunConfig, TrainConfig, changed_on_resume
from gmscale.config.parsing import parse_with
from gmscale.config.sections import plain
from gmscale.data.config import without_secrets
from gmscale.errors import UsageError, check_choice, check_range
from gmscale.files import write_atomically
from gmscale.sweep import space
from gmscale.sweep.space import Domain, Space, apply, arm_of
from gmscale.trials import MASK

EVALUATED = ("top1", "top5", "loss")
"""Objectives known at every evaluation, by which a scheduler can judge."""
OBJECTIVES = (*EVALUATED, "best_top1", "ema_top1", "pruned_top1", "fgsm_top1", "pgd_top1")

# Not what is learned, but where, and how fast.
_MAY_CHANGE = {"dir", "at_once", "cpus_per_worker", "gpus_per_worker", "retries", "dashboard", "ray_output"}
_DEFAULT_TRIALS = 16


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is searched and how, which controls are trained beside it, and what a trial may take."""

    dir: str = "runs/sweep"
    """Folder of the sweep; the same command goes on with what is there."""
    space: dict[str, Any] = field(default_factory=dict)
    """Field -> a list of values, {uniform: [low, high]}, {loguniform: [low, high]} or {int: [low, high]}, such as
    '{mask.strength: [0.25, 0.5, 1], optim.lr: {loguniform: [1e-3, 1e-1]}}'."""
    search: Literal["grid", "random", "tpe", "nsga2"] = "random"
    """grid takes every point of the lists, random some; tpe and nsga2 are Optuna's, which learn from the trials."""
    scheduler: Literal["none", "asha", "hyperband", "pbt"] = "none"
    """Who ends mask trials early (asha; hyperband is asha with several first rungs), or lets the worse go on from
    the better with other settings (pbt: population based training). Controls and the confirmation always train to
    the end."""
    trials: int = 0
    """Mask configurations to try, with pbt the population. 0 is 16 (all points of the space where they are fewer),
    and for a grid all."""
    seeds: int = 1
    """Seeds of every configuration in the search, from run.seed on; the same for all, so that differences are
    paired. grid and random, without a scheduler."""
    seed: int = 0
    """Seed of what search and scheduler draw."""
    objectives: list[str] = field(default_factory=lambda: ["top1"])
    """What counts: top1, top5, loss, best_top1, ema_top1, pruned_top1, fgsm_top1, pgd_top1. Several are weighed
    against each other, none first."""
    prune: float = 0.8
    """pruned_top1: share of the weights that magnitude pruning removes."""
    eps: float = 4 / 255
    """fgsm_top1, pgd_top1: largest change of a pixel on a scale of 0 to 1."""
    no_mask_lr: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])
    """Factors of optim.lr in the control without a mask, which so has a search of its own. Empty leaves that
    control out, and with it any claim that a mask helps."""
    random_mask: bool = True
    """Train the control with a random mask of equal density too: the base's, and that of whatever is confirmed."""
    random_twins: bool = False
    """Train the random mask of equal density of every configuration in the search. grid and random."""
    confirm_seeds: int = 5
    """Fresh seeds on which the best configurations and their controls are trained after the search; 0 is off, and
    leaves a best trial but no winner."""
    workers: int = 1
    """Processes of a trial, all on one node."""
    cpus_per_worker: int = 1
    """CPU cores of each, and threads it uses."""
    gpus_per_worker: float = 0.0
    """GPUs of each: 0, 1, or with one worker a share such as 0.25 of a GPU, whose memory trials then share."""
    at_once: int = 0
    """Trials at the same time at most; 0 is as many as fit."""
    retries: int = 2
    """Times that a trial is started again after it failed."""
    grace_epochs: float = 1.0
    """asha, hyperband: epochs that every trial gets."""
    reduction_factor: int = 3
    """asha, hyperband: one in so many trials goes on from each rung to the next, which is so many times longer."""
    perturb_epochs: float = 1.0
    """pbt: epochs between two comparisons, a multiple of run.eval_every_epochs."""
    dashboard: bool = False
    """Let Ray serve its dashboard."""
    ray_output: bool = False
    """Show Ray's own messages."""

    def __post_init__(self) -> None:
        if not self.dir:
            raise UsageError("sweep.dir is empty; expected the path of the sweep's folder")
        for name, low in (("trials", 0), ("seeds", 1), ("seed", 0), ("workers", 1), ("cpus_per_worker", 1)):
            check_range(getattr(self, name), f"sweep.{name}", low, whole=True)
        for name, low in (("at_once", 0), ("retries", 0), ("confirm_seeds", 0), ("reduction_factor", 2)):
            check_range(getattr(self, name), f"sweep.{name}", low, whole=True)
        if self.confirm_seeds == 1:
            raise UsageError("sweep.confirm_seeds is 1, which gives no interval; expected at least 2, or 0 for off")
        check_range(self.grace_epochs, "sweep.grace_epochs", 0, open_low=True)
        check_range(self.perturb_epochs, "sweep.perturb_epochs", 0, open_low=True)
        check_range(self.eps, "sweep.eps", 0, 1, open_low=True)
        check_range(self.prune, "sweep.prune", 0, 0.999, open_low=True)
        check_range(self.gpus_per_worker, "sweep.gpus_per_worker", 0, 1)
        if self.gpus_per_worker % 1 and self.workers > 1:
            raise UsageError(
                f"sweep.gpus_per_worker is {self.gpus_per_worker:g} and sweep.workers {self.workers}; the "
                f"processes of one training cannot share a GPU"
            )
        _check_distinct(self.no_mask_lr, "no_mask_lr")
        for factor in self.no_mask_lr:
            check_range(factor, "sweep.no_mask_lr", 0, open_low=True)
        self._check_objectives()
        self._check_search()

    def _check_objectives(self) -> None:
        if not self.objectives:
            raise UsageError(f"sweep.objectives is empty; expected some of {', '.join(OBJECTIVES)}")
        _check_distinct(self.objectives, "objectives")
        for objective in self.objectives:
            check_choice(objective, OBJECTIVES, "sweep.objectives")
        if self.scheduler == "none":
            return
        if len(self.objectives) > 1:
            raise UsageError(
                f"sweep.scheduler {self.scheduler} judges by one objective, and sweep.objectives has "
                f"{len(self.objectives)}; take scheduler none, or the first objective alone"
            )
        if self.objectives[0] not in EVALUATED:
            raise UsageError(
                f"sweep.objectives is {self.objectives[0]}, known only after the training; with scheduler "
                f"{self.scheduler} expected one of {', '.join(EVALUATED)}"
            )

    def _check_search(self) -> None:
        domains = self.domains
        if self.scheduler == "pbt" and self.search != "random":
            raise UsageError(
                f"sweep.search is {self.search}, but scheduler pbt draws its population itself; take search random"
            )
        repeats = self.search in ("grid", "random") and self.scheduler == "none"
        if self.seeds > 1 and not repeats:
            name = f"search {self.search}" if self.scheduler == "none" else f"scheduler {self.scheduler}"
            raise UsageError(
                f"sweep.seeds is {self.seeds}, but {name} tries each configuration once; set it to 1 "
                f"(sweep.confirm_seeds gives fresh seeds to the best)"
            )
        if self.random_twins and self.search not in ("grid", "random"):
            raise UsageError(
                f"sweep.random_twins is true, but search {self.search} finds its configurations as it goes; take "
                "search grid or random"
            )
        if self.search in ("tpe", "nsga2"):
            for name, domain in domains.items():
                if any(isinstance(value, list | dict) for value in domain.values):
                    raise UsageError(
                        f"sweep.space: {name} holds lists or mappings, and search {self.search} takes numbers, "
                        f"words and null; take search grid or random"
                    )
        self._set_trials(domains)

    def _set_trials(self, domains: Space) -> None:
        if self.search == "grid":
            points = space.grid_size(domains)
            if self.trials not in (0, points):
                raise UsageError(
                    f"sweep.trials is {self.trials}, but a grid takes all points of sweep.space, and it has "
                    f"{points}; leave it out, or take search random"
                )
            object.__setattr__(self, "trials", points)
            return
        if self.trials == 0:
            object.__setattr__(self, "trials", int(min(space.size(domains), _DEFAULT_TRIALS)))
        space.check_size(domains, self.trials)
        if self.scheduler == "pbt" and self.trials < 2:
            raise UsageError("sweep.trials is 1; expected at least 2, as pbt compares")

    @cached_property
    def domains(self) -> dict[str, Domain]:
        """The space, parsed."""
        return space.parse_all(self.space)

    def evaluation(self) -> tuple[str, ...]:
        """Return the arguments of gmscale evaluate that the objectives ask for; none where training says it all."""
        found: list[str] = []
        if "pruned_top1" in self.objectives:
            found += ["--prune", str(self.prune)]
        attacks = [name for name in ("fgsm", "pgd") if f"{name}_top1" in self.objectives]
        if attacks:
            found += ["--attack", ",".join(attacks), "--eps", str(self.eps)]
        return (*found, "--no_page") if found else ()


def _check_distinct(values: Sequence[Any], name: str) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise UsageError(f"sweep.{name} holds {value!r} twice")


# ---- reading and writing ----------------------------------------------------------------------------------------


def build_parser() -> ArgumentParser:
    """Return the parser of gmscale sweep, to which flags may be added."""
    return configuration.build_parser("gmscale sweep", {"sweep": SweepConfig})


def parse(argv: Sequence[str], parser: ArgumentParser | None = None) -> tuple[TrainConfig, SweepConfig, Any]:
    """Return the trials' base configuration, the sweep's, and the namespace with any further flags of `parser`.

    Raises UsageError, in one line, for whatever is wrong, also for a point of the space that cannot be trained.
    """
    base, extra, namespace = parse_with({"sweep": SweepConfig}, argv, parser or build_parser())
    sweep = extra["sweep"]
    check(base, sweep)
    return base, sweep, namespace


def load(folder: Path) -> tuple[TrainConfig, SweepConfig]:
    """Return the base configuration and the sweep's of the sweep in `folder`."""
    for name in ("base.yaml", "sweep.yaml"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} holds no sweep: it has no {name}")
    base, sweep, _ = parse(["--config", str(folder / "base.yaml"), "--sweep", str(folder / "sweep.yaml")])
    return base, sweep


def save(folder: Path, base: TrainConfig, sweep: SweepConfig) -> None:
    """Write base.yaml, for --config, and sweep.yaml, the fields of its section."""
    write_atomically(folder / "base.yaml", base.to_yaml())
    write_atomically(folder / "sweep.yaml", yaml.safe_dump(plain(asdict(sweep)), sort_keys=False))


def check_same(folder: Path, base: TrainConfig, sweep: SweepConfig) -> None:
    """Raise UsageError, naming the first field, if the sweep in `folder` has other settings than these."""
    saved_base, saved = load(folder)
    changes = changed_on_resume(plain(asdict(saved_base)), base)
    changes += [
        (f"sweep.{f.name}", getattr(saved, f.name), getattr(sweep, f.name))
        for f in fields(SweepConfig)
        if f.name not in _MAY_CHANGE and getattr(saved, f.name) != getattr(sweep, f.name)
    ]
    for name, before, value in changes:
        raise UsageError(
            f"{folder} holds a sweep with other settings: {name} was {before!r} and is {value!r}; choose another "
            f"sweep.dir, or go on with that one: gmscale sweep --resume {folder}"
        )


# ---- the sweep and the training together ------------------------------------------------------------------------


def check(base: TrainConfig, sweep: SweepConfig) -> None:
    """Raise UsageError, in one line, if trials of this base cannot make this sweep."""
    _check_base(base, sweep)
    if "ema_top1" in sweep.objectives and base.model.ema_decay == 0:
        raise UsageError("sweep.objectives has ema_top1, but model.ema_decay is 0: there is no average")
    backend = base.parallel.backend
    if (backend == "single" and sweep.workers > 1) or (backend not in ("auto", "single") and sweep.workers == 1):
        raise UsageError(
            f"parallel.backend is {backend!r}, but sweep.workers is {sweep.workers}; take parallel.backend auto"
        )
    if sweep.scheduler != "none" and "run.epochs" in sweep.space:
        raise UsageError(
            f"sweep.space: scheduler {sweep.scheduler} compares trials of equal length; take run.epochs out, or "
            f"scheduler none"
        )
    if sweep.scheduler in ("asha", "hyperband"):
        check_range(sweep.grace_epochs, "sweep.grace_epochs", 0, base.run.epochs, open_low=True)
    space.check(sweep.domains, base)
    if sweep.scheduler == "pbt":
        _check_population(base, sweep)


def _check_base(base: TrainConfig, sweep: SweepConfig) -> None:
    if arm_of(base) != MASK:
        raise UsageError(
            f"gmscale sweep needs a mask to begin with, and makes the controls itself; mask.enabled is "
            f"{str(base.mask.enabled).lower()} (mask.operator {base.mask.operator}), output.enabled "
            f"{str(base.output.enabled).lower()} (output.operator {base.output.operator})"
        )
    defaults = RunConfig()
    for name in ("arm", "resume", "pause_after_epochs", "branch_from"):
        if getattr(base.run, name) != getattr(defaults, name):
            raise UsageError(f"run.{name} is {getattr(base.run, name)!r}, which a sweep sets itself; leave it out")
    if without_secrets(base.data.source) != base.data.source:
        raise UsageError(
            f"data.source {without_secrets(base.data.source)} was given with credentials or a query; the trials "
            f"read it from {sweep.dir}/base.yaml, where no secret may stand"
        )


def _check_population(base: TrainConfig, sweep: SweepConfig) -> None:
    """Raise UsageError unless trials of the space can go on from each other's checkpoints."""
    intervals = sweep.perturb_epochs / base.run.eval_every_epochs
    if not math.isclose(intervals, round(intervals)) or round(intervals) < 1:
        raise UsageError(
            f"sweep.perturb_epochs is {sweep.perturb_epochs:g}; expected a multiple of run.eval_every_epochs, "
            f"{base.run.eval_every_epochs:g}: trials are compared where they were evaluated"
        )
    if sweep.perturb_epochs >= base.run.epochs:
        raise UsageError(
            f"sweep.perturb_epochs is {sweep.perturb_epochs:g}; expected less than run.epochs, {base.run.epochs:g}"
        )
    other = plain(asdict(base))
    for dotted in sweep.domains:
        section, _, name = dotted.partition(".")
        other[section][name] = object()  # unlike any value
    for dotted, _, _ in changed_on_resume(other, base, branches=True):
        raise UsageError(
            f"sweep.space: {dotted} cannot change within a training, as scheduler pbt has it; take it out, or "
            f"scheduler asha"
        )


# ---- controls ---------------------------------------------------------------------------------------------------


def no_mask(base: TrainConfig, factor: float) -> dict[str, Any]:
    """Return the settings that train `base` without a mask, at `factor` times its learning rate."""
    rate = base.optim.lr * factor
    off = {f"{name}.enabled": False for name, section in _masks(base).items() if section.enabled}
    return {**off, "optim.lr": rate if factor == 1 else float(f"{rate:.6g}")}


def random_twin(base: TrainConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with random masks of equal density in place of those of `base` with these settings."""
    twin = dict(settings)
    for name, section in _masks(apply(base, settings)).items():
        if section.enabled and section.operator != "random":
            twin |= {f"{name}.operator": "random", f"{name}.random_like": section.operator}
    return twin


def _masks(config: TrainConfig) -> dict[str, MaskConfig | OutputConfig]:
    return {"mask": config.mask, "output": config.output}
