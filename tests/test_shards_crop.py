"""gmscale shards crop: shards that hold what a model looks at, complete, reproducible, boxes moved along."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gmscale import cli
from gmscale.config import from_dict
from gmscale.data import DataConfig, open_index, open_split
from gmscale.data.images.transforms import EvalTransform, eval_geometry
from gmscale.data.index import read
from gmscale.data.tars.tar import Tar
from gmscale.data.tars.writer import open_shard
from gmscale.errors import UsageError
from gmscale.evaluation.draws import uniform
from gmscale.shards import crop as cropping
from gmscale.shards.commands import main as shards
from gmscale.shards.crop import Options, crop


def samples(directory: Path, split: str = "train") -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    info = json.loads((directory / "_info.json").read_text())
    for name in info["splits"][split]["filenames"]:
        with Tar(directory / name) as tar:
            for member in tar.members():
                key, _, kind = member.name.partition(".")
                found.setdefault(key, {})[kind] = tar.read(member)
    return found


def facts(sample: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(sample["json"]))


@pytest.fixture(scope="module")
def guided(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("crops")
    for guide in ("saliency", "random"):
        crop(Options(finished_run, out / guide, guide=guide))
    return {guide: out / guide for guide in ("saliency", "random")}


@pytest.mark.parametrize("guide", ["saliency", "random"])
def test_samples_are_cut_from_the_originals_and_say_how(guided: dict[str, Path], cache: Path, guide: str) -> None:
    originals, cut = samples(tiny.build(cache)), samples(guided[guide])
    assert list(cut) == list(originals)
    moved = 0
    for key, sample in cut.items():
        was, now = facts(originals[key]), facts(sample)
        left, top, right, bottom = now["crop"]
        image = Image.open(io.BytesIO(originals[key]["jpg"])).convert("RGB")
        again = io.BytesIO()
        image.crop((left, top, right, bottom)).save(again, "JPEG", quality=95)
        assert sample["jpg"] == again.getvalue()
        assert sample["cls"] == originals[key]["cls"]
        assert (now["cropped_from"], now["guide"]) == (list(image.size), guide)
        assert 0.38 < (right - left) * (bottom - top) / (image.width * image.height) < 0.96
        x0, y0, x1, y1 = was["box"]
        inside = [max(x0, left) - left, max(y0, top) - top, min(x1, right) - left, min(y1, bottom) - top]
        assert now["box"] == (inside if inside[0] < inside[2] and inside[1] < inside[3] else None)
        moved += now["box"] != was["box"]
    assert moved > len(cut) / 2


def test_both_guides_cut_squares_of_the_same_sizes_at_other_places(guided: dict[str, Path]) -> None:
    crops = {guide: [facts(sample)["crop"] for sample in samples(path).values()] for guide, path in guided.items()}
    pairs = list(zip(crops["saliency"], crops["random"], strict=True))
    assert all(a[2] - a[0] == b[2] - b[0] and a[3] - a[1] == b[3] - b[1] for a, b in pairs)
    assert sum(a != b for a, b in pairs) > len(pairs) / 2


def test_the_shards_are_whole_and_can_be_trained_on(guided: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    out = guided["saliency"]
    validation = tiny.build(cache)
    assert shards(["verify", str(out), "--full", "--workers", "0"]) == 0
    assert shards(["build", str(validation), str(out), "--split", "validation", "--workers", "0"]) == 0
    config = from_dict(tiny.settings(cache, tmp_path / "run", data={"source": str(out)}))
    outcome = tiny.train(config)
    assert outcome.summary is not None
    index = open_index(open_split(DataConfig(source=str(out)), "train"))
    assert len(index) == tiny.SIZE
    Image.open(io.BytesIO(read(index, 0))).verify()


def test_the_same_command_goes_on_and_gives_the_same_bytes(
    finished_run: Path, guided: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(finished_run, tmp_path / "again", batch_size=7)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cropping, "_facts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            crop(options)
    assert not list(options.out.glob("*.tar")), "complete or absent"
    crop(options)
    before = {path.name: path.stat().st_mtime_ns for path in options.out.glob("*.tar")}
    crop(options)
    assert before == {path.name: path.stat().st_mtime_ns for path in options.out.glob("*.tar")}
    for path in guided["saliency"].glob("*.tar"):
        # saliency depends on how the batch was divided in its last bits only, and crops seldom on those
        ours = samples(options.out)
        same = [ours[key]["jpg"] == sample["jpg"] for key, sample in samples(guided["saliency"]).items()]
        assert sum(same) > 0.95 * len(same), path
    with pytest.raises(UsageError, match="began with guide saliency"):
        crop(Options(finished_run, options.out, guide="random"))


@pytest.mark.parametrize(
    ("box", "moved"),
    [
        ([[0, 0, 30, 30], [90, 0, 99, 9], [20, 25, 40, 40]], [[0, 0, 20, 10], [10, 5, 30, 20]]),
        ([[90, 0, 99, 9]], []),
        ([1.5, 2.5, 30.25, 40], [0, 0, 20.25, 20]),
        ([90, 0, 99, 9], None),
        (["a", "b", 3, 4], ["a", "b", 3, 4]),
        ([None, 1, 2, 3], [None, 1, 2, 3]),
        (None, None),
    ],
)
@pytest.mark.parametrize("field", ["box", "boxes"])
def test_boxes_move_along_and_what_is_no_box_stays(field: str, box: Any, moved: Any) -> None:
    found = cropping._facts(json.dumps({field: box, "word": "é"}).encode(), (10, 20, 60, 70), (100, 80), "random")
    assert found[field] == moved
    assert (found["word"], found["crop"]) == ("é", [10, 20, 60, 70])


def test_another_run_with_the_same_names_does_not_go_on(
    finished_run: Path, guided: dict[str, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(finished_run, tmp_path / "other")
    for file in other.glob("checkpoints/*/model*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UsageError, match="began with weights"):
        crop(Options(other, guided["random"], guide="random"))


def test_where_the_view_lies_in_the_image(tmp_path: Path) -> None:
    """A bright pixel block of an oblong image is found where the geometry says."""
    data = DataConfig(image_size=32, crop_pct=0.8)
    for width, height in ((100, 70), (61, 120)):
        image = torch.zeros(height, width, 3, dtype=torch.uint8)
        image[height // 2 : height // 2 + 6, width // 3 : width // 3 + 6] = 255
        encoded = io.BytesIO()
        Image.fromarray(image.numpy()).save(encoded, "PNG")
        view = torch.zeros(32, 32, 3, dtype=torch.uint8)
        EvalTransform(data)(encoded.getvalue(), view.numpy())
        scale, corner = eval_geometry((width, height), data)
        x, y = (width // 3 + 3) * scale[0] - corner[0], (height // 2 + 3) * scale[1] - corner[1]
        bright = view[:, :, 0].double()
        rows, columns = torch.arange(32.0).double() + 0.5, torch.arange(32.0).double() + 0.5
        assert float((bright.sum(1) * rows).sum() / bright.sum()) == pytest.approx(y, abs=0.3)
        assert float((bright.sum(0) * columns).sum() / bright.sum()) == pytest.approx(x, abs=0.3)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--guide", "salience"], "--guide is 'salience'"),
        (["--method", "gradcan"], "--method is 'gradcan'"),
        (["--scale", "0.9,0.4"], "expected the smaller number first"),
        (["--scale", "1"], "--scale expects two shares"),
        (["--split", "trian"], "trian"),
        (["--checkpoint", "77"], "no checkpoint of step 77"),
    ],
)
def test_a_mistake_is_one_line(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["shards", "crop", str(finished_run), str(tmp_path / "out"), *argv])
    assert ended.value.code == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert [line[:16] for line in complaint.splitlines()].count("gmscale: error: ") == 1
    assert "Traceback" not in complaint
    assert not list(tmp_path.rglob("*.tar"))


def test_a_sample_out_of_place_does_not_shift_the_numbers_of_those_after_it(
    finished_run: Path, cache: Path, tmp_path: Path
) -> None:
    """Its second part is no sample of the index; the samples behind it keep their labels and their draws."""
    source, info = tmp_path / "source", json.loads((tiny.build(cache) / "_info.json").read_text())
    source.mkdir()
    whole = list(samples(tiny.build(cache)).items())
    shard = info["splits"]["train"]["filenames"][0]
    torn = [("a", {"jpg": whole[0][1]["jpg"]}), ("b", whole[1][1]), ("a", {"cls": b"0"})]
    with open_shard(source / shard) as file:
        for key, members in [*torn, *whole[2:6]]:
            file.add({"__key__": key, **members})
    split = {"name": "train", "num_samples": 6, "filenames": [shard], "shard_lengths": [6]}
    (source / "_info.json").write_text(json.dumps({**info, "splits": {"train": split}}))
    kept, bad = crop(Options(finished_run, tmp_path / "out", source=str(source), guide="random"))
    assert (kept, bad) == (5, 2)
    index = open_index(open_split(DataConfig(source=str(source)), "train"))
    assert index.label.tolist()[2:] == [int(members["cls"]) for _, members in whole[2:6]]
    draws = uniform(torch.arange(6), 3, (0, 0))
    sides = (tiny.IMAGE_SIZE * (0.4 + 0.5 * draws[:, 0]).sqrt()).round().long().tolist()
    cut = samples(tmp_path / "out")
    for number, (key, _) in enumerate(whole[2:6], 2):
        left, _, right, _ = facts(cut[key])["crop"]
        assert right - left == sides[number]
