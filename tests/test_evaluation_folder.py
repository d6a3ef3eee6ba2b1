"""Images in class folders: the very pixels of the validation split, each once, under the model's classes."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from gmscale.config import TrainConfig
from gmscale.data import ValLoader, val_loader
from gmscale.data.index import read
from gmscale.errors import RunError, UsageError
from gmscale.evaluation.folder import folder_batches, folder_labels, open_folder
from gmscale.evaluation.subject import PixelBatch, Subject
from gmscale.models import create
from gmscale.parallel import World

CLASSES = [f"n{number:08d}" for number in range(10)]


@pytest.fixture(scope="module")
def config(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return tiny.config(cache, tmp_path_factory.mktemp("runs") / "none")


@pytest.fixture(scope="module")
def copied(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation images in class folders, file for file."""
    root = tmp_path_factory.mktemp("copied")
    index = split(config).index
    for number in range(len(index)):
        folder = root / index.classes[int(index.label[number])]
        folder.mkdir(exist_ok=True)
        (folder / f"{number:04d}.png").write_bytes(read(index, number))
    (root / "README.txt").write_text("no class")
    (root / ".hidden").mkdir()
    return root


def split(config: TrainConfig) -> ValLoader:
    loader = val_loader(config.data, 0, 1)
    assert isinstance(loader, ValLoader)
    return loader


def subject(config: TrainConfig, world: World = tiny.ALONE) -> Subject:
    loader = split(config)
    torch.manual_seed(0)
    return Subject(create(config, 10).eval(), config, loader, world, tuple(loader.classes))


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (9, 9, 9)).save(root / name / "0.png")
    return root


def joined(batches: list[PixelBatch]) -> PixelBatch:
    return PixelBatch(*map(torch.cat, zip(*batches, strict=True)))


def test_a_copy_of_the_split_gives_its_pixels_and_labels(config: TrainConfig, copied: Path) -> None:
    one = subject(config)
    found, own = joined(list(folder_batches(copied, one))), joined(list(one.batches()))
    folder = open_folder(copied, one.classes)
    order = torch.tensor([int(Path(name).stem) for name in folder.names])
    assert len(folder) == tiny.VALIDATION_SIZE
    assert torch.equal(found.pixels, own.pixels[order])
    assert torch.equal(found.labels, own.labels[order])
    assert found.indices.tolist() == list(range(tiny.VALIDATION_SIZE))


@pytest.mark.parametrize("images", [None, 7])
def test_ranks_and_workers_share_every_image_once(config: TrainConfig, copied: Path, images: int | None) -> None:
    whole = joined(list(folder_batches(copied, subject(config), images)))
    with_workers = replace(config, data=replace(config.data, workers=2, eval_batch_size_per_device=3))
    shares = [World(rank, rank, 3, torch.device("cpu"), "gloo") for rank in range(3)]
    parts = [list(folder_batches(copied, subject(with_workers, world), images)) for world in shares]
    together = joined([batch for part in parts for batch in part])
    assert all(torch.equal(a, b) for a, b in zip(whole, together, strict=True))
    assert all(parts)
    if images:
        assert whole.indices.tolist() == [i * tiny.VALIDATION_SIZE // images for i in range(images)]


def test_progress_counts_this_ranks_share(config: TrainConfig, copied: Path) -> None:
    heard: list[tuple[int, int]] = []
    one = replace(subject(config), progress=lambda done, total: heard.append((done, total)))
    list(folder_batches(copied, one))
    assert heard == [(10, 25), (20, 25), (25, 25)]


def test_folders_are_named_as_the_classes_or_by_number(tmp_path: Path) -> None:
    subset = folders(tmp_path / "subset", CLASSES[7], CLASSES[2])
    assert folder_labels(subset, CLASSES) == {CLASSES[2]: 2, CLASSES[7]: 7}
    assert open_folder(subset, CLASSES).outputs.tolist() == [2, 7]
    numbered = folders(tmp_path / "numbered", *map(str, range(10)))
    assert folder_labels(numbered, CLASSES) == {str(number): number for number in range(10)}
    assert folder_labels(numbered, ()) == folder_labels(numbered, CLASSES)
    # names win over numbers
    assert folder_labels(numbered, [str(9 - number) for number in range(10)])["0"] == 9


def test_numbers_of_imagenet_have_names_in_its_order(tmp_path: Path) -> None:
    numbers = list(map(str, range(1000)))
    subset = folders(tmp_path / "subset", "n01440764", "n01443537", "n15075141")
    assert folder_labels(subset, numbers) == {"n01440764": 0, "n01443537": 1, "n15075141": 999}
    with pytest.raises(UsageError, match="n01440764 is none of the model's 999 classes"):
        folder_labels(subset, numbers[:999])
    assert folder_labels(folders(tmp_path / "v2", "7", "12"), numbers) == {"12": 12, "7": 7}


@pytest.mark.parametrize(
    ("names", "classes", "said"),
    [
        ((), CLASSES, "has no class folders; expected images in DIR/CLASS/"),
        (("n00000003", "n0000000x"), CLASSES, "is none of the model's 10 classes; did you mean 'n0000000"),
        (("zebra",), CLASSES, "is none of the model's 10 classes (they are n00000000, n00000001, n00000002, ...)"),
        (("3", "10"), CLASSES, "10: expected numbers of the model's 10 classes"),
        (("zebra",), (), "nobody knows the names of the model's classes; expected folders named by the numbers"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, names: tuple[str, ...], classes: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_folder(folders(tmp_path, *names), classes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_images_or_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing cannot be read: No such file"):
        open_folder(tmp_path / "missing", CLASSES)
    (tmp_path / CLASSES[0]).mkdir()
    with pytest.raises(UsageError, match="no images in its 1 folders"):
        open_folder(tmp_path, CLASSES)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(config: TrainConfig, tmp_path: Path, workers: int) -> None:
    damaged = folders(tmp_path, "3", "4") / "4" / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    one = subject(replace(config, data=replace(config.data, workers=workers)))
    with pytest.raises(RunError, match=r"4/0\.png does not decode"):
        list(folder_batches(tmp_path, one))
