"""One optimizer step: accumulate micro-batches -> mask -> reduce over ranks -> unscale -> clip -> step.

The mask sits before the reduction because each rank removes the noise of its own gradient; unscaling and clipping
come after it because they act on what the optimizer will see.
"""

from contextlib import nullcontext

import torch

from gmscale import data
from gmscale.config import TrainConfig
from gmscale.data import Batch
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
