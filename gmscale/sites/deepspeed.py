"""Site `deepspeed`: the mask in the parameters' gradient hooks, before ZeRO reduces anything.

DeepSpeed has no communication hook. A hook on a parameter itself runs before DeepSpeed's own, which reduce and
partition: it sees the whole gradient of this rank in every ZeRO stage, divided by the accumulation steps and
multiplied by the loss scale. ZeRO 2 and 3 reduce every micro-batch, so every micro-batch is masked, in all stages.
Error feedback holds a whole gradient on every rank, also where ZeRO-3 partitions everything else.
"""

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmscale.errors import UsageError
from gmscale.masking import GradientMask
from gmscale.sites.attachment import Attachment
from gmscale.sites.selection import Selection, select


class DeepSpeedAttachment(Attachment):
    """A mask in gradient hooks under DeepSpeed; masks every micro-batch (the same as once a step without
    accumulation)."""

    site = "deepspeed"
    timing = "each micro-batch"

    def __init__(self, model: nn.Module, engine: Any, mask: GradientMask, selection: Selection) -> None:
        super().__init__(mask, selection, rank=0)
        self._model = model
        self._engine: Any = None
        self._looked_for_engine = False
        self._share_of_step = 1 / len(selection.parameters)
        self._given_scale: float | None = None
        self._passes = 0
        self._arrived: dict[str, tuple[int, int]] = {}
        self._handles = [p.register_hook(self._hook(name)) for name, p in selection.parameters.items()]
        self._pass_counter = (engine or model).register_forward_pre_hook(self._count_pass)
        if engine is not None:
            self._meet(engine)

    def at(
        self, step: int, total_steps: int | None = None, *, grad_scale: float | None = None, observe: bool = True
    ) -> None:
        """As in `Attachment`; `grad_scale` None is the loss scale that the engine has at the time."""
        super().at(step, total_steps, grad_scale=self._grad_scale, observe=observe)
        self._given_scale = grad_scale

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing to do: the engine counts its micro-batches, and each is masked."""
        return nullcontext()

    def detach(self) -> None:
        super().detach()
        for handle in (*self._handles, self._pass_counter):
            handle.remove()

    def _hook(self, name: str) -> Callable[[Tensor], Tensor]:
        @torch.no_grad()
        def hook(gradient: Tensor) -> Tensor:
            if not self._looked_for_engine:
                self._look_for_engine()
            self._check_whole(name)
            self._bring_to_scale()
            with self._clock.running(gradient.device, self._share_of_step):
                masked = gradient.clone()  # a hook must leave its argument alone
                self._mask_all([(name, masked)])
            return masked

        return hook

    # -- the engine ---------------------------------------------------------------------------------------------
    def _meet(self, engine: Any) -> None:
        if refusal := next(_refusals(engine), None):
            raise UsageError(f"site 'deepspeed' {refusal}")
        self._engine, self._looked_for_engine = engine, True
        self._rank = engine.global_rank
        self._share_of_step /= engine.gradient_accumulation_steps()

    def _look_for_engine(self) -> None:
        """Find the engine that was made of the model after the mask was attached to it, if there is one."""
        self._looked_for_engine = True
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        engine_type = _deepspeed().DeepSpeedEngine
        # type(), because isinstance() would ask every proxy in the process for its class; DeepSpeed keeps no list
        for thing in gc.get_objects():
            if issubclass(type(thing), engine_type) and getattr(thing, "module", None) is self._model:
                self._meet(thing)
                # the model's forward may be compiled from now on, the engine's never is
                self._pass_counter.remove()
                self._pass_counter = thing.register_forward_pre_hook(self._count_pass)

    def _count_pass(self, *_: Any) -> None:
        self._passes += 1

    def _check_whole(self, name: str) -> None:
        now = self._passes, 0 if self._engine is None else self._engine.micro_steps
        if self._arrived.get(name) == now:
            raise UsageError(
                f"the gradient of {name} comes in parts, and a mask needs it whole: checkpoint layers that are "
                f"used more than once with use_reentrant=False, and add losses up for one backward pass"
            )
        self._arrived[name] = now

    def _bring_to_scale(self) -> None:
        """Bring what is held back to the loss scale of the coming gradients."""
        scale = _loss_scale(self._engine) if self._given_scale is None else self._given_scale
        if scale == self._grad_scale:
            return
        for residual in self._residuals.values():
            residual.mul_(scale / self._grad_scale)
            if residual.dtype == torch.float16:  # inf would stay for ever; at the limit it makes a step overflow
                residual.clamp_(torch.finfo(torch.float16).min, torch.finfo(torch.float16).max)
        self._grad_scale = scale


def attach_deepspeed(model: nn.Module, mask: GradientMask) -> DeepSpeedAttachment:
    """Attach `mask` to a DeepSpeedEngine, or to the model before `deepspeed.initialize`; see `gmscale.attach`."""
    engine_type = _deepspeed().DeepSpeedEngine
    if isinstance(model, DistributedDataParallel):
        raise UsageError(
            "site 'deepspeed' needs a DeepSpeedEngine, or the bare model before deepspeed.initialize; this is a "
            "DDP model, whose site is 'ddp'"
        )
    if isinstance(model, engine_type):
        return DeepSpeedAttachment(model.module, model, mask, select(model.module, mask))
    return DeepSpeedAttachment(model, None, mask, select(model, mask))


def _deepspeed() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ImportError:
        raise UsageError(
            "site 'deepspeed' needs DeepSpeed, which is not installed: pip install \"gmscale[deepspeed]\""
        ) from None


def _loss_scale(engine: Any) -> float:
    """Return the factor on the coming gradients, wherever this kind of engine keeps it."""
    if engine is None:
        return 1.0
    scalers = (
        getattr(engine, "torch_autocast_z0_gradscaler", None),
        getattr(engine.optimizer, "torch_autocast_gradscaler", None),
    )
    for scaler in scalers:
        if scaler is not None:
            return float(scaler.get_scale())
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def _refusals(engine: Any) -> Iterator[str]:
    """Yield what this engine does that the mask cannot be exact with."""

    def asks(name: str) -> Any:
        found = getattr(engine, name, None)  # older releases lack some
        return found() if callable(found) else found

    if engine.zero_optimization_stage() == 0 and engine.fp16_enabled():
        yield (
            "cannot serve ZeRO stage 0 with fp16: DeepSpeed itself scales no loss there but unscales the update; "
            "use stage 1, or bf16"
        )
    for name in ("pipeline_parallelism", "has_moe_layers", "is_deepcompile_enabled", "zenflow", "super_offload"):
        if asks(name):
            what = name.removeprefix("is_").removeprefix("has_").removesuffix("_enabled").replace("_", " ")
            yield f"cannot serve DeepSpeed's {what}: its gradients do not pass the parameters' hooks one by one"
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        if asks(name):
            yield f"has not been tried with ZeRO++'s {name}, which needs CUDA; switch it off"
    for name in ("autotp_size", "mp_world_size", "sequence_parallel_size"):
        if (asks(name) or 1) > 1:
            yield f"needs whole gradients on every rank, but the engine splits a model or its samples ({name})"
