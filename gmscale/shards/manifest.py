"""The files beside the shards of a set: _info.json, and where the samples of each split came from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gmscale.errors import UsageError
from gmscale.files import write_atomically
from gmscale.shards.journal import Finished
from gmscale.shards.layout import Layout


def read_info(directory: Path) -> dict[str, Any]:
    """Return what _info.json holds, or nothing where there is none."""
    for path in (directory / "_info.json", directory / "info.json"):  # timm reads either
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(info, dict) and isinstance(info.setdefault("splits", {}), dict):
                return info
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None
        raise UsageError(f"{path} is not timm's _info.json, which has 'splits'")
    return {}


def write_info(
    directory: Path,
    split: str,
    name: str,
    shards: Sequence[Finished],
    classes: Sequence[str],
    before: dict[str, Any],
) -> None:
    """Write _info.json as it was `before`, with this split and these classes."""
    entry = {
        "name": split,
        "num_samples": sum(shard.samples for shard in shards),
        "filenames": [shard.shard for shard in shards],
        "shard_lengths": [shard.samples for shard in shards],
        "sha256": [shard.sha256 for shard in shards],
        "bytes": [shard.bytes for shard in shards],
    }
    info = before | {
        "name": name,
        "splits": before.get("splits", {}) | {split: entry},
        "classes": classes,
        "class_to_idx": {label: i for i, label in enumerate(classes)},
    }
    write_atomically(directory / "_info.json", json.dumps(info, indent=2) + "\n")


def write_lists(
    directory: Path, split: str, layout: Layout, names: Sequence[str], entries: Sequence[Finished]
) -> None:
    """Write where each key came from, and which of `names` were left out and why."""
    left_out = {skipped.name: skipped for entry in entries for skipped in entry.skipped}
    sources, bad = [], []
    for shard in layout:
        for key, i in zip(shard.keys, shard.samples, strict=True):
            if names[i] in left_out:
                bad.append("\t".join(left_out[names[i]]))
            else:
                sources.append(f"{key}\t{names[i]}")
    for kind, lines in (("sources", sources), ("skipped", bad)):
        path = directory / f"_{kind}-{split}.txt"
        if lines:
            write_atomically(path, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
        else:
            path.unlink(missing_ok=True)
