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
from gmscale.parallel.compiled import compile_, uncompiled
from gmscale.parallel.failure import together
from gmscale.parallel.world import World, broadcast_buffers, of_all_ranks
from gmscale.parallel.wrapped import MakeOptimizer, Stepped, WeightShard, Wrapped, check_division, has_finite_norm

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
        self.world = world
        self._half = config.optim.amp == "fp16"
        with together(world):
            self._deepspeed = _imported(world)
            _refuse(bare, make_optimizer, config, self._deepspeed.get_accelerator())
            # ZeRO lays parameters out flat, one after the other: contiguous, whatever they were before
            bare = bare.to(world.device).to(memory_format=torch.contiguous_format)
            compile_([bare], config.model, world.device)
            optimizer = make_optimizer(bare)
        if self._half:
            bare.register_forward_pre_hook(lambda _, images: tuple(i.half() for i in images))
            bare.register_forward_hook(lambda _, __, logits: logits.float())
        with _quiet():
            self._engine, *_ = self._deepspeed.initialize(
                model=bare, optimizer=optimizer, config=_settings(bare, config)
            )
        self.bare, self.model = bare, self._engine
        self.eval_model = uncompiled(bare, config.model)
        self.optimizer = self._engine.basic_optimizer  # the engine's own wrapper has the same param_groups
        self.lockstep = self._stage == 3
        self._nonfinite: set[str] = set()
        if self._stage > 0:
            self._watch_verdicts()

    def loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale) if self._half else 1.0

    def zero_grad(self) -> None:
        """Nothing to do: the engine forgets its gradients in each step."""

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch

    def step(self) -> Stepped:
        if self._stage == 0:
            return self._step_whole()
        self._nonfinite = set()
        with _quiet():  # it would tell of skipped steps, as metrics do
            self._engine.step()
        return Stepped(torch.as_tensor(self._engine.get_global_grad_norm()), bool(self._engine.optimizer.overflow))

    def nonfinite_gradients(self) -> list[str]:
        anywhere = set[str]().union(*of_all_ranks(self._nonfinite, self.world))
        return [name for name, _ in self.bare.named_parameters() if name in anywhere]

    def weights(self) -> Mapping[str, Tensor]:
        weights = {}
        for name, tensor in self._named_tensors().items():
            with self._whole(tensor) as whole:
                if self.world.is_main:
                    weights[name] = whole.detach().to("cpu", copy=True)
        return weights

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = self._named_tensors()
        if unknown := own.keys() ^ weights.keys():
            raise RuntimeError(f"the model and the file differ in {', '.join(sorted(unknown)[:3])}")
        for name, saved in weights.items():
            if self._stage == 3 and isinstance(own[name], nn.Parameter):
                with self._deepspeed.zero.GatheredParameters([own[name]], modifier_rank=0):
                    own[name].copy_(saved)
            else:
                own[name].copy_(saved)
        if self._stage > 0:
            self._engine.optimizer.refresh_fp32_params()

    def weight_shards(self) -> Mapping[str, WeightShard]:
        if self._stage < 3:
            return super().weight_shards()
        shards, parameters = {}, dict(self.bare.named_parameters(remove_duplicate=False))
        for name, tensor in self._named_tensors().items():
            if name in parameters:
                # a frozen weight has no float32 master
                local = self._deepspeed.utils.safe_get_local_fp32_param(tensor) if tensor.requires_grad else None
                shards[name] = self._shard(tensor, tensor.ds_tensor if local is None else local)
            elif self.world.is_main:
                shards[name] = WeightShard(tuple(tensor.shape), 0, tensor.detach().flatten())
        return shards

    @torch.no_grad()
    def load_weight_shards(self, shards: Mapping[str, WeightShard]) -> None:
        if self._stage < 3:
            return super().load_weight_shards(shards)
        own, parameters = self._named_tensors(), dict(self.bare.named_parameters(remove_duplicate=False))
        with together(self.world):
            check_division(self.weight_shards(), shards)
        for name, tensor in own.items():
            if name in parameters:
                tensor.partition()  # small ones stay gathered, and would otherwise keep their old values
                self._shard(tensor, tensor.ds_tensor).entries.copy_(shards[name].entries)
                if tensor.ds_persist:
                    tensor.all_gather()
            elif self.world.is_main:
                tensor.copy_(shards[name].entries.view_as(tensor))
        broadcast_buffers(self.bare, self.world)
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

    def _named_tensors(self) -> dict[str, Any]:
        """Return parameters and buffers, as ZeRO left them, in the names and the order of the state dict."""
        own: dict[str, Any] = dict(self.bare.named_parameters(remove_duplicate=False))
        own |= dict(self.bare.named_buffers())
        return {name: own[name] for name in self.bare.state_dict()}

    @contextmanager
    def _whole(self, tensor: Tensor) -> Iterator[Tensor]:
        """Give a whole parameter or buffer, in float32 if it has a master; a collective."""
        if self._stage > 0 and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            yield self._deepspeed.utils.safe_get_full_fp32_param(tensor)
        elif self._stage == 3 and isinstance(tensor, nn.Parameter):
            with self._deepspeed.zero.GatheredParameters([tensor]):
                yield tensor
        else:
            yield tensor

    def _shard(self, parameter: Any, local: Tensor) -> WeightShard:
        """Return the entries of a ZeRO-3 parameter in `local`, a flat part of it, without its padding."""
        offset = min(self.world.rank * local.numel(), parameter.ds_numel)
        entries = local.detach()[: parameter.ds_numel - offset]
        return WeightShard(tuple(parameter.ds_shape), offset, entries)

    def _step_whole(self) -> Stepped:
        """Step with ZeRO stage 0, which looks at no gradient."""
        named = [(name, p.grad) for name, p in self.bare.named_parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in named])
        if norm.isfinite():
            self._engine.step()
            return Stepped(norm, False)
        self._nonfinite = {name for name, gradient in named if not has_finite_norm(gradient)}
        self.bare.zero_grad()
        self._engine.micro_steps += 1  # the engine counts the micro-batch without a step
        return Stepped(norm, True)

    def _watch_verdicts(self) -> None:
        """Look at the gradients of a step that ZeRO is about to skip; afterwards they are gone."""
        optimizer = self._engine.optimizer
        update_scale = optimizer.loss_scaler.update_scale
        held = optimizer.fp16_groups if self._stage == 3 else optimizer.params_in_partition
        names = {id(parameter): name for name, parameter in self.bare.named_parameters()}

        def update(overflow: bool) -> None:
            if overflow:
                for group, gradients in optimizer.averaged_gradients.items():
                    padded = (g for g in gradients or () if not getattr(g, "_zero_padding", False))
                    for gradient, parameter in zip(padded, held[group], strict=False):
                        if not has_finite_norm(gradient):
                            self._nonfinite.add(names[id(parameter)])
            update_scale(overflow)

        optimizer.loss_scaler.update_scale = update

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
    if config.model.compile and stage == 3:
        raise UsageError(
            "model.compile with parallel.zero_stage 3: torch.compile does not see DeepSpeed gather the weights; "
            "use stage 2, or parallel.backend fsdp2"
        )
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
