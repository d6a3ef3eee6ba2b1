"""Other judges of the same model: reassessed labels, and sets of images that only look otherwise."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmscale import parallel
from gmscale.data import ShardIndex, ValLoader, order
from gmscale.data.index import fetch_shard
from gmscale.data.tars.scan import key_and_kind
from gmscale.data.tars.tar import members
from gmscale.errors import RunError, UsageError
from gmscale.evaluation.accuracy import hits, judged, shares
from gmscale.evaluation.folder import Folder, open_folder, uint8_batches
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.subject import Subject

_SHOWN = {"top1": ("top1 %", ".2f"), "top5": ("top5 %", ".2f"), "top1_within": ("among its classes %", ".2f")}
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class RealLabels(Measurement):
    """Top1 by ImageNet's reassessed labels: a prediction among an image's labels is right; some images have none.

    SOURCE: Beyer et al., Are we done with ImageNet? (2020), arXiv 2006.07159, and its real.json. Labels are numbers
    of classes in the order of their WordNet ids, which must be the model's.
    """

    section: ClassVar[str] = "shifts"
    shown: ClassVar[dict[str, tuple[str, str]]] = _SHOWN

    path: str
    """JSON: a list with the labels of ILSVRC2012_val_00000001 and so on, or an object from names to labels."""
    name: str = "ReaL"
    """What the page calls it."""

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise UsageError(f"--real {self.path}: no such file; expected real.json of ImageNet's ReaL labels")

    @property
    def words(self) -> str:
        return f"{self.name} labels"

    def check(self, subject: Subject) -> None:
        """Read the labels. Raises UsageError if they do not fit the images."""
        self._labels(subject)

    @torch.no_grad()
    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return top1 in percent of the images that have a label, None if none has, and count, their number."""
        loader, device = subject.loader, subject.world.device
        chosen, first = self._labels(subject)
        table = _padded(chosen).to(device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        done, share = 0, -(-subject.count() // subject.world.size)
        for logits, labels, indices in judged(subject.model, loader, subject.config.data, subject.world):
            right = table[(indices - first).to(device, non_blocking=True)]
            correct = (logits.argmax(1)[:, None] == right).any(1)
            sums += torch.stack((correct.sum(), (right >= 0).any(1).sum()))
            done += len(labels)
            subject.progress(done, share)
        correct_ones, count = subject.total(sums).tolist()
        return {"top1": 100 * correct_ones / count if count else None, "count": int(count)}

    def _labels(self, subject: Subject) -> tuple[list[Sequence[int]], int]:
        """Return the labels of this rank's images, and the first one's number; a collective."""
        loader, world = subject.loader, subject.world
        with parallel.together(world):
            if not isinstance(loader, ValLoader):
                raise UsageError("--real needs samples' names and so data.access index; this run's is stream")
            mine = order.rank_share(len(loader.index), world.rank, world.size)
            found = _read_labels(Path(self.path), len(loader.classes))
            labels = [_labels_of(name, found, self.path) for name in sample_names(loader.index, mine)]
        return labels, int(mine[0]) if len(mine) else 0


@dataclass(frozen=True)
class FolderAccuracy(Measurement):
    """Accuracy on a folder of class folders such as ImageNet-A, -R, -Sketch or -V2.

    Sets of some of the classes are also judged among these alone, the others' logits left out: `top1_within` is the
    figure that ImageNet-A (Hendrycks et al. 2021, arXiv 1907.07174) and -R (2006.16241) are reported with.
    """

    section: ClassVar[str] = "shifts"
    shown: ClassVar[dict[str, tuple[str, str]]] = _SHOWN

    name: str
    """What the page calls it."""
    path: str
    """Folders are named as the run's classes are, or by their numbers as in ImageNet-V2."""

    def __post_init__(self) -> None:
        if not Path(self.path).is_dir():
            raise UsageError(f"--folder {self.name}={self.path}: no such directory; expected a folder of classes")

    @property
    def words(self) -> str:
        return self.name

    def check(self, subject: Subject) -> None:
        """List the images. Raises UsageError if their classes are not the model's."""
        with parallel.together(subject.world):
            self._open(subject)

    @torch.no_grad()
    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return top1, top5, loss, count, `classes` (how many there are), and, where they are not all of the
        model's, top1_within in percent."""
        with parallel.together(subject.world):
            folder = self._open(subject)
        device = subject.world.device
        outputs = torch.from_numpy(folder.outputs).to(device)
        sums, within = (torch.zeros(n, dtype=torch.float64, device=device) for n in (4, 1))
        batches = uint8_batches(folder, subject)
        for logits, labels, _ in judged(subject.model, batches, subject.config.data, subject.world):
            sums += hits(logits, labels)
            within += (outputs[logits[:, outputs].argmax(1)] == labels).sum()
        found: dict[str, Any] = {**shares(subject.total(sums)), "classes": len(outputs)}
        right = subject.total(within).item()
        if len(outputs) < _outputs(subject):
            found["top1_within"] = 100 * right / len(folder)
        return found

    def _open(self, subject: Subject) -> Folder:
        folder = open_folder(Path(self.path), subject.classes)
        if (largest := int(folder.outputs[-1])) >= _outputs(subject):
            raise UsageError(
                f"--folder {self.name}={self.path} has class {largest}; the model has {_outputs(subject)} classes"
            )
        return folder


def sample_names(index: ShardIndex, samples: NDArray[np.int64]) -> list[str]:
    """Return what ascending `samples` are called: their webdataset keys, or the files that they were made of.

    `gmscale shards build` lists those files beside its shards. Of each shard the headers are read once.
    """
    files = _files_by_key(index)
    shard_of = np.searchsorted(np.cumsum(index.lengths), samples, side="right")
    names: list[str] = []
    for shard in np.unique(shard_of):
        at = _keys_by_offset(index, int(shard))
        for offset in index.offset[samples[shard_of == shard]].tolist():
            if offset not in at:
                raise RunError(
                    f"{index.split.directory}/{index.split.names[shard]} has changed since it was indexed: no "
                    f"sample begins at byte {offset}"
                )
            names.append(files.get(at[offset], at[offset]))
    return names


def _files_by_key(index: ShardIndex) -> dict[str, str]:
    try:
        text = index.split.directory.fetch(f"_sources-{index.split.name}.txt").read_bytes()
    except FileNotFoundError:
        return {}
    lines = text.decode("utf-8", "surrogateescape").splitlines()
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def _keys_by_offset(index: ShardIndex, shard: int) -> dict[int, str]:
    """Return the key that each member of a shard belongs to, by the byte at which its contents begin."""
    named = ((member.offset, key_and_kind(member.name)) for member in members(fetch_shard(index, shard)))
    return {offset: found[0] for offset, found in named if found}


def _read_labels(path: Path, classes: int) -> Sequence[Sequence[int]] | Mapping[str, Sequence[int]]:
    """Return the labels in the file: a list, or by name without folder and extension."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"--real {path} cannot be read as JSON: {error}") from None
    if not content or not isinstance(content, list | dict):
        raise UsageError(f"--real {path} holds no labels; expected a list or an object with a list for each image")
    lists = content.values() if isinstance(content, dict) else content
    for labels in lists:
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise UsageError(f"--real {path} holds {str(labels)[:40]}; expected a list of class numbers an image")
        if any(not 0 <= label < classes for label in labels):
            raise UsageError(f"--real {path} names class {max(labels)}; the images have {classes} classes, from 0")
    return {_stem(key): labels for key, labels in content.items()} if isinstance(content, dict) else content


def _labels_of(name: str, found: Sequence[Sequence[int]] | Mapping[str, Sequence[int]], path: str) -> Sequence[int]:
    if isinstance(found, Mapping):
        if _stem(name) not in found:
            raise UsageError(f"--real {path} has no labels of sample {name!r}; its keys are such as {min(found)!r}")
        return found[_stem(name)]
    numbered = _VALIDATION_NAME.search(name)
    if numbered is None or not 1 <= int(numbered[1]) <= len(found):
        raise UsageError(
            f"--real {path} lists the labels of ILSVRC2012_val_00000001 to _{len(found):08d}, but a sample is "
            f"called {name!r}; expected ImageNet's file names, or JSON with a key for each sample"
        )
    return found[int(numbered[1]) - 1]


def _stem(key: str) -> str:
    return key.rpartition("/")[2].partition(".")[0]


def _padded(lists: Iterable[Sequence[int]]) -> Tensor:
    """Return int64 [N, most], -1 after the end of each list."""
    rows = list(map(list, lists))
    most = max(map(len, rows), default=0) or 1
    return torch.tensor([row + [-1] * (most - len(row)) for row in rows], dtype=torch.int64).reshape(-1, most)


def _outputs(subject: Subject) -> int:
    return max(len(subject.classes), len(subject.loader.classes))
