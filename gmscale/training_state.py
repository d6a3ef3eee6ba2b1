"""What training changes, and what a checkpoint therefore holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from gmscale import checkpoint, parallel
from gmscale.parallel import World
from gmscale.sites import Attachment


@dataclass
class TrainingState:
    """Model, optimizer, mask and the rest; `model` is the wrapped one, `bare` timm's own inside it."""

    bare: nn.Module
    model: nn.Module
    attachment: Attachment | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    meter: "Meter"
    best_top1: float = 0.0

    def save(self, run_dir: Path, step: int, identity: dict[str, Any], keep: int, world: World) -> None:
        """Write the checkpoint of `step` steps done; called by every rank."""
        checkpoint.save(
            run_dir,
            step,
            model=self.bare,
            ema=self.ema.module if self.ema else None,
            optimizer=self.optimizer.state_dict(),
            shared={"identity": identity, "scaler": self.scaler.state_dict(), "best_top1": self.best_top1},
            per_rank={
                "mask": self.attachment.state_dict() if self.attachment else None,
                "random": checkpoint.random_states(world.device),
                "meter": self.meter.sums,
            },
            keep=keep,
            world=world,
        )

    def restore(self, path: Path, world: World) -> int:
        """Load a checkpoint of the same run; return the number of steps done."""
        state = checkpoint.read(path)
        checkpoint.load_weights(path, self.bare, self.ema.module if self.ema else None)
        checkpoint.load_optimizer(path, self.optimizer)
        self.scaler.load_state_dict(state["shared"]["scaler"])
        self.best_top1 = state["shared"]["best_top1"]
        own = checkpoint.load_rank(path, world)
        if self.attachment is not None:
            self.attachment.load_state_dict(own["mask"])
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
