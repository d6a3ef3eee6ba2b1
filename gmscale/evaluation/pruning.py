"""Global magnitude pruning: what is left of a model without its smallest weights."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from gmscale.errors import UsageError
from gmscale.evaluation.accuracy import evaluate
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.subject import Subject


@dataclass(frozen=True)
class Pruning(Measurement):
    """Top1 after global magnitude pruning."""

    section: ClassVar[str] = "pruning"
    shown: ClassVar[dict[str, tuple[str, str]]] = {
        "top1": ("top1 %", ".2f"),
        "measured": ("weights at zero", ".2%"),
    }

    sparsity: float
    """Share of the weights that go."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "--prune")

    @property
    def words(self) -> str:
        return f"pruned by {100 * self.sparsity:g} %"

    def measure(self, subject: Subject) -> dict[str, Any]:
        sparse, measured = pruned(subject.model, self.sparsity)
        found = evaluate(sparse, subject.loader, subject.config.data, subject.world)
        return {"measured": measured, "top1": found["top1"]}


def check_sparsity(sparsity: float, name: str) -> None:
    """Raise UsageError unless `sparsity` is a share strictly between 0 and 1."""
    if not 0 < sparsity < 1:
        raise UsageError(f"{name} is {sparsity:g}; expected a share between 0 and 1, such as 0.8")


@torch.no_grad()
def pruned(model: nn.Module, sparsity: float) -> tuple[nn.Module, float]:
    """Return a copy of `model` without its smallest weights, and the share of weights that are zero in it.

    All weights of convolutions and linear layers compete, biases and normalisation stay: as torch's
    global_unstructured with L1Unstructured, which cannot do channels_last weights. Nothing is trained afterwards,
    and statistics of batch normalisation are not measured again. Raises UsageError for a sparsity that is not
    between 0 and 1, and for a model without such layers.
    """
    check_sparsity(sparsity, "sparsity")
    copied = copy.deepcopy(model)
    weights = [module.weight for module in copied.modules() if isinstance(module, _ConvNd | nn.Linear)]
    weights = list({id(weight): weight for weight in weights}.values())  # layers may share one
    if not weights:
        raise UsageError(f"{type(model).__name__} has no convolution or linear layer to prune")
    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    goes = torch.zeros_like(sizes, dtype=torch.bool)
    goes[sizes.topk(round(sparsity * len(sizes)), largest=False).indices] = True
    for weight, smallest in zip(weights, goes.split([w.numel() for w in weights]), strict=True):
        weight.masked_fill_(smallest.view(weight.shape), 0.0)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return copied, zeros / len(sizes)
