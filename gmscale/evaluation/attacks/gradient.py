"""FGSM (Goodfellow et al. 2015, arXiv 1412.6572) and PGD (Madry et al. 2018, arXiv 1706.06083)."""

from torch import Tensor, nn

from gmscale.evaluation.attacks.ball import direction, project
from gmscale.evaluation.attacks.losses import climb, cross_entropy

_RELATIVE_STEP = 2.5  # a walk of all steps in one direction would go this many times eps (Madry et al. 2018)


def fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, *, eps: float, norm: str = "linf") -> Tensor:
    """Return `pixels` [N, C, H, W], moved by `eps` along the gradient of the loss, or its sign, within [0, 1].

    `model` takes pixels, is in evaluation mode, and is left as it is; so for the other attacks.
    """
    return (pixels + eps * direction(_gradient(model, pixels, labels), norm)).clamp(0, 1)


def pgd(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
) -> Tensor:
    """Return `pixels` after `steps` steps uphill in the loss from `pixels` + `start`, each of 2.5 eps / steps.

    After each step they are cut to [0, 1] and projected into the ball of radius `eps` around `pixels`.
    """
    length = _RELATIVE_STEP * eps / steps
    attacked = (pixels + start).clamp(0, 1)
    for _ in range(steps):
        moved = attacked + length * direction(_gradient(model, attacked, labels), norm)
        attacked = project(moved, pixels, eps=eps, norm=norm)
    return attacked


def _gradient(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    return climb(model, pixels, labels, cross_entropy)[2]
