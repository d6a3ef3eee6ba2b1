"""Replicated: the whole model and optimizer on every rank, in one process or under DistributedDataParallel."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmscale.config import TrainConfig
from gmscale.errors import UsageError
from gmscale.parallel.compiled import compile_, uncompiled
from gmscale.parallel.failure import together
from gmscale.parallel.gradients import clip
from gmscale.parallel.world import World, of_all_ranks
from gmscale.parallel.wrapped import AMP_TYPES, MakeOptimizer, Stepped, Wrapped


class Replicated(Wrapped):
    """The whole model and optimizer on every rank; a collective under DDP.

    With parallel.batch_norm reduce each rank has its own batch-norm statistics, which are averaged at evaluations.
    """

    def __init__(self, bare: nn.Module, make_optimizer: MakeOptimizer, config: TrainConfig, world: World) -> None:
        with together(world):
            if config.model.compile and world.backend == "ddp" and config.parallel.bucket_cap_mb < 1:
                raise UsageError(
                    f"parallel.bucket_cap_mb is {config.parallel.bucket_cap_mb:g}; model.compile with ddp needs at "
                    "least 1, the size of the first bucket"
                )
            self.bare = self.model = bare.to(world.device)
            compile_([self.bare], config.model, world.device)
            self.eval_model = uncompiled(self.bare, config.model)
            self.optimizer = make_optimizer(self.bare)
        self.world = world
        self.autocast = AMP_TYPES[config.optim.amp]
        self._config = config
        self._own_statistics = config.parallel.batch_norm == "reduce" and world.size > 1
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.optim.amp == "fp16")
        if world.backend == "ddp":
            self._distribute(begins=True)

    def loss_scale(self) -> float:
        return self._scaler.get_scale()

    def no_sync(self) -> AbstractContextManager[None]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self) -> Stepped:
        self._scaler.unscale_(self.optimizer)
        norm, finite = clip(self.bare.parameters(), self._config.optim)
        if finite:
            self._scaler.step(self.optimizer)
        self._scaler.update()  # lowers the scale if it found what is not finite
        return Stepped(norm, not finite)

    def refit(self) -> None:
        if isinstance(self.model, DistributedDataParallel):
            self.zero_grad()  # gradients are views of the old reducer's buckets
            self.model._remove_autograd_hooks()  # they would keep it and its buckets alive
            self._distribute(begins=False)

    def nonfinite_buffers(self) -> list[str]:
        if not self._own_statistics:
            return super().nonfinite_buffers()
        own = [name for name, buffer in self.bare.named_buffers() if not buffer.isfinite().all()]
        anywhere = set[str]().union(*of_all_ranks(own, self.world))
        return [name for name, _ in self.bare.named_buffers() if name in anywhere]

    @torch.no_grad()
    def average_statistics(self) -> None:
        statistics = list(self._statistics().values())
        if statistics:
            flat = torch.cat([s.flatten().double() for s in statistics])
            dist.all_reduce(flat)
            parts = (flat / self.world.size).split([s.numel() for s in statistics])
            for own, mean in zip(statistics, parts, strict=True):
                own.copy_(mean.view_as(own))

    def weights(self) -> Mapping[str, Tensor]:
        return self.bare.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.bare.load_state_dict(weights)

    def optimizer_state(self) -> Mapping[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def rank_state(self) -> Mapping[str, Any]:
        return {"statistics": self._statistics()}

    @torch.no_grad()
    def load_optimizer_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(dict(shared["optimizer"]))
        self._scaler.load_state_dict(dict(shared["scaler"]))
        buffers = dict(self.bare.named_buffers())
        for name, statistics in own["statistics"].items():
            buffers[name].copy_(statistics)

    def _statistics(self) -> dict[str, Tensor]:
        """Return the batch-norm statistics that are this rank's own."""
        if not self._own_statistics:
            return {}
        return {n: b for n, b in self.bare.named_buffers() if n.endswith(("running_mean", "running_var"))}

    def _distribute(self, *, begins: bool) -> None:
        """Wrap the model in DDP; only when training begins do all ranks take over rank 0's weights."""
        config, data, device = self._config.parallel, self._config.data, self.world.device
        settings: dict[str, Any] = {"broadcast_buffers": False} if self._own_statistics else {}
        with warnings.catch_warnings():
            # torch 2.14 has a newer word for it, but none yet that leaves the buffers alone at the start too
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model = DistributedDataParallel(
                self.bare,
                device_ids=[device.index] if device.type == "cuda" else None,
                bucket_cap_mb=config.bucket_cap_mb,
                gradient_as_bucket_view=config.gradient_as_bucket_view,
                static_graph=config.static_graph,
                find_unused_parameters=config.find_unused_parameters,
                init_sync=begins,
                **settings,
            )
        _settle_buckets(self.model, torch.zeros(2, data.channels, data.image_size, data.image_size, device=device))


def _settle_buckets(model: DistributedDataParallel, images: Tensor) -> None:
    """Let DDP arrange its gradient buckets now, by a backward pass on black images that leaves no other trace.

    By itself it would do so after the first steps of every start. A gradient's place in its bucket decides in which
    order three or more ranks are summed, so the first steps after a resume would be rounded in another way than
    those of an undisturbed run.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    # not compiled: it would be for these images
    with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.compiler.set_stance("force_eager"):
        for _ in range(2 if model.static_graph else 1):
            model(images).sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
