"""The ways to train that are compared: what differs between them, and how each is run."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import random_seed
from torch import Tensor, nn

from gmscale import models, parallel
from gmscale.config import TrainConfig
from gmscale.masking import GradientMask
from gmscale.masking.lateral import lateral_map
from gmscale.parallel import World
from gmscale.sites import Attachment, attach
from gmscale.sites.selection import clean_name

_FEW = 1e-4  # share of entries left out of the mask's error: a unit exactly at the threshold may go either way


@dataclass(frozen=True)
class Way:
    """How a run trains; the defaults are the reference."""

    ranks: int = 1
    masked: bool = False
    strength: float | None = None
    """Another strength than the configured one."""
    micro_batches: int = 1
    amp: Literal["none", "bf16"] = "none"
    channels_last: bool = False
    compiled: bool = False
    batch_statistics: bool = False
    """Normalise by the batch at hand instead of by fixed statistics."""
    bucket_cap_mb: float | None = None
    backend: str = "ddp"
    float64: bool = False


@dataclass(frozen=True)
class Batches:
    images: np.ndarray
    """[steps, global batch, 3, side, side], normalised float32."""
    labels: np.ndarray
    """[steps, global batch]."""
    classes: int


@dataclass(frozen=True)
class Trajectory:
    """What a run leaves behind, float32 or float64; complete on the main rank."""

    gradient: dict[str, Tensor] | None
    """Of the first step; None where the back-end shards it."""
    before: dict[str, Tensor]
    weights: dict[str, Tensor]
    mask_error: float | None


def train(config: TrainConfig, way: Way, batches: Batches, world: World) -> Trajectory:
    """Train as `way` says, on the ranks of `world`."""
    random_seed(config.run.seed, 0)
    config = replace(
        config,
        model=replace(config.model, channels_last=way.channels_last, drop_rate=0.0, drop_path_rate=0.0),
        optim=replace(config.optim, amp=way.amp, grad_accum_steps=way.micro_batches),
        parallel=replace(config.parallel, bucket_cap_mb=way.bucket_cap_mb or config.parallel.bucket_cap_mb),
    )
    dtype = torch.float64 if way.float64 else torch.float32
    bare = models.create(config, batches.classes).to(dtype)
    _settle_statistics(bare, torch.from_numpy(batches.images[0]).to(dtype))
    wrapped = parallel.wrap(bare, lambda model: models.optimizer(model, config.optim), config, world)
    mask = _mask(config, way) if way.masked else None
    attachment = attach(wrapped.model, mask, world.backend) if mask else None
    _set_mode(wrapped.model, way.batch_statistics)
    model = torch.compile(wrapped.model) if way.compiled else wrapped.model
    whole = isinstance(wrapped, parallel.Replicated)  # every rank has the whole gradients
    expected = _Expected(attachment, world) if attachment and whole else None
    before, first = _copy(wrapped.weights()), None
    errors: list[float] = []
    for step, (images, labels) in enumerate(zip(batches.images, batches.labels, strict=True)):
        if attachment:
            attachment.at(step, len(batches.images), grad_scale=wrapped.loss_scale())
            attachment.watch(expected)
        wrapped.zero_grad()
        for i in range(way.micro_batches):
            x, y = (_share(part, world, way.micro_batches, i) for part in (images, labels))
            x = x.to(dtype)
            with nullcontext() if i + 1 == way.micro_batches else (attachment or wrapped).no_sync():
                with torch.autocast(world.device.type, wrapped.autocast, enabled=wrapped.autocast is not None):
                    loss = nn.functional.cross_entropy(model(x), y, label_smoothing=config.optim.label_smoothing)
                wrapped.backward(loss / way.micro_batches)
        if whole:
            arrived = {clean_name(n): p.grad for n, p in wrapped.bare.named_parameters() if p.grad is not None}
            if first is None:
                first = _copy(arrived, wrapped.loss_scale())
            if expected:
                errors.append(expected.error(arrived))
        wrapped.step()
    return Trajectory(first, before, _copy(wrapped.weights()), max(errors, key=_nan_last) if errors else None)


class _Expected:
    """What has to arrive with a mask: computed one parameter at a time from the ranks' own gradients."""

    def __init__(self, attachment: Attachment, world: World) -> None:
        self._attachment, self._world = attachment, world
        self._totals: dict[str, Tensor] = {}

    def before_mask(self, gradients: Sequence[tuple[str, Tensor]], residuals: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients:
            held = residuals.get(name)
            self._totals[name] = gradient.clone() if held is None else gradient + held

    def after_mask(self, gradients: Sequence[tuple[str, Tensor]]) -> None:
        """See what is sent; what counts is what arrives."""

    @torch.no_grad()
    def error(self, arrived: Mapping[str, Tensor]) -> float:
        """Return the largest difference to what has to arrive, over its largest entry, but for very few entries."""
        worst = 0.0
        for touched in self._attachment.touched:
            total = self._totals.pop(touched.name, None)
            if total is None:
                return math.inf  # the mask has not seen it
            expected = self._expected(touched.name, total)
            off = (arrived[touched.name] - expected).abs().flatten()
            allowed = int(_FEW * len(off))
            largest = off.sort().values[len(off) - 1 - allowed] if bool(off.isfinite().all()) else math.nan
            worst = max(worst, float(largest / expected.abs().amax().clamp(min=1e-30)), key=_nan_last)
        return worst

    def _expected(self, name: str, total: Tensor) -> Tensor:
        mask, strength = self._attachment.mask, self._attachment._strength
        assert strength is not None
        generator = self._attachment._generator(name, total.device)
        if mask.agreement == "local":
            return self._mean(mask.apply(total, strength=strength, generator=generator))
        s = self._mean(lateral_map(total, mask.norm, mask.block))
        mean = self._mean(total)
        mask.apply_map_(mean, mask.keep_map(s, generator), strength=strength, residual=None, finite=True)
        return mean

    def _mean(self, x: Tensor) -> Tensor:
        if self._world.size > 1:
            dist.all_reduce(x)
        return x / self._world.size


def _mask(config: TrainConfig, way: Way) -> GradientMask:
    """Return the configured mask in full strength from the first step on."""
    settings = {f.name: getattr(config.mask, f.name) for f in fields(GradientMask)}
    settings |= {"start": 0.0, "end": 1.0, "warmup": 0.0, "cooldown": 0.0}
    settings["strength"] = config.mask.peak_strength if way.strength is None else way.strength
    if way.ranks == 1 or way.backend != "ddp":
        settings["agreement"] = "local"  # which is the consensus of one rank
    return GradientMask(**settings)


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch-norm layers of a model."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def _settle_statistics(model: nn.Module, images: Tensor) -> None:
    """Give batch norm the statistics of the first global batch: they stay fixed, and make sense from the start."""
    momenta = [(norm, norm.momentum) for norm in batch_norms(model)]
    if not momenta:
        return
    for norm, _ in momenta:
        norm.reset_running_stats()
        norm.momentum = None
    _set_mode(model, batch_statistics=True)
    model(images)
    for norm, momentum in momenta:
        norm.momentum = momentum


def _set_mode(model: nn.Module, batch_statistics: bool) -> None:
    model.eval()  # no dropout: its draws would differ between ranks
    for norm in batch_norms(model):
        norm.train(batch_statistics)


def _share(part: np.ndarray, world: World, micro_batches: int, i: int) -> Tensor:
    """Return micro-batch `i` of this rank."""
    return torch.from_numpy(part).chunk(world.size)[world.rank].chunk(micro_batches)[i]


def _copy(tensors: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    return {
        name: x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True) / scale
        for name, x in tensors.items()
        if x.is_floating_point()
    }


def _nan_last(x: float) -> float:
    return math.inf if math.isnan(x) else x
