"""Weather, and what splashes on the lens. Lengths as in blur: of 224 x 224 pixels, following the image's size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gmscale.evaluation.corruptions.blur import streaked
from gmscale.evaluation.corruptions.filters import (
    Draw,
    coloured,
    convolved,
    gaussian,
    grey,
    length,
    normal,
    plasma,
    plasma_side,
    zoomed,
)

# mean and deviation of the flakes, their size, least brightness; streak's radius and sigma; share of the image
_SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
_FROST = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))  # weights of image and frost
_FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))  # thickness, decay of the fractal
_BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
# mean, deviation, sigma and threshold of the liquid; opacity of water or sigma of mud
_SPATTER = (
    (0.65, 0.3, 4, 0.69, 0.6),
    (0.65, 0.3, 3, 0.68, 0.6),
    (0.65, 0.3, 2, 0.68, 0.5),
    (0.65, 0.3, 1, 0.65, 1.5),
    (0.67, 0.4, 1, 0.65, 1.5),
)
_MUD_FROM = 4  # severity
_WATER, _MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)
_ICE = (0.86, 0.94, 1.0)


def snow(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Whiten the image and let flakes fall within 45 degrees of the vertical, in one direction and its opposite."""
    mean, deviation, size, least, radius, sigma, share = _SNOW[severity - 1]
    height, width = pixels.shape[-2:]
    uniform = draw(height * width + 1)
    noise = normal(uniform[:, 1:]).view(-1, 1, height, width)
    flakes = zoomed(mean + deviation * noise, length(size, pixels, 1.0))
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    flakes = streaked(flakes, (uniform[:, 0] + 0.5) * (math.pi / 2), radius, sigma)
    whitened = torch.maximum(pixels, 1.5 * grey(pixels) + 0.5)
    return share * pixels + (1 - share) * whitened + flakes + flakes.flip(-2, -1)


def frost(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Add ice: needles in three directions, thicker in some places. ImageNet-C has photographs of frost instead."""
    of_image, of_frost = _FROST[severity - 1]
    return of_image * pixels + of_frost * coloured(_ICE, pixels) * _ice(pixels, draw)


def _ice(pixels: Tensor, draw: Draw) -> Tensor:
    """Return how bright ice is, [N, 1, H, W] in [0, 1]."""
    height, width = pixels.shape[-2:]
    side = plasma_side(pixels)
    uniform = draw(1 + side**2 + height * width)
    where = plasma(uniform[:, 1 : 1 + side**2], 1.5)[..., :height, :width]
    seeds = uniform[:, 1 + side**2 :].view(-1, 1, height, width)
    crystals = torch.zeros_like(seeds)
    for at_224, crowd, turn in ((16.0, 0.3, 0.0), (5.0, 0.25, 0.5)):  # large and small ones
        needle = length(at_224, pixels, 1.5)
        sown = (seeds < crowd / needle**2).to(pixels.dtype)
        crystals = crystals + convolved(sown, _stars(uniform[:, 0] + turn, needle)).clamp(0, 1)
        seeds = 1 - seeds
    return (0.1 + 0.55 * where + (0.2 + 0.6 * where) * crystals).clamp(0, 1)


def _stars(turns: Tensor, needle: float) -> Tensor:
    """Return kernels [N, k, k] of six needles, which fade over `needle` pixels and are turned at random."""
    reach = math.ceil(2.5 * needle)
    grid = torch.arange(-reach, reach + 1, device=turns.device, dtype=turns.dtype)
    angles = (turns[:, None] + torch.arange(3, device=turns.device)) * (math.pi / 3)
    sine, cosine = angles.sin()[..., None, None], angles.cos()[..., None, None]
    along = (grid * cosine + grid[:, None] * sine).abs()
    across = (grid[:, None] * cosine - grid * sine).abs()
    needles = (1 - across).clamp(min=0) * torch.exp(-along / needle) * (along < reach)
    return needles.amax(1)


def fog(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Add a fractal of clouds and scale the image back to its largest value."""
    thickness, decay = _FOG[severity - 1]
    height, width = pixels.shape[-2:]
    clouds = plasma(draw(plasma_side(pixels) ** 2), decay)[..., :height, :width]
    largest = pixels.amax((1, 2, 3), keepdim=True)
    return (pixels + thickness * clouds) * largest / (largest + thickness)


def brightness(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Raise the value of HSV; hue and saturation stay, so all channels grow by the same factor."""
    value = pixels.amax(1, keepdim=True)
    raised = (value + _BRIGHTNESS[severity - 1]).clamp(max=1)
    return torch.where(value > 0, pixels * (raised / value.clamp(min=1e-6)), raised)


def spatter(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Splash water (severities 1 to 3) or mud where smoothed noise is high.

    The share of the image that is hit is ImageNet-C's, the light on the drops is our own.
    """
    mean, deviation, sigma, threshold, last = _SPATTER[severity - 1]
    # smoothed by sigma, white noise of deviation 1 keeps 1 / (2 sqrt(pi) sigma)
    level = (threshold - mean) / deviation * 2 * math.sqrt(math.pi) * sigma
    noise = normal(draw(pixels[0, 0].numel())).view(-1, 1, *pixels.shape[-2:])
    smooth = gaussian(noise, length(sigma, pixels, 0.5))
    above = smooth / smooth.std((2, 3), keepdim=True) - level
    if severity >= _MUD_FROM:
        mud = gaussian((above > 0).to(pixels.dtype), length(last, pixels, 0.3))
        mud = torch.where(mud < 0.8, 0.0, mud)
        return pixels + mud * (coloured(_MUD, pixels) - pixels)
    height = above.clamp(0, 1).sqrt()
    padded = F.pad(height, (1, 1, 1, 1), mode="replicate")
    slope = padded[..., 2:, 2:] - padded[..., :-2, :-2]  # lit from the upper left
    light = (0.35 + slope).clamp(0, 1) * (above > 0)
    return pixels + last * light * coloured(_WATER, pixels)
