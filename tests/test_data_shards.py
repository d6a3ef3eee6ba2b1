"""The shard index finds what is there, and every fault of a shard is one line that names it."""

import io
import json
import multiprocessing
import pickle
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gmscale.data import ShardIndex, open_index, shards
from gmscale.errors import RunError, UsageError

Members = list[tuple[str, bytes]]


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
            (f"{number:04}.json", b"{}"),
        )
    ]


def write_info(directory: Path, **changes: object) -> None:
    split = {
        "name": "train",
        "num_samples": 4,
        "filenames": ["t-train-0000.tar", "t-train-0001.tar"],
        "shard_lengths": [2, 2],
    }
    info = {"name": "t", "classes": ["a", "b", "c"], "splits": {"train": split, "validation": split}}
    (directory / "_info.json").write_text(json.dumps(info | changes))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for shard in (0, 1):
        write_tar(tmp_path / f"t-train-{shard:04}.tar", two_samples(2 * shard))
    write_info(tmp_path)
    return tmp_path


def test_every_sample_is_found_with_its_label(directory: Path) -> None:
    index = open_index(directory, "train")
    assert len(index) == 4
    assert index.label.tolist() == [0, 1, 2, 0]
    assert index.shard.tolist() == [0, 0, 1, 1]
    assert index.lengths.tolist() == [2, 2]
    assert index.classes == ["a", "b", "c"]
    assert [shards.read(index, i) for i in range(4)] == [f"image {i}".encode() * 200 for i in range(4)]
    assert [shards.member_name(index, i) for i in range(4)] == [f"{i:04}.jpg" for i in range(4)]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_of_other_tar_formats(directory: Path, tar_format: int) -> None:
    key = f"{'ü' * 60}/{'k' * 120}"
    write_tar(
        directory / "t-train-0001.tar",
        [*two_samples(2)[:3], (f"{key}.JPEG", b"pixels"), (f"{key}.cls", b"2\n")],
        tar_format,
    )
    index = open_index(directory, "train")
    assert index.label.tolist() == [0, 1, 2, 2]
    assert shards.read(index, 3) == b"pixels"


def test_classes_are_numbered_when_info_lists_none(directory: Path) -> None:
    write_info(directory, classes=None)
    assert open_index(directory, "train").classes == ["0", "1", "2"]


def test_fingerprint_follows_content_not_place(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for path in directory.iterdir():
        (elsewhere / path.name).write_bytes(path.read_bytes())
    fingerprint = open_index(directory, "train").fingerprint
    assert open_index(elsewhere, "train").fingerprint == fingerprint

    relabelled = two_samples(2)
    relabelled[0] = (relabelled[0][0], b"1")
    write_tar(elsewhere / "t-train-0001.tar", relabelled)
    assert open_index(elsewhere, "train").fingerprint != fingerprint


def test_an_index_crosses_processes(directory: Path) -> None:
    index = open_index(directory, "train")
    expected = [shards.read(index, i) for i in range(4)]
    # After a fork the child shares the parent's descriptors; both may read at once.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(shards.read, [(index, i % 4) for i in range(100)]) == expected * 25
    assert pickle.loads(pickle.dumps(index)).fingerprint == index.fingerprint


def test_open_files_are_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN", 1)
    monkeypatch.setattr(shards, "_descriptors", type(shards._descriptors)())
    index = open_index(directory, "train")
    for i in (0, 2, 1, 3):
        assert shards.read(index, i) == f"image {i}".encode() * 200
        assert len(shards._descriptors) == 1


def test_a_shard_that_shrinks_after_indexing(directory: Path) -> None:
    index = open_index(directory, "train")
    beyond = replace(index, size=index.size + 10**6)
    with pytest.raises(RunError, match=r"t-train-0000\.tar ends inside sample 1"):
        shards.read(beyond, 1)


SHARD = "t-train-0001.tar"
# In blocks of 512 bytes, a header before each member: a label of 1, an image of 3, a json of 1.
SECOND_SAMPLE = 512 * (2 + 4 + 2)


def put(content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / SHARD).write_bytes(content)


def cut(byte: int) -> Callable[[Path], object]:
    return lambda directory: (directory / SHARD).write_bytes((directory / SHARD).read_bytes()[:byte])


def members(change: Callable[[Members], Members]) -> Callable[[Path], object]:
    return lambda directory: write_tar(directory / SHARD, change(two_samples(2)))


def relabel(text: bytes) -> Callable[[Path], object]:
    return members(lambda samples: [(samples[0][0], text), *samples[1:]])


def flip_header_bit(directory: Path) -> None:
    data = bytearray((directory / SHARD).read_bytes())
    data[SECOND_SAMPLE + 3] ^= 1
    (directory / SHARD).write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda directory: (directory / SHARD).unlink(), "cannot be read: No such file"),
    "a directory": (
        lambda directory: ((directory / SHARD).unlink(), (directory / SHARD).mkdir()),
        "cannot be read: Is a directory",
    ),
    "no bytes": (put(b""), "is empty: 0 bytes"),
    "no samples": (members(lambda _: []), "is empty: it holds no image"),
    "no images": (members(lambda samples: [samples[2]]), "is empty: it holds no image"),
    "not a tar": (put(b"<html>404</html>" * 100), "is not an uncompressed tar"),
    "compressed": (put(b"\x1f\x8b" + b"\0\1" * 1000), "is not an uncompressed tar"),
    "cut inside a member": (cut(SECOND_SAMPLE + 2000), "is truncated: it ends inside 0003.jpg"),
    "cut inside a header": (cut(SECOND_SAMPLE + 200), "is damaged or truncated: no tar header at byte 4096"),
    "cut between samples": (cut(SECOND_SAMPLE), "holds 1 samples, _info.json says 2"),
    "cut before an image": (cut(SECOND_SAMPLE + 1024), "0003.cls has no image"),
    "flipped header bit": (flip_header_bit, "is damaged or truncated: no tar header at byte 4096"),
    "missing label": (members(lambda samples: samples[1:]), "0002.jpg has no label; expected a member 0002.cls"),
    "label too large": (relabel(b"3"), "0002.cls holds label 3; expected 0 to 2"),
    "label negative": (relabel(b"-1"), "0002.cls holds label -1; expected 0 to 2"),
    "label not a number": (relabel(b"cat"), "0002.cls holds b'cat'; expected a class number"),
    "two images": (
        members(lambda samples: [*samples, ("0002.png", b"x")]),
        "0002.jpg and 0002.png are images of one sample '0002'",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_shard_is_named(directory: Path, damage: Callable[[Path], object], reason: str) -> None:
    damage(directory)
    with pytest.raises(UsageError, match=re.escape(SHARD)) as caught:
        open_index(directory, "train")
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message


def test_a_missing_directory_and_info(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.source: .*nowhere is not a directory"):
        open_index(tmp_path / "nowhere", "train")
    with pytest.raises(UsageError, match=r"_info\.json is missing"):
        open_index(tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "_info.json cannot be read"),
        ("[]", "needs 'filenames' and 'shard_lengths'"),
        ('{"splits": {"train": {"filenames": []}}}', "needs 'filenames' and 'shard_lengths'"),
        ('{"splits": {"train": {"filenames": [], "shard_lengths": []}}}', "has 0 filenames"),
        ('{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": []}}}', "1 filenames and 0 shard_lengths"),
    ],
)
def test_a_faulty_info_is_named(directory: Path, text: str, reason: str) -> None:
    (directory / "_info.json").write_text(text)
    with pytest.raises(UsageError, match=re.escape(reason)):
        open_index(directory, "train")


def test_an_unknown_split_names_the_nearest(directory: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no split 'valid' \(it has train, validation\); did you mean 'validation'"
    ):
        open_index(directory, "valid")


def test_an_index_is_not_compared_by_accident(directory: Path) -> None:
    first, second = open_index(directory, "train"), open_index(directory, "train")
    assert isinstance(first, ShardIndex)
    assert first != second
    assert first.fingerprint == second.fingerprint
