"""What a model needs: parameters, and operations for one image."""

import copy
from typing import NamedTuple

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from gmscale.data import DataConfig
from gmscale.evaluation.pruning.smallest import prunable, zeros

_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


class Cost(NamedTuple):
    """What a model holds, and what it computes for one image."""

    parameters: int
    """All parameters, without weights of convolutions and linear layers that are zero."""
    flops: int
    """Operations of matrix products, convolutions and attention; a multiply-add is two, as torch counts."""
    flops_nonzero: int
    """The same without products with weights that are zero, which only fitting hardware or kernels save. In layers
    that standardise their weights none are zero."""


@torch.no_grad()
def cost(model: nn.Module, config: DataConfig) -> Cost:
    """Return the cost of `model` for one image of `config`, counted while a copy of it on the CPU computes."""
    copied = copy.deepcopy(model).cpu().eval()
    # torch counts no operations of the CPU's fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        copied(torch.zeros(1, config.channels, config.image_size, config.image_size))
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    flops, saved = counter.get_total_flops(), 0.0
    for name, module in copied.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and not isinstance(module, _STANDARDISED):
            share = float((module.weight == 0).double().mean())
            saved += share * counts.get(f"{type(copied).__name__}.{name}", 0)
    parameters = sum(p.numel() for p in copied.parameters())
    return Cost(parameters - zeros(prunable(copied)), flops, flops - round(saved))
