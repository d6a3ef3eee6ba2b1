"""What training changes, and what a checkpoint therefore holds."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from gmscale import checkpoint, elastic, parallel
from gmscale.checkpoint import Contents
from gmscale.errors import RunError
from gmscale.models import Frozen, Loaded, Schedule
from gmscale.parallel import World, Wrapped
from gmscale.sites import Attachment

# What of an optimizer's groups follows from settings that a branch may change. The rest of them is equal or state,
# such as a count of steps.
_SETTINGS = {"lr", "initial_lr", "fallback_lr_scale", "weight_decay"}


@dataclass
class TrainingState:
    """The model with its optimizer, the masks and the rest."""

    wrapped: Wrapped
    attachment: Attachment | None
    """The mask of the weight gradients."""
    output_attachment: Attachment | None
    """The mask of the output gradients."""
    ema: ModelEmaV3 | None
    meter: "Meter"
    schedule: Schedule | None = None
    frozen: Frozen | None = None
    """What does not train now."""
    loaded: Loaded | None = None
    """What the starting weights gave; None if the run resumed, or started from random ones."""
    skips: "Skips" = field(default_factory=lambda: Skips())
    best_top1: float = 0.0

    @property
    def attachments(self) -> Mapping[str, Attachment]:
        """The masks by the section of the configuration that describes them."""
        both = {"mask": self.attachment, "output": self.output_attachment}
        return {name: attachment for name, attachment in both.items() if attachment is not None}

    def no_sync(self) -> AbstractContextManager[None]:
        """Context of the micro-batches before the last one of a step."""
        return (self.attachment or self.wrapped).no_sync()

    def contents(self, identity: dict[str, Any], world: World, *, sharded: bool) -> Contents:
        """Return what a checkpoint holds, `sharded` or with whole weights; a collective."""
        return Contents(
            weights=None if sharded else self.wrapped.weights(),
            shards=self.wrapped.weight_shards() if sharded else None,
            ema=self.ema.module.state_dict() if self.ema else None,
            optimizer=self.wrapped.optimizer_state(),
            shared={
                "identity": identity,
                "best_top1": self.best_top1,
                "schedule": self.schedule.state_dict() if self.schedule else {},
                "skips": self.skips.state_dict(),
            },
            per_rank={
                "masks": {name: attachment.state_dict() for name, attachment in self.attachments.items()},
                "back_end": self.wrapped.rank_state(),
                "random": checkpoint.random_states(world.device),
                "meter": self.meter.sums,
            },
        )

    def restore(self, path: Path, world: World, seed: int, *, branches: bool = False) -> None:
        """Load a checkpoint of the same run, whose seed is `seed`; a collective.

        If another number of ranks saved it, elastic.py says what of theirs each has now. A run that `branches` from
        another's checkpoint keeps the optimizer's settings of its own configuration.
        """
        with parallel.together(world):  # each rank reads what is its own before they load in step
            state = checkpoint.read(path)
            if state["world_size"] == world.size:
                own = checkpoint.load_rank(path, world)
            else:
                own = elastic.inherited(path, world, seed)
            optimizer = checkpoint.optimizer_state(path)
            shards = checkpoint.load_shards(path, world) if state["sharded"] else None
        if shards is not None:
            with checkpoint.must_fit(path):
                self.wrapped.load_weight_shards(shards)
        else:
            checkpoint.load_weights(path, self.wrapped.load_weights)
        if self.ema is not None:
            checkpoint.load_weights(path, self.ema.module.load_state_dict, "model_ema")
        groups = self.wrapped.optimizer.param_groups
        settings = [{name: group[name] for name in _SETTINGS & group.keys()} for group in groups]
        self.wrapped.load_optimizer_state(optimizer, own["back_end"])
        if branches:
            for group, own_settings in zip(self.wrapped.optimizer.param_groups, settings, strict=True):
                group.update(own_settings)
        self.best_top1 = state["shared"]["best_top1"]
        self.skips.load_state_dict(state["shared"]["skips"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["shared"]["schedule"])
        for name, attachment in self.attachments.items():
            attachment.load_state_dict(own["masks"][name])
        self.meter.sums = own["meter"]
        checkpoint.set_random_states(own["random"], world.device)


class Meter:
    """Training loss and top1 since the last log line; sums on the device, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        # loss x images, correct, images, and the largest loss of a micro-batch
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a micro-batch: its mean loss (0-d), logits [N, classes] and labels [N]."""
        self.sums[0] += loss.double() * len(labels)
        self.sums[1] += (logits.argmax(1) == labels).sum()
        self.sums[2] += len(labels)
        self.sums[3] = torch.maximum(self.sums[3], loss.double())  # NaN stays

    def values(self, world: World) -> dict[str, float]:
        """Return mean loss, top1 (percent) and the largest loss of a micro-batch over all ranks; start afresh."""
        own = self.sums.cpu()
        loss, correct, images = parallel.sum_over_ranks(own[:3], world).tolist()
        largest = parallel.largest_over_ranks(own[3].item(), world)
        self.sums = torch.zeros_like(self.sums)
        return {"loss": loss / images, "top1": 100 * correct / images, "loss_max": largest}


class Skips:
    """Steps without a finite gradient: they change no weights, and too many in a row end the run."""

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0
        self.last = ""
        self.broken: list[str] = []

    def add(self, names: list[str], buffers: list[str]) -> None:
        """Count a skipped step, whose gradients of `names` (in the model's order) were not finite.

        `buffers` are those that are not finite: with them training cannot recover.
        """
        self.broken = buffers
        self.total += 1
        self.in_a_row += 1
        # backpropagation comes from the last layer, so the last name was the first to go wrong
        first = f"first {names[-1]}" if names else "only the norm of all together"
        self.last = f"{first}, {len(names)} in all" if len(names) > 1 else first

    def end_row(self) -> None:
        """Say that a step had finite gradients."""
        self.in_a_row = 0

    def too_many(self, most: int) -> bool:
        """Return whether the run has to end: after `most` in a row, or one that left a buffer not finite."""
        return self.in_a_row >= most or bool(self.broken)

    def error(self, step: int, run_dir: Path) -> RunError:
        """Return what to end the run with after `step` steps."""
        good = checkpoint.latest(run_dir)
        found = f"the gradients of {self.in_a_row} steps in a row, up to step {step}, were not finite ({self.last})"
        if self.broken:
            found = (
                f"step {step} left {self.broken[0]} not finite ({len(self.broken)} buffers in all): an image or an "
                f"activation was not, and skipping the step does not mend its statistics"
            )
        return RunError(
            f"{found}; lower optim.lr or set optim.clip_grad; "
            + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet")
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"total": self.total, "in_a_row": self.in_a_row, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.total, self.in_a_row, self.last = state["total"], state["in_a_row"], state["last"]
