"""What training changes, and what a checkpoint therefore holds."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from gmscale import checkpoint, parallel
from gmscale.parallel import World, Wrapped
from gmscale.sites import Attachment


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
    best_top1: float = 0.0

    @property
    def attachments(self) -> Mapping[str, Attachment]:
        """The masks by the section of the configuration that describes them."""
        both = {"mask": self.attachment, "output": self.output_attachment}
        return {name: attachment for name, attachment in both.items() if attachment is not None}

    def no_sync(self) -> AbstractContextManager[None]:
        """Context of the micro-batches before the last one of a step."""
        return (self.attachment or self.wrapped).no_sync()

    def save(self, run_dir: Path, step: int, identity: dict[str, Any], keep: int, world: World) -> None:
        """Write the checkpoint of `step` steps done; called by every rank."""
        checkpoint.save(
            run_dir,
            step,
            weights=self.wrapped.weights(),
            ema=self.ema.module if self.ema else None,
            optimizer=self.wrapped.optimizer_state(),
            shared={"identity": identity, "best_top1": self.best_top1},
            per_rank={
                "masks": {name: attachment.state_dict() for name, attachment in self.attachments.items()},
                "back_end": self.wrapped.rank_state(),
                "random": checkpoint.random_states(world.device),
                "meter": self.meter.sums,
            },
            keep=keep,
            world=world,
        )

    def restore(self, path: Path, world: World) -> int:
        """Load a checkpoint of the same run; return the number of steps done."""
        state, own = checkpoint.read(path), checkpoint.load_rank(path, world)
        checkpoint.load_weights(path, self.wrapped.load_weights)
        if self.ema is not None:
            checkpoint.load_weights(path, self.ema.module.load_state_dict, "model_ema")
        self.wrapped.load_optimizer_state(checkpoint.optimizer_state(path), own["back_end"])
        self.best_top1 = state["shared"]["best_top1"]
        for name, attachment in self.attachments.items():
            attachment.load_state_dict(own["masks"][name])
        self.meter.sums = own["meter"]
        checkpoint.set_random_states(own["random"], world.device)
        return int(state["step"])


class Meter:
    """Training loss and top1 since the last log line; sums on the device, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss x images, correct, images

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a micro-batch: its mean loss (0-d), logits [N, classes] and labels [N]."""
        self.sums[0] += loss.double() * len(labels)
        self.sums[1] += (logits.argmax(1) == labels).sum()
        self.sums[2] += len(labels)

    def values(self, world: World) -> dict[str, float]:
        """Return mean loss and top1 (percent) over all ranks, and start afresh."""
        loss, correct, images = parallel.sum_over_ranks(self.sums.cpu(), world).tolist()
        self.sums = torch.zeros_like(self.sums)
        return {"loss": loss / images, "top1": 100 * correct / images}
