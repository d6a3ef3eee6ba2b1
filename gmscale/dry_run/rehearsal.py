"""A rehearsal: a few masked optimizer steps and one evaluation on made data, as training would do them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import cast

import torch

from gmscale import evaluation, parallel
from gmscale.config import TrainConfig
from gmscale.costs import Traffic
from gmscale.data import ValLoader
from gmscale.dry_run.made import MadeBatches, MadeValidation
from gmscale.masking import GradientMask
from gmscale.parallel import World
from gmscale.sites import MaskReport
from gmscale.step import train_step
from gmscale.traffic import Operations, counted
from gmscale.training_state import TrainingState


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """What the steps took, the slowest rank's times and the largest memory; and what rank 0 saw."""

    first_step_s: float
    step_s: float
    """Median of the timed steps, the first one left out."""
    reports: dict[str, MaskReport]
    """Of the masks, by their sections."""
    traffic: dict[str, Traffic]
    """What one step handed to collectives, by torch's names."""
    peak_mb: float


class Rehearsal:
    """Trains `state` on made batches, at the step at which the masks are strongest."""

    def __init__(
        self, state: TrainingState, config: TrainConfig, world: World, classes: int, total_steps: int
    ) -> None:
        self._state, self._config, self._world, self._classes = state, config, world, classes
        self._total_steps = total_steps
        self.at = strongest_step([a.mask for a in state.attachments.values()], total_steps)
        with parallel.together(world):
            self.made = MadeBatches(config, world.rank, classes)
        if state.schedule is not None:
            state.schedule.before(0)

    def run(self, steps: int) -> Rehearsed:
        """Do one step, `steps` timed ones, and one whose collectives and masks are looked at; a collective."""
        first = self._step()
        self._reports()  # their clocks start afresh
        timed = median([self._step() for _ in range(steps)])
        times = self._reports()
        with counted() as operations:
            self._step(observe=True)
        looks = self._reports()
        return Rehearsed(
            first_step_s=parallel.largest_over_ranks(first, self._world),
            step_s=parallel.largest_over_ranks(timed, self._world),
            reports={name: _timed_by(looks[name], times[name]) for name in looks},
            traffic=_traffic(operations),
            peak_mb=parallel.largest_over_ranks(parallel.peak_memory_mb(self._world.device), self._world),
        )

    def evaluate(self, images: int) -> float:
        """Evaluate one batch of at most `images`; return the images a second of the slowest rank; a collective."""
        world = self._world
        with parallel.together(world):
            made = MadeValidation(self._config.data, images)
        started = self._now()
        evaluation.evaluate(
            self._state.wrapped.eval_model,
            cast(ValLoader, made),  # it yields the same
            self._config.data,
            world,
            lockstep=self._state.wrapped.lockstep,
        )
        return made.images / parallel.largest_over_ranks(self._now() - started, world)

    def _step(self, *, observe: bool = False) -> float:
        """Do one optimizer step; return its seconds."""
        state = self._state
        started = self._now()
        for mask in state.attachments.values():
            mask.at(self.at, self._total_steps, grad_scale=state.wrapped.loss_scale(), observe=observe)
        train_step(state, self.made.step(), self._config, self._world, self._classes)
        if state.ema is not None:
            state.ema.update(state.wrapped.bare, step=self.at)
        return self._now() - started

    def _reports(self) -> dict[str, MaskReport]:
        return {name: mask.report() for name, mask in self._state.attachments.items()}

    def _now(self) -> float:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def strongest_step(masks: Iterable[GradientMask], total_steps: int) -> int:
    """Return a step at which the masks together are about as strong as they ever get."""
    masks = list(masks)
    steps = range(0, total_steps, max(1, total_steps // 200))
    return max(steps, key=lambda step: sum(mask.strength_at(step, total_steps) for mask in masks))


def _traffic(operations: Operations) -> dict[str, Traffic]:
    return {name: Traffic(seen["calls"], seen["bytes"]) for name, seen in operations.items()}


def _timed_by(look: MaskReport, clock: MaskReport) -> MaskReport:
    """Return a report of an observed step with the time of those that were not slowed by being counted."""
    return MaskReport(**(vars(look) | {"hook_ms": clock.hook_ms}))
