"""The index reads any sample, and keeps what it found, whoever builds it where and when."""

import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from small_shards import FIRST, SECOND, opened, split_of, two_samples, write_info, write_shards, write_tar

from gmscale.data import index as indexing
from gmscale.data import stored as storing
from gmscale.data import survey as surveying
from gmscale.data.faults import ShardError
from gmscale.data.index import member_name, open_index, read
from gmscale.data.source import LocalDirectory, Split
from gmscale.data.tars.scan import Scan, scan
from gmscale.errors import RunError

Damage = Callable[[Path], object]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_shards(tmp_path)
    return tmp_path


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that were read, as it goes on."""
    names: list[str] = []

    def noting(path: Path, name: str, *rest: object) -> Scan:
        names.append(name)
        return scan(path, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(surveying, "scan", noting)
    return names


def test_every_sample_is_found_with_its_label(directory: Path) -> None:
    index = opened(directory)
    assert len(index) == 4
    assert index.label.tolist() == [0, 1, 2, 0]
    assert [index.shard(i) for i in range(4)] == [0, 0, 1, 1]
    assert index.lengths.tolist() == [2, 2]
    assert index.classes == ["a", "b", "c"]
    assert index.faults == ()
    assert [read(index, i) for i in range(4)] == [f"image {i}".encode() * 200 for i in range(4)]
    assert [member_name(index, i) for i in range(4)] == [f"{i:04}.jpg" for i in range(4)]


def test_a_pattern_without_info(directory: Path) -> None:
    (directory / "_info.json").unlink()
    index = opened(directory, "t-train-{0000..0001}.tar")
    assert index.label.tolist() == [0, 1, 2, 0]
    assert index.classes == ["0", "1", "2"]
    assert opened(directory, "t-train-{0001..0000}.tar").label.tolist() == [2, 0, 0, 1]
    with pytest.raises(ShardError, match=r"t-train-0002\.tar: there is no such file; 7 more of the 10 shards"):
        opened(directory, "t-train-{0000..0009}.tar")


def test_a_substitute_is_the_next_usable_sample_of_the_shard(directory: Path) -> None:
    samples = [(f"{i}.{part}", b"x") for i in range(5) for part in ("jpg", "cls")]
    write_tar(directory / SECOND, [(n, b"1" if n in ("1.cls", "3.cls") else d) for n, d in samples])
    write_info(directory, shard_lengths=[2, 5])
    index = opened(directory)
    assert index.label.tolist() == [0, 1, -1, 1, -1, 1, -1]
    assert [index.substitute(i) for i in range(7)] == [1, 0, 3, 5, 5, 3, 3]


def test_fingerprint_follows_content_not_place(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(directory, elsewhere)
    fingerprint = opened(directory).fingerprint
    assert opened(directory).fingerprint == fingerprint
    assert opened(elsewhere).fingerprint == fingerprint
    write_tar(elsewhere / SECOND, [(two_samples(2)[0][0], b"1"), *two_samples(2)[1:]])
    assert opened(elsewhere).fingerprint != fingerprint


def test_a_second_opening_reads_no_shard(directory: Path, scanned: list[str]) -> None:
    first, second = opened(directory), opened(directory)
    assert sorted(scanned) == [FIRST, SECOND]
    assert first.stored.rows.tolist() == second.stored.rows.tolist()
    assert first != second


def test_only_changed_shards_are_read_again(directory: Path, scanned: list[str]) -> None:
    write_tar(directory / FIRST, two_samples(0)[1:])
    first = opened(directory)
    table = first.stored.table
    scanned.clear()

    os.utime(directory / SECOND, ns=(0, 0))
    touched = opened(directory)
    assert scanned == [SECOND]
    assert (touched.fingerprint, touched.faults, touched.stored.table) == (first.fingerprint, first.faults, table)
    scanned.clear()

    replaced = directory / "new"
    write_tar(replaced, [(two_samples(2)[0][0], b"1"), *two_samples(2)[1:]])
    replaced.rename(directory / SECOND)
    changed = opened(directory)
    assert scanned == [SECOND]
    assert changed.label.tolist() == [-1, 1, 1, 0]
    assert changed.faults == first.faults
    assert changed.fingerprint != first.fingerprint
    assert list(directory.glob("*.npy")) == [changed.stored.table]
    # An index that was open keeps its table.
    assert first.label.tolist() == [-1, 1, 2, 0]

    scanned.clear()
    write_info(directory, filenames=[SECOND], shard_lengths=[2])
    assert opened(directory).label.tolist() == [1, 0]
    assert scanned == []


def test_other_classes_make_another_index(directory: Path, scanned: list[str]) -> None:
    opened(directory)
    scanned.clear()
    info = json.loads((directory / "_info.json").read_text())
    (directory / "_info.json").write_text(json.dumps(info | {"classes": ["a", "b"]}))
    assert [fault.reason for fault in opened(directory).faults] == ["bad label"]
    assert len(scanned) == 2


def spoil_table(directory: Path) -> None:
    (table,) = directory.glob("*.npy")
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)


def edit(change: Callable[[dict[str, Any]], object], sign: bool = True) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "_index-train.json"
        document = json.loads(path.read_text())
        change(document)
        if sign:
            document["check"] = storing._check(document["index"])
        path.write_text(json.dumps(document))

    return damage


SPOILED: dict[str, Damage] = {
    "no json": lambda directory: (directory / "_index-train.json").unlink(),
    "half a json": lambda directory: os.truncate(directory / "_index-train.json", 100),
    "other json": lambda directory: (directory / "_index-train.json").write_text("[1]"),
    "deep json": lambda directory: (directory / "_index-train.json").write_text("[" * 100_000),
    "no text": lambda directory: (directory / "_index-train.json").write_bytes(b"\xff\0"),
    "another format": edit(lambda document: document.update(format=0)),
    "a changed entry": edit(lambda document: document["index"].update(fingerprint="0"), sign=False),
    "another table": edit(lambda document: document["index"].update(table="../../etc/passwd")),
    "names missing": edit(lambda document: document["index"].update(names=[FIRST])),
    "lengths wrong": edit(lambda document: document["index"].update(lengths=[2, 3])),
    "lengths no numbers": edit(lambda document: document["index"].update(lengths=["2", "2"])),
    "rows beyond the shard": edit(lambda document: document["index"].update(bytes=[10240, 512])),
    "a fault too many": edit(lambda document: document["index"].update(faults=[[SECOND, "k", "no label", "d"]])),
    "no table": lambda directory: next(directory.glob("*.npy")).unlink(),
    "a changed table": spoil_table,
    "half a table": lambda directory: os.truncate(next(directory.glob("*.npy")), 100),
}


@pytest.mark.parametrize("damage", SPOILED.values(), ids=SPOILED.keys())
def test_a_damaged_index_is_made_anew(directory: Path, scanned: list[str], damage: Damage) -> None:
    first = opened(directory)
    rows, fingerprint = first.stored.rows.tolist(), first.fingerprint
    damage(directory)
    scanned.clear()
    again = opened(directory)
    assert len(scanned) == 2
    assert (again.stored.rows.tolist(), again.fingerprint) == (rows, fingerprint)
    scanned.clear()
    opened(directory)
    assert scanned == []


class ReadOnly(LocalDirectory):
    """A directory that belongs to somebody else, also where the tests run as root."""

    def writable(self) -> Path | None:
        return None


def test_a_directory_that_cannot_be_written(directory: Path, tmp_path: Path, scanned: list[str]) -> None:
    shards = split_of(directory)
    split = Split(**vars(shards) | {"directory": ReadOnly(directory)})
    cache = tmp_path / "cache"
    first = open_index(split, cache_dir=cache)
    assert first.stored.table is not None
    assert cache in first.stored.table.parents
    assert not list(directory.glob("_index*"))
    scanned.clear()
    assert open_index(split, cache_dir=cache).fingerprint == first.fingerprint
    assert scanned == []
    # Nowhere to keep it.
    unkept = open_index(split)
    assert unkept.stored.table is None
    assert [read(pickle.loads(pickle.dumps(unkept)), i)[:7] for i in range(4)] == [
        b"image %d" % i for i in range(4)
    ]


def test_a_failed_write_beside_the_shards_goes_to_the_cache(directory: Path, tmp_path: Path) -> None:
    (directory / "_index-train.json").mkdir()
    table = opened(directory, cache=tmp_path / "cache").stored.table
    assert table is not None
    assert tmp_path / "cache" in table.parents


class Elsewhere:
    """A directory whose files come one by one, as from a server, and note that they did."""

    def __init__(self, origin: Path, here: Path) -> None:
        self.origin, self.here, self.fetched = origin, here, list[str]()

    def fetch(self, name: str, *, size: int | None = None, sha256: str | None = None) -> Path:
        data = (self.origin / name).read_bytes()
        assert size in (None, len(data))
        self.fetched.append(name)
        self.here.mkdir(exist_ok=True)
        (self.here / name).write_bytes(data)
        return self.here / name

    def open(self, name: str) -> BinaryIO:
        return (self.origin / name).open("rb")

    def writable(self) -> Path | None:
        return None

    def __str__(self) -> str:
        return "https://example.org/set"


def test_a_remote_index_is_kept_or_fetched(directory: Path, tmp_path: Path) -> None:
    def split() -> tuple[Split, list[str]]:
        far = Elsewhere(directory, tmp_path / "copies")
        return Split(**vars(split_of(directory)) | {"directory": far}), far.fetched

    shards, fetched = split()
    first = open_index(shards, cache_dir=tmp_path / "cache")
    assert sorted(fetched) == [FIRST, SECOND]
    shards, fetched = split()
    assert open_index(shards, cache_dir=tmp_path / "cache").fingerprint == first.fingerprint
    assert fetched == []

    # Published beside the shards, it spares others the scan; they keep a copy, because the fetched one may go.
    opened(directory)
    shards, fetched = split()
    published = open_index(shards, cache_dir=tmp_path / "elsewhere")
    assert [name[:12] for name in fetched] == ["_index-train"] * 2
    assert published.fingerprint == first.fingerprint
    assert published.stored.table is not None
    assert tmp_path / "elsewhere" in published.stored.table.parents
    assert read(published, 3) == b"image 3" * 200

    write_info(directory, shard_lengths=[2, 3])
    shards, fetched = split()
    with pytest.raises(
        ShardError, match=r"https://example\.org/set/t-train-0001\.tar: holds 2 samples, _info\.json says 3"
    ):
        open_index(shards, cache_dir=tmp_path / "cache")
    assert fetched[-1] == SECOND


def open_many_times(directory: Path) -> set[str]:
    return {opened(directory).fingerprint for _ in range(20)}


def test_processes_may_build_at_once(directory: Path) -> None:
    expected = opened(directory).fingerprint
    with multiprocessing.get_context("fork").Pool(3) as pool:
        results = pool.map_async(open_many_times, [directory] * 3)
        while not results.ready():
            for path in directory.glob("_index*"):
                path.unlink(missing_ok=True)
        assert results.get() == [{expected}] * 3


def test_an_index_crosses_processes(directory: Path) -> None:
    index = opened(directory)
    expected = [read(index, i) for i in range(4)]
    # After a fork the child shares the parent's descriptors; both may read at once.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(read, [(index, i % 4) for i in range(100)]) == expected * 25
    sent = pickle.dumps(index)
    received = pickle.loads(sent)
    assert isinstance(received.stored.rows, np.memmap)
    assert received.fingerprint == index.fingerprint
    assert [read(received, i) for i in range(4)] == expected
    assert index.stored.table is not None
    index.stored.table.unlink()
    with pytest.raises(RunError, match=r"_index-train-.*\.npy cannot be read"):
        pickle.loads(sent)


def test_open_files_are_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "_MAX_OPEN", 1)
    monkeypatch.setattr(indexing, "_descriptors", type(indexing._descriptors)())
    index = opened(directory)
    for i in (0, 2, 1, 3):
        assert read(index, i) == f"image {i}".encode() * 200
        assert len(indexing._descriptors) == 1


def test_a_shard_that_changes_after_indexing(directory: Path) -> None:
    index = opened(directory)
    read(index, 0)
    os.truncate(directory / FIRST, 1000)
    with pytest.raises(RunError, match=r"t-train-0000\.tar ends inside sample 0; it was cut short"):
        read(index, 0)
    os.truncate(directory / SECOND, 1000)
    with pytest.raises(RunError, match=r"t-train-0001\.tar has 1000 bytes; expected 10240: it has changed"):
        read(index, 2)
    (directory / SECOND).unlink()
    with pytest.raises(RunError, match=r"t-train-0001\.tar cannot be read: No such file"):
        read(index, 2)


def test_timms_reader_finds_as_many_samples(directory: Path) -> None:
    from timm.data import create_dataset

    dataset = create_dataset("wds/t", root=str(directory), split="train", is_training=False)
    assert len(dataset) == len(opened(directory))
