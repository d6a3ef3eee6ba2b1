"""Batch normalisation over ranks: whose statistics count."""

import warnings

from timm.layers import convert_sync_batchnorm
from torch import nn

from gmscale.config import ParallelConfig
from gmscale.errors import UsageError
from gmscale.parallel.world import World

_BatchNorm = nn.modules.batchnorm._BatchNorm


def set_batch_norm(model: nn.Module, config: ParallelConfig, world: World) -> nn.Module:
    """Return the model with the batch-norm layers that parallel.batch_norm asks for; weights and names stay.

    `sync` puts other layers in their place, so call it before anything keeps a reference to them. Raises UsageError
    for what the back-end of `world` or its device cannot do.
    """
    if config.batch_norm == "broadcast" or world.size == 1:
        return model
    if world.backend != "ddp":
        raise UsageError(
            f"parallel.batch_norm {config.batch_norm!r} needs parallel.backend ddp; {world.backend} evaluates and "
            f"saves rank 0's statistics (broadcast)"
        )
    if config.batch_norm == "sync" and world.device.type == "cpu":
        raise UsageError("parallel.batch_norm sync needs GPUs; on CPU use reduce or broadcast")
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        if world.is_main:
            warnings.warn(
                f"parallel.batch_norm is {config.batch_norm!r}, but the model has no batch normalisation",
                stacklevel=2,
            )
        return model
    if config.batch_norm == "sync":
        model = convert_sync_batchnorm(model)
    return model
