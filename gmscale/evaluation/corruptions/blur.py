"""Blurs. Their lengths are given in pixels of 224 x 224 images, as ImageNet-C's, and follow the image's size."""

import math

import torch
from torch import Tensor

from gmscale.evaluation.corruptions.filters import Draw, convolved, gaussian, length, streaks, zoomed

_GAUSSIAN = (1, 2, 3, 4, 6)  # sigma
_DEFOCUS = (3, 4, 6, 8, 10)  # radius
_GLASS = ((0.7, 2.6), (0.9, 2.7), (1, 4.7), (1.1, 5.2), (1.5, 6.9))  # sigma, reach
_MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # radius, sigma
_ZOOM = ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))  # step, factors from 1

_LEAST_SIGMA, _LEAST_RADIUS, _LEAST_REACH = 0.3, 0.5, 0.5


def gaussian_blur(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    return gaussian(pixels, length(_GAUSSIAN[severity - 1], pixels, _LEAST_SIGMA))


def defocus_blur(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Average over a disc, of whose edge pixels have the share that it covers."""
    radius = length(_DEFOCUS[severity - 1], pixels, _LEAST_RADIUS)
    grid = torch.arange(-math.ceil(radius), math.ceil(radius) + 1, device=pixels.device)
    disc = (radius + 0.5 - torch.hypot(grid[:, None].float(), grid.float())).clamp(0, 1)
    return convolved(pixels, (disc / disc.sum())[None])


def glass_blur(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Blur, let each pixel take the colour of one nearby, and blur again.

    ImageNet-C swaps pixels one after another, a loop over the image that nothing can share. Here all look at once,
    evenly as far as the reach, which was chosen so that three photographs change as much (mean square).
    """
    sigma, reach = _GLASS[severity - 1]
    sigma, reach = length(sigma, pixels), length(reach, pixels, _LEAST_REACH)
    height, width = pixels.shape[-2:]
    moves = ((2 * draw(2 * height * width) - 1) * reach).round().long().view(-1, 2, height, width)
    rows = (torch.arange(height, device=pixels.device)[:, None] + moves[:, 0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=pixels.device) + moves[:, 1]).clamp(0, width - 1)
    places = (rows * width + columns).flatten(1)[:, None].expand(-1, pixels.shape[1], -1)
    shuffled = gaussian(pixels, sigma).flatten(2).gather(2, places).view(pixels.shape)
    return gaussian(shuffled, sigma)


def motion_blur(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Streak along an angle within 45 degrees of the horizontal."""
    radius, sigma = _MOTION[severity - 1]
    angles = (draw(1)[:, 0] - 0.5) * (math.pi / 2)
    return streaked(pixels, angles, radius, sigma)


def streaked(images: Tensor, angles: Tensor, radius: float, sigma: float) -> Tensor:
    """Return `images` with streaks of `sigma`, cut at twice the `radius` (ImageMagick's), both at 224 pixels."""
    cut = length(2 * radius, images, 4 * _LEAST_RADIUS)
    return convolved(images, streaks(angles, length(sigma, images, _LEAST_RADIUS), cut))


def zoom_blur(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Average the image and its middle at growing factors."""
    step, factors = _ZOOM[severity - 1]
    total = 2 * pixels  # the image itself, and the factor 1
    for number in range(1, factors):
        total += zoomed(pixels, 1 + step * number)
    return total / (factors + 1)
