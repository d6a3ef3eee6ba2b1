"""Corruptions of a run's images, and ImageNet-C's folders: what a scorecard says of them."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gmscale.data import DataConfig, ValLoader, normalize, val_loader
from gmscale.errors import UsageError
from gmscale.evaluation.corruptions import FAMILIES, SEVERITIES, CorruptedFolder, Corruption, corrupt
from gmscale.evaluation.subject import Subject
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks

FAMILY = "shot_noise"


class Few(nn.Module):
    """A few of the pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images[..., ::8, ::8].flatten(1)


def fitted(config: DataConfig) -> nn.Module:
    """A linear model that knows each validation image by heart, by so little of it that it is easily misled."""
    batches = [(Few()(normalize(images, config)), labels) for images, labels, _ in val_loader(config, 0, 1)]
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    linear = nn.Linear(inputs.shape[1], 10, bias=False).requires_grad_(False)
    linear.weight.copy_((torch.linalg.pinv(inputs) @ F.one_hot(labels, 10).float()).T)
    return nn.Sequential(Few(), linear)


def subject_of(cache: Path, run_dir: Path, world: World = tiny.ALONE, **more: Any) -> Subject:
    config = tiny.config(cache, run_dir, data={"eval_batch_size_per_device": 10, "crop_pct": 1.0, **more})
    loader = val_loader(config.data, world.rank, world.size)
    assert isinstance(loader, ValLoader)
    return Subject(fitted(config.data), config, loader, world, tuple(loader.classes))


@pytest.fixture
def subject(cache: Path, tmp_path: Path) -> Subject:
    return subject_of(cache, tmp_path / "run")


def whole(subject: Subject, images: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*subject.batches(images), strict=True))  # type: ignore[return-value]


def top1(subject: Subject, pixels: Tensor, labels: Tensor) -> float:
    return float((subject.on_pixels(pixels).argmax(1) == labels).double().mean() * 100)


@pytest.mark.parametrize("images", [None, 12])
def test_one_entry_holds_five_severities(subject: Subject, images: int | None) -> None:
    found = Corruption(family=FAMILY, images=images).measure(subject)
    pixels, labels, indices = whole(subject, images)
    corrupted = [corrupt(pixels, FAMILY, severity, indices, subject.seed) for severity in SEVERITIES]
    assert found["top1"] == pytest.approx([top1(subject, version, labels) for version in corrupted])
    assert found["clean_top1"] == pytest.approx(top1(subject, pixels, labels))
    assert found["mean_top1"] == pytest.approx(sum(found["top1"]) / 5)
    assert found["error"] == pytest.approx(100 - found["mean_top1"])
    assert found["clean_top1"] == 100 > found["top1"][4]
    assert len(labels) == (images or tiny.VALIDATION_SIZE)


def test_the_seed_is_the_runs(subject: Subject) -> None:
    other = replace(subject, config=replace(subject.config, run=replace(subject.config.run, seed=5)))
    pixels, _, indices = whole(subject)
    assert not torch.equal(corrupt(pixels, FAMILY, 5, indices, 0), corrupt(pixels, FAMILY, 5, indices, 5))
    assert other.seed == 5
    assert Corruption(family=FAMILY).measure(other)["top1"] != Corruption(family=FAMILY).measure(subject)["top1"]


def _rank(world: World, cache: str, run_dir: str) -> dict[str, Any]:
    return Corruption(family=FAMILY, images=15).measure(subject_of(Path(cache), Path(run_dir), world))


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(cache: Path, tmp_path: Path, subject: Subject) -> None:
    one = Corruption(family=FAMILY, images=15).measure(subject)
    assert run_ranks(_rank, 2, str(cache), str(tmp_path / "run")) == one


@pytest.fixture
def folder(subject: Subject, tmp_path: Path) -> Path:
    """The run's images as ImageNet-C would lie on a disk: of one family, and an empty one beside it."""
    pixels, labels, indices = whole(subject)
    for severity in SEVERITIES:
        version = corrupt(pixels, FAMILY, severity, indices, subject.seed)
        for number, (picture, label) in enumerate(zip(version, labels.tolist(), strict=True)):
            place = tmp_path / "C" / FAMILY / str(severity) / subject.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            array = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(array).save(place / f"{number}.png")
    (tmp_path / "C" / "notes").mkdir()
    return tmp_path / "C"


def test_folders_give_what_the_same_images_give(subject: Subject, folder: Path) -> None:
    (what,) = CorruptedFolder.all_in(folder)
    assert asdict(what) == {"path": str(folder), "family": FAMILY}
    assert what.measure(subject) == Corruption(family=FAMILY).measure(subject)


def test_grey_models_are_measured(cache: Path, tmp_path: Path) -> None:
    grey = subject_of(cache, tmp_path / "run", channels=1)
    assert len(Corruption(family="snow").measure(grey)["top1"]) == 5
    with pytest.raises(UsageError, match=r"--corrupt is 'saturate', which needs colour"):
        Corruption(family="saturate").measure(grey)


def test_words_and_mistakes(tmp_path: Path) -> None:
    assert Corruption(family="motion_blur", images=50).words == "motion blur, 50 images"
    with pytest.raises(UsageError, match=r"--corrupt is 'fogg'; expected one of .*; did you mean 'fog'"):
        Corruption(family="fogg")
    with pytest.raises(UsageError, match="--corrupt_images is 0"):
        Corruption(family="fog", images=0)
    with pytest.raises(UsageError, match="nowhere is not a folder; expected DIR/FAMILY/SEVERITY/CLASS/IMAGE"):
        CorruptedFolder.all_in(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=f"has no folder of a family such as {FAMILIES[0]}"):
        CorruptedFolder.all_in(tmp_path)
    (tmp_path / "fog" / "1").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"has no folder fog/2; expected fog/1 to fog/5"):
        CorruptedFolder.all_in(tmp_path)
