"""Saliency as a measurement, and its gallery: of a model that is known to look at coloured squares."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from small_shards import write_tar
from torch import Tensor, nn

from gmscale.data import val_loader
from gmscale.data.tars.tar import Tar
from gmscale.errors import UsageError
from gmscale.evaluation.saliency.deletion import deletion, insertion
from gmscale.evaluation.saliency.gallery import write_gallery
from gmscale.evaluation.saliency.localization import centre, iou, top_box
from gmscale.evaluation.saliency.maps import saliency
from gmscale.evaluation.saliency.measurement import Saliency
from gmscale.evaluation.saliency.randomisation import randomised, similarity
from gmscale.evaluation.subject import Subject
from gmscale.parallel import World
from gmscale.parallel.failure import PeerError
from gmscale.parallel.local_ranks import run_ranks

SIDE, COUNT = 32, 22
# Which samples are something else than one small square of their class.
WRONG, TWO, LARGE, BARE = 3, 5, 8, 12


class Colours(nn.Module):
    """Tells red, green and blue: the mean of what is brighter than the data's mean in each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])
            self.head.weight.copy_(30 * torch.eye(3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(self.conv(images)).mean((2, 3)))
        return logits


def write_squares(folder: Path) -> None:
    """Shards of dark noise with a square of the class's colour, whose box is in the JSON."""
    rng = np.random.default_rng(0)
    names = [f"t-train-{number:04}.tar" for number in range(2)]
    for shard, name in enumerate(names):
        members = []
        for number in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
            width, height = (30, 30) if number == LARGE else rng.integers(5, 11, 2)
            x0, y0 = (int(rng.integers(SIDE - length + 1)) for length in (width, height))
            pixels = rng.integers(0, 100, (SIDE, SIDE, 3), dtype=np.uint8)
            pixels[y0 : y0 + height, x0 : x0 + width, number % 3] = 255
            box = [x0, y0, x0 + int(width), y0 + int(height)]
            boxes = [box, [0, 0, 4, 4]] if number == TWO else [] if number == BARE else [box]
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            label = (number + (number == WRONG)) % 3
            members += [
                (f"{number:04}.cls", str(label).encode()),
                (f"{number:04}.json", json.dumps({"boxes": boxes}).encode()),
                (f"{number:04}.png", buffer.getvalue()),
            ]
        write_tar(folder / name, members)
    split = {"name": "train", "filenames": names, "shard_lengths": [COUNT // 2] * 2, "num_samples": COUNT}
    info = {"name": "t", "classes": ["red", "green", "blue"], "splits": {"train": split}}
    (folder / "_info.json").write_text(json.dumps(info))


def subject_of(folder: Path, world: World = tiny.ALONE, batch_size: int = 5, access: str = "index") -> Subject:
    section = {
        "source": str(folder),
        "val_split": "train",
        "image_size": SIDE,
        "eval_batch_size_per_device": batch_size,
        "access": access,
    }
    config = tiny.config(folder / "cache", folder / "run", data=section)
    loader = val_loader(config.data, world.rank, world.size)
    model = Colours().eval().requires_grad_(False)
    return Subject(model, config, loader, world, ("red", "green", "blue"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("squares")
    write_squares(made)
    return made


# ---- what is measured --------------------------------------------------------------------------------------------


def test_what_a_model_looks_at_is_found(folder: Path) -> None:
    subject = subject_of(folder)
    found = Saliency("gradient", images=None).measure(subject)
    assert (found["correct"], found["count"], found["note"]) == (COUNT - 1, COUNT - 4, None)
    assert [found[name] for name in ("iou", "ebpg", "pointing")] == pytest.approx([1, 1, 1])
    assert max(found["centre_iou"], found["centre_ebpg"], found["centre_pointing"]) < 0.6
    # one sixteenth of the pixels is most of a square
    assert 1 / 3 < found["deletion"] < 0.45
    assert found["insertion"] > 0.9
    json.dumps({**asdict(Saliency("gradient")), **found}, allow_nan=False)


def test_means_are_over_the_images_one_by_one(folder: Path) -> None:
    subject = subject_of(folder, batch_size=COUNT)
    ((pixels, labels, indices),) = subject.batches()
    right = [number for number in range(COUNT) if number != WRONG]
    judged = [number for number in right if number not in (TWO, LARGE, BARE)]
    truth = {number: _box(folder, number) for number in judged}
    model, (*_, (_, blank)) = subject.on_pixels, randomised(subject.model, subject.seed)
    with_random = subject.of(blank).on_pixels
    values: dict[str, list[float]] = {}

    def keep(name: str, value: Tensor) -> None:
        values.setdefault(name, []).append(value.item())

    for number in right:
        one = slice(number, number + 1)
        x, y, index = pixels[one], labels[one], indices[one]
        own, other = (
            saliency(m, x, y, "log-paper", indices=index, seed=subject.seed) for m in (model, with_random)
        )
        keep("deletion", deletion(model, x, y, own, model.mean))
        keep("insertion", insertion(model, x, y, own))
        keep("randomisation", similarity(own, other))
        if number in truth:
            keep("iou", iou(top_box(own), truth[number]))
            keep("centre_iou", iou(top_box(centre(own)), truth[number]))
    found = Saliency("log-paper", images=None).measure(subject_of(folder))
    for name, own_values in values.items():
        assert found[name] == pytest.approx(np.mean(own_values), rel=1e-4), name


def _box(folder: Path, number: int) -> Tensor:
    return torch.tensor(json.loads(_members(folder)[f"{number:04}.json"])["boxes"], dtype=torch.float32)


def _members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with Tar(path) as tar:
            found |= {member.name: tar.read(member) for member in tar.members()}
    return found


def test_a_part_of_the_images(folder: Path) -> None:
    found = Saliency("gradient", images=4).measure(subject_of(folder))  # 0, 5 (two objects), 11, 16
    assert (found["correct"], found["count"]) == (4, 3)
    assert found["iou"] == pytest.approx(1)


def test_the_model_is_left_as_it_was(folder: Path) -> None:
    subject = subject_of(folder)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    Saliency("gradcam", images=5).measure(subject)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in subject.model.parameters()
    )


def test_boxes_of_a_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"0000": [[0, 0, 32, 15]], "0001": [[0, 0, 1, 1]]}))
    found = Saliency("gradient", images=None, boxes=str(path)).measure(subject_of(folder))
    assert (found["correct"], found["count"]) == (COUNT - 1, 2)
    assert found["iou"] < 0.5


def test_without_boxes_localization_is_left_out(folder: Path, tmp_path: Path) -> None:
    members = [pair for pair in sorted(_members(folder).items()) if not pair[0].endswith("json")]
    write_tar(tmp_path / "t.tar", members)
    split = {"name": "train", "filenames": ["t.tar"], "shard_lengths": [COUNT], "num_samples": COUNT}
    info = {"name": "t", "classes": ["red", "green", "blue"], "splits": {"train": split}}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    found = Saliency("gradient", images=None).measure(subject_of(tmp_path))
    assert (found["correct"], found["count"]) == (COUNT - 1, 0)
    assert found["note"] == "The images have no boxes: localization is left out."
    assert {found[name] for name in ("iou", "ebpg", "pointing", "centre_iou", "centre_ebpg")} == {None}
    assert found["deletion"] < found["insertion"]


def test_a_model_that_is_always_wrong(folder: Path) -> None:
    subject = subject_of(folder)
    subject.model.head.weight.neg_()  # type: ignore[union-attr, operator]
    found = Saliency("gradient", images=3).measure(subject)
    assert (found["correct"], found["count"]) == (0, 0)
    assert found["deletion"] is found["randomisation"] is found["iou"] is None
    assert found["note"] == "No image with a box is classified correctly and has one object on at most half of it."


def test_a_stream_has_no_boxes(folder: Path) -> None:
    subject = subject_of(folder, access="stream")
    found = Saliency("gradient", images=None).measure(subject)
    assert (found["correct"], found["count"], found["iou"]) == (COUNT - 1, 0, None)
    with pytest.raises(UsageError, match=r"--boxes needs data\.access index"):
        Saliency("gradient", images=None, boxes=str(folder)).measure(subject)


# ---- mistakes ----------------------------------------------------------------------------------------------------


def test_boxes_of_other_images_are_a_mistake(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"n01_1": [[0, 0, 1, 1]]}))
    with pytest.raises(UsageError, match="has no box of the 22 images that are measured; expected boxes by"):
        Saliency("gradient", images=None, boxes=str(path)).measure(subject_of(folder))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "grad-cam"}, r"--saliency is 'grad-cam'; .*did you mean 'gradcam'\?"),
        ({"method": "log", "images": 0}, "--saliency_images is 0"),
        ({"method": "log", "boxes": "nowhere"}, "--boxes nowhere: there is no such file or folder"),
        ({"method": "log", "images": 2.5}, "--saliency_images is 2.5; expected a whole number"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Saliency(**settings)


# ---- several ranks -----------------------------------------------------------------------------------------------


def _rank(world: World, folder: str, out: str) -> dict[str, Any]:
    subject = subject_of(Path(folder), world, batch_size=4)
    write_gallery(subject, Path(out), ["gradient"], 5)
    found = Saliency("smoothgrad", images=13).measure(subject)
    broken = Path(out) / "broken.json"
    broken.write_text(json.dumps({"0021": "in the share of rank 1"}))
    with pytest.raises(PeerError if world.is_main else UsageError, match=r"rank 1 failed|'0021' is 'in the share"):
        Saliency("gradient", images=None, boxes=str(broken)).measure(subject)
    return found


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(folder: Path, tmp_path: Path) -> None:
    subject = subject_of(folder)
    two = run_ranks(_rank, 2, str(folder), str(tmp_path / "two"))
    one = Saliency("smoothgrad", images=13).measure(subject)
    assert one.pop("note") is two.pop("note") is None
    assert two == pytest.approx(one, rel=1e-4)
    write_gallery(subject, tmp_path / "one", ["gradient"], 5)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted([*files, "broken.json"]) == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


# ---- gallery -----------------------------------------------------------------------------------------------------


def test_the_gallery(folder: Path, tmp_path: Path) -> None:
    methods = ("gradient", "gradcam++")
    write_gallery(subject_of(folder), tmp_path / "gallery", methods, 4)
    records = json.loads((tmp_path / "gallery" / "gallery.json").read_text())
    assert [record["index"] for record in records] == [0, 5, 11, 16]
    assert [record["label"] for record in records] == ["red", "blue", "blue", "green"]
    assert all(record["predicted"] == record["label"] for record in records)
    for number, record in enumerate(records):
        assert record["files"] == {method: f"{number:03d}-{method}.png" for method in methods}
        single = record["index"] != TWO
        assert record["box"] == (_box(folder, record["index"])[0].tolist() if single else None)
        assert record["iou"]["gradient"] == (pytest.approx(1) if single else None)
        for file in (record["image"], *record["files"].values()):
            assert Image.open(tmp_path / "gallery" / file).size == (224, 224)
    shown = np.asarray(Image.open(tmp_path / "gallery" / "000-image.png"))[::7, ::7]
    original = np.asarray(Image.open(io.BytesIO(_members(folder)["0000.png"])))
    assert np.abs(shown.astype(int) - original).max() <= 1
    x0, y0, x1, y1 = (7 * int(edge) for edge in records[0]["box"])
    overlay = np.asarray(Image.open(tmp_path / "gallery" / "000-gradient.png")).astype(int)
    assert overlay[y0 + 2, x0 + 10 : x1 - 10].tolist() == [[255, 255, 255]] * (x1 - x0 - 20)  # the true box
    square = np.zeros((224, 224), dtype=bool)
    square[y0:y1, x0:x1] = True
    assert overlay[square].mean() > 2 * overlay[~square].mean()


def test_a_gallery_of_images_in_grey_without_boxes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text("{}")
    subject = subject_of(folder)
    grey = replace(subject.config, data=replace(subject.config.data, channels=1))
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    subject = replace(subject.of(model), config=grey)
    write_gallery(subject, tmp_path / "gallery", ["gradient"], 2, str(path))
    records = json.loads((tmp_path / "gallery" / "gallery.json").read_text())
    assert [(record["box"], record["iou"]) for record in records] == [(None, {"gradient": None})] * 2
    assert len(list((tmp_path / "gallery").glob("*.png"))) == 4
