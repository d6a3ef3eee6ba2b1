"""Accuracy and loss over a validation split, every sample counted exactly once on any number of ranks."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gmscale import parallel
from gmscale.data import DataConfig, StreamValLoader, ValLoader, normalize
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.subject import Subject
from gmscale.parallel import World


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ValLoader | StreamValLoader,
    config: DataConfig,
    world: World,
    *,
    lockstep: bool = False,
) -> dict[str, float]:
    """Return loss (mean cross-entropy), top1 and top5 in percent, and count, the same on every rank.

    `model` is the bare model, not its DDP wrapper: ranks may have different numbers of batches. Where its forward
    pass is a collective (`lockstep`), ranks with fewer batches add empty ones. Its buffers are set to rank 0's
    first, so that all ranks judge the same model.
    """
    was_training = model.training
    model.eval()
    parallel.broadcast_buffers(model, world)
    sums = torch.zeros(4, dtype=torch.float64)  # loss, top1, top5, count
    for images, labels, _ in loader:
        inputs = normalize(images.to(world.device, non_blocking=True), config)
        labels = labels.to(world.device, non_blocking=True)
        logits = model(inputs).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums += torch.stack(
            (
                F.cross_entropy(logits, labels, reduction="sum").double(),
                ranked[:, 0].sum().double(),
                ranked.any(1).sum().double(),
                torch.tensor(len(labels), dtype=torch.float64, device=world.device),
            )
        ).cpu()
    if lockstep:
        for _ in range(int(parallel.largest_over_ranks(len(loader), world)) - len(loader)):
            model(torch.zeros(1, config.channels, config.image_size, config.image_size, device=world.device))
    model.train(was_training)
    loss, top1, top5, count = parallel.sum_over_ranks(sums, world).tolist()
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "count": int(count)}


@dataclass(frozen=True)
class Accuracy(Measurement):
    """Top1, top5 and loss of the model as it is."""

    section: ClassVar[str] = "accuracy"
    shown: ClassVar[dict[str, tuple[str, str]]] = {"top1": ("top1 %", ".2f"), "top5": ("top5 %", ".2f")}

    @property
    def words(self) -> str:
        return "accuracy"

    def measure(self, subject: Subject) -> dict[str, Any]:
        return dict(evaluate(subject.model, subject.loader, subject.config.data, subject.world))
