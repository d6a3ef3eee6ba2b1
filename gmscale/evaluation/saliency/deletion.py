"""Does the model need what a saliency map shows it? Its probability while pixels go or come, most salient first."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

STEPS = 16
# RISE's blur of 224 pixels: a kernel of 11 pixels, sigma 5. Larger images take more, but smaller ones no less: with
# a kernel of 3 pixels a small network knew images of 64 pixels as well as sharp ones (with 11: half as well).
_BLUR_RADIUS, _RISE_SIDE = 5, 224


def deletion(
    model: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
    maps: Tensor,
    grey: Tensor,
    steps: int = STEPS,
) -> Tensor:
    """Return the area [N] under the label's probability while pixels become `grey`; smaller is better.

    `model` takes pixels [N, C, H, W] and returns logits, `maps` [N, H, W] says in which order pixels go, and `grey`
    [C, 1, 1] is the data's mean, which is zero once normalised. SOURCE: RISE (Petsiuk et al. 2018, arXiv
    1806.07421, section 4.1).
    """
    return _area(probabilities(model, pixels, grey.expand_as(pixels), labels, maps, steps))


def insertion(
    model: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, maps: Tensor, steps: int = STEPS
) -> Tensor:
    """Return the area [N] under the label's probability while a blurred image becomes sharp; larger is better.

    Arguments and source as those of `deletion`. A blurred start has no sharp edges of its own, as grey would.
    """
    return _area(probabilities(model, blurred(pixels), pixels, labels, maps, steps))


@torch.no_grad()
def probabilities(
    model: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, labels: Tensor, maps: Tensor, steps: int
) -> Tensor:
    """Return the labels' softmax probability [N, steps + 1] while the pixels of `start` become those of `end`.

    After step k the k / steps most salient pixels have changed, in all channels. Equally salient ones follow in an
    arbitrary order, the same for every image.
    """
    shuffled = torch.randperm(maps[0].numel(), generator=torch.Generator().manual_seed(0)).to(maps.device)
    order = shuffled[maps.flatten(1)[:, shuffled].argsort(stable=True, dim=1, descending=True)]
    turn = order.argsort(1).view(maps.shape)  # of each pixel: 0 goes first
    found = []
    for step in range(steps + 1):
        changed = turn < round(step * turn[0].numel() / steps)
        logits = model(torch.where(changed[:, None], end, start))
        found.append(logits.float().softmax(1).gather(1, labels[:, None])[:, 0])
    return torch.stack(found, 1)


def blurred(pixels: Tensor) -> Tensor:
    """Return images [N, C, H, W] without their details."""
    radius = max(_BLUR_RADIUS, round(_BLUR_RADIUS * min(pixels.shape[2:]) / _RISE_SIDE))
    return gaussian_blur(pixels, [2 * radius + 1] * 2, [float(radius)] * 2)


def _area(curve: Tensor) -> Tensor:
    """Return the area under [N, steps + 1] equally spaced values over an interval of length 1, by trapezoids."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1))
