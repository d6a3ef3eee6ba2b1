"""What several families are made of: lengths that follow the image's size, blurs, zooms and random fields."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[[int], Tensor]
"""Takes a count, returns as many numbers of (0, 1) for each image: float32 [N, count], the same at each call."""

_SIDE = 224  # of ImageNet-C's images
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as OpenCV's and Pillow's grey


def length(at_224: float, images: Tensor, least: float = 0.0) -> float:
    """Return a length in pixels of `images` [N, C, H, W] for one of 224 x 224 pixels: r L + (1 - r) `least`.

    r is the shorter side / 224. On small images lengths come near to `least` (no more than 0 for large ones), which
    keeps them in order and above what a pixel grid can show.
    """
    ratio = min(images.shape[-2:]) / _SIDE
    return ratio * at_224 + max(0.0, 1 - ratio) * least


def normal(uniform: Tensor) -> Tensor:
    """Return standard normal numbers for numbers of (0, 1)."""
    return math.sqrt(2) * (2 * uniform - 1).erfinv()


def grey(images: Tensor) -> Tensor:
    """Return the luminance [N, 1, H, W] of images [N, 3 or 1, H, W]."""
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)


def coloured(rgb: tuple[float, float, float], images: Tensor) -> Tensor:
    """Return a colour in the channels that `images` have, [C, 1, 1]."""
    colour = images.new_tensor(rgb)[None, :, None, None]
    return (colour if images.shape[1] == 3 else grey(colour))[0]


def gaussian(images: Tensor, sigma: float) -> Tensor:
    """Return `images` [N, C, H, W] blurred by a Gaussian of `sigma` pixels, cut at 4 sigma, edges repeated.

    One product with a matrix for each axis, whose rows are the kernel where it falls on the image.
    """
    height, width = images.shape[-2:]
    flat = images.reshape(-1, height, width)
    down, across = (_gaussian_rows(side, sigma, images) for side in (height, width))
    # products of batches, not of one tall matrix: those of an image do not depend on its neighbours
    blurred = torch.bmm(down.expand(len(flat), -1, -1), flat)
    return torch.bmm(blurred, across.T.expand(len(flat), -1, -1)).view(images.shape)


def gaussian_weights(sigma: float) -> Tensor:
    """Return the Gaussian's weights along one axis, cut at 4 sigma: [2 r + 1], their sum 1."""
    reach = int(4 * sigma + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    return weights / weights.sum()


def _gaussian_rows(side: int, sigma: float, like: Tensor) -> Tensor:
    """Return the matrix [side, side] that blurs a column."""
    weights = gaussian_weights(sigma).to(like)
    reach = len(weights) // 2
    offsets = torch.arange(-reach, reach + 1, device=like.device)
    places = (torch.arange(side, device=like.device)[:, None] + offsets).clamp(0, side - 1)
    return like.new_zeros(side, side).scatter_add_(1, places, weights.expand(side, -1))


def convolved(images: Tensor, kernels: Tensor) -> Tensor:
    """Return `images` [N, C, H, W] convolved with `kernels` [N or 1, 2 r + 1, 2 r + 1], edges reflected.

    By the Fourier transform: kernels are as large as streaks are long, and each image may have its own.
    """
    reach = kernels.shape[-1] // 2
    images = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    size = tuple(images.shape[-2:])
    spectrum = torch.fft.rfft2(images) * torch.fft.rfft2(kernels, s=size)[:, None]
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * reach :, 2 * reach :]


def streaks(angles: Tensor, sigma: float, cut: float) -> Tensor:
    """Return kernels [N, k, k] of motion blur: half a Gaussian of `sigma` pixels, from the centre along each angle.

    `angles` in radians, [N]; `cut` is the streak's length in pixels.
    """
    reach = math.ceil(cut)
    distances = torch.arange(0, reach + 1, device=angles.device)
    weights = torch.exp(-0.5 * (distances / sigma) ** 2)
    grid = torch.arange(-reach, reach + 1, device=angles.device)

    def hats(along: Tensor) -> Tensor:  # bilinear shares of each pixel in each step: [N, steps, k]
        return (1 - (grid - (distances * along[:, None])[..., None]).abs()).clamp(min=0)

    kernels = torch.einsum("i,niy,nix->nyx", weights / weights.sum(), hats(angles.sin()), hats(angles.cos()))
    return kernels.contiguous()


def zoomed(images: Tensor, factor: float) -> Tensor:
    """Return the middle of `images`, enlarged linearly by `factor` to their size."""
    height, width = images.shape[-2:]
    inner = [math.ceil(side / factor) for side in (height, width)]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    crop = images[..., top : top + inner[0], left : left + inner[1]]
    size = [max(round(part * factor), side) for part, side in zip(inner, (height, width), strict=True)]
    large = F.interpolate(crop, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[..., top : top + height, left : left + width]


def plasma(uniform: Tensor, decay: float) -> Tensor:
    """Return a fractal of clouds in [0, 1] for each image, [N, 1, side, side], from `uniform` [N, side * side].

    Diamond-square on a torus, side a power of 2: each level of half the step adds noise whose range shrinks by
    `decay` squared.

    SOURCE: Fournier, Fussell and Carpenter 1982; in ImageNet-C a draw's range shrinks, and so does its factor.
    """
    side = math.isqrt(uniform.shape[1])
    noise = 2 * uniform.view(-1, side, side) - 1
    heights = torch.zeros_like(noise)
    step, reach = side, 1.0
    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step].clone()
        pairs = corners + corners.roll(-1, 1)
        middles = (pairs + pairs.roll(-1, 2)) / 4 + reach * noise[:, half::step, half::step]
        heights[:, half::step, half::step] = middles
        above = middles + middles.roll(1, 1) + corners + corners.roll(-1, 2)
        heights[:, ::step, half::step] = above / 4 + reach * noise[:, ::step, half::step]
        beside = middles + middles.roll(1, 2) + corners + corners.roll(-1, 1)
        heights[:, half::step, ::step] = beside / 4 + reach * noise[:, half::step, ::step]
        step, reach = half, reach / decay**2
    low, high = heights.amin((1, 2), keepdim=True), heights.amax((1, 2), keepdim=True)
    return ((heights - low) / (high - low))[:, None]


def plasma_side(images: Tensor) -> int:
    """Return the side of the smallest fractal that covers `images`."""
    return 1 << (max(images.shape[-2:]) - 1).bit_length()
