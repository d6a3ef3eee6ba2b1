"""DeepSpeed: ZeRO stages 0 to 3 over torchrun's process group, without DeepSpeed's launcher or checkpoints."""

import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gmscale.config import TrainConfig
from gmscale.errors import UsageError
from gmscale.parallel.failure import together
from gmscale.parallel.world import World
from gmscale.parallel.wrapped import MakeOptimizer, Wrapped

_BatchNorm = nn.modules.batchnorm._BatchNorm


class DeepSpeedWrapped(Wrapped):
    """A model in a DeepSpeed engine, which starts from rank 0's weights.

    With optim.amp bf16 the weights stay float32, on the wire too, and DeepSpeed's own autocast computes in
    bfloat16, as under DDP; evaluation computes in float32. With fp16 the weights are float16, with float32 master
    weights in the optimizer and a dynamic loss scale; evaluation computes in float16.

    Raises UsageError for what DeepSpeed cannot do: see `_refuse`.
    """

    def __init__(self, bare: nn.Module, make_optimizer: MakeOptimizer, config: TrainConfig, world: World) -> None:
        self._stage = config.parallel.zero_stage
        self._is_main = world.is_main
        self._clips = config.optim.clip_grad > 0
        self._half = config.optim.amp == "fp16"
        with together(world):
            self._deepspeed = _imported(world)
            _refuse(bare, make_optimizer, config, self._deepspeed.get_accelerator())
            # ZeRO lays parameters out flat, one after the other: contiguous, whatever they were before
            bare = bare.to(world.device).to(memory_format=torch.contiguous_format)
            optimizer = make_optimizer(bare)
        if self._half:
            bare.register_forward_pre_hook(lambda _, images: tuple(i.half() for i in images))
            bare.register_forward_hook(lambda _, __, logits: logits.float())
        with _quiet():
            self._engine, *_ = self._deepspeed.initialize(
                model=bare, optimizer=optimizer, config=_settings(bare, config)
            )
        self.bare, self.model = bare, self._engine
        self.optimizer = self._engine.basic_optimizer  # the engine's own wrapper has the same param_groups
        self.lockstep = self._stage == 3

    def loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale) if self._half else 1.0

    def zero_grad(self) -> None:
        """Nothing to do: the engine forgets its gradients in each step."""

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch

    def step(self) -> Tensor | None:
        norm = None
        if self._clips and self._stage == 0:  # the engine clips here too, but does not tell the norm
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.bare.parameters() if p.grad is not None])
        self._engine.step()
        if self._clips and self._stage > 0:
            norm = torch.as_tensor(self._engine.get_global_grad_norm())
        return norm

    def weights(self) -> Mapping[str, Tensor]:
        weights = {}
        trained = dict(self.bare.named_parameters(remove_duplicate=False))
        for name in self.bare.state_dict():
            tensor = trained[name] if name in trained else self.bare.get_buffer(name)
            if name in trained and self._stage > 0:
                tensor = self._deepspeed.utils.safe_get_full_fp32_param(tensor)
            if self._is_main:
                weights[name] = tensor.detach().to("cpu", copy=True)
        return weights

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = dict(self.bare.named_parameters(remove_duplicate=False)) | dict(self.bare.named_buffers())
        if unknown := own.keys() & self.bare.state_dict().keys() ^ weights.keys():
            raise RuntimeError(f"the model and the file differ in {', '.join(sorted(unknown)[:3])}")
        for name, saved in weights.items():
            if self._stage == 3 and isinstance(own[name], nn.Parameter):
                with self._deepspeed.zero.GatheredParameters([own[name]], modifier_rank=0):
                    own[name].copy_(saved)
            else:
                own[name].copy_(saved)
        if self._stage > 0:
            self._engine.optimizer.refresh_fp32_params()

    def optimizer_state(self) -> Mapping[str, Any]:
        shared: dict[str, Any] = {"param_groups": [_settings_of(group) for group in self.optimizer.param_groups]}
        if self._half:
            scaler = vars(self._engine.optimizer.loss_scaler)
            shared["scaler"] = {k: v for k, v in scaler.items() if isinstance(v, bool | int | float)}
        return shared

    def rank_state(self) -> Mapping[str, Any]:
        masters = self._masters()
        own: dict[str, Any] = {"optimizer": [dict(self.optimizer.state.get(m, {})) for m in masters]}
        return own | ({"masters": [m.detach() for m in masters]} if self._half else {})

    @torch.no_grad()
    def load_optimizer_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        for group, saved in zip(self.optimizer.param_groups, shared["param_groups"], strict=True):
            group.update(saved)
        masters = self._masters()
        for master, state in zip(masters, own["optimizer"], strict=True):
            self.optimizer.state[master] = dict(state)
        if self._half:
            for name, value in shared["scaler"].items():
                setattr(self._engine.optimizer.loss_scaler, name, value)
            for master, saved in zip(masters, own["masters"], strict=True):
                master.copy_(saved)

    def _masters(self) -> list[Tensor]:
        """Return what the optimizer updates on this rank: parameters, or this rank's flat parts of them."""
        if self._stage == 3:  # which its param_groups hold only during a step
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _imported(world: World) -> Any:
    """Import DeepSpeed for the device of `world`."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed insists on it
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError:
        raise UsageError(
            'parallel.backend deepspeed needs DeepSpeed, which is not installed: pip install "gmscale[deepspeed]"'
        ) from None
    if world.device.type == "cpu":
        # DeepSpeed would compile a C++ extension on first use, for a minute or two; gloo does the same work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _settings(bare: nn.Module, config: TrainConfig) -> dict[str, Any]:
    """Return DeepSpeed's own configuration.

    No module is named safe for low precision: their weights would be gathered in bfloat16 or in float32, whatever
    was needed first, and resumed runs and evaluations would differ.
    """
    precision: dict[str, dict[str, Any]] = {
        "none": {},
        "bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}},
        "fp16": {"fp16": {"enabled": True}},
    }
    return precision[config.optim.amp] | {
        "train_micro_batch_size_per_gpu": config.data.batch_size_per_device,
        "gradient_accumulation_steps": config.optim.grad_accum_steps,
        "gradient_clipping": config.optim.clip_grad,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "overlap_comm": config.parallel.overlap_comm,
            # two gigabytes by default, and torch's deterministic mode fills them in every step
            "reduce_bucket_size": min(500_000_000, sum(p.numel() for p in bare.parameters())),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def _refuse(bare: nn.Module, make_optimizer: MakeOptimizer, config: TrainConfig, accelerator: Any) -> None:
    """Raise UsageError for settings that DeepSpeed would fail at, or worse."""
    optim, stage = config.optim, config.parallel.zero_stage
    if optim.clip_grad > 0 and optim.clip_mode != "norm":
        raise UsageError(
            f"optim.clip_mode is {optim.clip_mode!r}; parallel.backend deepspeed clips by norm only (or use ddp)"
        )
    if optim.amp == "fp16":
        if stage == 0:
            raise UsageError(
                "optim.amp fp16 with parallel.zero_stage 0: DeepSpeed scales no loss there; use stage 1, or bf16"
            )
        if any(isinstance(module, _BatchNorm) for module in bare.modules()):
            raise UsageError(
                f"optim.amp fp16 with parallel.backend deepspeed makes all weights float16, which the batch "
                f"normalisation of {config.model.name} does not take; use bf16, or ddp"
            )
        if config.model.ema_decay > 0:
            raise UsageError(
                "model.ema_decay would average float16 weights under optim.amp fp16 with parallel.backend "
                "deepspeed; use bf16, or set it to 0"
            )
        if not accelerator.is_fp16_supported():
            raise UsageError("optim.amp fp16: DeepSpeed finds no fast fp16 on this device; use bf16")
    if stage > 0 and not _is_elementwise(make_optimizer):
        raise UsageError(
            f"optim.opt {optim.opt!r} needs whole weights, but ZeRO stage {stage} hands an optimizer flat parts of "
            f"them; use parallel.zero_stage 0, or an optimizer such as sgd or adamw"
        )


def _is_elementwise(make_optimizer: MakeOptimizer) -> bool:
    """Whether an optimizer does the same to a weight matrix and to a flat piece of it (tried on one)."""
    with torch.random.fork_rng([]):
        whole, part = nn.Linear(160, 160, bias=False), nn.Linear(160, 160, bias=False)
        gradients = torch.randn(3, 160, 160)
        gradients[-1] = 0  # some look at a gradient only where it is orthogonal to the weights
    began, size = whole.weight.detach().flatten().clone(), whole.weight.numel() // 3
    optimizers = make_optimizer(whole), make_optimizer(part)
    part.weight.data = began[:size].clone()
    try:
        for gradient in gradients:
            whole.weight.grad, part.weight.grad = gradient.clone(), gradient.flatten()[:size].clone()
            for optimizer in optimizers:
                optimizer.step()
    except (RuntimeError, IndexError, ValueError, AssertionError):  # it cannot do without the matrix
        return False
    moves = whole.weight.flatten()[:size] - began[:size], part.weight - began[:size]
    return bool((moves[0] - moves[1]).norm() <= 1e-3 * moves[0].norm())


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed from warning of an optimizer it has not tried: whether it fits was tried above."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(logging.WARNING)
