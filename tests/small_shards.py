"""Two small shards of four samples in three classes, and what tests do with them."""

import io
import json
import os
import tarfile
from pathlib import Path

from gmscale.data.config import DataConfig
from gmscale.data.index import ShardIndex, open_index
from gmscale.data.source import Split, open_split

Members = list[tuple[str, bytes]]

FIRST, SECOND = "t-train-0000.tar", "t-train-0001.tar"


def write_tar(path: Path, members: Members, tar_format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def two_samples(start: int) -> Members:
    return [
        member
        for number in (start, start + 1)
        for member in (
            (f"{number:04}.cls", str(number % 3).encode()),
            (f"{number:04}.jpg", f"image {number}".encode() * 200),
            (f"{number:04}.json", json.dumps({"label": 2 - number % 3, "text": str(number % 2)}).encode()),
        )
    ]


def write_info(directory: Path, **changes: object) -> None:
    split = {"name": "train", "filenames": [FIRST, SECOND], "shard_lengths": [2, 2], "num_samples": 4}
    split |= changes
    info = {"name": "t", "classes": ["a", "b", "c"], "splits": {"train": split, "validation": split}}
    (directory / "_info.json").write_text(json.dumps(info))


def write_shards(directory: Path) -> None:
    write_tar(directory / FIRST, two_samples(0))
    write_tar(directory / SECOND, two_samples(2))
    for name in (FIRST, SECOND):
        # Long ago, so that whatever changes them changes this too.
        os.utime(directory / name, (1, 1))
    write_info(directory)


def split_of(directory: Path, name: str = "train") -> Split:
    return open_split(DataConfig(source=str(directory)), name)


def opened(directory: Path, name: str = "train", label: str = "cls", cache: Path | None = None) -> ShardIndex:
    return open_index(split_of(directory, name), label, cache)
