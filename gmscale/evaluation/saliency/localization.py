"""Does a saliency map lie on the object? Scores of maps [N, H, W] against one box an image, [N, 4].

Boxes are x0, y0, x1, y1 in pixels of the map, x1 and y1 excluded, so that pixel (row 0, column 0) is the box
0, 0, 1, 1. All scores are in [0, 1]; larger is better.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SHARE = 0.15  # of the pixels that a map's own box is drawn around, as in the authors' code
MOST_COVERED = 0.5  # of the image by a box: of a larger one any map finds most
_TOLERANCE = 15 / 224  # of the pointing game, as a share of the image's side (Zhang et al. 2016: 15 pixels)
_ROUNDING = 1e-5  # of a map's largest value
_CENTRE_WIDTH = 0.25  # standard deviation of the centred map, as a share of the image's side


class Scores(NamedTuple):
    """How well maps find boxes, [N] each."""

    iou: Tensor
    """Of the true box and the one around the top 15 % of the pixels."""
    ebpg: Tensor
    """Energy-based pointing game."""
    pointing: Tensor
    """Pointing game."""


def scores(maps: Tensor, boxes: Tensor) -> Scores:
    """Return all three scores; the pointing game's tolerance is 15 pixels where the shorter side has 224."""
    tolerance = _TOLERANCE * min(maps.shape[1:])
    return Scores(iou(top_box(maps), boxes), energy_pointing(maps, boxes), pointing(maps, boxes, tolerance))


def judged(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return bool [N]: which images have a single object, whose box covers at most half of the image.

    `boxes` has [K, 4] for each image of `size` height, width. SOURCE: the protocol of the authors of the gradient
    mask (github oiwio/Gradient-Mask-with-LI, tester.py), of Score-CAM before (Wang et al. 2020, section 4.3).
    """
    height, width = size
    return torch.tensor(
        [len(own) == 1 and bool(_areas(own)[0] <= MOST_COVERED * height * width) for own in boxes],
        dtype=torch.bool,
    )


def top_box(maps: Tensor, share: float = SHARE) -> Tensor:
    """Return the box [N, 4] around the largest `share` of the pixels of each map [N, H, W].

    SOURCE: the authors' code (methods/LoG.py): pixels above the (1 - share) quantile. Where none is above it,
    because the map has a plateau there, those that equal it count too: the box of a constant map is the image.
    """
    flat = maps.flatten(1)
    quantile = flat.kthvalue(max(1, int(flat.shape[1] * (1 - share))), dim=1).values[:, None, None]
    above = maps > quantile
    marked = above | ((maps == quantile) & ~above.any((1, 2), keepdim=True))
    edges = []
    for lines in (marked.any(1), marked.any(2)):  # columns, rows
        numbers = torch.arange(lines.shape[1], device=maps.device)
        first = numbers.where(lines, lines.shape[1]).amin(1)
        last = numbers.where(lines, -1).amax(1)
        edges += [first, last + 1]
    x0, x1, y0, y1 = edges
    return torch.stack((x0, y0, x1, y1), 1).float()


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union [N] of boxes `a` and `b`, [N, 4] each, none of them empty."""
    corners = torch.cat((torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])), 1)
    shared = _areas(corners)
    return shared / (_areas(a) + _areas(b) - shared)


def energy_pointing(maps: Tensor, boxes: Tensor) -> Tensor:
    """Return the share [N] of each map's sum that lies in its box; 0 for a map of zeros. Maps are >= 0.

    A pixel that the box covers in part counts in part. SOURCE: the energy-based pointing game of Score-CAM (Wang et
    al. 2020, arXiv 1910.01279, section 4.3); the authors of the gradient mask coded it with the intersection of the
    true and the predicted box in place of the true one.
    """
    rows = _covered(maps.shape[1], boxes[:, 1], boxes[:, 3])
    columns = _covered(maps.shape[2], boxes[:, 0], boxes[:, 2])
    maps = maps / _largest(maps)  # whatever their scale, sums neither vanish nor overflow
    inside = torch.einsum("nhw,nh,nw->n", maps, rows, columns)
    total = maps.sum((1, 2))
    return (inside / total).where(total > 0, 0.0).clamp(max=1)


def pointing(maps: Tensor, boxes: Tensor, tolerance: float) -> Tensor:
    """Return whether the largest value of each map lies in its box or within `tolerance` pixels of it: [N].

    Of several pixels that are the largest, but for rounding, the mean counts: a constant map gains nothing from the
    order of pixels, nor the plateau of a coarse map from the order of sums, which differs between batches. SOURCE:
    Zhang et al. 2016 (arXiv 1608.00507), with a tolerance of 15 pixels.
    """
    down = _distance(maps.shape[1], boxes[:, 1], boxes[:, 3])
    across = _distance(maps.shape[2], boxes[:, 0], boxes[:, 2])
    hit = torch.hypot(down[:, :, None], across[:, None, :]) <= tolerance
    largest = maps >= (1 - _ROUNDING) * maps.amax((1, 2), keepdim=True)
    return (hit & largest).sum((1, 2)) / largest.sum((1, 2))


def centre(maps: Tensor) -> Tensor:
    """Return the map that knows nothing but that objects are in the middle: a Gaussian, shaped like `maps`.

    Photographers centre their objects, so its scores are what a method has to beat.
    """
    rows, columns = (
        torch.exp(-0.5 * (((torch.arange(side, device=maps.device) + 0.5) / side - 0.5) / _CENTRE_WIDTH) ** 2)
        for side in maps.shape[1:]
    )
    return (rows[:, None] * columns).expand_as(maps)


def _areas(boxes: Tensor) -> Tensor:
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0).unbind(1)
    return width * height


def _covered(side: int, low: Tensor, high: Tensor) -> Tensor:
    """Return how much of each pixel along an axis lies between `low` and `high`, [N, side]."""
    left = torch.arange(side, device=low.device)
    return (torch.minimum(left + 1, high[:, None]) - torch.maximum(left, low[:, None])).clamp_min(0)


def _distance(side: int, low: Tensor, high: Tensor) -> Tensor:
    """Return how far each pixel's middle along an axis is from the stretch `low` to `high`, [N, side]."""
    middle = torch.arange(side, device=low.device) + 0.5
    return torch.maximum(low[:, None] - middle, middle - high[:, None]).clamp_min(0)


def _largest(maps: Tensor) -> Tensor:
    largest = maps.amax((1, 2), keepdim=True)
    return largest.where(largest > 0, 1.0)
