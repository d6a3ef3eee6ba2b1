"""Auto-PGD: PGD with momentum that chooses the length of its steps itself, for each image.

SOURCE: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", 2020, arXiv 2003.01690, algorithm 1.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmscale.evaluation.attacks.ball import direction, project
from gmscale.evaluation.attacks.losses import Loss, climb, cross_entropy

_MOMENTUM = 0.75  # alpha: the share of the new step
_ENOUGH_RISES = 0.75  # rho
_FIRST_CHECK, _SHORTER, _SHORTEST = 22, 3, 6  # percent of the steps


class _Walk(NamedTuple):
    """The images that are not misclassified yet: one row each."""

    number: Tensor
    """int64 [n]: which of the images"""
    pixels: Tensor
    labels: Tensor
    point: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    length: Tensor
    """[n, 1, 1, 1]: of the next step"""
    rises: Tensor
    """int64 [n]: steps since the last check that raised the loss"""
    checked_loss: Tensor
    """The best loss at the last check"""
    halved: Tensor
    """bool [n]: whether the length was halved there"""


def apgd(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
    loss: Loss = cross_entropy,
) -> Tensor:
    """Return the first misclassified image on the way from `pixels` + `start`, or else the one of the largest loss.

    `pixels` and `start` are [N, C, H, W]. The way has `steps` steps; a misclassified image goes no further.
    """
    found = torch.empty_like(pixels)
    point = project(pixels + start, pixels, eps=eps, norm=norm)
    logits, losses, gradient = climb(model, point, labels, loss)
    walk = _Walk(
        number=torch.arange(len(pixels), device=pixels.device),
        pixels=pixels,
        labels=labels,
        point=point,
        previous=point,
        gradient=gradient,
        loss=losses,
        best=point,
        best_gradient=gradient,
        best_loss=losses,
        length=pixels.new_full((len(pixels), 1, 1, 1), 2 * eps),
        rises=torch.zeros_like(labels),
        checked_loss=losses,
        halved=torch.zeros_like(labels, dtype=torch.bool),
    )
    walk = _unfooled(walk, logits, found)
    since_check = checks(steps)
    for step in range(1, steps + 1):
        if len(walk.number) == 0:
            return found
        moved = project(walk.point + walk.length * direction(walk.gradient, norm), walk.pixels, eps=eps, norm=norm)
        if step > 1:
            moved = walk.point + _MOMENTUM * (moved - walk.point) + (1 - _MOMENTUM) * (walk.point - walk.previous)
            moved = project(moved, walk.pixels, eps=eps, norm=norm)
        logits, losses, gradient = climb(model, moved, walk.labels, loss)
        walk = _unfooled(_arrived(walk, moved, losses, gradient), logits, found)
        if step in since_check:
            walk = _checked(walk, since_check[step])
    found[walk.number] = walk.best
    return found


def checks(steps: int) -> dict[int, int]:
    """Return the steps after which lengths are checked, with the number of steps since the check before.

    They come sooner and sooner: p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06) of all.
    """
    percent = [0, _FIRST_CHECK]
    while percent[-1] <= 100:
        percent.append(percent[-1] + max(percent[-1] - percent[-2] - _SHORTER, _SHORTEST))
    at = sorted({-(-share * steps // 100) for share in percent[:-1]})
    return {step: step - before for before, step in pairwise(at)}


def _unfooled(walk: _Walk, logits: Tensor, found: Tensor) -> _Walk:
    """Return the images that are still classified correctly; of the others, the points go to `found`."""
    right = logits.argmax(1) == walk.labels
    if bool(right.all()):
        return walk
    found[walk.number[~right]] = walk.point[~right]
    return _Walk(*(values[right] for values in walk))


def _arrived(walk: _Walk, point: Tensor, losses: Tensor, gradient: Tensor) -> _Walk:
    better = losses > walk.best_loss
    images = better[:, None, None, None]
    return walk._replace(
        point=point,
        previous=walk.point,
        gradient=gradient,
        loss=losses,
        best=torch.where(images, point, walk.best),
        best_gradient=torch.where(images, gradient, walk.best_gradient),
        best_loss=torch.where(better, losses, walk.best_loss),
        rises=walk.rises + (losses > walk.loss),
    )


def _checked(walk: _Walk, steps: int) -> _Walk:
    """Halve the steps of images whose loss rose too rarely, or whose best has not changed, and go back to it."""
    stuck = ~walk.halved & (walk.best_loss == walk.checked_loss)
    halve = (walk.rises < _ENOUGH_RISES * steps) | stuck
    images = halve[:, None, None, None]
    return walk._replace(
        point=torch.where(images, walk.best, walk.point),
        gradient=torch.where(images, walk.best_gradient, walk.gradient),
        loss=torch.where(halve, walk.best_loss, walk.loss),
        length=torch.where(images, walk.length / 2, walk.length),
        rises=torch.zeros_like(walk.rises),
        checked_loss=walk.best_loss,
        halved=halve,
    )
