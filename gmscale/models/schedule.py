"""timm's learning-rate schedules, over the epochs of a run."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler

from gmscale.config import OptimConfig
from gmscale.errors import UsageError, check_choice, check_keys, check_range

# Which arguments of timm's factory a schedule uses; it would ignore the others without a word.
_CYCLES = ("cycle_limit", "cycle_mul", "cycle_decay")
_NOISE = ("noise", "noise_pct", "noise_std", "noise_seed")
_ARGUMENTS = {
    "cosine": (*_CYCLES, "k_decay", "warmup_prefix", *_NOISE),
    "tanh": (*_CYCLES, "warmup_prefix", *_NOISE),
    "step": ("decay_epochs", "decay_rate", "warmup_prefix", *_NOISE),
    "multistep": ("decay_milestones", "decay_rate", "warmup_prefix", *_NOISE),
    "poly": ("decay_rate", *_CYCLES, "k_decay", "warmup_prefix", *_NOISE),
    "plateau": ("decay_rate", "patience_epochs", *_NOISE),
    "wsd": ("decay_epochs", "decay_fn", "warmup_prefix", *_NOISE),
    "rsqrt": ("decay_epochs", "decay_fn", "stable_timescale", "warmup_prefix", *_NOISE),
    "constant": ("warmup_prefix", *_NOISE),
    "none": (),
}
SCHEDULES = tuple(_ARGUMENTS)

# Those with an end, at which the learning rate is optim.min_lr and optim.cooldown_epochs begin.
_ENDING = ("cosine", "tanh", "poly", "wsd", "rsqrt")

# Arguments without which these schedules would take timm's, made for runs of 300 epochs.
_NEEDED = {"step": "decay_epochs", "multistep": "decay_milestones"}

_SET_BY = {
    "sched": "optim.sched",
    "num_epochs": "run.epochs",
    "cooldown_epochs": "optim.cooldown_epochs",
    "min_lr": "optim.min_lr",
    "warmup_lr": "optim.warmup_lr",
    "warmup_epochs": "optim.warmup_epochs",
    "step_on_epochs": "optim.sched_on",
    "updates_per_epoch": "optim.sched_on",
}


class Schedule:
    """A learning-rate schedule of timm's: a function of the step, but for plateau, which follows evaluations.

    As in timm's train.py the rates of the first step, or epoch, are those that the schedule begins with.
    """

    def __init__(self, scheduler: Scheduler, steps_per_epoch: int) -> None:
        self._scheduler = scheduler
        self._steps_per_epoch = steps_per_epoch
        self._first = self._rates()

    def before(self, step: int) -> None:
        """Set the learning rates of optimizer step number `step`, counted from 0."""
        t = step // self._steps_per_epoch if self._scheduler.t_in_epochs else step
        if t == 0:
            self._set_rates(self._first)
        elif self._scheduler.t_in_epochs:
            self._scheduler.step(t)
        else:
            self._scheduler.step_update(t)

    def observe(self, step: int, top1: float) -> None:
        """Say what an evaluation after `step` steps found."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the evaluations so far left behind, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""

    def _rates(self) -> list[float]:
        return [group["lr"] for group in self._scheduler.optimizer.param_groups]

    def _set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self._scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class Plateau(Schedule):
    """timm's plateau: the learning rate falls when top1 has not risen for more than patience_epochs.

    Of each epoch one evaluation counts, the first at or after its end. Where evaluations are rarer than epochs,
    patience_epochs counts evaluations.
    """

    _scheduler: PlateauLRScheduler

    def __init__(self, scheduler: PlateauLRScheduler, steps_per_epoch: int) -> None:
        super().__init__(scheduler, steps_per_epoch)
        self._epoch = 0

    def before(self, step: int) -> None:
        # After the warm-up timm's step() without a metric would end the noise of the last evaluation.
        if step // self._steps_per_epoch <= self._scheduler.warmup_t:
            super().before(step)

    def observe(self, step: int, top1: float) -> None:
        epoch = step // self._steps_per_epoch
        if epoch > self._epoch:
            self._epoch = epoch
            self._scheduler.step(epoch, top1)

    def state_dict(self) -> dict[str, Any]:
        inner = self._scheduler.lr_scheduler
        return {
            "epoch": self._epoch,
            "best": inner.best if math.isfinite(inner.best) else None,
            "num_bad_epochs": inner.num_bad_epochs,
            "without_noise": self._scheduler.restore_lr,
            "rates": self._rates(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        inner = self._scheduler.lr_scheduler
        self._epoch = inner.last_epoch = state["epoch"]
        inner.best = -math.inf if state["best"] is None else state["best"]
        inner.num_bad_epochs = state["num_bad_epochs"]
        self._scheduler.restore_lr = state["without_noise"]
        self._set_rates(state["rates"])


def schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, epochs: float, steps_per_epoch: int
) -> Schedule | None:
    """Return timm's schedule for a run of `epochs`, cooldown and all cycles included; None is constant.

    Raises UsageError for settings that timm does not know, that do not fit in the run, or that would be ignored.
    """
    _check(config, epochs)
    if config.sched == "none":
        for group in optimizer.param_groups:  # timm leaves the layers' own rates to its schedules
            group["lr"] = config.lr * group.get("lr_scale", 1.0)
        return None
    given = config.sched_kwargs
    covered = epochs - config.cooldown_epochs
    if given.get("warmup_prefix", False):
        covered -= config.warmup_epochs
    kind = Plateau if config.sched == "plateau" else Schedule
    arguments: dict[str, Any] = {
        "num_epochs": covered / _cycles(given),  # for timm the length of the first cycle
        "warmup_epochs": config.warmup_epochs,
        "warmup_lr": config.warmup_lr,
        "cooldown_epochs": config.cooldown_epochs,
        "min_lr": config.min_lr,
        "step_on_epochs": config.sched_on == "epoch" or kind is Plateau,
        "updates_per_epoch": steps_per_epoch,
    }
    try:
        with warnings.catch_warnings():
            # timm's plateau is deprecated because its state is not saved; ours is.
            warnings.simplefilter("ignore", FutureWarning)
            scheduler, _ = create_scheduler_v2(optimizer, config.sched, **arguments, **given)
        made = kind(scheduler, steps_per_epoch)
        for step in (max(0, round(epochs * steps_per_epoch) - 1), 0):  # some values fail only when they are used
            made.before(step)
    except (TypeError, ValueError, AssertionError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or "timm refuses these settings"
        raise UsageError(f"optim.sched {config.sched} with optim.sched_kwargs {given}: {reason}") from error
    return made


def _cycles(given: Mapping[str, Any]) -> float:
    """Return how many times the first cycle all cycles last."""
    factor = given.get("cycle_mul", 1.0)
    return float(sum(factor**i for i in range(given.get("cycle_limit", 1))))


def _check(config: OptimConfig, epochs: float) -> None:
    check_choice(config.sched, SCHEDULES, "optim.sched")
    _check_arguments(config.sched, config.sched_kwargs)
    uses_min_lr = config.sched in (*_ENDING, "plateau")
    for field, used in (
        ("min_lr", uses_min_lr),
        ("cooldown_epochs", config.sched in _ENDING),
        ("warmup_epochs", config.sched != "none"),
    ):
        if not used and getattr(config, field) > 0:
            raise UsageError(
                f"optim.{field} is {getattr(config, field):g}, but optim.sched {config.sched} does not use it"
            )
    room = epochs - config.cooldown_epochs
    if room <= 0:
        raise UsageError(
            f"optim.cooldown_epochs is {config.cooldown_epochs:g}; expected less than run.epochs {epochs:g}"
        )
    whole = config.sched in ("wsd", "rsqrt") or config.sched_kwargs.get("warmup_prefix", False)
    if config.warmup_epochs > room or (whole and config.warmup_epochs == room):
        less = f" {epochs:g}" if room == epochs else f" without optim.cooldown_epochs, {room:g}"
        raise UsageError(
            f"optim.warmup_epochs is {config.warmup_epochs:g}; expected "
            f"{'less than' if whole else 'at most'} run.epochs{less}"
        )


def _check_arguments(sched: str, given: Mapping[str, Any]) -> None:
    where = "optim.sched_kwargs"
    for key in given:
        if key in _SET_BY:
            raise UsageError(f"{where} sets {key!r}; set {_SET_BY[key]} instead")
    check_keys(given, _ARGUMENTS[sched], f"{where} of {sched}")
    if sched in _NEEDED and _NEEDED[sched] not in given:
        raise UsageError(f"optim.sched {sched} needs {where}.{_NEEDED[sched]}, in epochs")
    for switch, others in (("noise", _NOISE[1:]), ("cycle_limit", _CYCLES[1:])):
        for key in others:
            if key in given and switch not in given:
                raise UsageError(f"{where} sets {key!r}, which changes nothing without {switch!r}")
    for key in ("cycle_mul", "decay_epochs"):
        if key in given:
            check_range(given[key], f"{where}.{key}", 0, open_low=True)
    for key, low in (("cycle_limit", 1), ("patience_epochs", 0)):
        if key in given:
            check_range(given[key], f"{where}.{key}", low, 1000, whole=True)
    milestones = given.get("decay_milestones", [])
    if not isinstance(milestones, list | tuple) or sorted(milestones) != list(milestones):
        raise UsageError(f"{where}.decay_milestones is {milestones}; expected epochs in rising order")
