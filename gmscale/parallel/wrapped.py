"""Wrapped: a model made parallel together with its optimizer.

Here is everything in which the back-ends differ for the training loop and for checkpoints, and nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmscale.config import OptimConfig, ParallelConfig, TrainConfig
from gmscale.parallel.failure import together
from gmscale.parallel.world import World

AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Wrapped(ABC):
    """A model as a back-end trains it. Trees of state hold dicts, lists, numbers, text and tensors."""

    bare: nn.Module
    """timm's own model, inside."""
    model: nn.Module
    """What a mask is attached to and the training loss is computed with."""
    optimizer: torch.optim.Optimizer
    """The optimizer whose param_groups hold the learning rate."""
    lockstep: bool = False
    """Whether a forward pass is a collective: all ranks then have to make equally many."""
    autocast: torch.dtype | None = None
    """dtype of torch.autocast around a forward pass; None where there is none or the back-end has its own way."""

    @property
    def eval_model(self) -> nn.Module:
        """The module to evaluate: float32 images in, logits out."""
        return self.bare

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
    def step(self) -> Tensor | None:
        """Unscale, clip and step; return the gradient norm if clipping by norm is on."""

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """Return the whole weights and buffers in timm's names, complete on the main rank; a collective."""

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


class Replicated(Wrapped):
    """The whole model and optimizer on every rank: one process, or DistributedDataParallel."""

    def __init__(
        self, bare: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig, device: torch.device
    ) -> None:
        self.bare = self.model = bare
        self.optimizer = optimizer
        self.autocast = AMP_TYPES[config.amp]
        self._optim = config
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")

    def distribute(self, config: ParallelConfig, device: torch.device, image_size: int) -> None:
        """Wrap the model in DDP; a collective."""
        self.model = DistributedDataParallel(
            self.bare,
            device_ids=[device.index] if device.type == "cuda" else None,
            bucket_cap_mb=config.bucket_cap_mb,
            gradient_as_bucket_view=config.gradient_as_bucket_view,
            static_graph=config.static_graph,
            find_unused_parameters=config.find_unused_parameters,
        )
        _settle_buckets(self.model, image_size)

    def loss_scale(self) -> float:
        return self._scaler.get_scale()

    def no_sync(self) -> AbstractContextManager[None]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self) -> Tensor | None:
        self._scaler.unscale_(self.optimizer)
        norm = self._clip()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return norm

    def weights(self) -> Mapping[str, Tensor]:
        return self.bare.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.bare.load_state_dict(weights)

    def optimizer_state(self) -> Mapping[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_optimizer_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(dict(shared["optimizer"]))
        self._scaler.load_state_dict(dict(shared["scaler"]))

    def _clip(self) -> Tensor | None:
        if self._optim.clip_grad == 0:
            return None
        parameters = [p for p in self.bare.parameters() if p.grad is not None]
        if self._optim.clip_mode == "norm":
            return torch.nn.utils.clip_grad_norm_(parameters, self._optim.clip_grad)
        dispatch_clip_grad(parameters, self._optim.clip_grad, mode=self._optim.clip_mode)
        return None


def wrap(bare: nn.Module, make_optimizer: MakeOptimizer, config: TrainConfig, world: World) -> Wrapped:
    """Return the model on its device as the back-end of `world` trains it; a collective.

    `make_optimizer` gets the model whose parameters the optimizer shall update. Raises UsageError for what the
    back-end cannot do.
    """
    if world.backend == "deepspeed":
        from gmscale.parallel.deepspeed import DeepSpeedWrapped

        return DeepSpeedWrapped(bare, make_optimizer, config, world)
    if world.backend == "fsdp2":
        from gmscale.parallel.fsdp2 import FSDP2Wrapped

        return FSDP2Wrapped(bare, make_optimizer, config, world)
    with together(world):
        bare = bare.to(world.device)
        wrapped = Replicated(bare, make_optimizer(bare), config.optim, world.device)
    if world.backend == "ddp":
        wrapped.distribute(config.parallel, world.device, config.data.image_size)
    return wrapped


def _settle_buckets(model: DistributedDataParallel, image_size: int) -> None:
    """Let DDP arrange its gradient buckets now, by a backward pass on black images that leaves no other trace.

    By itself it would do so after the first steps of every start. A gradient's place in its bucket decides in which
    order three or more ranks are summed, so the first steps after a resume would be rounded in another way than
    those of an undisturbed run.
    """
    device = next(model.parameters()).device
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2 if model.static_graph else 1):
            model(torch.zeros(2, 3, image_size, image_size, device=device)).sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
