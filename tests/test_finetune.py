"""Fine-tuning from end to end: one of our runs is the start of another, frozen in part, thawed, and resumed."""

import json
import os
import signal
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from gmscale import models
from gmscale.data import DataConfig, embedded
from gmscale.data.tars.writer import write_shard
from gmscale.errors import UsageError

KNOWN, NEW = range(6), range(6, 10)  # digits
STEPS = 6  # of an epoch in a tiny run


def digits(embedded_set: Path, target: Path, chosen: Sequence[int]) -> Path:
    """Make shards of some of the ten digits, which are the classes 0, 1, ... there."""
    target.mkdir()
    splits = {}
    for split in ("train", "validation"):
        samples: dict[str, dict[str, Any]] = {}
        for shard in sorted(embedded_set.glob(f"*-{split}-*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    content = tar.extractfile(member)
                    assert content is not None
                    samples.setdefault(key, {"__key__": key})[extension] = content.read()
        kept = [s | {"cls": str(chosen.index(int(s["cls"])))} for s in samples.values() if int(s["cls"]) in chosen]
        name = f"digits-{split}-0000.tar"
        write_shard(target / name, kept)
        splits[split] = {
            "name": split,
            "num_samples": len(kept),
            "filenames": [name],
            "shard_lengths": [len(kept)],
        }
    info = {"name": "digits", "splits": splits, "classes": [str(digit) for digit in chosen]}
    (target / "_info.json").write_text(json.dumps(info))
    return target


def fit(folder: Path, name: str, /, **sections: dict[str, Any]) -> Path:
    """Train on some digits; return the run directory."""
    base: tiny.Sections = {
        "run": {"epochs": 1.0, "eval_every_epochs": 0.5},
        "model": {"name": "test_resnet"},
        "data": {"source": str(folder / "new"), "batch_size_per_device": 32},
        "optim": {"opt": "adamw", "lr": 0.01},
    }
    both = {key: base.get(key, {}) | sections.get(key, {}) for key in base | sections}
    tiny.train(tiny.config(folder, folder / name, **both))
    return folder / name


def top1(run_dir: Path) -> list[float]:
    return [r["top1"] for r in tiny.metrics(run_dir) if r["phase"] == "validation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the known and of the new digits, and a run that has learnt the known ones."""
    folder = tmp_path_factory.mktemp("digits")
    whole = embedded.ensure(DataConfig(size=1200, image_size=32, cache_dir=str(folder)))
    digits(whole, folder / "known", KNOWN)
    digits(whole, folder / "new", NEW)
    fit(
        folder,
        "pretrained",
        run={"epochs": 4.0, "eval_every_epochs": 4.0},
        data={"source": str(folder / "known")},
        mask={"enabled": False},
    )
    return folder


@pytest.mark.parametrize("masked", [False, True])
def test_pretrained_on_some_digits_a_model_learns_the_others_faster(folder: Path, masked: bool) -> None:
    mask = {"mask": {"enabled": masked}}
    scratch = fit(folder, f"scratch-{masked}", **mask)
    tuned = fit(folder, f"tuned-{masked}", model={"checkpoint": str(folder / "pretrained")}, **mask)
    assert top1(folder / "pretrained")[-1] > 60
    assert top1(tuned)[0] > 38  # chance is 25
    assert max(top1(tuned)) > max(top1(scratch)) + 12
    started = json.loads((tuned / "started_from.json").read_text())
    assert started["source"].startswith(str(folder / "pretrained"))
    assert set(started["fresh"]) == {"fc.weight", "fc.bias"}
    assert set(started["fresh"].values()) == {"classifier of 6 classes in the source, 4 here"}
    assert not (scratch / "started_from.json").exists()
    assert (tuned / "touched.json").exists() == masked
    if masked:
        kept = [r["kept_entries"] for r in tiny.metrics(tuned) if r["phase"] == "train"]
        assert all(0 < share < 1 for share in kept)


def touched(run_dir: Path) -> list[str]:
    return [t["name"] for t in json.loads((run_dir / "touched.json").read_text())["mask"]["touched"]]


def model_of(run_dir: Path) -> dict[str, Tensor]:
    """Weights and statistics of the newest checkpoint."""
    start = "model.safetensors/"
    return {name.removeprefix(start): t for name, t in tiny.tensors(run_dir).items() if name.startswith(start)}


def changed(folder: Path, run_dir: Path) -> set[str]:
    """Names of the tensors that are not those of the pretrained run."""
    return set(tiny.different(model_of(folder / "pretrained"), model_of(run_dir)))


def test_a_linear_probe_changes_the_classifier_alone(folder: Path) -> None:
    run_dir = fit(
        folder,
        "probe",
        model={"checkpoint": str(folder / "pretrained")},
        finetune={"linear_probe": True},
        run={"epochs": 0.25},
    )
    assert changed(folder, run_dir) == {"fc.weight", "fc.bias"}  # no statistics either
    assert touched(run_dir) == ["fc.weight"]


def test_the_mask_touches_chosen_layers_of_those_that_train(folder: Path) -> None:
    run_dir = fit(
        folder,
        "chosen",
        model={"checkpoint": str(folder / "pretrained")},
        finetune={"freeze": ["conv1", "layer[1-2]"]},
        mask={"include": ["layer[2-3].*.conv?.weight", "fc.weight"], "exclude": ["*.conv2.weight"]},
        run={"epochs": 0.25},
    )
    assert touched(run_dir) == ["layer3.0.conv1.weight", "layer3.0.conv3.weight", "fc.weight"]
    names = changed(folder, run_dir)
    assert not any(name.startswith(("conv1.", "layer1.", "layer2.")) for name in names)
    assert {"bn1.weight", "layer3.0.conv2.weight", "layer4.0.conv1.weight", "fc.weight"} <= names


def test_a_resumed_run_needs_its_starting_weights_no_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "weights.safetensors"
    pretrained = next((folder / "pretrained" / "checkpoints").glob("*/model.safetensors"))
    source.write_bytes(pretrained.read_bytes())
    given = {"model": {"checkpoint": str(source)}, "run": {"epochs": 0.25}}
    with monkeypatch.context() as patch:
        stop(patch, 2)
        fit(folder, "resumed", **given)
    source.unlink()
    fit(folder, "resumed", **given)
    assert (folder / "resumed" / "summary.json").exists()
    assert json.loads((folder / "resumed" / "started_from.json").read_text())["source"] == str(source)


# -- thawing ----------------------------------------------------------------------------------------------------
THAWING: tiny.Sections = {
    "run": {"epochs": 1.5, "log_every": 3},
    "model": {"name": "test_byobnet", "ema_decay": 0.8, "drop_rate": 0.3},
    "finetune": {"freeze": ["stem", "stages.[0-1]"], "unfreeze_epoch": 0.5},
    "optim": {"opt": "adamw", "lr": 0.01},
}
THAW = STEPS // 2  # steps before everything trains


def stop(patch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a signal after so many optimizer steps of its next run."""
    tiny.after_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)


@pytest.fixture(scope="module")
def thawed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that thawed, undisturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    tiny.train(tiny.config(cache, run_dir, **THAWING))
    return run_dir


@pytest.mark.parametrize("step", [THAW - 1, THAW, THAW + 1], ids=["before", "at", "after"])
def test_a_resume_around_the_thaw_is_bit_for_bit(
    cache: Path, tmp_path: Path, thawed: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    given = tiny.config(cache, tmp_path, **THAWING)
    with monkeypatch.context() as patch:
        stop(patch, step)
        assert tiny.train(given).summary is None
    assert tiny.checkpoint_steps(tmp_path) == [step]
    tiny.train(given)
    assert tiny.different(tiny.tensors(thawed), tiny.tensors(tmp_path)) == []
    assert tiny.untimed(tiny.metrics(thawed)) == tiny.untimed(tiny.metrics(tmp_path))


def test_what_was_frozen_trains_from_the_thaw_on(
    cache: Path, tmp_path: Path, thawed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tiny.config(cache, tmp_path, **THAWING)
    with monkeypatch.context() as patch:
        stop(patch, THAW)
        tiny.train(given)
    torch.manual_seed(given.run.seed)
    random = models.create(given, 10).state_dict()
    cold = {name for name in random if name.startswith(("stem.", "stages.0.", "stages.1."))}
    assert cold.isdisjoint(tiny.different(random, model_of(tmp_path)))
    tiny.train(given)
    counters = {name for name in cold if name.endswith("num_batches_tracked")}
    end = model_of(tmp_path)
    assert cold <= set(tiny.different(random, end))
    assert {int(end[name]) for name in counters} == {9 - THAW}
    # the mask touched less before, and touches all after
    assert [t for t in touched(tmp_path) if t.startswith("stem.")]
    assert touched(tmp_path) == touched(thawed)


def test_a_compiled_model_thaws_alike(cache: Path, tmp_path: Path, thawed: Path) -> None:
    model = THAWING["model"] | {"compile": "eager"}
    tiny.train(tiny.config(cache, tmp_path, **THAWING | {"model": model}))
    assert tiny.different(tiny.tensors(thawed), tiny.tensors(tmp_path)) == []


def test_the_thaw_reports_the_masks_before_they_are_renewed(thawed: Path) -> None:
    lines = {r["step"]: r for r in tiny.metrics(thawed) if r["phase"] == "train"}
    assert all(0 < lines[step]["kept_entries"] < 1 for step in (THAW, 2 * THAW, 3 * THAW))


def test_a_thaw_that_never_comes_is_refused(cache: Path, tmp_path: Path) -> None:
    finetune = THAWING["finetune"] | {"unfreeze_epoch": 1.5}
    with pytest.raises(UsageError, match=r"finetune\.unfreeze_epoch is 1\.5"):
        tiny.train(tiny.config(cache, tmp_path, **THAWING | {"finetune": finetune}))
