"""The back-end that a run asks for."""

from torch import nn

from gmscale.config import TrainConfig
from gmscale.parallel.replicated import Replicated
from gmscale.parallel.world import World
from gmscale.parallel.wrapped import MakeOptimizer, Wrapped


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
    return Replicated(bare, make_optimizer, config, world)
