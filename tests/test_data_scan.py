"""Every sample of a shard is found; every fault of a shard or a sample is one line that names it."""

import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_shards import SECOND, Members, opened, two_samples, write_info, write_shards, write_tar

from gmscale.data import survey as surveying
from gmscale.data.faults import ShardError
from gmscale.data.index import member_name, read
from gmscale.errors import UsageError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_shards(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_directories_and_other_members(directory: Path, tar_format: int) -> None:
    stem = f"{'ü' * 60}/{'k' * (90 if tar_format == tarfile.USTAR_FORMAT else 120)}"
    write_tar(
        directory / SECOND,
        [
            ("README", b"no key"),
            ("__meta__/x.jpg", b"webdataset takes it for no sample"),
            ("a.b/0002.CLS", b" 1\n"),
            ("a.b/0002.Jpg", b"first"),
            ("a.b/0002.seg.png", b"not the image"),
            (f"{stem}.webp", b"second"),
            (f"{stem}.cls", b"2"),
            (f"{stem}.txt", b"caption"),
            # The same file name in another directory is another sample.
            ("./0002.png", b"third"),
            ("./0002.cls", b"0"),
        ],
        tar_format,
    )
    write_info(directory, shard_lengths=[2, 3])
    index = opened(directory)
    assert index.faults == ()
    assert index.label.tolist() == [0, 1, 1, 2, 0]
    assert [read(index, i) for i in (2, 3, 4)] == [b"first", b"second", b"third"]
    assert [member_name(index, i) for i in (2, 3, 4)] == ["a.b/0002.Jpg", f"{stem}.webp", "./0002.png"]


def test_keys_are_those_of_webdataset(directory: Path) -> None:
    from webdataset import WebDataset

    stems = ["a", "b b", "ü/x", "./c", "d.e/f", "g/h", "__i__/j", "__k__", "__l", "m/__n__"]
    write_tar(directory / SECOND, [(f"{stem}.{part}", b"1") for stem in stems for part in ("cls", "jpg")])
    (directory / "_info.json").unlink()
    index = opened(directory, SECOND)
    theirs = [sample["__key__"] for sample in WebDataset(str(directory / SECOND), shardshuffle=False)]
    assert [member_name(index, i).removesuffix(".jpg") for i in range(len(index))] == theirs


def test_an_image_beyond_2_gib_is_not_used(directory: Path) -> None:
    label, image = tarfile.TarInfo("0.cls"), tarfile.TarInfo("0.jpg")
    label.size, image.size = 1, 3 << 30
    beginning = label.tobuf() + b"0".ljust(512, b"\0") + image.tobuf()
    write_tar(directory / SECOND, two_samples(2)[:2])
    rest = (directory / SECOND).read_bytes()
    with (directory / SECOND).open("wb") as file:
        file.write(beginning)
        file.seek(image.size, os.SEEK_CUR)
        file.write(rest)
    index = opened(directory)
    assert [fault.reason for fault in index.faults] == ["oversized image"]
    assert index.label.tolist() == [0, 1, -1, 2]
    assert read(index, 3) == b"image 2" * 200


def test_labels_in_json(directory: Path) -> None:
    assert opened(directory, label="json.label").label.tolist() == [2, 1, 0, 2]
    assert opened(directory, label="json.text").label.tolist() == [0, 1, 0, 1]
    assert opened(directory).label.tolist() == [0, 1, 2, 0]
    with pytest.raises(
        ShardError, match=r"none of its 2 samples can be used; the first: '0000\.json' has no field 'lable'"
    ):
        opened(directory, label="json.lable")


# In blocks of 512 bytes, a header before each member: a label of 1, an image of 3, a json of 1.
SAMPLE = 512 * (2 + 4 + 2)

Damage = Callable[[Path], object]


def put(content: bytes) -> Damage:
    return lambda directory: (directory / SECOND).write_bytes(content)


def cut(byte: int) -> Damage:
    return lambda directory: (directory / SECOND).write_bytes((directory / SECOND).read_bytes()[:byte])


def members(change: Callable[[Members], Members]) -> Damage:
    return lambda directory: write_tar(directory / SECOND, change(two_samples(2)))


def put_directory(directory: Path) -> None:
    (directory / SECOND).unlink()
    (directory / SECOND).mkdir()


def flip_header_bit(directory: Path) -> None:
    data = bytearray((directory / SECOND).read_bytes())
    data[SAMPLE + 3] ^= 1
    (directory / SECOND).write_bytes(data)


BAD_SHARDS: dict[str, tuple[Damage, str, str]] = {
    "missing": (lambda directory: (directory / SECOND).unlink(), "missing shard", "there is no such file"),
    "a directory": (put_directory, "unreadable shard", "is not a regular file"),
    "no bytes": (put(b""), "empty shard", "0 bytes"),
    "no member": (members(lambda _: []), "empty shard", "a tar without a file in it"),
    "no sample": (members(lambda _: [("README", b"")]), "empty shard", "no member has a name such as"),
    "no image": (members(lambda samples: [samples[2]]), "no image", "none of its 1 samples can be used"),
    "not a tar": (put(b"<html>404</html>" * 100), "not a tar", "HTML"),
    "compressed": (put(b"\x1f\x8b" + b"\0\1" * 1000), "compressed shard", "gzip"),
    "cut inside a member": (cut(SAMPLE + 2000), "truncated shard", "ends inside '0003.jpg'"),
    "cut inside a header": (cut(SAMPLE + 200), "truncated shard", "at byte 4096"),
    "cut between samples": (cut(SAMPLE), "truncated shard", "without the two blocks of zeros"),
    "flipped header bit": (
        flip_header_bit,
        "damaged header",
        "no valid tar header at byte 4096, after '0002.json'",
    ),
    "a sample less": (members(lambda samples: samples[:3]), "wrong sample count", "1 samples, _info.json says 2"),
    "a sample more": (
        members(lambda samples: [*samples, ("5.jpg", b"x"), ("5.cls", b"0")]),
        "wrong sample count",
        "3 samples, _info.json says 2",
    ),
    "images before labels": (
        members(lambda samples: [samples[1], samples[4], samples[0], samples[3]]),
        "interleaved sample",
        "the first: '0002.cls' comes after other samples",
    ),
}


@pytest.mark.parametrize(("damage", "reason", "detail"), BAD_SHARDS.values(), ids=BAD_SHARDS.keys())
def test_a_bad_shard_is_fatal_and_named(directory: Path, damage: Damage, reason: str, detail: str) -> None:
    opened(directory)
    damage(directory)
    with pytest.raises(ShardError, match=re.escape(f"{directory}/{SECOND}: ")) as caught:
        opened(directory)
    assert caught.value.fault.reason == reason
    assert detail in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_bad_shards_are_counted(directory: Path) -> None:
    for path in directory.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(ShardError, match=r"t-train-0000\.tar: 0 bytes; 1 more of the 2 shards cannot be used"):
        opened(directory)
    for shard in (0, 1):
        write_tar(directory / f"t-train-{shard:04}.tar", two_samples(2 * shard)[:3])
    with pytest.raises(ShardError, match=r"t-train-0000\.tar: holds 1 samples.*; 1 more of the 2 shards cannot"):
        opened(directory)


@pytest.mark.parametrize(("size", "reason"), [(10**6, "truncated shard"), (5, "wrong size")])
def test_bytes_are_compared_with_info(directory: Path, size: int, reason: str) -> None:
    true = (directory / SECOND).stat().st_size
    write_info(directory, bytes=[true, true])
    opened(directory)
    write_info(directory, bytes=[true, size])
    with pytest.raises(ShardError, match=f"{true} bytes, _info.json says {size}") as caught:
        opened(directory)
    assert caught.value.fault.reason == reason


def relabel(text: bytes) -> Callable[[Members], Members]:
    return lambda samples: [(samples[0][0], text), *samples[1:]]


BAD_SAMPLES: dict[str, tuple[Callable[[Members], Members], str, str, str]] = {
    "no label": (lambda samples: samples[1:], "0002", "no label", "expected a member '0002.cls'"),
    "two labels": (lambda samples: [samples[0], *samples], "0002", "bad label", "'0002.jpg' has 2 labels"),
    "label too large": (relabel(b"3"), "0002", "bad label", "'0002.cls' holds label 3; expected 0 to 2"),
    "label negative": (relabel(b"-1"), "0002", "bad label", "'0002.cls' holds '-1'; expected a class number"),
    "label a word": (relabel(b"cat"), "0002", "bad label", "'0002.cls' holds 'cat'"),
    "label empty": (relabel(b""), "0002", "bad label", "'0002.cls' holds ''"),
    "label underscored": (relabel(b"1_0"), "0002", "bad label", "'0002.cls' holds '1_0'"),
    "label long": (relabel(b"1" * 65), "0002", "bad label", "'0002.cls' has 65 bytes"),
    "no image": (lambda samples: [samples[0], *samples[2:]], "0002", "no image", "expected a member '0002.jpg'"),
    "only json": (lambda samples: samples[2:], "0002", "no image", "'0002.json' has no image"),
    "two images": (
        lambda samples: [*samples, ("0003.png", b"x")],
        "0003",
        "two images",
        "'0003.jpg' and '0003.png' are images of one sample",
    ),
    "empty image": (lambda s: [s[0], (s[1][0], b""), *s[2:]], "0002", "empty image", "'0002.jpg' has 0 bytes"),
    "interleaved": (lambda s: [s[0], *s[2:], s[1]], "0002", "interleaved sample", "'0002.jpg' comes after other"),
    "outside": (
        lambda samples: [("../" + name if "3" in name else name, data) for name, data in samples],
        "../0003",
        "unsafe name",
        "'../0003.cls' leads out of its directory",
    ),
    "absolute": (
        lambda samples: [("/" + name if "3" in name else name, data) for name, data in samples],
        "/0003",
        "unsafe name",
        "'/0003.cls' leads out of its directory",
    ),
}


@pytest.mark.parametrize(("change", "name", "reason", "detail"), BAD_SAMPLES.values(), ids=BAD_SAMPLES.keys())
def test_a_bad_sample_has_a_row_and_a_fault(
    directory: Path, change: Callable[[Members], Members], name: str, reason: str, detail: str
) -> None:
    members(change)(directory)
    for index in (opened(directory), opened(directory)):  # scanned, and read back
        (fault,) = index.faults
        assert (fault.shard, fault.key, fault.reason) == (SECOND, name, reason)
        assert detail in fault.detail
        bad = 2 + int(name.endswith("3"))
        assert np.flatnonzero(index.label < 0).tolist() == [bad]
        assert len(index) == 4
        assert index.substitute(bad) == 5 - bad
        assert name in member_name(index, bad)
        if reason in ("no image", "empty image", "interleaved sample"):
            assert read(index, bad) == b""
        assert read(index, 5 - bad).startswith(b"image")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("{", "does not hold JSON"),
        ("[" * 100_000, "does not hold JSON"),
        ("[1]", "has no field 'label'"),
        ('"label"', "has no field 'label'"),
        ('{"text": 1}', "has no field 'label'"),
        ('{"label": true}', "holds 'True'"),
        ('{"label": 1.0}', "holds '1.0'"),
        ('{"label": "1' + "0" * 5000 + '"}', "holds '1000"),
        ('{"label": 1' + "0" * 4000 + "}", "holds label 1000"),
        (" " * (1 << 20) + '{"label": 1}', "has 1048588 bytes"),
    ],
)
def test_a_bad_label_in_json(directory: Path, text: str, detail: str) -> None:
    members(lambda samples: [*samples[:2], ("0002.json", text.encode()), *samples[3:]])(directory)
    (fault,) = opened(directory, label="json.label").faults
    assert (fault.key, fault.reason) == ("0002", "bad label")
    assert f"'0002.json' {detail}" in fault.detail
    assert len(fault.detail) < 200


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 19), st.integers(0, 19), st.booleans(), st.integers(0, 19))
def test_no_damage_changes_the_number_of_samples(
    directory: Path, first: int, last: int, removed: bool, place: int
) -> None:
    write_shards(directory)
    data = (directory / SECOND).read_bytes()
    piece = data[512 * first : 512 * last]
    damaged = (
        data[: 512 * first] + data[512 * last :] if removed else data[: 512 * place] + piece + data[512 * place :]
    )
    (directory / SECOND).write_bytes(damaged)
    try:
        index = opened(directory)
    except ShardError:
        return
    assert index.lengths.tolist() == [2, 2]
    assert index.faults or index.label.tolist() == [0, 1, 2, 0]


def test_faults_are_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveying, "_MOST_FAULTS", 1)
    for shard in (0, 1):
        write_tar(directory / f"t-train-{shard:04}.tar", two_samples(2 * shard)[1:])
    with pytest.raises(
        UsageError, match=r"2 of 4 samples of split 'train' cannot be used; the first: t-train-0000"
    ):
        opened(directory)
