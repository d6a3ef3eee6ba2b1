"""Random erasing as timm does it: rectangles of normalised images filled with the mean colour or with noise.

Paper: https://arxiv.org/abs/1708.04896. The rectangles and the noise in them are functions of the samples' seeds
alone, so that they do not depend on how a global batch is divided.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmscale.data.config import AugmentConfig
from gmscale.data.images.draws import ERASING, Streams, number, whole_number

# timm's: area of what one image loses as a share of the image, height : width, tries at a rectangle that fits.
MIN_AREA, MAX_AREA = 0.02, 1 / 3
LOG_RATIO = math.log(0.3), math.log(1 / 0.3)
TRIES = 10


class Erasure(NamedTuple):
    """The rectangles that are erased from the images of one micro-batch."""

    rectangles: Tensor
    """int64 [R, 7], a row for each: turn, image, top, left, height, width, key of its noise. Sorted by turn, the
    rectangle's number within its image: a later one covers an earlier one."""


def draw_erasure(augment: AugmentConfig, image_size: int, seeds: NDArray[np.uint64]) -> Erasure:
    """Draw what is erased from the images of one micro-batch from its samples' seeds [N]."""
    rectangles = []
    streams = Streams()
    for image, seed in enumerate(seeds.tolist()):
        random = streams.start(seed, ERASING)
        if random.random_sample() >= augment.erase_prob:
            continue
        count = 1 + whole_number(random, augment.erase_count)
        for turn in range(count):
            rectangle = _rectangle(image_size, count, random)
            if rectangle is not None:
                key = whole_number(random, 2**53)
                rectangles.append((turn, image, *rectangle, key))
    rectangles.sort()
    return Erasure(torch.tensor(rectangles, dtype=torch.int64).view(-1, 7))


def erase(images: Tensor, erasure: Erasure, mode: Literal["const", "rand", "pixel"]) -> None:
    """Fill the rectangles of normalised float images [N, C, S, S] in channels_last memory, in place.

    They become 0, the mean colour, with `const`; one normal colour each with `rand`; normal noise with `pixel`.
    `erasure` is on the CPU: all sizes are taken from there, so that a GPU does not have to be waited for.
    """
    turns = erasure.rectangles[:, 0]
    areas = erasure.rectangles[:, 4] * erasure.rectangles[:, 5]
    on_device = erasure.rectangles.to(images.device, non_blocking=True)
    first = 0
    for count in turns.bincount().tolist():
        # Rectangles of one turn are in different images: no pixel is written twice, in whatever order.
        own = slice(first, first + count)
        _fill(images, on_device[own], int(areas[own].sum()), mode)
        first += count


def normals(keys: Tensor) -> Tensor:
    """Return three standard normal numbers for each int64 key, as float32 [len(keys), 3].

    A key's bits are scrambled as in SplitMix64 (Steele, Lea and Flood, 2014); 21 of them make one number.
    """
    bits = keys.clone()
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None)):
        # The mask makes an arithmetic shift a logical one.
        bits ^= (bits >> shift).bitwise_and_((1 << 64 - shift) - 1)
        if factor is not None:
            bits *= factor
    shifts = torch.arange(0, 63, 21, device=keys.device)
    numbers = (bits[:, None] >> shifts).bitwise_and_(2**21 - 1).float()
    # The middles of 2 ** 21 equal intervals of (-1, 1), exact in float32.
    return numbers.add_(0.5).mul_(2.0**-20).sub_(1).erfinv_().mul_(math.sqrt(2))


def _rectangle(size: int, count: int, random: np.random.RandomState) -> tuple[int, int, int, int] | None:
    """Return top, left, height, width of one of `count` rectangles, or None if none was found that fits."""
    for _ in range(TRIES):
        area = number(random, MIN_AREA, MAX_AREA) * size**2 / count
        ratio = math.exp(number(random, *LOG_RATIO))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < size and width < size:
            top, left = whole_number(random, size - height + 1), whole_number(random, size - width + 1)
            return top, left, height, width
    return None


def _fill(images: Tensor, rectangles: Tensor, pixels: int, mode: Literal["const", "rand", "pixel"]) -> None:
    """Fill disjoint rectangles of `pixels` pixels in all."""
    size = images.shape[3]
    _, image, top, left, height, width, key = rectangles.unbind(1)
    area = height * width
    start = area.cumsum(0) - area
    # Each erased pixel's rectangle, number in it, and place among the pixels of the whole batch.
    owner = torch.arange(len(rectangles), device=images.device).repeat_interleave(area, output_size=pixels)
    number_inside = torch.arange(pixels, device=images.device) - start[owner]
    across = width[owner]
    row = number_inside.div(across, rounding_mode="floor")
    corner = (image * size + top) * size + left
    place = corner[owner] + row * (size - across) + number_inside
    channels = images.shape[1]
    target = images.permute(0, 2, 3, 1).view(-1, channels)
    if mode == "const":
        target[place] = 0.0
    elif mode == "rand":
        target[place] = normals(key)[owner, :channels]
    else:
        # SplitMix64's own step from one number to the next.
        target[place] = normals(key[owner] + number_inside * -0x61C8864680B583EB)[:, :channels]
