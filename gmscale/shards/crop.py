"""gmscale shards crop: each image becomes the part of it that a trained model looks at, or a random part."""

import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from gmscale.data import DataConfig, ShardIndex, embedded, open_index, open_split
from gmscale.data.faults import ImageError
from gmscale.data.images.decode import decode
from gmscale.data.images.guided import best_squares
from gmscale.data.images.transforms import EvalTransform, eval_geometry
from gmscale.data.index import fetch_shard
from gmscale.data.survey import where
from gmscale.data.tars.scan import IMAGE_EXTENSIONS, key_and_kind
from gmscale.data.tars.tar import Tar
from gmscale.data.tars.writer import open_shard
from gmscale.errors import UsageError, check_choice, check_range
from gmscale.evaluation.draws import uniform
from gmscale.evaluation.saliency.maps import METHODS, saliency
from gmscale.evaluation.subject import OnPixels
from gmscale.progress import Meter
from gmscale.shards.journal import Finished, Journal, Skipped, locked
from gmscale.shards.manifest import read_info, write_info
from gmscale.trained import Trained, load

GUIDES = ("saliency", "random")
_QUALITY = 95


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    run: Path
    out: Path
    source: str | None = None
    split: str | None = None
    guide: str = "saliency"
    method: str = "gradient"
    scale: tuple[float, float] = (0.4, 0.9)
    """Smallest and largest area of a crop, as a share of what the model sees of the image."""
    seed: int = 0
    checkpoint: str = "last"
    weights: str = "auto"
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_choice(self.guide, GUIDES, "--guide")
        check_choice(self.method, METHODS, "--method")
        for number in self.scale:
            check_range(number, "--scale", 0, 1, open_low=True)
        if self.scale[0] > self.scale[1]:
            raise UsageError(f"--scale is {self.scale[0]:g},{self.scale[1]:g}; expected the smaller number first")
        check_range(self.batch_size, "--batch_size", 1, whole=True)


class _Item(NamedTuple):
    """A sample of the shard that is read."""

    key: str
    number: int
    """In the split."""
    label: int
    members: dict[str, bytes]
    encoded: bytes
    pixels: NDArray[np.uint8]
    """[H, W, 3]"""


def crop(options: Options) -> tuple[int, int]:
    """Write the cropped split into OUT, shard by shard, and its entry of _info.json; return samples and bad ones.

    A crop is a square of a random area in the model's view of an image, where the saliency of its own label is
    highest in sum, or at a random place; it is cut from the original pixels and stored as JPEG. Equal options give
    equal bytes on one machine; after an interruption the same command goes on. Bad samples are left out.
    """
    trained = load(options.run, options.checkpoint, options.weights)
    data, index = _open(trained, options)
    if len(index.classes) > trained.outputs:
        raise UsageError(
            f"{data.source} has {len(index.classes)} classes, the model of {options.run} {trained.outputs} outputs"
        )
    split, source = index.split.name, Path(str(index.split.directory))
    if options.out.resolve() == source.resolve():
        raise UsageError(f"OUT {options.out} is where the shards are read from; expected another directory")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = OnPixels(trained.model.requires_grad_(False).to(device), data)
    plan = {
        "guide": options.guide,
        "method": options.method if options.guide == "saliency" else "",
        "scale": list(options.scale),
        "seed": options.seed,
        "weights": f"{_digest(trained.model)[:12]} of {trained.name}",
        "source": index.fingerprint,
    }
    with locked(options.out), Meter(f"cropping {split}") as meter:
        journal = Journal(options.out / f"_crop-{split}.jsonl", plan)
        done = 0
        for shard, name in enumerate(index.split.names):
            if name not in journal.finished or not (options.out / name).exists():
                journal.add(_shard(index, shard, model, data, options, device))
            done += int(index.lengths[shard])
            meter.show(done, len(index))
        entries = [journal.finished[name] for name in index.split.names]
        journal.close_with(entries)
        kept = [entry for entry in entries if entry.samples]
        write_info(options.out, split, options.out.name, kept, index.classes, read_info(options.out))
    return sum(entry.samples for entry in entries), sum(len(entry.skipped) for entry in entries)


def _digest(model: nn.Module) -> str:
    """Tell runs apart that differ in nothing that their names say."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _open(trained: Trained, options: Options) -> tuple[DataConfig, ShardIndex]:
    data = trained.config.data
    data = replace(data, source=options.source or data.source, train_split=options.split or data.train_split)
    home = embedded.ensure(data) if data.source == "embedded" else None
    return data, open_index(open_split(data, data.train_split, home), data.label, Path(data.cache_dir))


def _shard(
    index: ShardIndex, shard: int, model: OnPixels, data: DataConfig, options: Options, device: torch.device
) -> Finished:
    name = index.split.names[shard]
    skipped: list[Skipped] = []
    with open_shard(options.out / name) as out:
        usable = _items(index, shard, data.strict, skipped)
        while items := list(islice(usable, options.batch_size)):
            for item, members in zip(items, _cropped(items, model, data, options, device), strict=True):
                out.add({"__key__": item.key, **members})
        if not out.count:
            raise UsageError(f"{where(index.split, shard)}: not one of its samples can be used")
    stats = out.stats
    return Finished(name, stats.count, stats.bytes, stats.sha256, tuple(skipped))


def _items(index: ShardIndex, shard: int, strict: bool, skipped: list[Skipped]) -> Iterator[_Item]:
    """Yield the usable samples of a shard with all their members."""
    first = int(index.lengths[:shard].sum())
    # by place: of a sample whose members are not in a row, only the first part is in the index
    numbers = {int(index.offset[i]): i for i in range(first, first + int(index.lengths[shard]))}
    with Tar(fetch_shard(index, shard), where(index.split, shard)) as tar:
        named = ((key_and_kind(member.name), member) for member in tar.members())
        for key, group in groupby(((own, m) for own, m in named if own), lambda pair: pair[0][0]):
            found = {kind: member for (_, kind), member in group}
            number = next((numbers[m.offset] for m in found.values() if m.offset in numbers), None)
            label = -1 if number is None else int(index.label[number])
            members = {kind: tar.read(member) for kind, member in found.items()}
            extension = next((kind for kind in IMAGE_EXTENSIONS if kind in members), "")
            if number is None or label < 0 or not extension:
                skipped.append(Skipped(key, "bad sample", "see gmscale shards verify"))
                continue
            try:
                pixels = decode(members[extension], strict)
            except ImageError as error:
                skipped.append(Skipped(key, error.reason, str(error)))
                continue
            yield _Item(key, number, label, members, members[extension], pixels)


def _cropped(
    items: list[_Item], model: OnPixels, data: DataConfig, options: Options, device: torch.device
) -> Iterator[dict[str, str | bytes]]:
    """Yield the members of each cropped sample."""
    size = data.image_size
    numbers = torch.tensor([item.number for item in items], device=device)
    draws = uniform(numbers, 3, (options.seed, 0))
    low, high = options.scale
    sides = (size * (low + (high - low) * draws[:, 0]).sqrt()).round().long().clamp(1, size)
    if options.guide == "saliency":
        tops, lefts = best_squares(_saliency(items, numbers, model, data, options, device), sides)
    else:
        tops, lefts = (draws[:, 1:] * (size - sides + 1)[:, None]).long().unbind(1)
    windows = torch.stack((lefts, tops, lefts + sides, tops + sides), 1).tolist()
    for item, window in zip(items, windows, strict=True):
        image = Image.fromarray(item.pixels)
        box = _in_image(window, image.size, data)
        buffer = io.BytesIO()
        image.crop(box).save(buffer, "JPEG", quality=_QUALITY)
        others = {kind: text for kind, text in item.members.items() if kind not in IMAGE_EXTENSIONS}
        facts = _facts(others.pop("json", b""), box, image.size, options.guide)
        yield {**others, "jpg": buffer.getvalue(), "json": json.dumps(facts)}


def _saliency(
    items: list[_Item],
    numbers: Tensor,
    model: OnPixels,
    data: DataConfig,
    options: Options,
    device: torch.device,
) -> Tensor:
    transform = EvalTransform(data)
    views = np.empty((len(items), data.image_size, data.image_size, 3), dtype=np.uint8)
    for item, view in zip(items, views, strict=True):
        transform(item.encoded, view)
    images = torch.from_numpy(views).permute(0, 3, 1, 2).to(device)
    labels = torch.tensor([item.label for item in items], device=device)
    return saliency(model, model.pixels(images), labels, options.method, indices=numbers, seed=options.seed)


def _in_image(window: list[int], size: tuple[int, int], data: DataConfig) -> tuple[int, int, int, int]:
    """Return a window of the model's view as whole pixels of the image, at least one of them."""
    scale, corner = eval_geometry(size, data)
    edges = [(window[i] + corner[i % 2]) / scale[i % 2] for i in range(4)]
    left, top = (min(max(0, math.floor(edges[i])), size[i] - 1) for i in range(2))
    right, bottom = (min(max((left, top)[i] + 1, math.ceil(edges[i + 2])), size[i]) for i in range(2))
    return left, top, right, bottom


def _facts(text: bytes, crop: tuple[int, int, int, int], size: tuple[int, int], guide: str) -> dict[str, Any]:
    """Return a sample's JSON with the crop. The box of an object, or a list of them, moves along.

    A box is cut to the crop; outside of it a single one becomes null, one of a list goes. What is no box of four
    numbers stays as it is.
    """
    try:
        facts = json.loads(text) if text else {}
    except ValueError:
        facts = {}
    facts = facts if isinstance(facts, dict) else {"json": facts}
    for field in ("box", "boxes"):  # as gmscale evaluate reads them
        given = facts.get(field)
        if isinstance(given, list) and _is_box(given):
            facts[field] = _moved(given, crop)
        elif isinstance(given, list) and all(map(_is_box, given)):
            facts[field] = [box for each in given if (box := _moved(each, crop))]
    return facts | {"crop": list(crop), "cropped_from": list(size), "guide": guide}


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(isinstance(edge, int | float) for edge in value)


def _moved(box: list[float], crop: tuple[int, int, int, int]) -> list[float] | None:
    """Return the part of a box x0, y0, x1, y1 within the crop, seen from its corner; None for an empty part."""
    left, top, right, bottom = crop
    x0, y0, x1, y1 = box
    found = [max(x0, left) - left, max(y0, top) - top, min(x1, right) - left, min(y1, bottom) - top]
    return found if found[0] < found[2] and found[1] < found[3] else None
