"""Accuracy on corrupted images: of the corruptions made here, and of ImageNet-C's folders."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gmscale import parallel
from gmscale.corruption_error import EXTRA, FAMILIES, SEVERITIES
from gmscale.errors import UsageError, check_choice, check_range
from gmscale.evaluation.corruptions.corrupt import severities
from gmscale.evaluation.folder import folder_batches, folder_labels
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.subject import PixelBatch, Subject

_SHOWN = {"mean_top1": ("mean top1 %", ".2f"), "clean_top1": ("clean top1 %", ".2f")}


@dataclass(frozen=True, kw_only=True)
class Corruption(Measurement):
    """Top1 under one family of corruptions at its five severities."""

    section: ClassVar[str] = "corruptions"
    shown: ClassVar[dict[str, tuple[str, str]]] = _SHOWN

    family: str
    """One of FAMILIES or EXTRA."""
    images: int | None = None
    """How many images, spread over the split; None for all."""

    def __post_init__(self) -> None:
        check_choice(self.family, (*FAMILIES, *EXTRA), "--corrupt")
        if self.images is not None:
            check_range(self.images, "--corrupt_images", 1, whole=True)

    @property
    def words(self) -> str:
        return self.family.replace("_", " ") + ("" if self.images is None else f", {self.images} images")

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return top1 of each severity, their mean and the mean error, and top1 on the same images as they are."""
        if self.family == "saturate" and subject.config.data.channels == 1:
            raise UsageError("--corrupt is 'saturate', which needs colour; this model's data.channels is 1")
        model = subject.on_pixels
        counts = torch.zeros(2 + len(SEVERITIES))  # images, right as they are, right at each severity
        for pixels, labels, indices in subject.batches(self.images):
            versions = (pixels, *severities(pixels, self.family, indices, subject.seed))
            counts += torch.tensor([len(labels), *(_right(model, version, labels) for version in versions)])
        images, clean, *right = subject.total(counts).tolist()
        return _found([100 * number / images for number in right], 100 * clean / images)


@dataclass(frozen=True, kw_only=True)
class CorruptedFolder(Measurement):
    """Top1 on one family of ImageNet-C itself, or of a set that is laid out like it."""

    section: ClassVar[str] = "corruptions"
    shown: ClassVar[dict[str, tuple[str, str]]] = _SHOWN

    path: str
    """Folder of FAMILY/SEVERITY/CLASS/IMAGE."""
    family: str
    """One of FAMILIES or EXTRA."""

    def __post_init__(self) -> None:
        check_choice(self.family, (*FAMILIES, *EXTRA), "family of --corrupt_folder")
        for severity in SEVERITIES:
            if not self._of(severity).is_dir():
                raise UsageError(
                    f"--corrupt_folder {self.path} has no folder {self.family}/{severity}; "
                    f"expected {self.family}/1 to {self.family}/{len(SEVERITIES)} with a folder a class in each"
                )

    @staticmethod
    def all_in(path: Path) -> tuple["CorruptedFolder", ...]:
        """Return one for each family that `path` has. Raises UsageError if it has none."""
        families = [family for family in (*FAMILIES, *EXTRA) if (path / family).is_dir()]
        if not families:
            what = f"has no folder of a family such as {FAMILIES[0]}" if path.is_dir() else "is not a folder"
            raise UsageError(f"--corrupt_folder {path} {what}; expected DIR/FAMILY/SEVERITY/CLASS/IMAGE")
        return tuple(CorruptedFolder(path=str(path), family=family) for family in families)

    @property
    def words(self) -> str:
        return f"{self.family.replace('_', ' ')} of {self.path}"

    def check(self, subject: Subject) -> None:
        """Raise UsageError if a severity's class folders are not the model's classes."""
        with parallel.together(subject.world):
            for severity in SEVERITIES:
                folder_labels(self._of(severity), subject.classes)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return what Corruption.measure does; the images as they are, are those of the subject."""
        model = subject.on_pixels
        right = [_top1(model, folder_batches(self._of(severity), subject), subject) for severity in SEVERITIES]
        return _found(right, _top1(model, subject.batches(), subject))

    def _of(self, severity: int) -> Path:
        return Path(self.path) / self.family / str(severity)


def _found(top1: list[float], clean: float) -> dict[str, Any]:
    mean = sum(top1) / len(top1)
    return {"top1": top1, "mean_top1": mean, "error": 100 - mean, "clean_top1": clean}


def _top1(model: nn.Module, batches: Iterable[PixelBatch], subject: Subject) -> float:
    counts = torch.zeros(2)
    for pixels, labels, _ in batches:
        counts += torch.tensor([len(labels), _right(model, pixels, labels)])
    images, right = subject.total(counts).tolist()
    return 100 * right / images


@torch.no_grad()
def _right(model: nn.Module, pixels: Tensor, labels: Tensor) -> int:
    return int((model(pixels).argmax(1) == labels).sum())
