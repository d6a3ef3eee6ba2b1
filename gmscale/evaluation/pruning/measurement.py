"""Pruning as a measurement: what goes, whether what is left is trained, and what that does to the accuracy."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Self

from torch import Tensor

from gmscale.errors import UsageError, check_choice, check_range
from gmscale.evaluation.accuracy import evaluate
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.pruning.channels import channels, without_channels
from gmscale.evaluation.pruning.cost import cost
from gmscale.evaluation.pruning.finetuning import finetune
from gmscale.evaluation.pruning.smallest import Pruned, fitting_pattern, prunable, pruned, zeros
from gmscale.evaluation.subject import Subject

HOW = ("global", "layer", "structured")

_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


@dataclass(frozen=True)
class Pruning(Measurement):
    """Top1 and top5 without a share of the weights, and what the model then costs."""

    section: ClassVar[str] = "pruning"
    shown: ClassVar[dict[str, tuple[str, str]]] = {
        "top1": ("top1 %", ".2f"),
        "measured": ("weights gone", ".2%"),
        "flops_share": ("FLOPs left", ".2%"),
    }

    sparsity: float
    """Share of the weights that go; for structured, of the channels."""
    how: str = "global"
    """global: the smallest of all weights; layer: of each layer; structured: whole channels of each layer; or N:M,
    such as 2:4, the smallest of each M neighbouring inputs but N, which is a sparsity of 1 - N/M."""
    finetune: int = 0
    """Optimizer steps of fine-tuning after pruning."""

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UsageError(f"--prune is {self.sparsity:g}; expected a share between 0 and 1, such as 0.8")
        if ":" in self.how:
            n, m = _pattern(self.how)
            assert math.isclose(self.sparsity, 1 - n / m), (
                f"{self.how} leaves out another share than {self.sparsity}"
            )
        else:
            check_choice(self.how, HOW, "--prune_how")
        check_range(self.finetune, "--finetune", 0, whole=True)

    @classmethod
    def parse(cls, word: str, how: str = "global", finetune: int = 0) -> Self:
        """Return the measurement that --prune asks for by a share, such as 0.8 or 4/5, or a pattern, such as 2:4.

        Raises UsageError for what is neither, and for a pattern of whole channels.
        """
        word = word.strip()
        if ":" in word:
            if how == "structured":
                raise UsageError(
                    f"--prune is {word}, which is of single weights; --prune_how structured needs a share"
                )
            n, m = _pattern(word)
            return cls(1 - n / m, f"{n}:{m}", finetune)
        try:
            sparsity = float(Fraction(word))
        except (ValueError, ArithmeticError):
            raise UsageError(f"--prune is {word!r}; expected a number such as 0.8, or N:M such as 2:4") from None
        return cls(sparsity, how, finetune)

    @property
    def trains(self) -> bool:
        return self.finetune > 0

    @property
    def words(self) -> str:
        share = f"{100 * self.sparsity:g} %"
        said = {
            "global": f"pruned by {share}",
            "layer": f"pruned by {share} in each layer",
            "structured": f"{share} of channels pruned",
        }.get(self.how, f"pruned {self.how}")
        steps = "1 step" if self.finetune == 1 else f"{self.finetune} steps"
        return f"{said}, {steps} of fine-tuning" if self.finetune else said

    def check(self, subject: Subject) -> None:
        """Raise UsageError if no layer fits the pattern."""
        if ":" in self.how:
            fitting_pattern(subject.model, self.how)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return what is left; a collective.

        measured is the share of the weights of convolutions and linear layers that are zero or gone; parameters is
        how many of all are left, flops what a dense model of that shape computes for one image, and flops_nonzero
        what is left of that without products with zero, with their shares of the original. structured adds
        channels, the share of them that is gone, and N:M the layers_left_whole, which it does not fit.
        """
        config = subject.config.data
        if self.how == "structured":
            sparse = Pruned(without_channels(subject.model, self.sparsity, config), {})
        else:
            sparse = pruned(subject.model, self.sparsity, self.how)
        if self.finetune:
            finetune(sparse, subject, self.finetune)
        result = evaluate(sparse.model, subject.loader, config, subject.world)
        before, after = cost(subject.model, config), cost(sparse.model, config)
        left, had = prunable(sparse.model), prunable(subject.model)
        found: dict[str, Any] = {
            "measured": 1 - (_size(left) - zeros(left)) / _size(had),
            "top1": result["top1"],
            "top5": result["top5"],
            "parameters": after.parameters,
            "parameters_share": after.parameters / before.parameters,
            "flops": after.flops,
            "flops_nonzero": after.flops_nonzero,
            "flops_share": after.flops_nonzero / before.flops,
        }
        if self.how == "structured":
            found["channels"] = 1 - channels(sparse.model) / channels(subject.model)
        elif ":" in self.how:
            found["layers_left_whole"] = list(sparse.whole)
        return found


def _pattern(word: str) -> tuple[int, int]:
    found = _PATTERN.fullmatch(word)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise UsageError(f"--prune is {word!r}; expected N:M with N below M, such as 2:4")
    return n, m


def _size(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.numel() for weight in weights.values())
