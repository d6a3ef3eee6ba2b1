"""Sharded weights: a file of each rank with its parts, and one file of whole weights made from them."""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gmscale.checkpoint.tensors import Layout, TensorFile, damaged, new_file, read_layouts, read_tensors
from gmscale.errors import UsageError
from gmscale.files import sync
from gmscale.parallel import WeightShard, World


def shard_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's file of weights."""
    return f"weights-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def places(shards: Mapping[str, WeightShard]) -> str:
    """Return the text that stands beside the entries of `shards` in their file."""
    return json.dumps({name: [list(shard.shape), shard.offset] for name, shard in shards.items()})


def load_shards(folder: Path, world: World) -> dict[str, WeightShard]:
    """Return what this rank saved as `shards`, on the CPU."""
    tensors, text = read_tensors(folder / shard_name(world.rank, world.size))
    return {
        name: WeightShard(tuple(shape), offset, tensors[name]) for name, (shape, offset) in json.loads(text).items()
    }


class Part(NamedTuple):
    """Where some entries of a weight are."""

    offset: int
    entries: int
    rank: int


def chosen(parts: Sequence[Part], entries: int) -> list[Part]:
    """Return those of `parts` that make up a weight of so many entries, each entry once, in order.

    Of equal parts, as of a buffer that every rank has whole, the lowest rank's is taken. Raises ValueError, saying
    which entries, if some are in no part or in several different ones.
    """
    found: list[Part] = []
    end = 0
    for part in sorted(part for part in parts if part.entries):
        if found and part[:2] == found[-1][:2]:
            continue
        if part.offset != end:
            few, low, high = part.offset > end, min(end, part.offset), max(end, part.offset)
            raise ValueError(f"entries {low} to {high - 1} are in {'no shard' if few else 'several shards'}")
        found.append(part)
        end += part.entries
    if end != entries:
        raise ValueError(f"there are {entries} entries, and the shards hold {end}")
    return found


def whole_weights(folder: Path) -> Path:
    """Return model.safetensors of a checkpoint; made from the ranks' shards if it is not there yet.

    Needs the memory of one shard of one weight; the file is complete or absent. Raises UsageError for shards that
    are missing, damaged or do not fit together, and where the file cannot be written.
    """
    file = folder / "model.safetensors"
    found = sorted(folder.glob("weights-*-of-*.safetensors"))
    if file.is_file() or not found:
        return file
    world_size = int(found[0].stem.rpartition("-")[2])
    files = [folder / shard_name(rank, world_size) for rank in range(world_size)]
    if missing := sorted({*files} ^ {*found}):
        what = "is missing" if missing[0] in files else f"does not belong to {found[0].name}"
        raise UsageError(f"{folder} holds shards of weights, but {missing[0].name} {what}")
    layouts, wanted = _plan(files)
    temporary = folder / f".{file.name}.{secrets.token_hex(4)}.tmp"
    try:
        with new_file(temporary, layouts) as whole:
            for path, offsets in zip(files, wanted, strict=True):
                _copy(path, offsets, whole)
        temporary.rename(file)
        sync(folder)
    except OSError as error:
        raise UsageError(f"{file} cannot be made from the shards beside it: {error}") from None
    return file


def _plan(files: Sequence[Path]) -> tuple[dict[str, Layout], list[dict[str, int]]]:
    """Return the layouts of the whole weights, and of each file which weights to take and their offsets."""
    layouts: dict[str, Layout] = {}
    parts: dict[str, list[Part]] = {}
    for rank, file in enumerate(files):
        stored, text = read_layouts(file)
        for name, (shape, offset) in json.loads(text).items():
            layout = Layout(stored[name].dtype, tuple(shape))
            if layouts.setdefault(name, layout) != layout:
                raise UsageError(
                    f"{file}: {name} is {_words(layout)}, and {_words(layouts[name])} in another shard"
                )
            parts.setdefault(name, []).append(Part(offset, stored[name].entries, rank))
    wanted: list[dict[str, int]] = [{} for _ in files]
    for name, found in parts.items():
        try:
            for part in chosen(found, layouts[name].entries):
                wanted[part.rank][name] = part.offset
        except ValueError as error:
            raise UsageError(f"the shards in {files[0].parent} do not make up {name}: {error}") from None
    return layouts, wanted


def _copy(path: Path, offsets: Mapping[str, int], whole: TensorFile) -> None:
    try:
        with safe_open(path, "pt") as file:
            for name, offset in offsets.items():
                entries: Tensor = file.get_tensor(name)
                whole.put(name, entries, offset)
    except SafetensorError as error:
        raise damaged(path, error) from None


def _words(layout: Layout) -> str:
    return f"{str(layout.dtype).removeprefix('torch.')} {list(layout.shape)}"
