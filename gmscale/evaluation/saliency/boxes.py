"""Objects' bounding boxes where the evaluation transform puts them, for saliency maps to be held against."""

import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from PIL import Image
from torch import Tensor

from gmscale.data import DataConfig, ShardIndex
from gmscale.data.images.decode import jpeg_header
from gmscale.data.images.transforms import eval_geometry
from gmscale.data.index import fetch_shard, read
from gmscale.data.survey import where
from gmscale.data.tars.scan import key_and_kind
from gmscale.data.tars.tar import Member, Tar
from gmscale.errors import RunError, UsageError

_FORM = "[x0, y0, x1, y1] in pixels with x0 < x1 and y0 < y1"
_LARGEST_TEXT = 1 << 20


class _Sample(NamedTuple):
    key: str
    """Name of its members without their extensions."""
    place: str
    """Of its JSON, for messages."""
    text: bytes
    """Of its JSON; empty if it has none."""


class _Annotation(NamedTuple):
    boxes: list[list[float]]
    size: tuple[float, float] | None = None
    """Width and height of the image that they were drawn on; None for the image in the shards."""


class Boxes:
    """Boxes of the samples of an index, from one of three sources.

    `path` is a folder of XML files as PASCAL's and ImageNet's, NAME.xml for the sample whose key is NAME; or a JSON
    file {key: [[x0, y0, x1, y1], ...]}; or None for the samples' own .json members with a field box, one box, or
    boxes. x1 and y1 are excluded, but for XML, whose pixels are counted from 1. Samples of `gmscale shards build`
    are found by the name of the image that they were made from, too, and the boxes of an image that was made
    smaller there by the size that its XML gives. Raises UsageError for a path that holds no boxes.
    """

    def __init__(self, index: ShardIndex, data: DataConfig, path: str | None = None) -> None:
        self._index, self._data = index, data
        self._find: Callable[[_Sample], _Annotation]
        if path is None:
            self._find = _from_sample
        elif Path(path).is_dir():
            self._find = partial(_from_xml, files=_xml_files(Path(path)), origins=_origins(index))
        else:
            self._find = partial(_from_json, content=_content(path), path=path, origins=_origins(index))

    def of(self, numbers: Iterable[int]) -> list[Tensor]:
        """Return the boxes of the samples of these numbers as the model sees them: float32 [K, 4] each.

        x0, y0, x1, y1 in pixels of the view, x1 and y1 excluded, cut to it; a box outside of it is left out. K is 0
        for a sample without annotation. Raises UsageError for an annotation that cannot be read.
        """
        numbers = list(numbers)
        found = {number: self._find(sample) for number, sample in _samples(self._index, numbers)}
        return [self._seen(number, found[number]) for number in numbers]

    def _seen(self, number: int, annotation: _Annotation) -> Tensor:
        if not annotation.boxes:
            return torch.empty(0, 4)
        boxes = torch.tensor(annotation.boxes, dtype=torch.float64)
        stored = _image_size(read(self._index, number))
        if annotation.size is not None:
            boxes = boxes * torch.tensor(
                [now / then for now, then in zip(stored, annotation.size, strict=True)] * 2
            )
        return in_view(boxes, stored, self._data)


def in_view(boxes: Tensor, size: tuple[int, int], data: DataConfig) -> Tensor:
    """Return where the evaluation transform puts `boxes` [K, 4] of an image of `size` width, height; float32.

    Its shorter side becomes image_size / crop_pct, and the centre is cut out. Boxes are cut to the view; those of
    which nothing is left are left out.
    """
    scale, corner = (torch.tensor(2 * pair, dtype=torch.float64) for pair in eval_geometry(size, data))
    cut = (boxes.double() * scale - corner).clamp(0, data.image_size)
    return cut[(cut[:, 2:] > cut[:, :2]).all(1)].float()


def _image_size(encoded: bytes) -> tuple[int, int]:
    """Return width and height of an image, from its header."""
    header = jpeg_header(encoded)
    if header is not None:
        return header.width, header.height
    with Image.open(io.BytesIO(encoded)) as image:
        return image.width, image.height


# ---- samples and their names -------------------------------------------------------------------------------------


def _samples(index: ShardIndex, numbers: Iterable[int]) -> Iterator[tuple[int, _Sample]]:
    """Yield these samples of an index, from one pass over the headers of each of their shards."""
    by_shard: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for number in numbers:
        by_shard[index.shard(number)][int(index.offset[number])] = number
    split = index.split
    for shard, wanted in by_shard.items():
        with Tar(fetch_shard(index, shard), where(split, shard)) as tar:
            for key, members in _keyed(tar):
                offset = next((own.offset for own in members.values() if own.offset in wanted), None)
                if offset is None:
                    continue
                member = members.get("json")
                if member is not None and member.size > _LARGEST_TEXT:
                    raise UsageError(f"{tar.shard}: {member.name!r} has {member.size} bytes; expected up to 1 MiB")
                name = "" if member is None else f"{tar.shard}: {member.name!r}"
                yield wanted.pop(offset), _Sample(key, name, b"" if member is None else tar.read(member))
                if not wanted:
                    break
        if wanted:
            raise RunError(f"{where(split, shard)} has changed since it was indexed")


def _keyed(tar: Tar) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield each sample's key and its members by extension."""
    named = ((key_and_kind(member.name), member) for member in tar.members())
    for key, group in groupby(((own, member) for own, member in named if own), lambda pair: pair[0][0]):
        yield key, {kind: member for (_, kind), member in group}


def _origins(index: ShardIndex) -> dict[str, str]:
    """Return the name of the image that each key was made from, where `gmscale shards build` has kept it."""
    try:
        path = index.split.directory.fetch(f"_sources-{index.split.name}.txt")
    except OSError:
        return {}
    lines = path.read_text("utf-8", "surrogateescape").splitlines()
    return {key: name for key, _, name in (line.partition("\t") for line in lines)}


def _names(key: str, origins: Mapping[str, str]) -> list[str]:
    """Return the names by which a sample's annotation may be called, the surest first."""
    names = [key]
    if key in origins:
        names.append(str(PurePosixPath(origins[key]).with_suffix("")))
    return [*names, *(PurePosixPath(name).name for name in names)]


# ---- sources -----------------------------------------------------------------------------------------------------


def _from_sample(sample: _Sample) -> _Annotation:
    if not sample.text:
        return _Annotation([])
    try:
        facts = json.loads(sample.text)
    except (ValueError, RecursionError):
        raise UsageError(
            f"{sample.place} does not hold JSON; boxes are read there unless --boxes is given"
        ) from None
    if not isinstance(facts, dict):
        return _Annotation([])
    field = "box" if "box" in facts else "boxes"
    value = facts.get(field)
    # what is not a list is somebody else's field of that name
    return _Annotation(_checked(value, f"{sample.place} field {field!r}") if isinstance(value, list) else [])


def _from_json(sample: _Sample, content: Mapping[str, Any], path: str, origins: Mapping[str, str]) -> _Annotation:
    name = next((name for name in _names(sample.key, origins) if name in content), None)
    return _Annotation([] if name is None else _checked(content[name], f"--boxes {path}: {name!r}"))


def _from_xml(sample: _Sample, files: Mapping[str, Path], origins: Mapping[str, str]) -> _Annotation:
    name = next((name for name in _names(sample.key, origins) if name in files), None)
    return _Annotation([]) if name is None else _read_xml(files[name])


def _read_xml(path: Path) -> _Annotation:
    """Return the boxes of a PASCAL annotation, whose pixels are counted from 1, xmax and ymax included."""
    try:
        root = ElementTree.parse(path).getroot()
        edges = [
            [float(found.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax")]
            for found in root.iterfind("object/bndbox")
        ]
        width, height = (float(root.findtext(f"size/{name}") or 0) for name in ("width", "height"))
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise UsageError(
            f"--boxes {path}: {error}; expected a PASCAL annotation: object/bndbox with xmin, ymin, xmax, ymax"
        ) from None
    boxes = _checked([[x0 - 1, y0 - 1, x1, y1] for x0, y0, x1, y1 in edges], f"--boxes {path}: bndbox")
    return _Annotation(boxes, (width, height) if width > 0 and height > 0 else None)


def _xml_files(folder: Path) -> dict[str, Path]:
    """Return a folder's XML files, by path without .xml, and by name alone where only one has it."""
    paths = {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.xml"))}
    if not paths:
        raise UsageError(f"--boxes {folder} holds no .xml file; expected NAME.xml for each image, or a JSON file")
    uses = Counter(file.stem for file in paths.values())
    return {file.stem: file for file in paths.values() if uses[file.stem] == 1} | paths


def _content(path: str) -> dict[str, Any]:
    expected = "expected a folder of XML files, or a JSON file {key: [[x0, y0, x1, y1], ...]}"
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"--boxes {path}: {error.strerror or error}; {expected}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--boxes {path} does not hold JSON: {error}; {expected}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--boxes {path} holds a JSON {type(content).__name__}; {expected}")
    return content


def _checked(value: Any, place: str) -> list[list[float]]:
    """Return a list of boxes, also of a single one. Raises UsageError unless each has two dimensions."""
    boxes = [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value
    if not isinstance(boxes, list):
        raise UsageError(f"{place} is {value!r}; expected a list of {_FORM}")
    for box in boxes:
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)
        if not numbers or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
            raise UsageError(f"{place} has the box {str(box)[:60]}; expected {_FORM}")
    return boxes
