"""Noise: one draw or two for each value of an image."""

from functools import cache

import torch
from torch import Tensor

from gmscale.evaluation.corruptions.filters import Draw, normal

_GAUSSIAN = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation
_SPECKLE = (0.15, 0.2, 0.35, 0.45, 0.6)  # standard deviation, as a share of the pixel
_PHOTONS = (60, 25, 12, 5, 3)  # of a white pixel
_IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)  # share of the values

_QUANTILES = 2**14  # a table of 4 MiB for each severity, beyond whose ends lies 1 value in 16384


def gaussian_noise(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Add normal noise, one draw for each channel of each pixel."""
    return pixels + _GAUSSIAN[severity - 1] * _normal(pixels, draw)


def speckle_noise(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Add normal noise in proportion to the pixel."""
    return pixels + pixels * _SPECKLE[severity - 1] * _normal(pixels, draw)


def impulse_noise(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Set a share of the values to 0 or 1, each as often."""
    share = _IMPULSE[severity - 1]
    uniform = draw(pixels[0].numel()).view(pixels.shape)
    return pixels.masked_fill(uniform < share / 2, 0.0).masked_fill(uniform > 1 - share / 2, 1.0)


def shot_noise(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Count photons: Poisson numbers whose mean is the 8-bit pixel times what a white one receives."""
    photons = _PHOTONS[severity - 1]
    values = (pixels * 255).round().long()
    quantiles = (draw(pixels[0].numel()).view(pixels.shape) * _QUANTILES).long()
    counts = _poisson(photons).to(pixels.device).take(values * _QUANTILES + quantiles)
    return counts.to(pixels.dtype) / photons


@cache
def _poisson(photons: int) -> Tensor:
    """Return the counts at evenly spaced quantiles of 256 pixels' Poisson distributions, uint8 [256, quantiles].

    The inverse of the distribution, so that each value costs one look-up.
    """
    counts = torch.arange(2 * photons + 30, dtype=torch.float64)
    means = photons * torch.arange(256, dtype=torch.float64)[:, None] / 255
    shares = torch.exp(torch.xlogy(counts, means) - means - (counts + 1).lgamma()).cumsum(1)
    ends = (shares * _QUANTILES - 0.5).ceil().long().clamp(0, _QUANTILES)
    ends[:, -1] = _QUANTILES
    repeats = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
    return counts.byte().repeat(256).repeat_interleave(repeats.flatten()).view(256, _QUANTILES)


def _normal(pixels: Tensor, draw: Draw) -> Tensor:
    return normal(draw(pixels[0].numel())).view(pixels.shape)
