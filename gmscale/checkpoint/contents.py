"""What a checkpoint is made of, and in which files it goes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from gmscale.checkpoint.layout import rank_name
from gmscale.checkpoint.shards import places, shard_name
from gmscale.checkpoint.tree import pack
from gmscale.parallel import WeightShard, World


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a rank hands over to be saved: trees of dicts, lists, tuples, numbers, text and tensors.

    `weights`, `ema`, `optimizer` and `shared` (without tensors) are taken from rank 0, the others saved for each.
    """

    weights: Mapping[str, Tensor] | None
    """The whole weights; None where each rank saves its shards."""
    shards: Mapping[str, WeightShard] | None
    """This rank's parts of the weights; None where rank 0 saves them whole."""
    ema: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Any]
    shared: Mapping[str, Any]
    per_rank: Mapping[str, Any]


class Pages(NamedTuple):
    """What a file shall hold: tensors, and a text beside them."""

    tensors: Mapping[str, Tensor]
    text: str = ""


def pages(contents: Contents, world: World) -> dict[str, Pages]:
    """Return what this rank writes, by the files' names."""
    files = {rank_name(world.rank): _packed(contents.per_rank)}
    if contents.shards is not None:
        entries = {name: shard.entries for name, shard in contents.shards.items()}
        files[shard_name(world.rank, world.size)] = Pages(entries, places(contents.shards))
    if world.is_main:
        files["optimizer.safetensors"] = _packed(contents.optimizer)
        if contents.weights is not None:
            files["model.safetensors"] = Pages(contents.weights)
        if contents.ema is not None:
            files["model_ema.safetensors"] = Pages(contents.ema)
    return files


def _packed(tree: Mapping[str, Any]) -> Pages:
    tensors: dict[str, Tensor] = {}
    return Pages(tensors, json.dumps(pack(tree, tensors)))
