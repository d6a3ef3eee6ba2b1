"""A training state that a test steps by hand, on made images, with everything that a step may change in view."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmscale import build
from gmscale import step as stepping
from gmscale.config import TrainConfig
from gmscale.data import Batch
from gmscale.parallel import Stepped, World

NO_MASK: dict[str, dict[str, Any]] = {"mask": {"enabled": False}}


def world_of(rank: int, size: int, backend: str) -> World:
    """The world of a rank that `ranks.run_ranks` started, or of this process alone."""
    import os

    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    control = None if backend == "single" else dist.group.WORLD
    return World(rank, rank, size, torch.device("cpu"), backend, control)


class Run:
    """A run of `config` without data, checkpoints and the loop."""

    def __init__(self, config: TrainConfig, world: World, **begin: Any) -> None:
        torch.manual_seed(config.run.seed)
        self.config, self.world = config, world
        self.state = build.training_state(config, world, 10, 6, **begin)

    def step(self, number: int, *, poison: bool = False, scale: float = 1.0) -> Stepped:
        """Do step `number` on images that depend on it and on the rank; `poison` makes the loss infinite here."""
        generator = torch.Generator().manual_seed(1000 * number + self.world.rank)
        batches = [
            Batch(
                torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8),
                torch.randint(0, 10, (8,), generator=generator),
            )
            for _ in range(self.config.optim.grad_accum_steps)
        ]
        torch.manual_seed(number)
        for mask in self.state.attachments.values():
            mask.at(number, 100, grad_scale=self.state.wrapped.loss_scale())
        with self._loss_times(float("inf") if poison else scale):
            return stepping.train_step(self.state, batches, self.config, self.world, 10)

    def everything(self) -> dict[str, Tensor]:
        """Copies of all weights (on rank 0), of this rank's optimizer state and of what the mask holds back."""
        wrapped = self.state.wrapped
        found = {f"weights.{n}": w.detach().clone() for n, w in wrapped.weights().items()}
        trees = {"shared": wrapped.optimizer_state(), "own": wrapped.rank_state()}
        trees["masks"] = {name: mask.state_dict() for name, mask in self.state.attachments.items()}
        return found | {path: tensor.detach().clone() for path, tensor in _tensors(trees)}

    @contextmanager
    def images_of_nan(self, here: bool) -> Iterator[None]:
        """Images that are not finite, on this rank."""
        handle = self.state.wrapped.bare.register_forward_pre_hook(
            lambda _, images: tuple(i * float("nan") for i in images) if here else None
        )
        yield
        handle.remove()

    @contextmanager
    def _loss_times(self, factor: float) -> Iterator[None]:
        real = stepping.training_loss
        stepping.training_loss = lambda *arguments: real(*arguments) * factor
        try:
            yield
        finally:
            stepping.training_loss = real


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for name, value in items:
            yield from _tensors(value, f"{path}.{name}")
