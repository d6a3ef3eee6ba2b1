"""Saliency maps: do they lie on the objects, does the model need what they show, do they show what it learned?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gmscale import parallel
from gmscale.data import StreamValLoader
from gmscale.errors import UsageError, check_choice, check_range
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.saliency.boxes import Boxes
from gmscale.evaluation.saliency.deletion import deletion, insertion
from gmscale.evaluation.saliency.localization import centre, judged, scores
from gmscale.evaluation.saliency.maps import METHODS, saliency
from gmscale.evaluation.saliency.randomisation import randomised, similarity
from gmscale.evaluation.subject import PixelBatch, Subject

_COUNTS = ("annotated", "correct", "count")
_OF_CORRECT = ("deletion", "insertion", "randomisation")
_OF_JUDGED = ("iou", "ebpg", "pointing", "centre_iou", "centre_ebpg", "centre_pointing")
_NAMES = (*_COUNTS, *_OF_CORRECT, *_OF_JUDGED)


@dataclass(frozen=True)
class Saliency(Measurement):
    """Saliency maps of the true class, on correctly classified images.

    Localization follows the protocol of the gradient mask's authors: only images with a single object whose box
    covers at most half of what the model sees. What is named centre_ is of a map that only knows that objects are
    in the middle.
    """

    section: ClassVar[str] = "saliency"
    shown: ClassVar[dict[str, tuple[str, str]]] = {
        "iou": ("IoU", ".3f"),
        "ebpg": ("EBPG", ".3f"),
        "pointing": ("pointing", ".3f"),
        "deletion": ("deletion", ".3f"),
        "insertion": ("insertion", ".3f"),
    }

    method: str
    """How maps are made, one of METHODS."""
    images: int | None = 100
    """How many, evenly spread over the split; None for all."""
    boxes: str | None = None
    """Where the objects' boxes are: see Boxes. None for those in the shards, if there are any."""

    def __post_init__(self) -> None:
        check_choice(self.method, METHODS, "--saliency")
        if self.images is not None:
            check_range(self.images, "--saliency_images", 1, whole=True)
        if self.boxes is not None and not Path(self.boxes).exists():
            raise UsageError(
                f"--boxes {self.boxes}: there is no such file or folder; expected a folder of XML files, or JSON"
            )

    @property
    def words(self) -> str:
        return f"saliency {self.method}, " + ("all images" if self.images is None else f"{self.images} images")

    def check(self, subject: Subject) -> None:
        """Raise UsageError if `boxes` is given and holds none."""
        with parallel.together(subject.world):
            open_boxes(subject, self.boxes)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return means over the images, in [0, 1]; None for what no image has.

        correct: how many images are classified correctly; over these deletion, insertion, and randomisation, the
        rank correlation of each map with that of the model once all its weights are drawn anew: near 0 if maps
        show what was learned. count: how many of them localization is judged on; over these iou, ebpg, pointing,
        and the centre's. note: why localization is missing, None if it is not. Raises UsageError if `boxes` is
        given and has none of these images.
        """
        with parallel.together(subject.world):
            sums = self._sums(subject)
        found = dict(zip(_NAMES, subject.total(sums).tolist(), strict=True))
        annotated, correct, count = (int(found.pop(name)) for name in _COUNTS)
        if self.boxes is not None and not annotated:
            raise UsageError(
                f"--boxes {self.boxes} has no box of the {subject.count(self.images)} images that are measured; "
                "expected boxes by the samples' keys, or by the names of the images that they were made from"
            )
        note = None
        if not annotated:
            note = "The images have no boxes: localization is left out."
        elif not count:
            note = "No image with a box is classified correctly and has one object on at most half of it."
        means = {name: found[name] / correct if correct else None for name in _OF_CORRECT}
        means |= {name: found[name] / count if count else None for name in _OF_JUDGED}
        return {"correct": correct, "count": count, **means, "note": note}

    def _sums(self, subject: Subject) -> Tensor:
        """Return this rank's sums, float64 in the order of _NAMES."""
        boxes = open_boxes(subject, self.boxes)
        *_, (_, blank) = randomised(subject.model, subject.seed)
        random = subject.of(blank)
        sums = torch.zeros(len(_NAMES), dtype=torch.float64)
        for batch in subject.batches(self.images):
            sums += self._of_batch(subject, random, batch, boxes).cpu()
        return sums

    def _of_batch(self, subject: Subject, random: Subject, batch: PixelBatch, boxes: Boxes | None) -> Tensor:
        model, device = subject.on_pixels, batch.pixels.device
        objects = boxes.of(batch.indices.tolist()) if boxes else [torch.empty(0, 4)] * len(batch.labels)
        annotated = sum(len(own) > 0 for own in objects)
        with torch.no_grad():
            right = (model(batch.pixels).argmax(1) == batch.labels).nonzero()[:, 0]
        pixels, labels, indices = (values[right] for values in batch)
        if len(right) == 0:
            sums = torch.zeros(len(_NAMES), dtype=torch.float64)
            sums[0] = annotated
            return sums

        maps, random_maps = (
            saliency(one.on_pixels, pixels, labels, self.method, indices=indices, seed=subject.seed)
            for one in (subject, random)
        )
        of_correct = (
            deletion(model, pixels, labels, maps, model.mean),
            insertion(model, pixels, labels, maps),
            similarity(maps, random_maps),
        )
        objects = [objects[i] for i in right.tolist()]
        chosen = judged(objects, (maps.shape[1], maps.shape[2]))
        own = torch.cat([torch.empty(0, 4), *(box for box, yes in zip(objects, chosen, strict=True) if yes)])
        maps, own = maps[chosen.to(device)], own.to(device)
        of_judged = (*scores(maps, own), *scores(centre(maps), own))
        counts = (annotated, len(right), len(own))
        sums = torch.stack([values.double().sum() for values in (*of_correct, *of_judged)])
        return torch.cat((torch.tensor(counts, dtype=torch.float64), sums.cpu()))


def open_boxes(subject: Subject, path: str | None) -> Boxes | None:
    """Return the boxes of a subject's images; None for a stream, whose samples cannot be looked up."""
    if not isinstance(subject.loader, StreamValLoader):
        return Boxes(subject.loader.index, subject.config.data, path)
    if path is not None:
        raise UsageError("--boxes needs data.access index; this run's is stream")
    return None
