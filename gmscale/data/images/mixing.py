"""Mixup and cutmix, drawn as timm draws them, between neighbours of a micro-batch.

Mixup: https://arxiv.org/abs/1710.09412. Cutmix: https://arxiv.org/abs/1905.04899. timm mixes image i with image
N - 1 - i; here 2j and 2j + 1 mix, so that any even division of a global batch mixes the same images.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmscale.data.config import AugmentConfig
from gmscale.data.images.draws import MIXING, Streams, whole_number
from gmscale.errors import UsageError


class Mix(NamedTuple):
    """How much of its neighbour each of N images of side S takes.

    At row y and column x that is down[y] * across[x]: with mixup 1 - lam everywhere, with cutmix 1 within the
    rectangle and 0 outside. Over all pixels it is on average 1 - lam.
    """

    lam: Tensor
    """float32 [N]: share that an image's own label keeps."""
    down: Tensor
    """float32 [N, S]"""
    across: Tensor
    """float32 [N, S]"""


def check_mixing(augment: AugmentConfig, batch_size_per_device: int) -> None:
    """Raise UsageError if images are to be mixed with their neighbours and one of a micro-batch has none."""
    if augment.takes_pairs and batch_size_per_device % 2:
        raise UsageError(
            f"data.batch_size_per_device is {batch_size_per_device}; expected an even number, since augment.mixup, "
            f"cutmix and guided_mix mix pairs of images; nearest: {batch_size_per_device + 1}"
        )


def draw_mix(augment: AugmentConfig, image_size: int, seeds: NDArray[np.uint64]) -> Mix:
    """Draw the mixing of one micro-batch from its samples' seeds [N], N even.

    Whoever shares one draw takes it from the seed of the first among them.
    """
    count = len(seeds)
    assert count % 2 == 0, count
    lam = np.ones(count, dtype=np.float32)
    down = np.zeros((count, image_size), dtype=np.float32)
    across = np.ones((count, image_size), dtype=np.float32)
    sharing = {"batch": count, "pair": 2, "elem": 1}[augment.mix_mode]
    streams = Streams()
    for first in range(0, count, sharing):
        random = streams.start(int(seeds[first]), MIXING)
        if random.random_sample() >= augment.mix_prob:
            continue
        own = slice(first, first + sharing)
        if _cuts(augment, random):
            top, bottom, left, right = _rectangle(augment, image_size, random)
            lam[own] = 1 - (bottom - top) * (right - left) / image_size**2
            down[own, top:bottom] = 1
            across[own, :left] = across[own, right:] = 0
        else:
            lam[own] = random.beta(augment.mixup, augment.mixup)
            down[own] = 1 - lam[own, None]
    return Mix(torch.from_numpy(lam), torch.from_numpy(down), torch.from_numpy(across))


def mix_images(images: Tensor, mix: Mix) -> None:
    """Mix float images [N, C, S, S] in channels_last memory with their neighbours, in place."""
    channels = images.shape[1]
    own, other = images[0::2], images[1::2]
    difference = _rows(other) - _rows(own)
    _rows(own).addcmul_(difference, _shares(mix, 0, channels))
    _rows(other).addcmul_(difference, _shares(mix, 1, channels), value=-1)


def mix_labels(labels: Tensor, mix: Mix, classes: int) -> Tensor:
    """Return int64 labels [N] as float32 [N, classes]: lam of an image's own class, the rest of its neighbour's."""
    one_hot = labels[:, None] == torch.arange(classes, device=labels.device)
    neighbour = one_hot.view(-1, 2, classes).flip(1).view(-1, classes)
    lam = mix.lam[:, None]
    return one_hot * lam + neighbour * (1 - lam)


def _cuts(augment: AugmentConfig, random: np.random.RandomState) -> bool:
    cutmix = augment.cutmix > 0 or augment.cutmix_minmax is not None
    if cutmix and augment.mixup > 0:
        return random.random_sample() < augment.mix_switch_prob
    return cutmix


def _rectangle(augment: AugmentConfig, size: int, random: np.random.RandomState) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of what is cut out: a square clipped by the image, or what minmax allows."""
    if augment.cutmix_minmax is not None:
        # timm leaves out the largest side, and cannot draw where it is also the smallest.
        low, high = (int(size * share) for share in augment.cutmix_minmax)
        height, width = (low + whole_number(random, max(high - low, 1)) for _ in range(2))
        top, left = whole_number(random, size - height + 1), whole_number(random, size - width + 1)
        return top, top + height, left, left + width
    side = int(size * np.sqrt(1 - random.beta(augment.cutmix, augment.cutmix)))
    y, x = whole_number(random, size), whole_number(random, size)
    ends = (end for centre in (y, x) for end in (centre - side // 2, centre + (side + 1) // 2))
    top, bottom, left, right = (min(max(end, 0), size) for end in ends)
    return top, bottom, left, right


def _rows(images: Tensor) -> Tensor:
    """View [n, C, H, W] in channels_last memory as rows [n, H, C W], which a CPU works through fastest."""
    n, channels, height, width = images.shape
    return images.permute(0, 2, 3, 1).view(n, height, width * channels)


def _shares(mix: Mix, parity: int, channels: int) -> Tensor:
    """Return what every second image, from that at `parity` on, takes of its neighbour: [N / 2, S, C S]."""
    across = mix.across[parity::2].repeat_interleave(channels, dim=1)
    return mix.down[parity::2, :, None] * across[:, None, :]
