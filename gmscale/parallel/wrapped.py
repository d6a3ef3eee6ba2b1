"""Wrapped: a model made parallel together with its optimizer.

Here is everything in which the back-ends differ for the training loop and for checkpoints, and nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gmscale.parallel.world import World, of_all_ranks

AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Stepped(NamedTuple):
    """What an optimizer step did, the same on every rank."""

    grad_norm: Tensor
    """Norm of the reduced gradient before it was clipped."""
    skipped: bool
    """Whether weights and optimizer state were left alone, because that norm was not finite."""


class WeightShard(NamedTuple):
    """A rank's part of one weight: some neighbouring entries of the contiguous, flattened tensor."""

    shape: tuple[int, ...]
    """Shape of the whole weight."""
    offset: int
    """Place of the first entry."""
    entries: Tensor
    """1-D."""


class Wrapped(ABC):
    """A model as a back-end trains it. Trees of state hold dicts, lists, numbers, text and tensors."""

    bare: nn.Module
    """timm's own model, inside."""
    model: nn.Module
    """What a mask is attached to and the training loss is computed with."""
    optimizer: torch.optim.Optimizer
    """The optimizer whose param_groups hold the learning rate."""
    eval_model: nn.Module
    """The module to evaluate: float32 images in, logits out."""
    lockstep: bool = False
    """Whether a forward pass is a collective: all ranks then have to make equally many."""
    autocast: torch.dtype | None = None
    """dtype of torch.autocast around a forward pass; None where there is none or the back-end has its own way."""
    world: World

    @abstractmethod
    def loss_scale(self) -> float:
        """Return the loss scale that the coming gradients carry."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Context of the micro-batches before the last one of a step, when no mask is attached."""
        return nullcontext()

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backpropagate a micro-batch's loss, already divided by the number of micro-batches."""

    @abstractmethod
    def step(self) -> Stepped:
        """Unscale, clip and step, unless a gradient is not finite."""

    def nonfinite_gradients(self) -> list[str]:
        """Return after a skipped step the parameters whose gradient's norm is not finite, in the model's order.

        A collective. Empty if each norm is finite, and only the norm of them all overflows.
        """
        own = {
            name for name, p in self.bare.named_parameters() if p.grad is not None and not has_finite_norm(p.grad)
        }
        anywhere = set[str]().union(*of_all_ranks(own, self.world))
        return [name for name, _ in self.bare.named_parameters() if name in anywhere]

    def nonfinite_buffers(self) -> list[str]:
        """Return the buffers that are not finite: batch-norm statistics after an activation that was not.

        A collective. Skipping a step does not undo that. Buffers of rank 0 count, which the other ranks take over.
        """
        own = [name for name, buffer in self.bare.named_buffers() if not buffer.isfinite().all()]
        return of_all_ranks(own, self.world)[0]

    def refit(self) -> None:
        """Take note that other parameters than before require gradients; a collective."""
        raise NotImplementedError(f"{type(self).__name__} cannot change what trains")

    def average_statistics(self) -> None:  # noqa: B027 - most have nothing to do
        """Let all ranks agree on batch-norm statistics, before they are evaluated; a collective."""

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """Return the whole weights and buffers in timm's names, complete on the main rank; a collective."""

    def weight_shards(self) -> Mapping[str, WeightShard]:
        """Return this rank's part of the weights, where the back-end divides them."""
        raise NotImplementedError(f"{type(self).__name__} does not divide the weights")

    def load_weight_shards(self, shards: Mapping[str, WeightShard]) -> None:
        """Load what `weight_shards` returned on this rank; a collective. Raises RuntimeError if they do not fit."""
        raise NotImplementedError(f"{type(self).__name__} does not divide the weights")

    @abstractmethod
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load what `weights` returned on the main rank; a collective."""

    @abstractmethod
    def optimizer_state(self) -> Mapping[str, Any]:
        """Return the tree that the main rank saves for all; a collective."""

    def rank_state(self) -> Mapping[str, Any]:
        """Return the tree that each rank saves for itself."""
        return {}

    @abstractmethod
    def load_optimizer_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Load what `optimizer_state` and this rank's `rank_state` returned."""


def has_finite_norm(gradient: Tensor) -> bool:
    """Whether the norm of a gradient, or of this rank's part of it, is finite."""
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(torch.linalg.vector_norm(local.float()).isfinite())


def check_division(own: Mapping[str, WeightShard], saved: Mapping[str, WeightShard]) -> None:
    """Raise RuntimeError unless a rank's saved parts of the weights lie where its own do."""
    if unknown := own.keys() ^ saved.keys():
        raise RuntimeError(f"this rank of the model and the file differ in {', '.join(sorted(unknown)[:3])}")
    for name, shard in own.items():
        wanted = shard.shape, shard.offset, len(shard.entries)
        found = tuple(saved[name].shape), saved[name].offset, len(saved[name].entries)
        if wanted != found:
            raise RuntimeError(
                f"the file has {found[2]} entries from {found[1]} on of {name} {list(found[0])}, "
                f"and this rank holds {wanted[2]} from {wanted[1]} on of {list(wanted[0])}"
            )
