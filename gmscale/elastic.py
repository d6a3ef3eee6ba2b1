"""A run that goes on with another number of processes: its division, and what its ranks hand over.

The global batch of the run's beginning stays, so a step trains on the same samples, in the same micro-batches, at
the same learning rate; with fewer processes each accumulates more of them. What N ranks had to themselves is handed
over to N' others:

* Error feedback. Rank i owes the mean gradient r_i / N. The sample order gives every rank one contiguous slice of
  the global batch, so the samples of new rank j are those of neighbouring old ones, to the share w_ij those of rank
  i, and where slices are joined whole its gradient is the sum of w_ij times theirs. It takes over
  r'_j = sum_i w_ij r_i in the same way. Then (1/N') sum_j r'_j = (1/N) sum_i r_i: what is owed in all stays as it
  was, but for rounding (law 10). Of half as many ranks each takes over the mean of two residuals; of twice as many,
  two take over the same one, bit for bit.
* Sums since the last log line stay what they are in all. Batch-norm statistics that each rank has of its own
  (parallel.batch_norm reduce) are averaged with the same weights.
* Random states begin afresh, by the seed, the step and the rank: dropout draws others than it would have.

What changes: a mask sees gradients of more samples, or of fewer, and a mask of a mean is not the mean of masks. The
random operator draws by rank. Running batch-norm statistics take in other micro-batches, or more of them a step,
and with parallel.batch_norm sync more or fewer samples are normalised together.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed
from torch import Tensor

from gmscale import checkpoint
from gmscale.config import TrainConfig
from gmscale.errors import UsageError
from gmscale.parallel import World

BACK_ENDS = ("single", "ddp")

History = Sequence[tuple[int, int]]
"""(optimizer steps done, processes from there on): at the run's beginning, and wherever the number changed."""


@dataclass(frozen=True)
class Division:
    """How a run's global batch is divided over its processes."""

    config: TrainConfig
    """The run's configuration, but for optim.grad_accum_steps, which is that of the processes there are now."""
    history: History
    change: str
    """What is to be said of a change since the last checkpoint; empty if there was none."""


def divide(config: TrainConfig, world: World, history: History, start: int) -> Division:
    """Return how the processes of `world` share the run from step `start` on.

    Raises UsageError if they cannot have the global batch of the run's beginning, if the setting that lets their
    number change is off and it has, or if the back-end or the data do not allow that setting.
    """
    if config.parallel.elastic:
        _check(config, world)
    first, now = history[0][1], world.size
    # what changed at this very step, or later and was lost, has not trained anything
    history = [*history[:1], *(entry for entry in history[1:] if entry[0] < start)]
    before = history[-1][1]
    if before != now and not config.parallel.elastic:
        hint = ", set parallel.elastic true" if world.backend in BACK_ENDS else ""
        raise UsageError(
            f"run.dir {config.run.dir} holds a checkpoint saved by {_processes(before)}, which cannot be resumed "
            f"by {now}; start as many as before{hint}, or choose another run.dir"
        )
    accumulated = config.optim.grad_accum_steps
    micro_batches = accumulated * first
    if micro_batches % now:
        fitting = [str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        raise UsageError(
            f"{_processes(now)} cannot share the {_many(micro_batches, 'micro-batch', 'micro-batches')} of a step "
            f"(optim.grad_accum_steps {accumulated} x {_processes(first)} at the run's beginning); start "
            f"{_either(fitting)}"
        )
    divided = replace(config, optim=replace(config.optim, grad_accum_steps=micro_batches // now))
    if before == now:
        return Division(divided, history, "")
    return Division(divided, [*history, (start, now)], _change(config, micro_batches, before, now))


def shares(before: int, now: int, rank: int) -> dict[int, Fraction]:
    """Return of which of `before` ranks, and to what share, the samples of `rank` are, one of `now`.

    The shares add up to 1. For every old rank those of all new ones add up to now / before.
    """
    # both divisions in units of which the global batch has before * now
    begin, end = rank * before, (rank + 1) * before
    return {
        old: Fraction(min(end, (old + 1) * now) - max(begin, old * now), before)
        for old in range(begin // now, -(-end // now))
    }


def weighted_sum(parts: Iterable[tuple[Fraction, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Return the sum of weight * tensor of each name, laid out in memory as the tensors; a missing one is zero."""
    sums: dict[str, Tensor] = {}
    for weight, tensors in parts:
        for name, tensor in tensors.items():
            if name in sums:
                sums[name].add_(tensor, alpha=float(weight))
            else:
                sums[name] = tensor * float(weight)
    return sums


def inherited(path: Path, world: World, seed: int) -> dict[str, Any]:
    """Return, of what the ranks saved each for itself in the checkpoint at `path`, what this one goes on with.

    A tree of the same form as `checkpoint.load_rank` returns to as many ranks as before; `seed` is the run's.
    """
    state = checkpoint.read(path)
    before: int = state["world_size"]
    owned = shares(before, world.size, world.rank)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    scales: dict[str, float] = {}

    def parts() -> Iterable[tuple[Fraction, Mapping[str, Tensor]]]:
        for old, share in owned.items():  # one at a time: each is as large as the gradient
            held = checkpoint.load_rank(path, world, old)
            if old * world.size // before == world.rank:  # counted by one heir only
                sums[:3] += held["meter"][:3]
                sums[3] = torch.maximum(sums[3], held["meter"][3])
            scales.update({name: mask["grad_scale"] for name, mask in held["masks"].items()})  # equal on all ranks
            residuals = {
                f"{mask}/{name}": residual
                for mask, saved in held["masks"].items()
                for name, residual in saved["residuals"].items()
            }
            yield share, residuals
            yield share, {f"/{name}": tensor for name, tensor in held["back_end"].get("statistics", {}).items()}

    of_ranks = weighted_sum(parts())

    def named(prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}/"
        return {name.removeprefix(start): tensor for name, tensor in of_ranks.items() if name.startswith(start)}

    key = f"{seed}/{state['step']}/{world.size}/{world.rank}"
    random_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") >> 1)
    return {
        "masks": {name: {"grad_scale": scale, "residuals": named(name)} for name, scale in scales.items()},
        "back_end": {"statistics": named("")},
        "random": checkpoint.random_states(world.device),
        "meter": sums,
    }


def _check(config: TrainConfig, world: World) -> None:
    if world.backend not in BACK_ENDS:
        raise UsageError(
            f"parallel.elastic needs parallel.backend ddp (or one process); with {world.backend} each rank saves a "
            "part of the optimizer's state, which only as many ranks as before can load"
        )
    if config.data.access == "stream":
        raise UsageError(
            "parallel.elastic needs data.access index; which samples a step streams follows from the number of "
            "processes"
        )


def _change(config: TrainConfig, micro_batches: int, before: int, now: int) -> str:
    each, images = micro_batches // now, config.data.batch_size_per_device
    said = f"goes on with {_processes(now)} instead of {before}: "
    said += f"{_many(each, 'micro-batch', 'micro-batches')} a step"
    said += " accumulate" if each > 1 else " on each"
    if config.mask.enabled:
        seen = f"{images * each} images instead of {images * micro_batches // before}"
        said += f"; the mask now sees gradients of {seen}"
    return said


def _processes(count: int) -> str:
    return _many(count, "process", "processes")


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _either(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
