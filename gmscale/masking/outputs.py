"""Gradients of layer outputs: each sample has its own map, and the channels of a position share one factor."""

import torch
from torch import Tensor

from gmscale.masking.lateral import Norm
from gmscale.masking.mask import GradientMask, Kept


def output_map(gradient: Tensor, channel_axis: int, norm: Norm = "l2") -> Tensor:
    """Return the lateral maps s[n, h, w] >= 0 of [N, C, H, W] (channel_axis 1) or [N, H, W, C] (3).

    At least float32, whose squares bound the range: entries beyond 1e18 make a map without contrast.
    """
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    if norm == "max":
        return gradient.abs().amax(channel_axis).to(dtype)
    if gradient.device.type != "cpu" or gradient.stride(channel_axis) == 1:
        return torch.linalg.vector_norm(gradient, 1 if norm == "l1" else 2, dim=channel_axis, dtype=dtype)
    # Over an outer axis torch's CPU norm is 10 times slower than a sum; sample by sample it fits the cache.
    samples = (g.to(dtype) for g in gradient)
    if norm == "l1":
        return torch.stack([g.abs().sum(channel_axis - 1) for g in samples])
    return torch.stack([(g * g).sum(channel_axis - 1) for g in samples]).sqrt_()


def output_factor(
    gradient: Tensor,
    channel_axis: int,
    mask: GradientMask,
    strength: float,
    generator: torch.Generator | None = None,
    observe: bool = False,
) -> tuple[Tensor, Kept | None]:
    """Return (factor, what is kept if `observe`) of an output gradient laid out as in `output_map`.

    The factor, [N, 1, H, W] or [N, H, W, 1], is 1 - strength * (1 - m) with the keep map m of each sample, times
    one positive number a sample where the mask rescales.
    """
    s = output_map(gradient, channel_axis, mask.norm)
    m = mask.keep_map(s, generator)
    factor = (1 - m).mul_(-strength).add_(1)
    kept = None
    if observe or mask.rescale:
        length = s if mask.norm == "l2" else output_map(gradient, channel_axis, "l2")
        if observe:
            energy = (torch.linalg.vector_norm(m * length) / torch.linalg.vector_norm(length)).square()
            kept = Kept(m.mean(), torch.nan_to_num(energy, nan=1.0))  # a zero gradient has no energy to lose
        if mask.rescale:
            before, after = (
                torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (length, factor * length)
            )
            ratio = before / after
            factor = factor * torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
    return factor.unsqueeze(channel_axis), kept
