"""From a configuration to what a run is made of: loaders, model, masks, optimizer."""

import warnings
from pathlib import Path

import torch
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook

from gmscale import checkpoint, data, models, parallel
from gmscale.config import TrainConfig
from gmscale.data import StreamLoader, StreamValLoader, TrainLoader, ValLoader
from gmscale.errors import UsageError
from gmscale.parallel import World, Wrapped
from gmscale.sites import Attachment, GradientProbe, attach
from gmscale.training_state import Meter, TrainingState

Training = TrainLoader | StreamLoader
Validation = ValLoader | StreamValLoader

_COMM_HOOKS = {"allreduce": None, "bf16": bf16_compress_hook, "fp16": fp16_compress_hook}


def prepare_process(config: TrainConfig, world: World) -> None:
    """Seed this process and choose its arithmetic."""
    random_seed(config.run.seed, world.rank)
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not config.run.deterministic
    torch.set_float32_matmul_precision(config.run.matmul_precision)


def loaders(config: TrainConfig, world: World) -> tuple[Training, Validation]:
    """Return the loaders of training and validation; a collective."""

    def open_both() -> tuple[Training, Validation]:
        seed, accumulate = config.run.seed, config.optim.grad_accum_steps
        loader = data.train_loader(config.data, config.augment, seed, world.rank, world.size, accumulate)
        validation = data.val_loader(config.data, world.rank, world.size)
        if len(validation.classes) > len(loader.classes):
            raise UsageError(
                f"data.val_split {config.data.val_split!r} has labels up to {len(validation.classes) - 1}, and "
                f"data.train_split {config.data.train_split!r} up to {len(loader.classes) - 1}; the model would "
                "have no output for some"
            )
        return loader, validation

    with parallel.together(world):
        if config.data.decode == "gpu":
            data.check_device(world.device)
        if world.local_rank == 0:  # builds the embedded set where it is missing
            both = open_both()
    with parallel.together(world):
        if world.local_rank != 0:
            both = open_both()
    return both


def training_state(
    config: TrainConfig, world: World, classes: int, steps_per_epoch: int, *, step: int = 0, resumes: bool = False
) -> TrainingState:
    """Return everything that `step` optimizer steps done find in place; a collective.

    A run that `resumes` gets its weights from its checkpoint, others start from those they ask for.
    """
    with parallel.together(world):
        if not resumes and world.is_main and config.model.checkpoint:  # puts sharded weights together, once
            checkpoint.weights_file(Path(config.model.checkpoint), config.finetune.weights)
    with parallel.together(world):
        if config.parallel.sharded_checkpoints and not _divides_weights(config, world):
            raise UsageError(
                "parallel.sharded_checkpoints needs parallel.backend fsdp2 or parallel.zero_stage 3 of deepspeed; "
                f"this is {world.backend}, of which every rank holds the whole weights"
            )
        if config.augment.guided and config.augment.guide == "saliency" and world.backend not in ("single", "ddp"):
            raise UsageError(
                f"augment.guide saliency needs parallel.backend ddp, where a rank can run the model alone; with "
                f"{world.backend} expected augment.guide random"
            )
        bare = models.create(config, classes)
        models.check_optimizer(bare, config.optim, world.backend)
        loaded = None
        if not resumes and world.local_rank == 0:  # downloads what the others then find in the cache
            loaded = _start(bare, config, world)
    with parallel.together(world):
        if not resumes and world.local_rank != 0:
            loaded = _start(bare, config, world)
        bare = parallel.set_batch_norm(bare, config.parallel, world)
        frozen = models.freeze(bare, config.finetune)
        unfreezes_at = unfreeze_step(config, steps_per_epoch)
        if frozen is not None and unfreezes_at is not None:
            if config.finetune.unfreeze_epoch >= config.run.epochs:
                raise UsageError(
                    f"finetune.unfreeze_epoch is {config.finetune.unfreeze_epoch:g}, which a run of run.epochs "
                    f"{config.run.epochs:g} does not reach"
                )
            if world.backend not in ("single", "ddp"):
                raise UsageError(
                    f"finetune.unfreeze_epoch needs parallel.backend ddp; with {world.backend} start a second run "
                    "from this one's checkpoint"
                )
            if step >= unfreezes_at:
                frozen.release()
                frozen = None
    frozen_too = unfreezes_at is not None
    optim = config.optim.for_batch(config.data.batch_size_per_device * config.optim.grad_accum_steps * world.size)
    wrapped = parallel.wrap(
        bare, lambda model: models.optimizer(model, optim, frozen_too=frozen_too), config, world
    )
    with parallel.together(world):
        schedule = models.schedule(wrapped.optimizer, optim, config.run.epochs, steps_per_epoch)
        attachment, output_attachment = _attach(wrapped, config, world)
        ema = _average(wrapped, config)
    return TrainingState(wrapped, attachment, output_attachment, ema, Meter(world.device), schedule, frozen, loaded)


def probe(attachment: Attachment | None, config: TrainConfig) -> GradientProbe | None:
    """Return the probe of gradient quality, if one is asked for."""
    if config.run.probe_every == 0:
        return None
    if attachment is None:
        raise UsageError("run.probe_every measures what a mask does to weight gradients; it needs mask.enabled")
    if config.finetune.unfreeze_epoch > 0:
        raise UsageError("run.probe_every compares the same weights all along; finetune.unfreeze_epoch must be 0")
    return GradientProbe(attachment, config.run.probe_every)


def _divides_weights(config: TrainConfig, world: World) -> bool:
    return world.backend == "fsdp2" or (world.backend == "deepspeed" and config.parallel.zero_stage == 3)


def _start(model: nn.Module, config: TrainConfig, world: World) -> models.Loaded | None:
    """Load the starting weights that the configuration names, if it does."""
    named = config.model.checkpoint
    file = checkpoint.weights_file(Path(named), config.finetune.weights) if named else None
    with warnings.catch_warnings():
        if not world.is_main:
            warnings.simplefilter("ignore")  # one rank says it for all
        return models.start_from(model, config, file)


def unfreeze_step(config: TrainConfig, steps_per_epoch: int) -> int | None:
    """Return after how many optimizer steps everything trains; None if that never changes."""
    epoch = config.finetune.unfreeze_epoch
    return max(1, round(epoch * steps_per_epoch)) if epoch > 0 else None


def unfreeze(state: TrainingState, config: TrainConfig, world: World) -> None:
    """Let everything train from the next step on; a collective. The masks keep what they hold back."""
    assert state.frozen is not None
    state.frozen.release()
    state.frozen = None
    held = {name: mask.state_dict() for name, mask in state.attachments.items()}
    for mask in state.attachments.values():
        mask.detach()
    state.wrapped.refit()
    with parallel.together(world):
        state.attachment, state.output_attachment = _attach(state.wrapped, config, world)
        for name, mask in state.attachments.items():
            mask.load_state_dict(held[name])


def replica(state: TrainingState, config: TrainConfig, classes: int) -> nn.Module:
    """Return the model with its whole weights on the main rank, where one forward pass needs no other rank."""
    model = models.create(config, classes)
    weights = state.wrapped.weights()
    if weights:
        model.load_state_dict(weights)
    return model


def _attach(wrapped: Wrapped, config: TrainConfig, world: World) -> tuple[Attachment | None, Attachment | None]:
    """Return the masks of the weight gradients and of the layer outputs that the configuration asks for."""
    weights = outputs = None
    hook = _COMM_HOOKS[config.parallel.comm_hook]
    if hook is not None and world.backend != "ddp":
        raise UsageError(f"parallel.comm_hook {config.parallel.comm_hook!r} needs ddp; this is {world.backend}")
    if config.mask.enabled:
        site = world.backend if config.mask.site == "auto" else config.mask.site
        weights = attach(wrapped.model, config.mask, site, hook=hook)
    elif hook is not None:
        wrapped.model.register_comm_hook(None, hook)  # type: ignore[operator]
    if config.output.enabled:
        layers, sigmas = config.output.layers or None, config.output.sigmas or None
        outputs = attach(wrapped.model, config.output, "output", layers=layers, sigmas=sigmas)
    return weights, outputs


def _average(wrapped: Wrapped, config: TrainConfig) -> ModelEmaV3 | None:
    if config.model.ema_decay == 0:
        return None
    if wrapped.lockstep:
        raise UsageError(
            "model.ema_decay needs the whole weights on every rank, which this back-end shards; set it to 0, or "
            "take parallel.backend ddp or a lower parallel.zero_stage"
        )
    return ModelEmaV3(wrapped.bare, decay=config.model.ema_decay, use_warmup=config.model.ema_warmup)
