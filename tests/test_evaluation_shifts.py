"""Other judges of a model: reassessed labels by the samples' names, and folders of other images of its classes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from gmscale import parallel
from gmscale.data import ValLoader, val_loader
from gmscale.data.index import read
from gmscale.data.tars.writer import write_shard
from gmscale.errors import UsageError
from gmscale.evaluation import evaluate, shifts
from gmscale.evaluation.shifts import FolderAccuracy, RealLabels, sample_names
from gmscale.evaluation.subject import Subject, spread
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks

WNIDS = tuple(f"n{number:08d}" for number in range(10))
SOME = (2, 5, 7)
IMAGENET = [f"ILSVRC2012_val_{number:08d}" for number in range(1, tiny.VALIDATION_SIZE + 1)]


class Guess(nn.Module):
    """Takes the mean colour of an image for the logits, turned round as many classes as told."""

    def __init__(self, turn: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 3, generator=torch.Generator().manual_seed(turn)))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) @ self.weight.T


def subject(cache: Path, world: World = tiny.ALONE, **data: Any) -> Subject:
    config = tiny.config(cache, cache / "none", data=data)
    loader = val_loader(config.data, world.rank, world.size)
    return Subject(Guess().eval(), config, loader, world, WNIDS)


@pytest.fixture(scope="module")
def imagenet(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """data settings of the validation images under the names of ImageNet's, in two shards."""
    root, index = tmp_path_factory.mktemp("imagenet"), subject(cache).loader.index  # type: ignore[union-attr]
    samples = [
        {"__key__": name, "png": read(index, i), "cls": str(index.label[i]), "json": "{}"}
        for i, name in enumerate(reversed(IMAGENET))
    ]
    write_shard(root / "val-0.tar", samples[:20])
    write_shard(root / "val-1.tar", samples[20:])
    return {"source": str(root), "val_split": "val-{0..1}.tar"}


@torch.no_grad()
def predictions(one: Subject) -> tuple[list[int], list[int]]:
    batches = list(one.batches())
    predicted = torch.cat([one.on_pixels(batch.pixels).argmax(1) for batch in batches])
    return predicted.tolist(), torch.cat([batch.labels for batch in batches]).tolist()


def written(path: Path, content: Any) -> RealLabels:
    path.write_text(json.dumps(content))
    return RealLabels(path=str(path))


# ---- names -------------------------------------------------------------------------------------------------------


def test_names_are_the_keys_in_one_pass_over_each_shard(
    cache: Path, imagenet: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = subject(cache, **imagenet).loader.index  # type: ignore[union-attr]
    names = list(reversed(IMAGENET))
    opened: list[Path] = []
    real = shifts.members
    monkeypatch.setattr(shifts, "members", lambda path: opened.append(path) or real(path))
    assert sample_names(index, np.arange(25)) == names
    assert [path.name for path in opened] == ["val-0.tar", "val-1.tar"]
    assert sample_names(index, np.array([3, 24])) == [names[3], names[24]]
    assert sample_names(index, np.arange(0)) == []
    part = spread(index, 7)
    assert sample_names(part, np.arange(7)) == [names[i * 25 // 7] for i in range(7)]


def test_names_are_the_files_that_shards_were_built_of(
    cache: Path, imagenet: dict[str, Any], tmp_path: Path
) -> None:
    index = subject(cache).loader.index  # type: ignore[union-attr]
    write_shard(tmp_path / "v.tar", [{"__key__": "00", "png": read(index, 0), "cls": "1"}])
    (tmp_path / "_sources-v.tar.txt").write_text("00\tval/ILSVRC2012_val_00000007.JPEG\n")
    one = subject(cache, source=str(tmp_path), val_split="v.tar")
    assert sample_names(one.loader.index, np.arange(1)) == ["val/ILSVRC2012_val_00000007.JPEG"]  # type: ignore[union-attr]


# ---- reassessed labels -------------------------------------------------------------------------------------------


def test_with_the_own_labels_it_is_accuracy(cache: Path, imagenet: dict[str, Any], tmp_path: Path) -> None:
    one = subject(cache, **imagenet)
    _, labels = predictions(one)
    found = written(tmp_path / "real.json", [[label] for label in reversed(labels)]).measure(one)
    whole = evaluate(one.model, one.loader, one.config.data, tiny.ALONE)
    assert found == {"top1": whole["top1"], "count": tiny.VALIDATION_SIZE}


@pytest.mark.parametrize("keyed", [False, True])
def test_any_of_an_images_labels_is_right_and_images_without_are_left_out(
    cache: Path, imagenet: dict[str, Any], tmp_path: Path, keyed: bool
) -> None:
    one = subject(cache, **imagenet)
    predicted, _ = predictions(one)
    # of the 25 images: 5 have no label, 8 have two of which the prediction is one, 12 have a wrong one
    labels: list[list[int]] = [[] for _ in range(5)]
    labels += [[(right + 1) % 10, right] for right in predicted[5:13]]
    labels += [[(right + 1) % 10] for right in predicted[13:]]
    by_name = dict(zip(reversed(IMAGENET), labels, strict=True))
    content: Any = {f"{n}.JPEG": x for n, x in by_name.items()} if keyed else [by_name[name] for name in IMAGENET]
    found = written(tmp_path / "real.json", content).measure(one)
    assert found == {"top1": 40.0, "count": 20}


def test_a_part_of_the_images(cache: Path, imagenet: dict[str, Any], tmp_path: Path) -> None:
    one = subject(cache, **imagenet)
    predicted, _ = predictions(one)
    by_name = dict(zip(reversed(IMAGENET), ([p] for p in predicted), strict=True))
    assert isinstance(one.loader, ValLoader)
    part = replace(one, loader=ValLoader(spread(one.loader.index, 7), one.config.data, 0, 1))
    found = written(tmp_path / "real.json", [by_name[name] for name in IMAGENET]).measure(part)
    assert found == {"top1": 100.0, "count": 7}


def test_no_image_with_a_label(cache: Path, imagenet: dict[str, Any], tmp_path: Path) -> None:
    found = written(tmp_path / "real.json", [[]] * 25).measure(subject(cache, **imagenet))
    assert found == {"top1": None, "count": 0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([[0]] * 24, r"real.json lists the labels of ILSVRC2012_val_00000001 to _00000024, but .*_00000025'"),
        (
            {"other": [0]},
            r"real.json has no labels of sample 'ILSVRC2012_val_00000025'; its keys are such as 'other'",
        ),
        ([[0], [10]], "real.json names class 10; the images have 10 classes, from 0"),
        ([0, 1], "real.json holds 0; expected a list of class numbers an image"),
        ({}, "real.json holds no labels"),
        (3, "real.json holds no labels"),
    ],
)
def test_labels_that_do_not_fit(
    cache: Path, imagenet: dict[str, Any], tmp_path: Path, content: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        written(tmp_path / "real.json", content).measure(subject(cache, **imagenet))
    assert "\n" not in str(caught.value)


def test_labels_that_cannot_be_read(cache: Path, imagenet: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--real .*gone\.json: no such file"):
        RealLabels(path=str(tmp_path / "gone.json"))
    (tmp_path / "bad.json").write_text("[[1")
    with pytest.raises(UsageError, match=r"bad\.json cannot be read as JSON"):
        RealLabels(path=str(tmp_path / "bad.json")).measure(subject(cache, **imagenet))
    with pytest.raises(UsageError, match=r"--real needs .* data\.access index; this run's is stream"):
        written(tmp_path / "real.json", [[1]]).measure(subject(cache, access="stream"))


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation images in class folders: all of them by number, and those of SOME classes by name."""
    root, index = tmp_path_factory.mktemp("folders"), subject(cache).loader.index  # type: ignore[union-attr]
    for i, label in enumerate(index.label.tolist()):
        for folder in [root / "v2" / str(label)] + [root / "subset" / WNIDS[label]] * (label in SOME):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(read(index, i))
    return root


def test_the_splits_own_images_in_folders_give_its_accuracy(cache: Path, folders: Path) -> None:
    one = subject(cache)
    whole = evaluate(one.model, one.loader, one.config.data, tiny.ALONE)
    found = FolderAccuracy(name="v2", path=str(folders / "v2")).measure(one)
    assert found["loss"] == pytest.approx(whole.pop("loss"), rel=1e-6)
    assert whole.items() <= found.items()
    assert found["classes"] == len(set(predictions(one)[1]))


@torch.no_grad()
def test_a_subset_is_judged_among_its_classes_too(cache: Path, folders: Path) -> None:
    one = subject(cache)
    found = FolderAccuracy(name="a", path=str(folders / "subset")).measure(one)
    logits = torch.cat([one.on_pixels(batch.pixels) for batch in one.batches()]).tolist()
    chosen = [(values, label) for values, label in zip(logits, predictions(one)[1], strict=True) if label in SOME]
    assert {label for _, label in chosen} == set(SOME)
    right = sum(max(SOME, key=lambda c: values[c]) == label for values, label in chosen)
    assert (found["classes"], found["count"]) == (3, len(chosen))
    assert found["top1_within"] == pytest.approx(100 * right / len(chosen))
    assert found["top1_within"] > found["top1"]


def test_all_classes_are_no_subset(cache: Path, folders: Path, tmp_path: Path) -> None:
    index = subject(cache).loader.index  # type: ignore[union-attr]
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "0.png").write_bytes(read(index, number))
    found = FolderAccuracy(name="v2", path=str(tmp_path)).measure(subject(cache))
    assert (found["classes"], found["count"]) == (10, 10)
    assert "top1_within" not in found


def test_classes_that_the_model_has_not(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--folder a=.*gone: no such directory"):
        FolderAccuracy(name="a", path=str(tmp_path / "gone"))
    (tmp_path / "n0000000x").mkdir()
    with pytest.raises(UsageError, match=r"n0000000x is none of the model's 10 classes; did you mean 'n0000000\d'"):
        FolderAccuracy(name="a", path=str(tmp_path)).measure(subject(cache))
    numbered = tmp_path / "numbered" / "10"
    numbered.mkdir(parents=True)
    (numbered / "0.png").write_bytes(b"")
    with pytest.raises(UsageError, match="has class 10; the model has 10 classes"):
        FolderAccuracy(name="a", path=str(numbered.parent)).measure(replace(subject(cache), classes=()))


# ---- ranks -------------------------------------------------------------------------------------------------------


def measure_on_a_rank(
    world: World, cache: Path, data: dict[str, Any], real: str, folder: str
) -> dict[str, list[Any]]:
    one = subject(cache, world, **data)
    both = RealLabels(path=real).measure(one), FolderAccuracy(name="a", path=folder).measure(one)
    return {"ranks": parallel.of_all_ranks(both, world)}


def test_ranks_count_every_image_once(cache: Path, imagenet: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    one = subject(cache, **imagenet)
    predicted, _ = predictions(one)
    real = written(tmp_path / "real.json", [[p] if i % 3 else [] for i, p in enumerate(predicted)])
    subset = FolderAccuracy(name="a", path=str(folders / "subset"))
    first, second = run_ranks(measure_on_a_rank, 2, cache, imagenet, real.path, subset.path)["ranks"]
    assert first == second
    assert first[0] == real.measure(one)
    alone = subset.measure(one)
    assert first[1].pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert first[1] == alone
