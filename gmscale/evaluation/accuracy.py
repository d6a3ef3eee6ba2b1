"""Accuracy, loss and calibration over a validation split, every sample counted exactly once on any number of ranks.

Sums are kept on the device: nothing waits for it before the last batch.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmscale import parallel
from gmscale.data import DataConfig, StreamValLoader, ValLoader, normalize
from gmscale.evaluation.calibration import BINS, bin_sums, calibration
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
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    for logits, labels, _ in judged(model, loader, config, world):
        sums += hits(logits, labels)
    if lockstep:
        for _ in range(int(parallel.largest_over_ranks(len(loader), world)) - len(loader)):
            model(torch.zeros(1, config.channels, config.image_size, config.image_size, device=world.device))
    model.train(was_training)
    return shares(parallel.sum_over_ranks(sums.cpu(), world))


@torch.no_grad()
def judged(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]], config: DataConfig, world: World
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield logits float32 [N, classes], labels and indices [N] of uint8 batches as a loader has them.

    Logits and labels are on the device; indices are left where they are.
    """
    for images, labels, indices in batches:
        inputs = normalize(images.to(world.device, non_blocking=True), config)
        yield model(inputs).float(), labels.to(world.device, non_blocking=True), indices


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return what `shares` wants the sum of, float64 [4]: cross-entropy, right first guesses, right ones among the
    first five, and number."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return torch.stack(
        (
            F.cross_entropy(logits, labels, reduction="sum").double(),
            ranked[:, 0].sum().double(),
            ranked.any(1).sum().double(),
            torch.full((), len(labels), dtype=torch.float64, device=logits.device),
        )
    )


def shares(sums: Tensor) -> dict[str, float]:
    """Return loss, top1 and top5 in percent, and count from sums of `hits`."""
    loss, top1, top5, count = sums.tolist()
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "count": int(count)}


@dataclass(frozen=True)
class Accuracy(Measurement):
    """Top1, top5 and loss of the model as it is, by class, and its calibration, all from one pass."""

    section: ClassVar[str] = "accuracy"
    shown: ClassVar[dict[str, tuple[str, str]]] = {
        "top1": ("top1 %", ".2f"),
        "top5": ("top5 %", ".2f"),
        "ece": ("ECE %", ".2f"),
    }

    @property
    def words(self) -> str:
        return "accuracy"

    @torch.no_grad()
    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return loss, top1, top5, count as `evaluate` does, bit for bit; ece and bins as `calibration`; per_class.

        per_class has top1 and count of each class that has images, by its name.
        """
        world, names = subject.world, _names(subject)
        parallel.broadcast_buffers(subject.model, world)
        sums, binned, by_class = (
            torch.zeros(*shape, dtype=torch.float64, device=world.device)
            for shape in ((4,), (BINS, 3), (len(names), 2))
        )
        done, share = 0, -(-subject.count() // world.size)
        for logits, labels, _ in judged(subject.model, subject.loader, subject.config.data, world):
            sums += hits(logits, labels)
            confidence, predicted = logits.softmax(1).max(1)
            correct = predicted == labels
            binned += bin_sums(confidence, correct)
            # whole numbers, so that no order of adding matters
            by_class.index_add_(0, labels, torch.stack((correct, torch.ones_like(correct)), 1).double())
            done += len(labels)
            subject.progress(done, share)
        classes = zip(names, subject.total(by_class).tolist(), strict=True)
        return {
            **shares(subject.total(sums)),
            **calibration(subject.total(binned)),
            "per_class": {
                name: {"top1": 100 * right / count, "count": int(count)}
                for name, (right, count) in classes
                if count
            },
        }


def _names(subject: Subject) -> list[str]:
    """Return a name of its own for each class of the images: its number where names repeat, as ImageNet's crane."""
    names = [*subject.classes, *subject.loader.classes[len(subject.classes) :]]
    often = Counter(names)
    return [name if often[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
