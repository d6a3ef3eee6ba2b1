"""Pictures of what a model looks at: images under their saliency maps, with true boxes and those of the maps."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from gmscale import parallel
from gmscale.evaluation.saliency.localization import iou, top_box
from gmscale.evaluation.saliency.maps import saliency
from gmscale.evaluation.saliency.measurement import open_boxes
from gmscale.evaluation.subject import Subject
from gmscale.files import write_atomically

NAME = "gallery.json"

_LEAST_SIDE = 224  # of a picture; smaller images are enlarged by a whole factor
_COLOURS = "inferno"
_BRIGHTEST = 0.99  # share of a map's pixels below the brightest colour: single ones would darken the rest
_OPACITY = 0.6  # of the map over the image
_TRUE, _PREDICTED = (255, 255, 255), (0, 200, 255)


class _Row(NamedTuple):
    facts: dict[str, Any]
    pictures: dict[str, bytes]


def write_gallery(
    subject: Subject, directory: Path, methods: Sequence[str], count: int = 8, boxes: str | None = None
) -> None:
    """Write `count` images, evenly spread, with their saliency maps by each method into `directory`; a collective.

    NNN-image.png is the image, NNN-METHOD.png the image in grey under the map of its true class, with the true
    boxes in white and the box of the map in blue. gallery.json is a list of {index, label, predicted, image, files,
    box, iou}: `files` and `iou` by method; box is that of the single object, else it and iou are None. `boxes` is
    as in `Boxes`. Images are the same for every model of the same split. Only the main rank writes.
    """
    with parallel.together(subject.world):
        own = list(_rows(subject, methods, count, boxes))
    rows = [row for share in parallel.of_all_ranks(own, subject.world) for row in share]
    with parallel.together(subject.world):
        if subject.world.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            records = []
            for number, (facts, pictures) in enumerate(rows):
                files = {name: f"{number:03d}-{name}.png" for name in pictures}
                for name, file in files.items():
                    write_atomically(directory / file, pictures[name])
                records.append({**facts, "image": files.pop("image"), "files": files})
            write_atomically(directory / NAME, json.dumps(records, indent=1))


def _rows(subject: Subject, methods: Sequence[str], count: int, path: str | None) -> Iterator[_Row]:
    """Yield this rank's rows."""
    model, boxes, classes = subject.on_pixels, open_boxes(subject, path), subject.classes
    for pixels, labels, indices in subject.batches(count):
        with torch.no_grad():
            predicted = model(pixels).argmax(1).tolist()
        objects = boxes.of(indices.tolist()) if boxes else [torch.empty(0, 4)] * len(labels)
        maps = {
            method: saliency(model, pixels, labels, method, indices=indices, seed=subject.seed).cpu()
            for method in methods
        }
        found = {method: top_box(own) for method, own in maps.items()}
        images = (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for i, (index, label) in enumerate(zip(indices.tolist(), labels.tolist(), strict=True)):
            single = objects[i] if len(objects[i]) == 1 else None
            facts = {
                "index": index,
                "label": _name(label, classes),
                "predicted": _name(predicted[i], classes),
                "box": None if single is None else single[0].tolist(),
                "iou": {
                    method: None if single is None else iou(own[i : i + 1], single).item()
                    for method, own in found.items()
                },
            }
            pictures = {"image": _png(_picture(images[i]))}
            for method in methods:
                pictures[method] = _png(_overlay(images[i], maps[method][i], objects[i], found[method][i]))
            yield _Row(facts, pictures)


def _name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if label < len(classes) else str(label)


def _overlay(pixels: NDArray[np.uint8], saliency_map: Tensor, true: Tensor, predicted: Tensor) -> Image.Image:
    """Return the picture of an image [H, W, C] in grey under its map [H, W], with boxes [K, 4] and [4]."""
    over = saliency_map - saliency_map.min()
    brightest = over.flatten().quantile(_BRIGHTEST) or over.max()
    shares = (over / brightest.clamp_min(torch.finfo().tiny)).clamp(0, 1).numpy()
    colours = matplotlib.colormaps[_COLOURS](shares)[..., :3] * 255
    grey = pixels.mean(2, keepdims=True)
    mixed = _OPACITY * colours + (1 - _OPACITY) * grey
    picture = _picture(mixed.round().astype(np.uint8))
    draw, scale = ImageDraw.Draw(picture), picture.width // pixels.shape[1]
    for box, colour in [(predicted, _PREDICTED), *((own, _TRUE) for own in true)]:
        x0, y0, x1, y1 = (round(edge * scale) for edge in box.tolist())
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=(0, 0, 0), width=4)
        draw.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), outline=colour, width=2)
    return picture


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return an image [H, W, C], of one channel or three, enlarged so that boxes can be drawn on it."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    scale = -(-_LEAST_SIDE // min(image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
