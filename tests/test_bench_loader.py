"""gmscale bench loader: the rows are there and mean what they say; the times are for people, not for tests."""

import io
import json
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gmscale import bench
from gmscale.bench import feeding, loader, scale
from gmscale.bench.photographs import Copies, facts, from_shards, photographs
from gmscale.bench.pipelines import BASELINE, PIPELINES, Batch, Pipeline, Shape
from gmscale.errors import RunError, UsageError
from gmscale.parallel import local_ranks

COLOURS = [(200, 60, 100), (30, 180, 220), (128, 128, 128), (250, 240, 20)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY = ["--size", "16", "--image_size", "32", "--batch_size", "4"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    return Copies(photographs(16), tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    """JPEGs of one colour each, which is that of their class, so that no crop can change them."""

    def jpeg(colour: tuple[int, ...]) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (60, 48), colour).save(buffer, "JPEG", quality=100)
        return buffer.getvalue()

    return Copies([(jpeg(colour), n) for n, colour in enumerate(COLOURS)], tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipelines", "gmscale exat"], "unknown 'gmscale exat'; did you mean 'gmscale exact'"),
        (["--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["--size", "63"], "--size is 63; expected at least the 64 images of one step"),
        (["--train", "--size", "16"], "--size is 16; expected at least the 32 images of one step"),
        (["--train", "--workers", "-1"], "--workers is -1; expected at least 0"),
        (["--train", "--model", "resnet81"], "did you mean 'resnet"),
        (["--train", "--scale"], "not allowed with argument"),
        (["--scale", "--source", "somewhere"], "--source is for pipelines and --train, not for --scale"),
        (["--workers", "2"], "--workers is for --train, not for pipelines"),
        (["--split", "other"], "--split is of a --source; name one"),
        (["--source", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "_context", None)
    with pytest.raises(UsageError, match=message) as caught:
        bench.main(["loader", *arguments])
    assert "\n" not in str(caught.value)


# -- the images -------------------------------------------------------------------------------------------------
def test_the_photographs_are_the_same_jpegs_each_time_and_like_imagenets() -> None:
    samples = photographs(40)
    assert samples[:3] == photographs(3)
    assert {label for _, label in samples} == set(range(10))
    said = facts(samples)
    assert said["images"] == 40
    pixels = said["mean_width"] * said["mean_height"]
    assert pixels == pytest.approx(469 * 387, rel=0.1)
    assert 1e3 * said["mean_kb"] / pixels == pytest.approx(0.6, rel=0.15)


def test_all_copies_hold_the_same_jpegs(copies: Copies) -> None:
    samples = photographs(16)
    in_shards = []
    for path in sorted(copies.shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        keys = sorted({name.split(".")[0] for name in content})
        in_shards += [(content[f"{key}.jpg"], int(content[f"{key}.cls"])) for key in keys]
    assert in_shards == samples
    in_folders = sorted(copies.folders.glob("*/*.jpg"), key=lambda path: path.name)
    assert [(path.read_bytes(), int(path.parent.name)) for path in in_folders] == samples


def test_jpegs_are_taken_from_any_shards_and_too_few_are_an_error(copies: Copies) -> None:
    assert sorted(from_shards(str(copies.shards), "train", 16)) == sorted(photographs(16))
    with pytest.raises(UsageError, match=r"--size is 17, but split 'train' of .* has 16 JPEGs"):
        from_shards(str(copies.shards), "train", 17)


# -- the pipelines ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_yields_every_image_once_in_batches_of_the_declared_type(name: str, copies: Copies) -> None:
    pipeline, shape = PIPELINES[name], Shape(batch_size=4, image_size=32)
    if missing := pipeline.missing():
        pytest.skip(missing)
    epoch = pipeline.open(copies, shape)
    for number in range(2):
        labels: list[int] = []
        for images, batch_labels in epoch(number):
            assert images.shape == (4, 3, 32, 32)
            assert images.dtype == pipeline.dtype
            assert images.float().std() > 0.05
            labels += batch_labels.tolist()
        assert sorted(labels) == sorted(label for _, label in photographs(16))


@pytest.mark.parametrize("name", [name for name in PIPELINES if "RandAugment" not in name])
def test_pixels_come_out_as_red_green_blue_and_normalised_where_declared(name: str, plain: Copies) -> None:
    pipeline = PIPELINES[name]
    if missing := pipeline.missing():
        pytest.skip(missing)
    for images, labels in pipeline.open(plain, Shape(batch_size=2, image_size=32))(0):
        colours = torch.tensor(COLOURS)[labels.long()].view(-1, 3, 1, 1) / 255
        if pipeline.dtype == torch.uint8:
            seen = images / 255
        else:
            seen = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        assert (seen - colours).abs().max() < 2.5 / 255


def test_a_batch_that_is_not_as_declared_is_an_error(copies: Copies) -> None:
    wrong = Pipeline(lambda copies, shape: lambda number: iter([]), torch.uint8)

    def epoch(number: int) -> Iterator[Batch]:
        yield torch.zeros(4, 3, 32, 32), torch.zeros(4)

    with pytest.raises(RunError, match=r"wrong makes torch.float32 \(4, 3, 32, 32\); expected torch.uint8"):
        loader.warm_up("wrong", wrong, epoch, Shape(4, 32))


# -- what is shown ----------------------------------------------------------------------------------------------
def finite(value: Any) -> bool:
    return math.isfinite(value) and value > 0


def test_every_pipeline_has_a_row_with_a_ratio_or_the_reason_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "loader.json"
    assert bench.main(["loader", *TINY, "--rounds", "1", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = result["pipelines"]
    assert list(rows) == list(PIPELINES)
    for name, row in rows.items():
        if "skipped" in row:
            assert name.startswith(("litdata", "ffcv"))
            assert row["skipped"].endswith("is not installed")
            continue
        first, third = row["ratio_quartiles"]
        assert finite(row["images_per_cpu_s"])
        assert finite(first)
        assert first <= row["ratio"] <= third
        assert row["dtype"] == str(PIPELINES[name].dtype).removeprefix("torch.")
    assert rows["gmscale exact + RandAugment"]["against"] == "webdataset + timm RandAugment, float"
    assert result["environment"]["torch"]
    assert result["environment"]["pillow"]
    assert result["set"]["images"] == 16
    assert result["command"].startswith("gmscale bench loader --size 16")
    shown = capsys.readouterr().out
    assert all(name in shown for name in rows)


def test_shards_of_ones_own_are_measured_with_what_they_are_compared_with(
    copies: Copies, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "loader.json"
    few = ["--rounds", "1", "--pipelines", "gmscale exact"]
    assert bench.main(["loader", *TINY, *few, "--source", str(copies.shards), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["pipelines"]) == [BASELINE, "gmscale exact"]
    assert result["set"]["source"] == str(copies.shards)
    assert "second one beside it: the noise" in capsys.readouterr().out


def test_a_fed_training_reports_what_it_waited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "DECODES", ("fast",))
    out = tmp_path / "train.json"
    few = ["--model", "test_byobnet", "--steps", "3", "--workers", "1"]  # an epoch has two steps
    assert bench.main(["loader", "--train", *TINY, *few, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["environment"]["world_size"] == 2
    assert list(result["decode"]) == ["fast"]
    for row in result["decode"].values():
        assert 0 < row["waiting_share"] < 1
        assert row["steps_per_epoch"] == 2
        assert all(finite(row[name]) for name in ("step_ms", "images_per_s", "first_batch_ms"))
    assert "under 2 %" in capsys.readouterr().out


def test_an_index_at_scale_reports_seconds_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.json"
    assert bench.main(["loader", "--scale", "--shards", "3", "--samples", "43", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["samples"] == 129
    numbers = [value for name, value in result.items() if name.endswith(("_s", "_mib"))]
    assert len(numbers) == 9
    assert all(map(finite, numbers))
    assert "under 100 MiB" in capsys.readouterr().out


def test_made_up_shards_are_real_tars_that_take_almost_no_space(tmp_path: Path) -> None:
    assert scale.make(tmp_path, shards=3, samples=5) == "{000000..000002}.tar"
    paths = sorted(tmp_path.glob("*.tar"))
    assert len(paths) == 3
    assert len({path.stat().st_ino for path in paths}) == 1
    with tarfile.open(paths[2]) as tar:
        assert tar.getnames() == [f"{n:07}.{e}" for n in range(5) for e in ("cls", "jpg")]
        assert tar.extractfile("0000004.cls").read() == b"4"  # type: ignore[union-attr]
        image = Image.open(tar.extractfile("0000004.jpg"))  # type: ignore[arg-type]
        image.load()
        assert min(image.size) > 200  # about ImageNet's
