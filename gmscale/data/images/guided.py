"""Crops and patches of a training batch that are taken where a saliency map is highest, or at random.

Mixing is SaliencyMix (Uddin et al., https://arxiv.org/abs/2006.01643): the rectangle that an image takes from its
neighbour is centred on the neighbour's most salient pixel. The random guide draws the same sizes: the control.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gmscale.data.config import AugmentConfig
from gmscale.data.images.draws import GUIDING, Streams, number
from gmscale.data.images.mixing import Mix, mix_images, mix_labels


class Guided(NamedTuple):
    """What was drawn for N images of side S."""

    crop: Tensor
    """int64 [N]: side of the crop in pixels, S for none."""
    patch: Tensor
    """int64 [N]: side of the patch that an image takes from its neighbour, 0 for none."""
    places: Tensor
    """float32 [N, 4] in [0, 1): where a random guide takes crop and patch, downwards and across."""


def draw_guided(augment: AugmentConfig, image_size: int, seeds: NDArray[np.uint64], *, mixes: bool) -> Guided:
    """Draw crops and, if it `mixes`, patches for the samples with these seeds [N], each from its own."""
    crop = np.full(len(seeds), image_size, dtype=np.int64)
    patch = np.zeros(len(seeds), dtype=np.int64)
    places = np.empty((len(seeds), 4), dtype=np.float32)
    streams = Streams()
    for i, seed in enumerate(seeds):
        random = streams.start(int(seed), GUIDING)
        if random.random_sample() < augment.guided_crop:
            crop[i] = max(1, round(image_size * np.sqrt(number(random, *augment.guided_crop_scale))))
        if random.random_sample() < augment.guided_mix and mixes:
            patch[i] = int(image_size * np.sqrt(random.random_sample()))  # Beta(1, 1), as SaliencyMix
        places[i] = random.random_sample(4)
    return Guided(*(torch.from_numpy(values) for values in (crop, patch, places)))


def guide(
    images: Tensor, targets: Tensor, drawn: Guided, saliency: Tensor | None, classes: int
) -> tuple[Tensor, Tensor]:
    """Return the images float32 [N, C, S, S], in channels_last memory, and their targets, cropped and then mixed.

    `saliency` [N, S, S] is of these images; None is the random guide. Targets int64 [N] become float32
    [N, classes] if anything is mixed. Cropped images are resized to S (bilinear).
    """
    size = images.shape[-1]
    # asked on the CPU, where they were drawn: a GPU would have to be waited for
    crops, mixes = bool((drawn.crop < size).any()), bool(drawn.patch.any())
    drawn = Guided(*(part.to(images.device, non_blocking=True) for part in drawn))
    if crops:
        if saliency is None:
            tops, lefts = (drawn.places[:, :2] * (size - drawn.crop + 1)[:, None]).long().unbind(1)
        else:
            tops, lefts = best_squares(saliency, drawn.crop)
        images, saliency = _cut(images, saliency, tops, lefts, drawn.crop)
    if not mixes:
        return images, targets
    mix = _mix(drawn, saliency, size)
    mix_images(images, mix)
    return images, mix_labels(targets, mix, classes)


def best_squares(saliency: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first row and column, int64 [N], of the square with most of each map [N, S, S], of its own side.

    `sides` is int64 [N], from 1 to S.
    """
    size = saliency.shape[-1]
    # sums over all squares of a side at once, from sums over the rectangles that begin in the corner
    sums = F.pad(saliency.double().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
    begin = torch.arange(size, device=saliency.device)
    end = begin + sides[:, None]
    fits = end <= size
    ends = end.clamp(max=size)

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return sums.gather(1, (rows[:, :, None] * (size + 1) + columns[:, None, :]).flatten(1))

    begins = begin.expand_as(ends)
    inside = at(ends, ends) - at(begins, ends) - at(ends, begins) + at(begins, begins)
    inside = inside.masked_fill(~(fits[:, :, None] & fits[:, None, :]).flatten(1), -1.0)
    best = inside.argmax(1)
    return best // size, best % size


def _cut(
    images: Tensor, saliency: Tensor | None, tops: Tensor, lefts: Tensor, sides: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the crops, resized to the images' size; images that are not cropped stay bit for bit."""
    size = images.shape[-1]
    cropped = sides < size
    scale = sides / size
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, 0, 2], theta[:, 1, 2] = ((2 * start + sides) / size - 1 for start in (lefts, tops))
    everything = images if saliency is None else torch.cat((images, saliency[:, None].to(images.dtype)), 1)
    grid = F.affine_grid(theta, list(everything.shape), align_corners=False)
    shown = F.grid_sample(everything, grid, padding_mode="border", align_corners=False)
    shown = torch.where(cropped[:, None, None, None], shown, everything)
    found = shown[:, : images.shape[1]].contiguous(memory_format=torch.channels_last)
    return found, None if saliency is None else shown[:, -1]


def _mix(drawn: Guided, saliency: Tensor | None, size: int) -> Mix:
    """Return what each image takes of its neighbour: a square around a point of that one, clipped by the image."""
    if saliency is None:
        y, x = (drawn.places[:, 2:] * size).long().unbind(1)
    else:
        best = saliency.flatten(1).view(-1, 2, size * size).flip(1).flatten(0, 1).argmax(1)
        y, x = best // size, best % size
    position = torch.arange(size, device=drawn.patch.device)
    first, behind = drawn.patch // 2, (drawn.patch + 1) // 2

    def covered(centre: Tensor) -> Tensor:
        return ((position >= (centre - first)[:, None]) & (position < (centre + behind)[:, None])).float()

    down, across = covered(y), covered(x)
    return Mix(1 - down.sum(1) * across.sum(1) / size**2, down, across)
