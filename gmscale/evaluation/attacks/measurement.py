"""Top1 under an attack, as an entry of the scorecard."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gmscale import robustness
from gmscale.errors import UsageError, check_choice, check_range
from gmscale.evaluation.attacks.auto_pgd import apgd
from gmscale.evaluation.attacks.ball import NORMS, random_start
from gmscale.evaluation.attacks.gradient import fgsm, pgd
from gmscale.evaluation.attacks.losses import cross_entropy, dlr
from gmscale.evaluation.attacks.squares import square
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.subject import OnPixels, PixelBatch, Subject

ATTACKS = tuple(robustness.NAMES)

_APGD_LOSSES = {"apgd-ce": cross_entropy, "apgd-dlr": dlr}


@dataclass(frozen=True, kw_only=True)
class Attack(Measurement):
    """Top1 under an attack. FGSM is one step without restarts."""

    section: ClassVar[str] = "attacks"
    shown: ClassVar[dict[str, tuple[str, str]]] = {"top1": ("top1 %", ".2f"), "clean_top1": ("without %", ".2f")}

    attack: str
    """fgsm, pgd, apgd-ce and apgd-dlr use the model's gradients; square its scores; transfer the surrogates'
    gradients, with PGD."""
    norm: str = "linf"
    eps: float
    """Radius of the ball, in pixels of [0, 1]; for l2 of the whole image."""
    steps: int = 1
    """Of square, the queries of an image."""
    restarts: int = 1
    """Random starts, all of which must fail."""
    images: int | None = None
    """How many are attacked, evenly spread over the split; None for all."""
    surrogate: str = ""
    """transfer: which weights the images are made on, the beginning of their SHA-256; the command fills it in."""

    def __post_init__(self) -> None:
        check_choice(self.attack, ATTACKS, "--attack")
        check_choice(self.norm, NORMS, "--norm")
        check_range(self.eps, "--eps", 0, 1 if self.norm == "linf" else math.inf)
        check_range(self.steps, "--queries" if self.attack == "square" else "--steps", 1, whole=True)
        check_range(self.restarts, "--restarts", 1, whole=True)
        if self.images is not None:
            check_range(self.images, "--attack_images", 1, whole=True)

    @property
    def words(self) -> str:
        return robustness.described(asdict(self))

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return top1 and clean_top1: the percentages of the images that stay correct, and that were.

        Of square also the mean `queries` of the images that it broke, None if there are none. Raises UsageError for
        transfer without surrogates.
        """
        surrogates = self._surrogates(subject)
        model = subject.on_pixels
        sums = torch.zeros(4, dtype=torch.float64)  # all, correct, robust, queries of the broken
        for batch in subject.batches(self.images):
            correct, robust, queries = survivors(model, *batch, self, subject.seed, surrogates)
            broken = correct & ~robust
            of_batch = (torch.ones_like(queries), correct, robust, queries * broken)
            sums += torch.stack([values.double().sum() for values in of_batch]).cpu()
        count, clean, left, queries_of_broken = subject.total(sums).tolist()
        found: dict[str, Any] = {"top1": 100 * left / count, "clean_top1": 100 * clean / count}
        if self.attack == "square":
            found["queries"] = queries_of_broken / (clean - left) if clean > left else None
        return found

    def _surrogates(self, subject: Subject) -> list[OnPixels]:
        if self.attack != "transfer":
            return []
        if not subject.surrogates:
            raise UsageError("--attack transfer needs --baseline RUN: images are made on the baselines' models")
        return [OnPixels(surrogate, subject.config.data) for surrogate in subject.surrogates]


class Survivors(NamedTuple):
    """What an attack left of a batch."""

    correct: Tensor
    """bool [N]: classified correctly before"""
    robust: Tensor
    """bool [N]: and still after all restarts"""
    queries: Tensor
    """int64 [N]: of the attack square, over all restarts; of others 0"""


def survivors(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    indices: Tensor,
    attack: Attack,
    seed: int,
    surrogates: Sequence[nn.Module] = (),
) -> Survivors:
    """Attack the images [N, C, H, W] that `model` classifies correctly; each restart only those still left.

    `model` and `surrogates` take pixels. A transferred attack is made on each surrogate; all must fail.
    """
    correct = _is_right(model, pixels, labels)
    robust, queries = correct.clone(), torch.zeros_like(labels)
    for restart in range(attack.restarts):
        for source in surrogates if attack.attack == "transfer" else (model,):
            left = robust.nonzero()[:, 0]
            if len(left) == 0:
                return Survivors(correct, robust, queries)
            own = PixelBatch(pixels[left], labels[left], indices[left])
            attacked, used = _attacked(source, own, attack, (seed, restart))
            robust[left] = _is_right(model, attacked, own.labels)
            queries[left] += used
    return Survivors(correct, robust, queries)


def _attacked(
    model: nn.Module, batch: PixelBatch, attack: Attack, key: tuple[int, int]
) -> tuple[Tensor, Tensor | int]:
    """Return attacked images, and how many queries each took."""
    (pixels, labels, indices), eps, norm, steps = batch, attack.eps, attack.norm, attack.steps
    if attack.attack == "fgsm":
        return fgsm(model, pixels, labels, eps=eps, norm=norm), 0
    if attack.attack == "square":
        return square(model, pixels, labels, indices, eps=eps, norm=norm, queries=steps, key=key)
    start = random_start(pixels, indices, eps=eps, norm=norm, key=key)
    if attack.attack in _APGD_LOSSES:
        loss = _APGD_LOSSES[attack.attack]
        return apgd(model, pixels, labels, start, eps=eps, norm=norm, steps=steps, loss=loss), 0
    return pgd(model, pixels, labels, start, eps=eps, norm=norm, steps=steps), 0


@torch.no_grad()
def _is_right(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    right: Tensor = model(pixels).argmax(1) == labels
    return right
