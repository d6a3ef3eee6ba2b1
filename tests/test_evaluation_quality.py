"""Gradient quality of a checkpoint: NumPy as the oracle, the same on any ranks, and a model that stays as it is."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from numpy.typing import NDArray
from torch import nn

from gmscale import GradientMask, data, models
from gmscale.errors import UsageError
from gmscale.evaluation.alignment import judged, summarized
from gmscale.evaluation.quality import GradientQuality
from gmscale.evaluation.scorecard import Scorecard
from gmscale.evaluation.subject import Subject
from gmscale.losses import training_loss
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks

QUICK: dict[str, Any] = {"pairs": 2, "ranks": 2, "batch_size": 8}
AUGMENTED = {"augment": {"hflip": 0.5, "mixup": 0.2}, "optim": {"label_smoothing": 0.1, "lr": 0.05}}

Array = NDArray[np.float64]


def subject_of(cache: Path, world: World = tiny.ALONE, /, **sections: dict[str, Any]) -> Subject:
    config = tiny.config(cache, Path("unused"), **sections)
    torch.manual_seed(0)
    model = models.create(config, 10).eval().requires_grad_(False)
    for parameter in model.parameters():  # timm starts some at zero, behind which no weight has a gradient
        parameter += 0.05 * torch.randn(parameter.shape)
    return Subject(model, config, data.val_loader(config.data, world.rank, world.size), world, ())


def gradients(subject: Subject, batch_size: int, batches: int) -> Iterator[list[dict[str, Array]]]:
    """Yield, step by step, the gradients that training in one process would see in its micro-batches."""
    config = replace(subject.config, data=replace(subject.config.data, batch_size_per_device=batch_size))
    loader = data.train_loader(config.data, config.augment, config.run.seed, 0, 1, batches)
    model = copy.deepcopy(subject.model).requires_grad_(True).train()
    for epoch in range(100):
        for step in loader.epoch(epoch):
            found = []
            for batch in step:
                model.zero_grad()
                images, targets = data.to_device(batch, config.data, config.augment, 10, torch.device("cpu"))
                training_loss(model(images), targets, config.optim).backward()
                weights = {name: p.grad for name, p in model.named_parameters() if p.ndim > 1}
                found.append({name: g.double().numpy() for name, g in weights.items() if g is not None})
            yield found


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


# ---- what is measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "consensus"),
    [
        ({"operator": "pool", "strength": 0.3}, False),
        ({"operator": "log", "sigma": 0.7, "block": 8, "strength": 0.3}, False),
        ({"operator": "pool", "agreement": "consensus"}, True),
    ],
    ids=["pool", "log", "consensus"],
)
def test_every_layer_has_what_numpy_computes_from_the_gradients_of_training(
    cache: Path, mask: dict[str, Any], consensus: bool
) -> None:
    subject = subject_of(cache, mask={**mask, "error_feedback": True}, **AUGMENTED)
    found = GradientQuality(**QUICK).measure(subject)
    steps = gradients(subject, 8, 4)
    pairs = [next(steps) for _ in range(2)]
    block = mask.get("block", 16)
    how = {"operator": mask["operator"], "sigma": mask.get("sigma")}
    assert list(found["layers"]) == list(pairs[0][0])
    gains = np.empty((2, len(pairs[0][0])))
    for column, (name, layer) in enumerate(found["layers"].items()):
        expected: dict[str, list[float]] = {"alignment": [], "kept_entries": [], "kept_energy": []}
        of_means, of_ranks = [], []
        for number, pair in enumerate(pairs):
            raw, after = (np.stack([g[name] for g in half]) for half in (pair[:2], pair[2:]))
            maps = [oracle.lateral_map(g, block=block) for g in raw]
            maps = [np.mean(maps, 0)] * 2 if consensus else maps
            keep = np.stack([oracle.expand(oracle.keep_map(s, **how), raw[0].shape, block) for s in maps])
            alignment = cosine(raw.mean(0), after.mean(0))
            gains[number, column] = cosine((keep * raw).mean(0), after.mean(0)) - alignment
            expected["alignment"].append(alignment)
            expected["kept_entries"].append(keep.mean())
            energies = [((m * g) ** 2).sum() / (g**2).sum() for m, g in zip(keep, raw, strict=True)]
            expected["kept_energy"].append(float(np.mean(energies)))
            of_means.append((raw.mean(0) ** 2).sum())
            of_ranks.append((raw**2).sum() / 2)
        assert layer["gain"] == pytest.approx(gains[:, column].mean(), abs=2e-5)
        for key, values in expected.items():
            assert layer[key] == pytest.approx(np.mean(values), abs=2e-5)
        trace = 2 * (np.mean(of_ranks) - np.mean(of_means))
        assert layer["snr"] == pytest.approx(np.sqrt(np.mean(of_means) / trace), rel=1e-4)
    sizes = np.array([g.size for g in pairs[0][0].values()])
    by_pair = (gains * sizes).sum(1) / sizes.sum()
    assert found["gain"] == found["combined"]["gain"] == pytest.approx(by_pair.mean(), abs=2e-5)
    assert found["combined"]["gain_std"] == pytest.approx(by_pair.std(ddof=1), abs=2e-5)
    assert found["strength"] == 1
    assert found["judged"] == mask["operator"]


def signal_and_noise(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients of three ranks and a later one: every eighth kernel carries signal, all of them noise."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.zeros(16, 16, 3, 3)
    signal[:, ::8] = 2.0
    first = [signal + torch.randn(signal.shape, generator=generator) for _ in range(3)]
    return first, signal + torch.randn(signal.shape, generator=generator)


def test_a_mask_that_removes_noise_gains_over_its_control() -> None:
    rows = torch.stack([judged(*signal_and_noise(seed), GradientMask(kappa=1.4), (seed,)) for seed in range(6)])
    combined = summarized(rows[:, None], {"layer": 2304}, 3)["combined"]
    assert combined["gain_low"] > 0.02
    assert combined["control_gain"] < 0
    assert combined["over_control_low"] > combined["gain_low"]
    assert combined["over_control"] == pytest.approx(combined["gain"] - combined["control_gain"])
    assert combined["kept_entries"] == pytest.approx(1 / 8, abs=0.02)


def test_a_random_mask_is_as_good_as_its_control() -> None:
    mask = GradientMask(operator="random", error_feedback=False)
    rows = torch.stack([judged(*signal_and_noise(seed), mask, (seed,)) for seed in range(12)])
    combined = summarized(rows[:, None], {"layer": 2304}, 3)["combined"]
    assert combined["gain_high"] < 0
    assert combined["over_control_low"] < 0 < combined["over_control_high"]
    assert combined["gain"] != combined["control_gain"]


def test_ratios_are_of_means_and_layers_that_are_not_finite_are_left_out() -> None:
    table = torch.ones(3, 3, 10, dtype=torch.float64)
    table[:, :, 1] = torch.tensor([[0.1, 0.4, 0.0], [0.2, 0.5, 0.0], [0.3, 0.6, 0.0]])
    table[:, :, 5] = torch.tensor([[1.0], [2.0], [3.0]])  # |mean|^2
    table[:, :, 7] = 4.0  # mean |g|^2
    table[1, 2, 1] = float("nan")
    found = summarized(table, {"a": 30, "b": 10, "c": 1000}, 2)
    assert found["combined"]["gain"] == pytest.approx((3 * 0.2 + 0.5) / 4)
    assert found["combined"]["gain_std"] == pytest.approx(0.1)
    assert np.isnan(found["layers"]["c"]["gain"])
    assert found["layers"]["a"]["snr"] == pytest.approx(np.sqrt(2 / (2 * (4 - 2))))
    broken = summarized(torch.full((2, 1, 10), torch.nan, dtype=torch.float64), {"a": 30}, 2)["combined"]
    assert np.isnan(broken["gain"])


def test_the_configured_mask_is_the_runs_and_others_have_their_defaults(cache: Path) -> None:
    settings = {"enabled": False, "operator": "dog", "sigma": 0.8, "exclude": ["stem*"]}
    subject = subject_of(cache, mask=settings)
    configured = GradientQuality(**QUICK).measure(subject)
    pool = GradientQuality(operator="pool", **QUICK).measure(subject)
    assert (configured["judged"], configured["trained_with_mask"], pool["judged"]) == ("dog", False, "pool")
    assert set(pool["layers"]) - set(configured["layers"]) == {"stem.conv.weight"}
    assert configured["masked_parameters"] == len(configured["layers"])
    name = next(iter(configured["layers"]))
    assert configured["layers"][name]["alignment"] == pool["layers"][name]["alignment"]
    assert configured["layers"][name]["kept_entries"] != pool["layers"][name]["kept_entries"]


def test_what_does_not_train_is_not_judged(cache: Path) -> None:
    found = GradientQuality(**QUICK).measure(subject_of(cache, finetune={"linear_probe": True}))
    assert list(found["layers"]) == ["head.fc.weight"]
    found = GradientQuality(**QUICK).measure(
        subject_of(cache, finetune={"linear_probe": True, "unfreeze_epoch": 0.5})
    )
    assert len(found["layers"]) > 1


# ---- on what -----------------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is_and_nothing_is_drawn_that_the_images_do_not_decide(cache: Path) -> None:
    subject = subject_of(cache, model={"drop_rate": 0.5})
    assert any(
        isinstance(module, nn.Dropout) or getattr(module, "drop_rate", 0) for module in subject.model.modules()
    )
    before, state = copy.deepcopy(subject.model.state_dict()), torch.get_rng_state()
    heard: list[tuple[int, int]] = []
    first = GradientQuality(**QUICK).measure(replace(subject, progress=lambda *at: heard.append(at)))
    assert heard == [(1, 2), (2, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in subject.model.parameters())
    assert not any(module.training for module in subject.model.modules())
    with torch.no_grad():
        torch.rand(1)
        assert GradientQuality(**QUICK).measure(subject) == first


def test_a_small_split_gives_smaller_batches_and_pairs_of_further_epochs(cache: Path) -> None:
    subject = subject_of(cache)  # 100 images, batches of 16
    found = GradientQuality(operator="pool", pairs=3).measure(subject)
    assert found["images_of_a_gradient"] == 12
    steps = gradients(subject, 12, 8)  # one pair an epoch
    name = next(iter(found["layers"]))
    aligned = []
    for _ in range(3):
        pair = [g[name] for g in next(steps)]
        aligned.append(cosine(sum(pair[:4]), sum(pair[4:])))  # type: ignore[arg-type]
    assert found["layers"][name]["alignment"] == pytest.approx(np.mean(aligned), abs=2e-5)


def _measured(world: World, cache: str) -> dict[str, Any]:
    torch.set_num_threads(1)  # with other threads sums are rounded otherwise
    subject = subject_of(Path(cache), world, **AUGMENTED)
    return GradientQuality(pairs=5, ranks=2, batch_size=16).measure(subject)


def test_two_ranks_find_what_one_finds(cache: Path) -> None:
    assert run_ranks(_measured, 2, str(cache)) == run_ranks(_measured, 1, str(cache))


def test_the_scorecard_takes_it(cache: Path, tmp_path: Path) -> None:
    what, card = GradientQuality(operator="pool", **QUICK), Scorecard(tmp_path / "card.json", {"step": 1})
    found = what.measure(subject_of(cache))
    card.add(what, found)
    (entry,) = json.loads((tmp_path / "card.json").read_text())["quality"]
    assert entry["operator"] == "pool"
    assert all(isinstance(entry[name], float) for name in what.shown)
    assert card.has(what)
    assert not card.has(replace(what, pairs=3))
    assert what.words == "pool, 2 pairs of batches"


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"operator": "pol"}, r"--quality is 'pol'; expected one of configured, pool, .*; did you mean 'pool'\?"),
        ({"pairs": 1}, r"--pairs is 1; expected a whole number in \[2"),
        ({"ranks": 1}, r"--quality_ranks is 1"),
        ({"batch_size": 1}, r"--quality_batch_size is 1; expected a whole number in \[2"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        GradientQuality(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"batch_size": 64},
            "--quality_batch_size is 64, but data.train_split 'train' has 100 images; expected at most 12",
        ),
        (
            {"ranks": 40},
            "--quality takes 80 batches of 2 images or more for a pair; data.train_split 'train' has 100",
        ),
    ],
)
def test_a_split_that_is_too_small(cache: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        GradientQuality(**settings).measure(subject_of(cache))
