"""A split is found by its name or by a pattern, and whatever is wrong with either is one line."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmscale.data.config import DataConfig
from gmscale.data.source import LocalDirectory, Split, collapse, expand, open_split
from gmscale.errors import UsageError

TRAIN = {
    "name": "train",
    "num_samples": 5,
    "filenames": ["t-train-0000.tar", "t-train-0001.tar"],
    "shard_lengths": [2, 3],
}
VALIDATION = {"name": "validation", "filenames": ["t-validation-0000.tar"], "shard_lengths": [4]}
OURS = TRAIN | {"sha256": ["0" * 64, "f" * 64], "bytes": [10240, 20480]}


def write_info(directory: Path, split: object = TRAIN, name: str = "_info.json", **more: object) -> None:
    info = {"name": "t", "splits": {"train": split, "validation": VALIDATION}} | more
    (directory / name).write_text(json.dumps(info))


def found(directory: Path, split: str = "train", **settings: object) -> Split:
    return open_split(DataConfig(source=str(directory), **settings), split)  # type: ignore[arg-type]


def refused(directory: Path, split: str = "train", **settings: object) -> str:
    with pytest.raises(UsageError) as caught:
        found(directory, split, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["_info.json", "info.json"])
def test_timms_info_gives_names_and_lengths(tmp_path: Path, name: str) -> None:
    write_info(tmp_path, name=name)
    split = found(tmp_path)
    assert split == Split(
        LocalDirectory(tmp_path), "train", ("t-train-0000.tar", "t-train-0001.tar"), (2, 3), None, None, None
    )
    assert str(split.directory) == str(tmp_path)


def test_our_info_gives_hashes_sizes_and_classes_too(tmp_path: Path) -> None:
    write_info(tmp_path, OURS, classes=["cat", "dog"])
    split = found(tmp_path)
    assert split.sha256 == ("0" * 64, "f" * 64)
    assert split.sizes == (10240, 20480)
    assert split.classes == ["cat", "dog"]


def test_the_embedded_sets_directory_takes_the_place_of_the_source(tmp_path: Path) -> None:
    write_info(tmp_path)
    assert open_split(DataConfig(), "train", tmp_path).lengths == (2, 3)


def test_a_pattern_takes_what_info_knows(tmp_path: Path) -> None:
    write_info(tmp_path, OURS, classes=["cat"])
    split = found(tmp_path, "t-train-{0001..0000}.tar")
    assert split.names == ("t-train-0001.tar", "t-train-0000.tar")
    assert split.lengths == (3, 2)
    assert split.sizes == (20480, 10240)
    assert split.sha256 == ("f" * 64, "0" * 64)
    assert split.classes == ["cat"]
    # Of one shard it knows nothing.
    assert found(tmp_path, "t-train-{0001..0002}.tar").lengths is None


def test_a_pattern_needs_no_info(tmp_path: Path) -> None:
    split = found(tmp_path, "{a,b}/x-{08..10}.tar")
    assert split.names == tuple(f"{part}/x-{number}.tar" for part in "ab" for number in ("08", "09", "10"))
    assert split.lengths is split.sha256 is split.sizes is split.classes is None


@given(
    st.integers(0, 2000),
    st.integers(1, 50),
    st.integers(4, 6),
    st.sampled_from(["", "imagenet1k-train-", "a/b 2."]),
)
def test_collapse_undoes_expand(first: int, count: int, width: int, prefix: str) -> None:
    names = [f"{prefix}{number:0{width}}.tar" for number in range(first, first + count)]
    (pattern,) = collapse(reversed(names))
    assert expand(pattern) == names


def test_collapse_proposes_only_patterns_without_gaps() -> None:
    names = ["a-00.tar", "a-01.tar", "b-00.tar", "b-02.tar", "c-0.tar", "d.tar"]
    assert list(collapse(names)) == ["a-{00..01}.tar", "c-0.tar"]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a-{0..3.tar", "unbalanced braces"),
        ("a-{0..99999999999}.tar", "too many shards"),
        ("a-{0..9999}{0..9999}.tar", "too many shards"),
        ("a-{0,0}.tar", "names a-0.tar twice"),
        ("/data/a-{0..3}.tar", "is not a name within data.source"),
        ("a/../../b.tar", "is not a name within data.source"),
        ("https://example.org/a-{0..3}.tar", "is an address; give its directory as data.source"),
        ("pipe:cat a-{0..3}.tar", "would run a shell command"),
    ],
)
def test_a_faulty_pattern_is_named(tmp_path: Path, pattern: str, reason: str) -> None:
    assert reason in refused(tmp_path, pattern)


def test_a_pipe_takes_both_settings(tmp_path: Path) -> None:
    pattern = "pipe:cat a-{0..1}.tar"
    refused(tmp_path, pattern, access="stream")
    refused(tmp_path, pattern, allow_pipe=True)
    split = found(tmp_path, pattern, access="stream", allow_pipe=True)
    assert split.names == ("pipe:cat a-0.tar", "pipe:cat a-1.tar")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.tar", "a/../../x.tar", "pipe:rm -r x", "s3://b/x.tar"])
def test_names_in_info_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    write_info(tmp_path, TRAIN | {"filenames": ["t-train-0000.tar", name]})
    assert repr(name) in refused(tmp_path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert "data.source" in refused(tmp_path / "nowhere")
    assert "nowhere is not a directory" in refused(tmp_path / "nowhere")


def test_without_info_a_pattern_is_proposed(tmp_path: Path) -> None:
    assert "holds no numbered tars" in refused(tmp_path)
    for split, count in (("validation", 4), ("train", 12)):
        for number in range(count):
            (tmp_path / f"imagenet1k-{split}-{number:04}.tar").touch()
    assert "_info.json is missing" in refused(tmp_path)
    assert "name the shards, such as 'imagenet1k-train-{0000..0011}.tar'" in refused(tmp_path)
    assert "such as 'imagenet1k-validation-{0000..0003}.tar'" in refused(tmp_path, "val")


def test_an_unknown_split_names_the_nearest(tmp_path: Path) -> None:
    write_info(tmp_path)
    assert "no split 'valid' (it has train, validation); did you mean 'validation'" in refused(tmp_path, "valid")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "_info.json cannot be read"),
        ("[" * 100_000, "_info.json cannot be read"),
        ("\xff", "_info.json cannot be read"),
        ("[]", "needs 'filenames' and 'shard_lengths'"),
        ('{"splits": {"train": 1}}', "needs 'filenames' and 'shard_lengths'"),
        ('{"splits": {"train": {"filenames": []}}}', "needs 'filenames' and 'shard_lengths'"),
        ('{"splits": {"train": {"filenames": [], "shard_lengths": []}}}', "has 0 filenames"),
        ('{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": []}}}', "1 filenames and 0 shard_lengths"),
    ],
)
def test_a_faulty_info_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "_info.json").write_text(text, encoding="latin-1")
    assert reason in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"filenames": "ab"}, "has 'filenames' that is not a list"),
        ({"filenames": ["a.tar", 1]}, "has '1' among its filenames; expected names"),
        ({"filenames": ["a.tar", "a.tar"]}, "names a.tar twice"),
        ({"shard_lengths": [2, -3]}, "has '-3' among its shard_lengths; expected whole numbers"),
        ({"shard_lengths": [2, True]}, "has 'True' among its shard_lengths"),
        ({"sha256": ["0" * 64]}, "has 2 filenames and 1 sha256"),
        ({"sha256": ["0" * 64, "f" * 63]}, "expected 64 hexadecimal digits each"),
        ({"bytes": [1, "2"]}, "has '2' among its bytes"),
    ],
)
def test_a_faulty_field_of_info_is_named(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    write_info(tmp_path, OURS | change)
    assert reason in refused(tmp_path)


@pytest.mark.parametrize(
    ("classes", "reason"), [([], "lists no classes"), ("ab", "not a list"), ([1], "has '1' among")]
)
def test_faulty_classes_are_named(tmp_path: Path, classes: object, reason: str) -> None:
    write_info(tmp_path, classes=classes)
    assert re.search(reason, refused(tmp_path))
