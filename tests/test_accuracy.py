"""Accuracy, calibration and accuracy by class: one pass, against plain definitions, on any number of ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from gmscale import parallel, trained
from gmscale.data import normalize, val_loader
from gmscale.evaluation import evaluate
from gmscale.evaluation.accuracy import Accuracy
from gmscale.evaluation.calibration import BINS, bin_sums, calibration
from gmscale.evaluation.subject import Subject
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks


def subject(run: Path, world: World = tiny.ALONE, **data: Any) -> Subject:
    made = trained.load(run, "last", "model")
    section = replace(made.config.data, **data)
    config = replace(made.config, data=section)
    return Subject(made.model, config, val_loader(section, world.rank, world.size), world, made.classes)


def measure_on_a_rank(world: World, run: Path) -> dict[str, list[Any]]:
    return {"ranks": parallel.of_all_ranks(Accuracy().measure(subject(run, world)), world)}


@torch.no_grad()
def logits_of(one: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [(one.model(normalize(images, one.config.data)), labels) for images, labels, _ in one.loader]
    return torch.cat([logits for logits, _ in batches]), torch.cat([labels for _, labels in batches])


def ece_by_definition(confidence: list[float], correct: list[bool]) -> float:
    """Guo et al., equation 3, one prediction after another."""
    gap = 0.0
    for m in range(1, 16):
        inside = [i for i, p in enumerate(confidence) if (m - 1) / 15 < p <= m / 15]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            sure = sum(confidence[i] for i in inside) / len(inside)
            gap += len(inside) / len(confidence) * abs(accuracy - sure)
    return 100 * gap


def test_the_numbers_are_those_of_the_run_to_the_last_bit(finished_run: Path) -> None:
    found = Accuracy().measure(subject(finished_run))
    summary = json.loads((finished_run / "summary.json").read_text())
    assert {name: found[name] for name in ("loss", "top1", "top5")} == {
        name: summary[name] for name in ("loss", "top1", "top5")
    }
    one = subject(finished_run)
    assert evaluate(one.model, one.loader, one.config.data, tiny.ALONE).items() <= found.items()


def test_calibration_and_classes_are_those_of_the_logits(finished_run: Path) -> None:
    one = subject(finished_run)
    found, (logits, labels) = Accuracy().measure(one), logits_of(one)
    confidence, predicted = logits.softmax(1).max(1)
    correct = predicted == labels
    assert found["ece"] == pytest.approx(ece_by_definition(confidence.tolist(), correct.tolist()), rel=1e-9)
    assert sum(entry["count"] for entry in found["bins"]) == tiny.VALIDATION_SIZE
    assert set(found["per_class"]) == {one.classes[label] for label in labels.tolist()}
    for name, entry in found["per_class"].items():
        mine = labels == one.classes.index(name)
        assert entry["top1"] == pytest.approx(100 * correct[mine].double().mean().item())
        assert entry["count"] == int(mine.sum())


def test_classes_of_one_name_are_told_apart(finished_run: Path) -> None:
    named = ("crane", *map(str, range(1, 9)), "crane")
    found = Accuracy().measure(replace(subject(finished_run), classes=named))["per_class"]
    assert {"crane (0)", "crane (9)", "1"} <= set(found)
    assert sum(entry["count"] for entry in found.values()) == tiny.VALIDATION_SIZE


def test_batches_do_not_matter(finished_run: Path) -> None:
    # sums of other lengths round otherwise
    small, large = (Accuracy().measure(subject(finished_run, eval_batch_size_per_device=n)) for n in (4, 25))
    assert small["per_class"] == large["per_class"]
    assert small["ece"] == pytest.approx(large["ece"], rel=1e-5)
    assert [bin["count"] for bin in small["bins"]] == [bin["count"] for bin in large["bins"]]


def test_ranks_count_every_image_once(finished_run: Path) -> None:
    first, second = run_ranks(measure_on_a_rank, 2, finished_run)["ranks"]
    alone = Accuracy().measure(subject(finished_run))
    assert first == second
    assert {**first, "bins": None, "loss": None, "ece": None} == {**alone, "bins": None, "loss": None, "ece": None}
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert first["ece"] == pytest.approx(alone["ece"], rel=1e-5)


def test_a_rank_without_images_agrees(finished_run: Path) -> None:
    # a share of nothing must not change the shapes that ranks add up
    one = subject(finished_run)
    idle = replace(one, loader=val_loader(one.config.data, tiny.VALIDATION_SIZE, tiny.VALIDATION_SIZE + 1))
    seen: list[torch.Size] = []
    total = Subject.total

    def heard(self: Subject, values: torch.Tensor) -> torch.Tensor:
        seen.append(values.shape)
        return total(self, values) + 1  # of another rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subject, "total", heard)
        Accuracy().measure(one)
        Accuracy().measure(idle)
    assert seen[:3] == seen[3:]


def test_progress_is_told(finished_run: Path) -> None:
    heard: list[tuple[int, int]] = []
    Accuracy().measure(replace(subject(finished_run), progress=lambda done, total: heard.append((done, total))))
    assert heard == [(10, 25), (20, 25), (25, 25)]


# ---- calibration -------------------------------------------------------------------------------------------------


def test_bins_end_where_they_should() -> None:
    confidence = torch.tensor(
        [1e-9, 1 / 15, 1 / 15 + 1e-9, 0.5, 14 / 15 + 1e-9, 1.0, 1.0 + 1e-7], dtype=torch.float64
    )
    sums = bin_sums(confidence, torch.ones(7, dtype=torch.bool))
    assert sums[:, 2].nonzero()[:, 0].tolist() == [0, 1, 7, 14]
    assert sums[:, 2].sum() == 7
    assert sums[:, 0].sum().item() == pytest.approx(confidence.sum().item(), rel=1e-12)


def test_a_calibrated_model_has_no_error_and_a_boaster_all_of_it() -> None:
    sure = torch.full((100,), 0.75)
    honest = calibration(bin_sums(sure, torch.arange(100) < 75))
    assert honest["ece"] == pytest.approx(0)
    assert honest["bins"][11] == {"confidence": 0.75, "accuracy": 0.75, "count": 100}
    assert honest["bins"][0] == {"confidence": None, "accuracy": None, "count": 0}
    assert calibration(bin_sums(torch.ones(9), torch.zeros(9)))["ece"] == 100


@pytest.mark.parametrize("parts", [1, 7])
def test_error_by_the_definition(parts: int) -> None:
    random = np.random.default_rng(3)
    confidence, correct = torch.from_numpy(random.random(1000)), torch.from_numpy(random.random(1000) < 0.4)
    split = zip(confidence.chunk(parts), correct.chunk(parts), strict=True)
    sums = torch.stack([bin_sums(*part) for part in split]).sum(0)
    assert sums.shape == (BINS, 3)
    assert calibration(sums)["ece"] == pytest.approx(ece_by_definition(confidence.tolist(), correct.tolist()))
