"""Streamed shards: nothing lost, twice or swapped, whatever the shards, ranks and workers; webdataset's traps."""

import bz2
import gzip
import io
import json
import lzma
import multiprocessing
import os
import pickle
import random
import sys
import tarfile
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gmscale.data import sequence, stream
from gmscale.data.batch import Batch
from gmscale.data.config import AugmentConfig, DataConfig
from gmscale.data.faults import Fault, SampleError, ShardError
from gmscale.data.images.transforms import PixelAssembly
from gmscale.data.sequence import Piece, Sample, pieces, read, replaced, shuffled
from gmscale.data.source import LocalDirectory, Split, open_split
from gmscale.data.stream import StreamLoader, StreamValLoader
from gmscale.data.tars.scan import scan
from gmscale.errors import RunError, UsageError

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": lambda data: gzip.compress(data, 1),
    ".tar.bz2": bz2.compress,
    ".tar.xz": lambda data: lzma.compress(data, preset=0),
}
CLASSES = 1000


# ---- shards to read ----------------------------------------------------------------------------------------


def picture(number: int) -> bytes:
    """A PNG of 4 x 4 pixels whose colour says which it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(image: torch.Tensor) -> int:
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def sample(number: int, **other: bytes) -> list[tuple[str, bytes]]:
    """The members of a good sample; its label is its number."""
    parts = {"cls": str(number).encode(), "png": picture(number)} | other
    return [(f"{number:05d}.{extension}", data) for extension, data in parts.items()]


def shard(first: int, count: int) -> bytes:
    return tar([member for number in range(first, first + count) for member in sample(number)])


def write(directory: Path, contents: list[bytes], lengths: list[int], ending: str = ".tar") -> Split:
    """Write shards and their _info.json."""
    names = [f"train-{i:04d}{ending}" for i in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        (directory / name).write_bytes(COMPRESSORS[ending](content))
    return describe(directory, names, lengths)


def describe(directory: Path, names: list[str], lengths: list[int]) -> Split:
    info = {
        "splits": {"train": {"filenames": names, "shard_lengths": lengths}},
        "classes": [str(i) for i in range(CLASSES)],
    }
    (directory / "_info.json").write_text(json.dumps(info))
    return open_split(settings_for(directory, allow_pipe=True), "train")


def numbered(directory: Path, lengths: list[int], ending: str = ".tar") -> Split:
    """Write good shards whose samples are numbered through."""
    firsts = np.cumsum([0, *lengths])
    contents = [shard(int(first), count) for first, count in zip(firsts, lengths, strict=False)]
    return write(directory, contents, lengths, ending)


def settings_for(directory: Path, **values: Any) -> DataConfig:
    defaults = {
        "source": str(directory),
        "access": "stream",
        "image_size": 4,
        "batch_size_per_device": 2,
        "eval_batch_size_per_device": 3,
        "workers": 0,
    }
    return DataConfig(**(defaults | values))


PLAIN = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), color_jitter=0.0)


def loaders(
    split: Split, data: DataConfig, world_size: int = 1, grad_accum_steps: int = 1, seed: int = 0
) -> list[StreamLoader]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            StreamLoader(split, data, PLAIN, seed, rank, world_size, grad_accum_steps) for rank in range(world_size)
        ]


def labels(steps: list[list[Batch]]) -> list[int]:
    return [int(label) for step in steps for batch in step for label in batch.labels]


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "available_cores", lambda: 2)


class Trickle(io.RawIOBase):
    """A file that comes a few bytes at a time, as from a network, and may break off."""

    def __init__(self, data: bytes, breaks_at: int) -> None:
        self.data, self.breaks_at, self.position = data, breaks_at, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.breaks_at:
            raise ConnectionResetError(104, "Connection reset by peer")
        part = self.data[self.position : self.position + min(len(buffer), 1 + self.position % 7)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


@dataclass(frozen=True)
class FarDirectory(LocalDirectory):
    breaks_at: int = sys.maxsize

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, Trickle((self.path / name).read_bytes(), self.breaks_at))


# ---- what is read of one shard -----------------------------------------------------------------------------


def whole(split: Split, length: int | None = None) -> list[Sample]:
    """Read the first shard to its end."""
    if length is not None:
        split = replace(split, lengths=(length,))
    assert split.lengths
    return list(read(split, Piece(0, 0, split.lengths[0]), 0, "cls", CLASSES))


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_samples_are_those_that_webdataset_reads(tmp_path: Path, ending: str) -> None:
    split = numbered(tmp_path, [5], ending)
    theirs = list(webdataset.WebDataset(str(tmp_path / split.names[0]), shardshuffle=False))
    ours = whole(split)
    assert [(s.key, s.image, s.label, s.fault) for s in ours] == [
        (s["__key__"], s["png"], int(s["cls"]), None) for s in theirs
    ]


@given(st.integers(0, 7), st.integers(0, 7))
def test_a_piece_is_a_part_of_its_shard(tmp_path_factory: pytest.TempPathFactory, start: int, stop: int) -> None:
    split = numbered(tmp_path_factory.mktemp("piece"), [7], ".tar.gz")
    found = list(read(split, Piece(0, start, stop), 100, "cls", CLASSES)) if start < stop else []
    assert [s.label for s in found] == list(range(start, stop))
    assert [s.number for s in found] == list(range(100, 100 + len(found)))


def test_compressed_streams_that_follow_each_other_are_one(tmp_path: Path) -> None:
    data = shard(0, 4)
    for ending, compress in COMPRESSORS.items():
        (tmp_path / f"train{ending}").write_bytes(compress(data[:3000]) + compress(data[3000:]))
        split = describe(tmp_path, [f"train{ending}"], [4])
        assert [s.label for s in whole(split)] == [0, 1, 2, 3], ending


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_bytes_that_trickle_in_are_the_same(tmp_path: Path, ending: str) -> None:
    split = numbered(tmp_path, [3], ending)
    assert whole(replace(split, directory=FarDirectory(tmp_path))) == whole(split)
    with pytest.raises(ShardError, match=r"cannot be read after byte .*: Connection reset by peer"):
        whole(replace(split, directory=FarDirectory(tmp_path, breaks_at=100)))


parts = st.sampled_from(
    [("cls", b"3"), ("cls", b"x"), ("json", b'{"a": 5}'), ("png", b"p"), ("PNG", b""), ("jpg", b"j"), ("txt", b"t")]
)
keys = st.sampled_from(["0", "a/1", "../2", "__3__/x"])


@given(st.lists(st.tuples(keys, st.lists(parts, max_size=3)), max_size=5, unique_by=lambda sample: sample[0]))
@pytest.mark.parametrize("label", ["cls", "json.a"])
def test_streaming_and_indexing_find_the_same(
    tmp_path_factory: pytest.TempPathFactory, label: str, samples: list[tuple[str, list[tuple[str, bytes]]]]
) -> None:
    directory = tmp_path_factory.mktemp("same")
    members = [(f"{key}.{extension}", data) for key, part in samples for extension, data in part]
    counted = len({key for key, part in samples if part and not key.startswith("__")})
    split = write(directory, [tar(members)], [counted])
    try:
        found = scan(directory / split.names[0], split.names[0], "", label, CLASSES)
    except ShardError as error:
        fault = error.fault  # also where no sample is usable, which a stream leaves to `replaced`
    else:
        fault = None
    streamed = list(read(split, Piece(0, 0, counted), 0, label, CLASSES)) if counted else []
    if fault is None:
        assert [s.label for s in streamed] == found.rows["label"].tolist()
        assert tuple(s.fault for s in streamed if s.fault) == found.faults
    else:
        assert all(s.fault for s in streamed)


def reason(split: Split, **values: Any) -> str:
    with pytest.raises(ShardError) as caught:
        whole(split, **values)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(caught.value.fault.shard)
    return caught.value.fault.reason


def webdataset_keys(directory: Path) -> list[str]:
    """What webdataset makes of the first shard where errors do not stop it, or are none."""
    paths = sorted(map(str, directory.glob("train*")))
    return [s["__key__"] for s in webdataset.WebDataset(paths, shardshuffle=False, handler=lambda _: True)]


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_a_shard_cut_between_members_is_refused_where_webdataset_is_silent(tmp_path: Path, ending: str) -> None:
    data = shard(0, 4)
    split = write(tmp_path, [data[: 4 * 1024]], [4], ending)  # two samples of two blocks of 512 for each member
    assert webdataset_keys(tmp_path) == ["00000", "00001"]
    assert reason(split) == "truncated shard"
    # Also where the cut file is all that its count was taken from.
    assert reason(split, length=2) == "truncated shard"


def test_a_flipped_bit_in_a_header_is_refused_where_webdataset_loses_the_rest(tmp_path: Path) -> None:
    data = bytearray(shard(0, 4))
    data[4 * 1024 + 20] ^= 4
    split = write(tmp_path, [bytes(data)], [4])
    assert webdataset_keys(tmp_path) == ["00000", "00001"]
    assert reason(split) == "damaged header"


def test_halves_of_samples_in_two_shards_are_not_joined(tmp_path: Path) -> None:
    # webdataset without its end-of-shard mark pairs the label of one shard with the image of the next.
    first, second = tar([("7.cls", b"1")]), tar([("7.png", picture(2))])
    split = write(tmp_path, [first, second], [1, 1])
    tars = webdataset.tariterators.url_opener({"url": str(tmp_path / name)} for name in split.names)
    expanded = webdataset.tariterators.tar_file_expander(tars, eof_value=None)
    (joined,) = webdataset.tariterators.group_by_keys(expanded)
    assert (joined["cls"], joined["png"]) == (b"1", picture(2))
    found = [next(read(split, Piece(i, 0, 1), i, "cls", CLASSES)) for i in range(2)]
    assert [s.fault.reason for s in found if s.fault] == ["no image", "no label"]
    with pytest.raises(
        RunError, match=r"none of 2 samples in a row can be used; the first: train-0000.tar: '7.cls'"
    ):
        list(replaced(found))


def test_a_truncated_member_is_refused_where_webdataset_takes_it_for_whole(tmp_path: Path) -> None:
    content = os.urandom(3000)
    data = tar([("0.cls", b"0"), ("0.jpg", content)])
    split = write(tmp_path, [data[: 1024 + 512 + 1000]], [1])
    (theirs,) = webdataset.WebDataset(str(tmp_path / split.names[0]), shardshuffle=False, handler=lambda _: True)
    assert theirs.get("jpg") != content  # half a sample, and no word of it
    assert reason(split) == "truncated shard"


@pytest.mark.parametrize(("length", "said"), [(3, "more samples than the 3"), (5, "4 samples, _info.json says 5")])
def test_a_count_that_differs_is_refused(tmp_path: Path, length: int, said: str) -> None:
    with pytest.raises(ShardError, match=said) as caught:
        whole(numbered(tmp_path, [4]), length)
    assert caught.value.fault.reason == "wrong sample count"


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_compressed_bytes_are_checked_to_their_end(tmp_path: Path, ending: str, damage: str) -> None:
    split = numbered(tmp_path, [4], ending)
    path = tmp_path / split.names[0]
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-3:]
    else:
        data[-10 if ending == ".tar.xz" else -6] ^= 1  # of the checksum
    path.write_bytes(data)
    assert reason(split) == ("truncated shard" if damage == "cut" else "unreadable shard")


def test_a_sample_that_comes_again_is_refused(tmp_path: Path) -> None:
    # Sorted by extension, as `tar` writes what `find` lists: webdataset yields 4 half samples.
    members = [("0.cls", b"0"), ("1.cls", b"1"), ("0.png", picture(0)), ("1.png", picture(1))]
    split = write(tmp_path, [tar(members)], [2])
    assert webdataset_keys(tmp_path) == ["0", "1", "0", "1"]
    assert reason(split) == "interleaved sample"


def test_what_is_wrong_with_a_sample_is_found(tmp_path: Path) -> None:
    # webdataset yields half samples, and joins a.1.png and a.2.png to one.
    groups: dict[str, list[tuple[str, bytes]]] = {
        "no label": [("0.png", picture(0))],
        "no image": [("1.cls", b"1")],
        "bad label": [("2.cls", b"cat"), ("2.png", picture(2))],
        "two images": [("3.cls", b"3"), ("3.jpg", picture(3)), ("3.png", picture(3))],
        "empty image": [("4.cls", b"4"), ("4.png", b"")],
        "unsafe name": [("../5.cls", b"5"), ("../5.png", picture(5))],
    }
    for number, members in enumerate(groups.values()):
        assert members[0][0].removeprefix("../").startswith(str(number))
    dotted = [("a.1.cls", b"1"), ("a.1.png", picture(1)), ("a.2.cls", b"2"), ("a.2.png", picture(2))]
    other = [("6.cls", b"1000"), ("6.png", picture(6))]
    parts = [*groups.values(), dotted, other, sample(7)]
    split = write(tmp_path, [tar([member for part in parts for member in part])], [len(parts)])
    assert len(webdataset_keys(tmp_path)) == len(parts)
    found = whole(split)
    assert [s.fault.reason if s.fault else None for s in found] == [*groups, "no image", "bad label", None]
    assert all(s.fault is None or (s.fault.shard, s.fault.key) == (split.names[0], s.key) for s in found)


def test_labels_are_read_from_json(tmp_path: Path) -> None:
    members = [("0.json", b'{"label": 3, "name": "cat"}'), ("0.png", picture(0))]
    split = write(tmp_path, [tar(members)], [1])
    for label, expected in (("json.label", None), ("json.name", "bad label"), ("cls", "no label")):
        (found,) = read(split, Piece(0, 0, 1), 0, label, CLASSES)
        assert (found.fault and found.fault.reason) == expected
        assert found.label == (3 if expected is None else -1)


class Touch:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_member_is_executed(tmp_path: Path) -> None:
    bait = {"pyd": pickle.dumps(Touch(tmp_path / "theirs"))}
    split = write(tmp_path, [tar(sample(0, **bait))], [1])
    list(webdataset.WebDataset(str(tmp_path / split.names[0]), shardshuffle=False).decode())
    assert (tmp_path / "theirs").is_dir()
    (tmp_path / "theirs").rmdir()
    for steps in (list(loaders(split, settings_for(tmp_path, batch_size_per_device=1))[0].epoch(0)), whole(split)):
        assert len(steps) == 1
    assert not (tmp_path / "theirs").exists()


# ---- memory ------------------------------------------------------------------------------------------------


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_a_compressed_bomb_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(sequence, "_LARGEST_IMAGE", 1 << 20)
    bomb = tar([("0.cls", b"0"), ("0.png", bytes(24 << 20)), ("0.txt", bytes(8 << 20)), *sample(1)])
    split = write(tmp_path, [bomb], [2], ending)
    assert (tmp_path / split.names[0]).stat().st_size < 1 << 20
    found: list[Sample] = []
    assert peak(lambda: found.extend(whole(split))) < 6 << 20
    assert [s.fault.reason if s.fault else None for s in found] == ["oversized image", None]
    assert peak(lambda: list(webdataset.WebDataset(str(tmp_path / split.names[0]), shardshuffle=False))) > 24 << 20


def test_an_xz_header_cannot_ask_for_more_memory_than_there_is(tmp_path: Path) -> None:
    data = bytearray(lzma.compress(shard(0, 1)))
    block, end = 12, 12 + (data[12] + 1) * 4  # after the stream's header; its last 4 bytes are its CRC
    place = data.index(b"\x21\x01", block) + 2  # of the size of LZMA2's dictionary
    data[place] = 34  # 512 MiB
    data[end - 4 : end] = zlib.crc32(data[block : end - 4]).to_bytes(4, "little")
    (tmp_path / "train.tar.xz").write_bytes(data)
    with pytest.raises(ShardError, match="Memory usage limit exceeded"):
        whole(describe(tmp_path, ["train.tar.xz"], [1]))


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    # A header of the old GNU form says that 512 bytes stand for 8 GiB.
    member = tarfile.TarInfo("0.png")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = (8 << 30).to_bytes(12, "big")
    header[483] = 0x80
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    split = write(tmp_path, [tar([("0.cls", b"0")])[:1024] + bytes(header) + bytes(512 + 1024)], [1])
    assert reason(split) == "sparse member"


# ---- commands ----------------------------------------------------------------------------------------------


def test_a_command_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    numbered(tmp_path, [4], ".tar.gz")
    command = f"pipe:touch {tmp_path}/ran; cat {tmp_path}/train-0000.tar.gz"
    split = describe(tmp_path, [command], [4])
    data = settings_for(tmp_path)
    with pytest.raises(UsageError, match=r"data\.allow_pipe .*'pipe:touch .*shell command"):
        StreamLoader(split, data, PLAIN, 0, 0, 1, 1)
    with pytest.raises(UsageError, match=r"data\.allow_pipe"):
        StreamValLoader(split, data, 0, 1)
    assert not (tmp_path / "ran").exists()
    (loader,) = loaders(split, replace(data, allow_pipe=True))
    assert sorted(labels(list(loader.epoch(0)))) == [0, 1, 2, 3]
    assert (tmp_path / "ran").exists()


def test_a_command_that_fails_is_an_error_also_after_a_whole_tar(tmp_path: Path) -> None:
    numbered(tmp_path, [4])
    for status in (3, 141):  # webdataset takes 141 for success
        command = f"pipe:cat {tmp_path}/train-0000.tar; exit {status}"
        with pytest.raises(ShardError, match=f"its command ended with status {status}"):
            whole(describe(tmp_path, [command], [4]))
    command = f"pipe:cat {tmp_path}/train-0000.tar; exit 141"
    assert len(list(webdataset.WebDataset(command, shardshuffle=False))) == 4


def test_a_command_ends_with_its_stream(tmp_path: Path) -> None:
    numbered(tmp_path, [4])
    command = f"pipe:echo $$ > {tmp_path}/pid; cat {tmp_path}/train-0000.tar /dev/zero"
    found = read(describe(tmp_path, [command], [4]), Piece(0, 0, 2), 0, "cls", CLASSES)
    assert [s.label for s in found] == [0, 1]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_environment_of_webdataset_is_irrelevant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = numbered(tmp_path, [4])
    path = str(tmp_path / split.names[0])
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=/nowhere")
    with pytest.raises(FileNotFoundError):
        webdataset.gopen(path)
    monkeypatch.setattr(webdataset.utils, "enforce_security", True)  # WDS_SECURE=1, which it reads when imported
    with pytest.raises(ValueError, match="unsafe_gopen"):
        webdataset.gopen(path)
    assert len(whole(split)) == 4


def test_an_absent_or_foreign_shard_is_named(tmp_path: Path) -> None:
    split = describe(tmp_path, ["train.tar"], [1])
    assert reason(split) == "missing shard"
    for content, expected in (
        (b"", "empty shard"),
        (b"<html>not found</html>", "not a tar"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed shard"),
        (gzip.compress(b""), "empty shard"),
        (tar([]), "empty shard"),
    ):
        (tmp_path / "train.tar").write_bytes(content)
        assert reason(split) == expected, content


# ---- who reads what ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.randoms(use_true_random=False), st.data())
def test_pieces_of_consecutive_runs_are_every_sample_once(
    lengths: list[int], rng: Any, data: st.DataObject
) -> None:
    shards = list(range(len(lengths)))
    rng.shuffle(shards)
    cuts = sorted(data.draw(st.lists(st.integers(0, sum(lengths)), max_size=5)))
    found = []
    for begin, end in zip([0, *cuts], [*cuts, sum(lengths)], strict=True):
        run = pieces(np.array(lengths), np.array(shards), begin, end)
        assert sum(p.stop - p.start for p in run) == end - begin
        found += [(p.shard, i) for p in run for i in range(p.start, p.stop)]
    assert found == [(shard, i) for shard in shards for i in range(lengths[shard])]


def made(number: int, size: int = 1, fault: Fault | None = None) -> Sample:
    return Sample(number, "s.tar", str(number), b"" if fault else bytes(size), -1 if fault else number, fault)


def test_shuffling_is_bounded_by_samples_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "_MOST_SAMPLES", 8)
    monkeypatch.setattr(sequence, "_MOST_BYTES", 100)
    for size, most in ((1, 8), (25, 5), (1000, 1)):
        waiting: list[Sample] = []
        order = []
        for drawn in shuffled((made(i, size) for i in range(60)), np.random.Philox(1), waiting):
            assert len(waiting) < most
            order.append(drawn.number)
        assert sorted(order) == list(range(60))
        assert (order == list(range(60))) == (most == 1)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_an_unusable_sample_is_replaced_by_the_next_in_its_place(good: list[bool]) -> None:
    fault = Fault("s.tar", "k", "no label", "no label")
    samples = [made(i, fault=None if ok else fault) for i, ok in enumerate(good)]
    if not any(good):
        with pytest.raises(RunError, match="samples in a row can be used"):
            list(replaced(samples))
        return
    found = list(replaced(samples))
    assert sorted(s.number for s in found) == list(range(len(good)))
    usable = [i for i, ok in enumerate(good) if ok]
    for s in found:
        assert (s.fault is None) == good[s.number]
        assert s.label == next((i for i in usable if i >= s.number), usable[-1])


def test_the_search_for_a_usable_sample_ends() -> None:
    fault = Fault("s.tar", "k", "no label", "'k.png' has no label")
    with pytest.raises(
        RunError, match=r"none of 33 samples in a row can be used; the first: s\.tar: 'k\.png' has no"
    ):
        next(replaced(made(i, fault=fault) for i in range(10**9)))


# ---- training ----------------------------------------------------------------------------------------------

UNEVEN = [7, 1, 12, 0, 5, 9, 3]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the streams of all workers in this process."""
    monkeypatch.setattr(stream, "_workers", lambda streams, wanted: 0)


def by_node(names: list[str], lengths: list[int], rank: int, world_size: int) -> int:
    """Samples that webdataset gives to a rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        return sum(lengths[names.index(name)] for name in webdataset.split_by_node(names))
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_have_equal_batches_and_no_sample_twice(tmp_path: Path, world_size: int, workers: int) -> None:
    split = numbered(tmp_path, UNEVEN, ".tar.gz")
    if world_size > 1:
        assert len({by_node(list(split.names), UNEVEN, rank, world_size) for rank in range(world_size)}) > 1
    ranks = loaders(split, settings_for(tmp_path, workers=workers), world_size, grad_accum_steps=2)
    seen: list[int] = []
    for rank in ranks:
        steps = list(rank.epoch(0))
        assert len(steps) == rank.steps_per_epoch == 37 // rank.global_batch_size
        assert all([len(batch.labels) for batch in step] == [2, 2] for step in steps)
        seen += labels(steps)
    assert len(set(seen)) == len(seen) == ranks[0].steps_per_epoch * ranks[0].global_batch_size


@pytest.mark.usefixtures("one_process")
def test_images_are_channels_last_bytes_of_their_labels(tmp_path: Path) -> None:
    split = numbered(tmp_path, UNEVEN)
    for (batch,) in loaders(split, settings_for(tmp_path, workers=3))[0].epoch(0):
        assert isinstance(batch.images, torch.Tensor)
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (2, 3, 4, 4))
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert [number_of(image) for image in batch.images] == batch.labels.tolist()
        assert (batch.late, batch.faults) == (None, ())


def test_orders_differ_between_epochs_and_seeds_and_come_again(tmp_path: Path) -> None:
    split = numbered(tmp_path, UNEVEN)
    theirs = webdataset.WebDataset([str(tmp_path / n) for n in split.names], shardshuffle=100, empty_check=False)
    first, second = ([s["__key__"] for s in theirs] for _ in range(2))
    assert first == second
    data = settings_for(tmp_path)
    orders = [labels(list(loaders(split, data, seed=s)[0].epoch(e))) for s, e in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 10


def test_repeats_need_an_index(tmp_path: Path) -> None:
    split = numbered(tmp_path, [3, 2, 4])
    with pytest.raises(UsageError, match=r"augment\.repeats is 2, but data\.access stream"):
        StreamLoader(split, settings_for(tmp_path), AugmentConfig(repeats=2), 0, 0, 1, 1)


def test_an_order_is_for_ever(tmp_path: Path) -> None:
    # A resumed run depends on it, whatever versions it is resumed with.
    split = numbered(tmp_path, [3, 2, 4])
    assert labels(list(loaders(split, settings_for(tmp_path), seed=7)[0].epoch(5))) == [4, 0, 1, 5, 3, 2, 7, 6]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("lengths", [[11], UNEVEN])
def test_every_worker_meets_every_sample_some_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    # Also the tail of an only shard, and whatever does not fill a batch.
    split = numbered(tmp_path, lengths)
    theirs = webdataset.WebDataset([str(tmp_path / n) for n in split.names], shardshuffle=100).with_epoch(8)
    assert len({s["__key__"] for _ in range(10) for s in theirs}) == 8  # the tail is dropped for ever
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")  # of webdataset, whose ranks and workers keep their shards for ever
        patch.setenv("WORLD_SIZE", "2")
        theirs = webdataset.WebDataset(
            [str(tmp_path / n) for n in split.names], shardshuffle=100, nodesplitter=webdataset.split_by_node
        )
        assert len({s["__key__"] for _ in range(10) for s in theirs}) == sum(lengths[::2])
    ranks = loaders(split, settings_for(tmp_path, workers=2, batch_size_per_device=4), world_size=2)
    seen: dict[tuple[int, int], set[int]] = {}
    for epoch in range(40):
        for rank, loader in enumerate(ranks):
            for number, (batch,) in enumerate(loader.epoch(epoch)):
                seen.setdefault((rank, number % loader._streams), set()).update(batch.labels.tolist())
    assert len(seen) == (2 if lengths == [11] else 4)
    if lengths == UNEVEN:
        assert all(len(met) == 37 for met in seen.values())
    assert set.union(*seen.values()) == set(range(sum(lengths)))


def same(first: list[list[Batch]], second: list[list[Batch]]) -> bool:
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.faults == b.faults
        for a, b in zip(chain(*first), chain(*second), strict=True)
    )


def damaged(directory: Path) -> Split:
    """Shards of 24 samples; the 5th has no label, the 6th and the 15th are no pictures."""
    parts = [sample(i, png=b"\x89PNG no") if i in (5, 14) else sample(i) for i in range(24)]
    parts[4] = parts[4][1:]
    contents = [tar([member for part in parts[i : i + 8] for member in part]) for i in range(0, 24, 8)]
    return write(directory, contents, [8, 8, 8], ".tar.gz")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_samples_are_replaced_and_reported(tmp_path: Path, batch_size: int) -> None:
    split = damaged(tmp_path)
    (loader,) = loaders(split, settings_for(tmp_path, batch_size_per_device=batch_size))
    steps = list(loader.epoch(0))
    assert len(labels(steps)) == 24
    assert set(labels(steps)) == set(range(24)) - {4, 5, 14}
    faults = [fault for step in steps for batch in step for fault in batch.faults]
    assert {(f.shard[-8:], f.key, f.reason) for f in faults} == {
        ("0.tar.gz", "00004", "no label"),
        ("0.tar.gz", "00005", "corrupt image"),
        ("1.tar.gz", "00014", "corrupt image"),
    }
    assert len(faults) == 3


def test_a_batch_without_a_picture_ends_the_run(tmp_path: Path) -> None:
    split = write(tmp_path, [tar([m for i in range(4) for m in sample(i, png=b"\x89PNG no")])], [4])
    (loader,) = loaders(split, settings_for(tmp_path))
    with pytest.raises(
        RunError, match=r"no image could be put in the place of one that does not decode: .*train-0000"
    ):
        list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_resumed_epoch_goes_on_as_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    split, data = damaged(tmp_path), settings_for(tmp_path, workers=workers)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_workers", lambda streams, wanted: 0)
        expected = {epoch: list(loaders(split, data)[0].epoch(epoch)) for epoch in (0, 1)}
    assert not same(expected[0], expected[1])
    (loader,) = loaders(split, data)  # 3 workers are 3 streams in one process, because this machine has 2 cores
    assert same([next(loader.epoch(0))], expected[0][:1])
    # The second epoch abandons the first, whose batches may still be under way in the workers.
    assert same(list(loader.epoch(1)), expected[1])
    for start_step in (1, 7):
        assert same(list(loader.epoch(0, start_step)), expected[0][start_step:])
    assert list(loader.epoch(0, loader.steps_per_epoch)) == []


def test_reading_forward_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (loader,) = loaders(numbered(tmp_path, UNEVEN), settings_for(tmp_path))
    decoded: list[bytes] = []
    put = PixelAssembly.put
    monkeypatch.setattr(PixelAssembly, "put", lambda *args: (decoded.append(args[3]), put(*args))[1])
    assert len(labels(list(loader.epoch(0, 15)))) == len(decoded) == 2 * (18 - 15)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_ends_the_run_with_its_name(tmp_path: Path, workers: int) -> None:
    split = numbered(tmp_path, [6, 6, 6], ".tar.gz")
    path = tmp_path / split.names[1]
    path.write_bytes(path.read_bytes()[:-20])
    (loader,) = loaders(split, settings_for(tmp_path, workers=workers))
    error = failure(loader.epoch(0))
    assert isinstance(error, ShardError)
    assert error.fault.reason == "truncated shard"
    assert str(error) == f"{path}: its compressed data ends too early"
    del loader, error
    assert not multiprocessing.active_children()


def failure(batches: Iterable[object]) -> Exception:
    """Return the error that iterating ends with. Not pytest.raises, which would keep the loader and its workers."""
    try:
        list(batches)
    except (RunError, UsageError) as error:
        return error.with_traceback(None)
    raise AssertionError("no error")


def test_more_workers_than_shards_are_fewer_streams_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, data = numbered(tmp_path, [6, 6, 6]), settings_for(tmp_path, workers=8)
    with monkeypatch.context() as patch:
        patch.setenv("WORKER", "7")  # of webdataset
        patch.setenv("NUM_WORKERS", "8")
        with pytest.raises(ValueError, match="fewer shards than workers"):
            list(webdataset.WebDataset([str(tmp_path / n) for n in split.names], shardshuffle=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ranks = [StreamLoader(split, data, PLAIN, 0, rank, 2, 1) for rank in range(2)]
    (said,) = caught
    assert "data.workers is 8, but 3 streamed shards keep only 1 busy on each of 2 ranks" in str(said.message)
    assert sorted(label for rank in ranks for label in labels(list(rank.epoch(0)))) != []
    # Even with more ranks than shards, each sample is read for one of them.
    many = loaders(split, data, world_size=4)
    seen = [label for rank in many for label in labels(list(rank.epoch(0)))]
    assert len(set(seen)) == len(seen) == 16


def test_workers_are_a_divisor_of_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    # A stream always meets the same worker then; what is read does not depend on the machine.
    monkeypatch.setattr(stream, "available_cores", lambda: 4)
    assert [stream._workers(n, n) for n in (0, 1, 2, 3, 4, 6, 7, 8)] == [0, 1, 2, 3, 4, 3, 1, 4]


def test_the_fingerprint_covers_what_the_batches_follow_from(tmp_path: Path) -> None:
    split, data = numbered(tmp_path, UNEVEN), settings_for(tmp_path, workers=2)
    changed = [
        loaders(split, data)[0],
        loaders(split, replace(data, workers=3))[0],
        loaders(split, replace(data, batch_size_per_device=3))[0],
        loaders(split, data, world_size=2)[0],
        loaders(split, data, grad_accum_steps=2)[0],
        loaders(replace(split, lengths=(8, *UNEVEN[1:])), data)[0],
        loaders(replace(split, names=(*split.names[:-1], "other.tar")), data)[0],
        loaders(split, replace(data, label="json.label"))[0],
    ]
    assert len({loader.fingerprint for loader in changed}) == len(changed)
    assert loaders(split, data)[0].fingerprint == changed[0].fingerprint


def test_counts_and_classes_are_asked_for(tmp_path: Path) -> None:
    split, data = numbered(tmp_path, [3]), settings_for(tmp_path)
    for unknown, said in (
        (replace(split, lengths=None), r"samples in each shard of 'train': .*shard_lengths.*tar -tf SHARD"),
        (replace(split, classes=None), r"names of the classes.*_info\.json"),
    ):
        with pytest.raises(UsageError, match=said):
            StreamLoader(unknown, data, PLAIN, 0, 0, 1, 1)


def test_a_step_larger_than_the_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.batch_size_per_device .*takes 8 .*split has 3"):
        loaders(numbered(tmp_path, [3]), settings_for(tmp_path, batch_size_per_device=8))


def test_tars_that_need_no_stream_are_streamed_as_well(tmp_path: Path) -> None:
    numbered(tmp_path, [4, 4])
    split = open_split(settings_for(tmp_path), "train-{0000..0001}.tar")
    assert sorted(labels(list(loaders(split, settings_for(tmp_path))[0].epoch(0)))) == list(range(8))


# ---- validation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3, 40])
def test_validation_counts_every_sample_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, workers: int
) -> None:
    split, data = numbered(tmp_path, UNEVEN, ".tar.xz"), settings_for(tmp_path, workers=workers)
    if world_size > 1:
        monkeypatch.setattr(stream, "_workers", lambda streams, wanted: 0)
    for _ in range(2 if world_size == 1 else 1):
        seen: list[int] = []
        for rank in range(world_size):
            share = StreamValLoader(split, data, rank, world_size)
            batches = [*share, *share][len(share) :]  # each pass is a whole one
            assert len(batches) == len(share)
            for images, batch_labels, indices in batches:
                assert [number_of(image) for image in images] == batch_labels.tolist() == indices.tolist()
                seen += indices.tolist()
        assert sorted(seen) == list(range(37))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_fatal_in_validation(tmp_path: Path, workers: int) -> None:
    error = failure(StreamValLoader(damaged(tmp_path), settings_for(tmp_path, workers=workers), 0, 1))
    assert isinstance(error, SampleError)
    assert error.fault.key in ("00004", "00005", "00014")
    assert "\n" not in str(error)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_process_keeps_its_random_states(tmp_path: Path, workers: int) -> None:
    split, data = numbered(tmp_path, UNEVEN), settings_for(tmp_path, workers=workers)

    def draw() -> list[float]:
        return [random.random(), np.random.random(), torch.rand(()).item()]

    def seed() -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    seed()
    expected = draw()
    seed()
    list(loaders(split, data)[0].epoch(0))
    list(StreamValLoader(split, data, 0, 1))
    assert draw() == expected
