"""FGSM and PGD: accuracy on images that were changed, within a ball of radius eps, to be misclassified.

Images are pixels in [0, 1]; normalisation is part of the model that is attacked. Everything an attack draws depends
on the sample alone, so results do not depend on how samples are divided into batches and among ranks.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmscale.errors import check_choice, check_range
from gmscale.evaluation.draws import uniform
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.subject import Subject

ATTACKS = ("fgsm", "pgd")
NORMS = ("linf", "l2")

_RELATIVE_STEP = 2.5  # a walk of all steps in one direction would go this many times eps (Madry et al. 2018)
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Attack(Measurement):
    """Top1 under an attack. FGSM is one step without restarts."""

    section: ClassVar[str] = "attacks"
    shown: ClassVar[dict[str, tuple[str, str]]] = {"top1": ("top1 %", ".2f")}

    attack: str
    """fgsm or pgd."""
    norm: str = "linf"
    eps: float
    """Radius of the ball, in pixels of [0, 1]; for l2 of the whole image."""
    steps: int = 1
    restarts: int = 1

    def __post_init__(self) -> None:
        check_choice(self.attack, ATTACKS, "--attack")
        check_choice(self.norm, NORMS, "--norm")
        check_range(self.eps, "--eps", 0, 1 if self.norm == "linf" else math.inf)
        check_range(self.steps, "--steps", 1, whole=True)
        check_range(self.restarts, "--restarts", 1, whole=True)

    @property
    def words(self) -> str:
        norm = {"linf": "L-inf", "l2": "L2"}[self.norm]
        how = f", steps {self.steps}, restarts {self.restarts}" if self.attack == "pgd" else ""
        return f"{self.attack.upper()} {norm} eps {_eps(self.eps)}{how}"

    def measure(self, subject: Subject) -> dict[str, float]:
        """Return the percentage of images that are classified correctly and stay so."""
        model = subject.on_pixels
        counts = torch.zeros(2)  # robust, all
        for pixels, labels, indices in subject.batches():
            _, robust = survivors(model, pixels, labels, indices, self, subject.seed)
            counts += torch.tensor([int(robust.sum()), len(labels)])
        robust_images, all_images = subject.total(counts).tolist()
        return {"top1": 100 * robust_images / all_images}


def fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, *, eps: float, norm: str = "linf") -> Tensor:
    """Return `pixels` [N, C, H, W], moved by `eps` along the gradient of the loss, or its sign, within [0, 1].

    `model` takes pixels, is in evaluation mode, and is left as it is; so for `pgd`.
    """
    return (pixels + eps * _direction(_gradient(model, pixels, labels), norm)).clamp(0, 1)


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
        moved = (attacked + length * _direction(_gradient(model, attacked, labels), norm)).clamp(0, 1)
        # drawn nearer to `pixels` it stays in [0, 1], but for rounding
        attacked = (pixels + _into_ball(moved - pixels, eps, norm)).clamp(0, 1)
    return attacked


def random_start(pixels: Tensor, indices: Tensor, *, eps: float, norm: str, key: tuple[int, int]) -> Tensor:
    """Return a point of the ball of radius `eps` for each image, evenly distributed, shaped like `pixels`.

    It depends on the `key` and on the sample's number in `indices`, int64 [N], not on the other samples.
    """
    draws = uniform(indices.to(pixels.device), pixels[0].numel() + 1, key)
    start = 2 * draws[:, 1:] - 1
    if norm == "linf":
        start = eps * start
    else:
        normal = start.erfinv()  # directions of Gaussian vectors are evenly distributed
        radius = eps * draws[:, :1] ** (1 / normal.shape[1])
        start = radius * normal / normal.norm(dim=1, keepdim=True)
    return start.view(pixels.shape)


def survivors(
    model: nn.Module, pixels: Tensor, labels: Tensor, indices: Tensor, attack: Attack, seed: int
) -> tuple[Tensor, Tensor]:
    """Return which images are classified correctly, and which still are after all restarts: bool [N] each."""
    with torch.no_grad():
        correct = model(pixels).argmax(1) == labels
    robust = correct.clone()
    for restart in range(attack.restarts):
        left = robust.nonzero()[:, 0]
        if len(left) == 0:
            break
        own, targets = pixels[left], labels[left]
        if attack.attack == "fgsm":
            attacked = fgsm(model, own, targets, eps=attack.eps, norm=attack.norm)
        else:
            start = random_start(own, indices[left], eps=attack.eps, norm=attack.norm, key=(seed, restart))
            attacked = pgd(model, own, targets, start, eps=attack.eps, norm=attack.norm, steps=attack.steps)
        with torch.no_grad():
            robust[left] = model(attacked).argmax(1) == targets
    return correct, robust


def _gradient(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of each image's cross-entropy; those of parameters are not computed."""
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        # in double precision the loss of a confident model still has a gradient
        loss = F.cross_entropy(model(pixels).double(), labels, reduction="sum")
        return torch.autograd.grad(loss, pixels)[0]


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the step of length 1 in `norm` that climbs most; none where the gradient is zero."""
    return gradient.sign() if norm == "linf" else gradient / _lengths(gradient).clamp_min(_TINY)


def _into_ball(change: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "linf":
        return change.clamp(-eps, eps)
    return change * (eps / _lengths(change).clamp_min(max(eps, _TINY)))


def _lengths(images: Tensor) -> Tensor:
    """Return the L2 norm of each image, [N, 1, 1, 1]."""
    return torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)


def _eps(eps: float) -> str:
    """Return 4/255 for what is that, as people write radii."""
    steps = round(eps * 255)
    return f"{steps}/255" if steps and math.isclose(eps * 255, steps) else f"{eps:g}"
