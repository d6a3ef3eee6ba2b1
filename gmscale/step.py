"""One optimizer step: accumulate micro-batches -> mask -> reduce over ranks -> unscale -> clip -> step.

The mask sits before the reduction because each rank removes the noise of its own gradient; unscaling and clipping
come after it because they act on what the optimizer will see.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from gmscale import data
from gmscale.config import TrainConfig
from gmscale.data import Batch
from gmscale.data.images.guided import guide
from gmscale.losses import training_loss
from gmscale.parallel import Stepped, World
from gmscale.training_state import TrainingState


def train_step(
    state: TrainingState, micro_batches: list[Batch], config: TrainConfig, world: World, classes: int
) -> Stepped:
    """Do one optimizer step on this rank's micro-batches."""
    wrapped = state.wrapped
    wrapped.model.train()
    if state.frozen is not None:
        state.frozen.hold()
    wrapped.zero_grad()
    for i, batch in enumerate(micro_batches):
        world.heartbeat.at("forward")
        images, targets = data.to_device(batch, config.data, config.augment, classes, world.device)
        if batch.late is not None and batch.late.guided is not None:
            labels = batch.labels.to(world.device, non_blocking=True)
            salient = _saliency(state, images, labels) if config.augment.guide == "saliency" else None
            images, targets = guide(images, targets, batch.late.guided, salient, classes)
        last = i + 1 == len(micro_batches)
        with nullcontext() if last else state.no_sync():  # the last backward pass masks and reduces
            with torch.autocast(world.device.type, wrapped.autocast, enabled=wrapped.autocast is not None):
                logits = wrapped.model(images)
                loss = training_loss(logits, targets, config.optim)
            world.heartbeat.at("backward")
            # the mean over the global batch: this divides by the micro-batches, the back-end by the world size
            wrapped.backward(loss / len(micro_batches))
        state.meter.add(loss.detach(), logits.detach(), batch.labels.to(world.device, non_blocking=True))
    world.heartbeat.at("update")
    return wrapped.step()


def _saliency(state: TrainingState, images: Tensor, labels: Tensor) -> Tensor:
    """Return where the labels' logits depend on the images [N, C, S, S] most: float32 [N, S, S], slightly blurred.

    The input gradient's largest channel (Simonyan et al., arXiv 1312.6034) of the model as it would be evaluated.
    Nothing of the training changes: no statistics, gradients of weights, masks or random numbers.
    """
    wrapped = state.wrapped
    wrapped.model.eval()
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, wrapped.autocast, enabled=wrapped.autocast is not None):
        logits = wrapped.bare(images)
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).float().sum(), images)
    wrapped.model.train()
    if state.frozen is not None:
        state.frozen.hold()
    side = 2 * (images.shape[-1] // 32) + 1  # pixels alone are noisy
    return F.avg_pool2d(gradient.abs().amax(1)[:, None], side, 1, side // 2, count_include_pad=False)[:, 0]
