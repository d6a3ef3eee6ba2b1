"""Images in class folders, DIR/CLASS/*, for a model that knows these classes: ImageNet-A, -C, -R, -V2, -Sketch.

Decoded and cut as the validation split is, by the same code in processes of the same kind.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset

from gmscale.data import DataConfig, order
from gmscale.data.faults import ImageError
from gmscale.data.images.transforms import eval_assembly
from gmscale.data.tars.scan import IMAGE_EXTENSIONS
from gmscale.data.workers import Failure, data_loader, random_states_kept, results
from gmscale.errors import RunError, UsageError, nearest
from gmscale.evaluation.subject import PixelBatch, Subject, spread_over

# Most of the time goes to waiting where directories are on a network.
_THREADS = 16
_EXTENSIONS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


@dataclass(frozen=True, eq=False)
class Folder:
    """Images of class folders, in the order of the classes' outputs and then of names."""

    root: Path
    names: tuple[str, ...]
    """Relative to the root."""
    labels: NDArray[np.int64]
    """The model's output for the class of each image, [N]."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def outputs(self) -> NDArray[np.int64]:
        """The outputs of the classes that are here, each once, ascending."""
        return np.unique(self.labels)


class FolderImages(NamedTuple):
    """Images of a folder, on the CPU, as ValLoader yields them."""

    images: Tensor
    """uint8 [N, 3, H, W]"""
    labels: Tensor
    """int64 [N]"""
    indices: Tensor
    """int64 [N]: the images' numbers in the folder."""


def folder_labels(directory: Path, classes: Sequence[str]) -> dict[str, int]:
    """Return the model's output for each class folder of `directory`.

    Folders are named as `classes` are, such as n01440764, or, where none of them is, by the outputs' numbers as in
    ImageNet-V2. Where classes have no names but the numbers of ImageNet-1k, as timm's own shards have it, folders
    named by WordNet ids are taken in ImageNet's order. Hidden folders and files beside the folders are passed over.
    Raises UsageError for a directory without folders and for a class that the model does not know.
    """
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UsageError(f"{directory} cannot be read: {error.strerror}; expected a folder of classes") from None
    if not names:
        raise UsageError(f"{directory} has no class folders; expected images in DIR/CLASS/")
    if list(classes) == [str(number) for number in range(1000)] and not names[0].isdecimal():
        classes = ImageNetInfo("imagenet-1k").label_names()
    output = {name: number for number, name in enumerate(classes)}
    if not any(name in output for name in names) and all(map(str.isdecimal, names)):
        largest = max(names, key=int)
        if classes and int(largest) >= len(classes):
            raise UsageError(f"{directory / largest}: expected numbers of the model's {len(classes)} classes")
        return {name: int(name) for name in names}
    if not classes:
        raise UsageError(
            f"{directory / names[0]}: nobody knows the names of the model's classes; expected folders named by the "
            "numbers of its outputs"
        )
    for name in names:
        if name not in output:
            shown = nearest(name, classes) or f" (they are {', '.join(classes[:3])}, ...)"
            raise UsageError(f"{directory / name} is none of the model's {len(classes)} classes{shown}")
    return {name: output[name] for name in names}


def open_folder(directory: Path, classes: Sequence[str]) -> Folder:
    """List the images of a folder of class folders.

    Raises UsageError as folder_labels does, and where there are no images.
    """
    labels = folder_labels(directory, classes)
    names = sorted(labels, key=lambda name: (labels[name], name))
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(names, pool.map(lambda name: _images_in(directory, name), names), strict=True))
    if not any(found.values()):
        raise UsageError(f"{directory}: no images in its {len(names)} folders; expected {', '.join(_EXTENSIONS)}")
    return Folder(directory, tuple(n for ns in found.values() for n in ns), _repeated(labels, found))


def _images_in(directory: Path, name: str) -> list[str]:
    try:
        files = sorted(os.listdir(directory / name))
    except OSError as error:
        raise UsageError(f"{directory / name} cannot be read: {error.strerror}") from None
    return [f"{name}/{file}" for file in files if file.lower().endswith(_EXTENSIONS) and not file.startswith(".")]


def _repeated(labels: Mapping[str, int], found: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
    outputs = np.array([labels[name] for name in found], dtype=np.int64)
    return np.repeat(outputs, [len(files) for files in found.values()])


def folder_batches(directory: Path, subject: Subject, images: int | None = None) -> Iterator[PixelBatch]:
    """Return this rank's share of a folder of class folders in batches, or of `images` spread evenly over it.

    Over all ranks each image comes once. Labels are outputs of the subject's model, indices the images' numbers in
    the folder. Raises UsageError as open_folder; an image that does not decode is a RunError while iterating.
    """
    batches = uint8_batches(open_folder(directory, subject.classes), subject, images)
    on_pixels, device = subject.on_pixels, subject.world.device
    return (
        PixelBatch(
            on_pixels.pixels(batch.images.to(device, non_blocking=True)),
            batch.labels.to(device, non_blocking=True),
            batch.indices.to(device, non_blocking=True),
        )
        for batch in batches
    )


def uint8_batches(folder: Folder, subject: Subject, images: int | None = None) -> Iterator[FolderImages]:
    """Yield what folder_batches returns, as ValLoader does: uint8, on the CPU."""
    config, world = subject.config.data, subject.world
    numbers = spread_over(len(folder), len(folder) if images is None else min(images, len(folder)))
    share = numbers[order.rank_share(len(numbers), world.rank, world.size)]
    size, most = config.eval_batch_size_per_device, -(-len(numbers) // world.size)
    requests = [share[i : i + size] for i in range(0, len(share), size)]
    loader = data_loader(_Decoded(folder, config), requests, min(config.workers, len(requests)))
    done = 0
    for indices, decoded in zip(requests, results(loader), strict=True):
        yield FolderImages(decoded, torch.from_numpy(folder.labels[indices]), torch.from_numpy(indices))
        done += len(indices)
        subject.progress(done, most)


class _Decoded(Dataset[Tensor | Failure]):
    """Answers a request for numbered images of a folder. Runs in a worker, or in the main process without them."""

    def __init__(self, folder: Folder, config: DataConfig) -> None:
        self._folder, self._assembly = folder, eval_assembly(config)

    def __getitem__(self, indices: NDArray[np.int64]) -> Tensor | Failure:
        # An error is handed over as a value: raised here, it would reach the user wrapped in a worker's traceback.
        try:
            with random_states_kept():
                return self._load(indices)
        except RunError as error:
            return error

    def _load(self, indices: NDArray[np.int64]) -> Tensor:
        images = self._assembly.begin(len(indices))
        for row, number in enumerate(indices):
            path = self._folder.root / self._folder.names[number]
            try:
                self._assembly.put(images, row, path.read_bytes())
            except OSError as error:
                raise RunError(f"{path} cannot be read: {error.strerror}") from None
            except ImageError as error:
                raise RunError(f"{path} does not decode: {error}") from None
        decoded = self._assembly.end(images)
        assert isinstance(decoded, Tensor)  # evaluation is decoded exactly, by the workers
        return decoded
