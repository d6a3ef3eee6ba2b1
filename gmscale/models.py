"""timm: models, optimizers and schedules through its own factories, with errors that name the nearest choice."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from gmscale.config import ModelConfig, OptimConfig
from gmscale.errors import UsageError, check_choice, nearest

# timm's schedules that depend on the step alone, so that a resumed run needs no state of theirs.
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "none")


def create(config: ModelConfig, num_classes: int) -> nn.Module:
    """Return the timm model of `config` with `num_classes` outputs, on the CPU.

    Raises UsageError for a name timm does not know or a checkpoint that cannot be loaded.
    """
    if not timm.is_model(config.name.split(".")[0]):
        raise UsageError(f"model.name: timm has no model {config.name!r}{nearest(config.name, timm.list_models())}")
    if config.checkpoint and not config.checkpoint.endswith(".safetensors"):
        # timm would unpickle it, which can execute code.
        raise UsageError(f"model.checkpoint {config.checkpoint}: expected a .safetensors file")
    if config.checkpoint and not Path(config.checkpoint).is_file():
        raise UsageError(f"model.checkpoint {config.checkpoint}: no such file")
    drops: dict[str, Any] = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    try:
        model = timm.create_model(
            config.name,
            pretrained=config.pretrained,
            num_classes=num_classes,
            checkpoint_path=config.checkpoint,
            # Not every model takes every dropout; only those asked for are passed on.
            **{name: rate for name, rate in drops.items() if rate > 0},
            **config.kwargs,
        )
    except (TypeError, RuntimeError, OSError) as error:
        raise UsageError(f"model {config.name}: {' '.join(str(error).split())[:300]}") from error
    if config.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UsageError(f"model.grad_checkpointing is true, but {config.name} does not offer it")
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def check_image_size(model: nn.Module, name: str, image_size: int) -> None:
    """Raise UsageError unless the model on the CPU takes square images of `image_size` pixels."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"model {name} cannot take images of data.image_size {image_size}: {reason}") from error
    model.train(was_training)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the timm model inside DDP and torch.compile."""
    for attribute in ("module", "_orig_mod"):
        model = getattr(model, attribute, model)
    return model


def optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return timm's optimizer over `model`; biases and norms have no weight decay."""
    known = [str(name) for name in list_optimizers()]
    if config.opt.lower() not in known:
        raise UsageError(f"optim.opt: timm has no optimizer {config.opt!r}{nearest(config.opt, known)}")
    try:
        return create_optimizer_v2(
            unwrap(model),
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **config.opt_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"optim.opt {config.opt}: {' '.join(str(error).split())}") from error


def schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, epochs: float, steps_per_epoch: int
) -> Scheduler | None:
    """Return timm's schedule, to be called as `step_update(step)` before each step; None is constant."""
    check_choice(config.sched, SCHEDULES, "optim.sched")
    if config.warmup_epochs > epochs:
        raise UsageError(f"optim.warmup_epochs is {config.warmup_epochs:g}; expected at most run.epochs {epochs:g}")
    settings: dict[str, Any] = {
        "num_epochs": epochs,
        "warmup_epochs": config.warmup_epochs,
        "warmup_lr": config.warmup_lr,
        "min_lr": config.min_lr,
    }
    if config.sched == "none":
        return None
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=config.sched, step_on_epochs=False, updates_per_epoch=steps_per_epoch, **settings
    )
    return scheduler
