"""What gmscale evaluate is given: runs, exported folders and timm's models, with images and weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from file_hub import NAME, weights_of
from safetensors.torch import load_file, save_file

from gmscale import trained
from gmscale.data import ValLoader
from gmscale.errors import UsageError
from gmscale.evaluation import evaluate
from gmscale.evaluation.opening import Opened, Source, group_of, opened
from gmscale.export import export


@pytest.fixture(scope="module")
def shards(cache: Path) -> str:
    """The directory of the embedded set's shards."""
    return str(tiny.build(cache))


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(finished_run, "hf", checkpoint="last", out=tmp_path_factory.mktemp("export") / "folder")


@pytest.fixture(scope="module")
def weights(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(finished_run, checkpoint="last", out=tmp_path_factory.mktemp("weights"))


def open_alone(name: str | Path, **source: Any) -> Opened:
    return opened(str(name), Source(**source), tiny.ALONE)


def top1(found: Opened) -> float:
    return evaluate(found.model, found.loader, found.config.data, tiny.ALONE)["top1"]


def error_of(name: str | Path, **source: Any) -> str:
    with pytest.raises(UsageError) as caught:
        open_alone(name, **source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_weights(found: Opened, run: Path, kind: str) -> bool:
    own = trained.load(run, "last", kind).model.state_dict()
    return all(torch.equal(tensor, own[key]) for key, tensor in found.model.state_dict().items())


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "kind", "name"), [("auto", "ema", "ema_top1"), ("model", "model", "top1")])
def test_a_run(finished_run: Path, asked: str, kind: str, name: str) -> None:
    found = open_alone(finished_run, weights=asked)
    assert same_weights(found, finished_run, kind)
    assert top1(found) == json.loads((finished_run / "summary.json").read_text())[name]
    assert found.about["weights"] == kind
    assert (found.about["step"], found.about["checkpoint"], found.limit) == (9, "step-00000009", None)
    assert found.about["settings"] == {"source": "embedded", "val_split": "validation", "limit": None}
    assert found.classes == tuple(map(str, range(10)))
    assert not found.model.training


def test_a_run_on_other_images(finished_run: Path, shards: str) -> None:
    found = open_alone(finished_run, source=shards, val_split="train", batch_size=3, limit=7)
    assert (found.limit, found.config.data.eval_batch_size_per_device) == (7, 3)
    assert found.about["settings"] == {"source": shards, "val_split": "train", "limit": 7}
    assert isinstance(found.loader, ValLoader)
    assert len(found.loader.index) == 7
    assert open_alone(finished_run, limit=25).limit is None


def test_ranks_of_a_run_talk_as_it_did(finished_run: Path) -> None:
    assert group_of(str(finished_run)).threads == 1
    assert group_of("resnet18").threads == replace(group_of("resnet18")).threads


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        ("summary.json", "has not finished (no summary.json); train it to its end first"),
        ("config.yaml", "is neither a run (it has no config.yaml) nor a folder of gmscale export"),
    ],
)
def test_what_is_no_finished_run(finished_run: Path, tmp_path: Path, remove: str, said: str) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / remove).unlink()
    with pytest.raises(UsageError) as caught:
        group_of(str(run))
    assert said in str(caught.value)


def test_other_images_must_be_of_the_runs_classes(finished_run: Path, shards: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(shards, tmp_path / "other"))
    info = json.loads((other / "_info.json").read_text())
    (other / "_info.json").write_text(json.dumps(info | {"classes": [*map(str, range(9, -1, -1))]}))
    assert "has its classes in another order than --source: 0 is 0, there 9" in error_of(
        finished_run, source=str(other)
    )
    (other / "_info.json").write_text(json.dumps(info | {"classes": [*map(str, range(11))]}))
    assert "has 10 classes, the images at --source are of 11" in error_of(finished_run, source=str(other))


# ---- exported ----------------------------------------------------------------------------------------------------


def test_an_exported_folder_is_the_run(finished_run: Path, exported: Path, shards: str) -> None:
    found, run = open_alone(exported, source=shards), open_alone(finished_run)
    assert same_weights(found, finished_run, "ema")
    assert top1(found) == top1(run)
    own, its = found.config.data, run.config.data
    for field in ("image_size", "channels", "mean", "std", "crop_pct", "eval_interpolation"):
        assert getattr(own, field) == getattr(its, field)
    assert found.classes == run.classes
    assert found.about["checkpoint"] == "model.safetensors"
    assert found.about["settings"]["image_size"] == tiny.IMAGE_SIZE


def test_a_folder_has_no_other_checkpoint(exported: Path, shards: str) -> None:
    with pytest.raises(UsageError, match=r"--checkpoint is for a run or a timm model's name; .* its own weights"):
        opened(str(exported), Source(source=shards, checkpoint="best"), tiny.ALONE)


def test_a_file_of_weights_with_a_models_name(finished_run: Path, weights: Path, shards: str) -> None:
    found = open_alone("test_byobnet", checkpoint=str(weights), source=shards, image_size=tiny.IMAGE_SIZE)
    assert same_weights(found, finished_run, "ema")
    assert (found.config.data.image_size, len(found.classes)) == (tiny.IMAGE_SIZE, 10)
    assert found.about["checkpoint"] == weights.name
    assert found.about["sha256"] != open_alone(finished_run).about["sha256"]  # another file


def test_of_a_file_with_two_sets_of_weights(weights: Path, shards: str, tmp_path: Path) -> None:
    plain = load_file(weights)
    averaged = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in plain.items()}
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "both.pth")
    for kind, tensors in (("model", plain), ("ema", averaged), ("auto", averaged)):
        found = open_alone("test_byobnet", checkpoint=str(tmp_path / "both.pth"), source=shards, weights=kind)
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in found.model.state_dict().items())


# ---- timm --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache as it is after a download of NAME, on a machine without a network."""
    folder = tmp_path / "hub" / f"models--timm--{NAME}"
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    weights_of(folder / "snapshots" / "0" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture(scope="module")
def thousand(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shards without the names of their classes, as timm's own sets are."""
    folder = Path(shutil.copytree(shards, tmp_path_factory.mktemp("thousand") / "shards"))
    info = json.loads((folder / "_info.json").read_text())
    del info["classes"]
    (folder / "_info.json").write_text(json.dumps(info))
    return str(folder)


def test_pretrained_weights_of_the_hub(hub_cache: Path, thousand: str) -> None:
    found = open_alone(NAME, source=thousand)
    expected = load_file(hub_cache / "snapshots" / "0" / "model.safetensors")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.model.state_dict().items())
    own = found.config.data
    assert (own.image_size, own.crop_pct, own.mean, own.eval_interpolation) == (160, 0.95, (0.5,) * 3, "bicubic")
    assert found.classes[:2] == ("n01440764", "n01443537")
    assert found.about["checkpoint"] == f"timm/{NAME} of the hub"
    assert open_alone(NAME, source=thousand).about == found.about
    assert top1(found) <= 100


def test_offline_it_is_one_line(hub_cache: Path, thousand: str) -> None:
    said = error_of("test_resnet", source=thousand)
    assert said.startswith("cannot get the weights timm/test_resnet.r160_in1k: ")
    assert "give --checkpoint a file" in said


def test_the_images_must_be_of_the_models_classes(hub_cache: Path, shards: str) -> None:
    assert error_of(NAME, source=shards) == f"{NAME} has 1000 classes, the images at --source are of 10"


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("resnet81", {}, "resnet81: no such directory, and timm has no such model; did you mean 'resnet"),
        ("resnet18.a9_in1k", {"source": "."}, "timm has no weights 'a9_in1k' of resnet18; did you mean 'a"),
        ("resnet18", {}, "resnet18 is no run, which would say where its images are; name them with --source"),
        ("resnet18", {"source": "nowhere"}, "--source: nowhere is not a directory; expected 'embedded' or"),
        ("resnet18", {"source": ".", "checkpoint": "gone.pth"}, "gone.pth: no such file; expected weights of res"),
    ],
)
def test_what_cannot_be_measured(name: str, source: dict[str, Any], said: str) -> None:
    assert said in error_of(name, **source)


def test_weights_that_are_not_the_models(weights: Path, shards: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"checkpoint": str(weights), "source": shards}
    assert "does not fit model test_resnet" in error_of("test_resnet", **given)
    tensors = load_file(weights)
    classifier = "head.fc.weight"
    few = {key: t[:7] if key.startswith(classifier.removesuffix("weight")) else t for key, t in tensors.items()}
    save_file(few, tmp_path / "few.safetensors")
    said = error_of("test_byobnet", checkpoint=str(tmp_path / "few.safetensors"), source=shards)
    assert said == "test_byobnet has 7 classes, the images at --source are of 10"
    headless = {key: tensor for key, tensor in tensors.items() if not key.startswith(classifier[:-6])}
    save_file(headless, tmp_path / "headless.safetensors")
    said = error_of("test_byobnet", checkpoint=str(tmp_path / "headless.safetensors"), source=shards)
    assert "does not give test_byobnet all of its weights: head.fc.weight: not in the source" in said


def test_folders_that_are_not_timms(exported: Path, shards: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "folder"))
    (folder / "model.safetensors").unlink()
    assert "has no weights; expected model.safetensors beside config.json" in error_of(folder, source=shards)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"architecture": "test_byobnets"}))
    assert "timm has no model 'test_byobnets'; did you mean 'test_byobnet'" in error_of(folder, source=shards)
    (folder / "config.json").write_text("{}")
    assert "config.json is not timm's: KeyError: 'architecture'" in error_of(folder, source=shards)


def test_a_runs_size_is_its_own(finished_run: Path) -> None:
    assert "--image_size is for a timm model" in error_of(finished_run, image_size=64)
