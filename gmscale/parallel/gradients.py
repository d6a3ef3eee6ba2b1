"""Reduced gradients, between their reduction and the optimizer: are they finite, and clipping."""

from collections.abc import Iterable

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gmscale.config import OptimConfig


def clip(parameters: Iterable[nn.Parameter], config: OptimConfig) -> tuple[Tensor, bool]:
    """Clip gradients in place, unless their norm is not finite; return the norm before, and whether it is finite.

    The norm is that of all gradients as one vector, whole also where DTensors hold parts of them (then this is a
    collective). It overflows from about 1.8e19 on, whose square is beyond float32: such gradients are no use, and
    count as not finite too. Reading the answer makes the host wait for the backward pass.
    """
    trained = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = bool(whole.isfinite())
    if finite and config.clip_grad > 0:
        if config.clip_mode == "norm":
            torch.nn.utils.clip_grads_with_norm_(trained, config.clip_grad, norm)
        else:
            dispatch_clip_grad(trained, config.clip_grad, mode=config.clip_mode)
    return whole, finite
