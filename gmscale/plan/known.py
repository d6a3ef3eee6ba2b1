"""What a plan is made from: the step on one node, and what each mode hands to collectives."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gmscale.config import TrainConfig
from gmscale.costs import Traffic

Agreement = Literal["local", "consensus"]

# How gradients of a DDP model are reduced: (agreement of the mask or None without one, communication hook).
PLAIN = "plain"
MODES: dict[str, tuple[Agreement | None, Literal["allreduce", "bf16"]]] = {
    PLAIN: (None, "allreduce"),
    "local": ("local", "allreduce"),
    "local+bf16": ("local", "bf16"),
    "consensus": ("consensus", "allreduce"),
    "consensus+bf16": ("consensus", "bf16"),
}

# Back-ends that reduce gradients in one way of their own.
ONE_MODE = ("deepspeed", "fsdp2")


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to reduce gradients."""

    name: str
    step_s: float
    """On the devices that it was measured on."""
    traffic: Mapping[str, Traffic]
    """What a step hands to collectives, by torch's names, the same on any number of devices."""
    awaited: Traffic
    """Those of its all-reduces that the backward pass waits for: lateral maps of consensus."""
    kept: float | None
    """Share of the masked entries that consensus keeps, on which its bytes depend."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What was measured, counted or given."""

    model: str
    measured: str
    """What the step was measured on, in words."""
    devices: int
    images_per_device: int
    """A step."""
    grad_accum_steps: int
    samples: int
    epochs: float
    modes: list[Mode]
    notes: list[str]

    def steps(self, per_epoch: int) -> int:
        """Return the steps of the whole recipe, by the rule of train."""
        return max(1, round(self.epochs * per_epoch))


def config_of(mode: str, config: TrainConfig) -> TrainConfig:
    """Return the configuration with its gradients reduced as `mode` says, everything else as it is.

    Where the configuration's own mask is local, consensus has its default strength: only at 1 do entries stay
    at home.
    """
    agreement, hook = MODES[mode]
    strength = None if agreement == "consensus" and config.mask.agreement == "local" else config.mask.strength
    mask = replace(
        config.mask,
        enabled=agreement is not None,
        site="auto",
        agreement=agreement or "local",
        strength=strength,
    )
    return replace(config, mask=mask, parallel=replace(config.parallel, backend="ddp", comm_hook=hook))


def with_kept(mode: Mode, kept: float, entries: int, itemsize: int) -> Mode:
    """Return a mode of consensus that keeps another share of the `entries` that are masked."""
    assert mode.kept is not None
    seen = mode.traffic["allreduce"]
    changed = Traffic(seen.calls, seen.bytes + (kept - mode.kept) * entries * itemsize)
    return replace(mode, traffic={**mode.traffic, "allreduce": changed}, kept=kept)
