"""Crops and patches guided by saliency, and their random control: where they lie, and that training stays exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmscale import build, step
from gmscale.data.config import AugmentConfig
from gmscale.data.images.device import draw_late
from gmscale.data.images.guided import Guided, draw_guided, guide
from gmscale.errors import UsageError
from gmscale.parallel import World

S, CLASSES = 16, 5


def seeds(count: int) -> NDArray[np.uint64]:
    return np.random.Philox(key=3).random_raw(count)


def pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, S, S, generator=generator).contiguous(memory_format=torch.channels_last)


def maps(count: int) -> Tensor:
    return torch.rand(count, S, S, generator=torch.Generator().manual_seed(count))


def drawn(crop: list[int], patch: list[int], places: float = 0.0) -> Guided:
    return Guided(torch.tensor(crop), torch.tensor(patch), torch.full((len(crop), 4), places))


LABELS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("side", [1, 5, 8, 15])
def test_a_crop_holds_the_most_saliency_of_all_positions(side: int) -> None:
    images, salient = pictures(4), maps(4)
    found, targets = guide(images.clone(), LABELS, drawn([side, S, side, S], [0] * 4), salient, CLASSES)
    assert torch.equal(targets, LABELS)
    assert torch.equal(found[1::2], images[1::2]), "not cropped: bit for bit"
    for i in (0, 2):
        sums = salient[i].unfold(0, side, 1).unfold(1, side, 1).sum((-1, -2))
        top, left = divmod(int(sums.argmax()), sums.shape[1])
        cut = images[i : i + 1, :, top : top + side, left : left + side]
        wanted = torch.nn.functional.interpolate(cut, (S, S), mode="bilinear", align_corners=False)
        # at the crop's edge a resize of the crop alone repeats its last row, this one sees the image beyond it
        inner = slice(-(-S // side), S - -(-S // side))
        torch.testing.assert_close(found[i, :, inner, inner], wanted[0, :, inner, inner], rtol=1e-4, atol=1e-4)


def test_a_patch_comes_from_around_the_neighbours_most_salient_pixel() -> None:
    images, salient = pictures(4), torch.zeros(4, S, S)
    for i, (y, x) in enumerate([(3, 4), (15, 0), (8, 8), (2, 13)]):
        salient[i, y, x] = 1
    found, targets = guide(images.clone(), LABELS, drawn([S] * 4, [4, 4, 0, 5]), salient, CLASSES)
    wanted = images.clone()
    wanted[0, :, 13:, :2] = images[1, :, 13:, :2]  # around (15, 0), clipped
    wanted[1, :, 1:5, 2:6] = images[0, :, 1:5, 2:6]  # around (3, 4)
    wanted[3, :, 6:11, 6:11] = images[2, :, 6:11, 6:11]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets[0, 1].item() == pytest.approx(6 / S**2)
    assert targets[1, 0].item() == pytest.approx(16 / S**2)
    assert targets[2, 2] == 1


def test_the_random_guide_draws_the_same_sizes_at_places_of_its_own() -> None:
    settings = {"guided_crop": 0.7, "guided_mix": 0.6}
    draws = draw_guided(AugmentConfig(**settings, guide="random"), S, seeds(2000), mixes=True)  # type: ignore[arg-type]
    same = draw_guided(AugmentConfig(**settings), S, seeds(2000), mixes=True)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(draws, same, strict=True))
    assert 0.66 < (draws.crop < S).float().mean() < 0.74
    assert 0.50 < (draws.patch > 0).float().mean() < 0.62, "a patch may be of side 0"
    low, high = AugmentConfig().guided_crop_scale
    sides = draws.crop[draws.crop < S]
    assert S * low**0.5 - 1 < sides.min() <= sides.max() < S * high**0.5 + 1
    some = Guided(*(part[:200] for part in draws))
    found, _ = guide(pictures(200), torch.zeros(200, dtype=torch.int64), some, None, CLASSES)
    changed = (found != pictures(200)).flatten(1).any(1)
    assert torch.equal(changed, (some.crop < S) | changed & (some.patch > 0))


@pytest.mark.parametrize("salient", [True, False])
def test_batches_may_be_divided_between_pairs(salient: bool) -> None:
    augment = AugmentConfig(guided_crop=0.5, guided_mix=0.8)
    everything = draw_guided(augment, S, seeds(8), mixes=True)
    labels = torch.arange(8) % CLASSES
    whole, targets = guide(pictures(8), labels, everything, maps(8) if salient else None, CLASSES)
    for part in (slice(0, 2), slice(2, 8)):
        own = draw_guided(augment, S, seeds(8)[part], mixes=True)
        images = pictures(8)[part].contiguous(memory_format=torch.channels_last)
        found, own_targets = guide(images, labels[part], own, maps(8)[part] if salient else None, CLASSES)
        assert torch.equal(found, whole[part])
        assert torch.equal(own_targets, targets[part])


def test_mixing_ends_where_it_shall_and_cropping_goes_on() -> None:
    augment = AugmentConfig(guided_crop=1.0, guided_mix=1.0, mix_off_epoch=2)
    before, after = (draw_late(augment, S, seeds(8), epoch) for epoch in (1, 2))
    assert before is not None
    assert before.guided is not None
    assert before.guided.patch.any()
    assert after is not None
    assert after.guided is not None
    assert not after.guided.patch.any()
    assert torch.equal(before.guided.crop, after.guided.crop)


def test_what_cannot_be_together_is_refused() -> None:
    with pytest.raises(UsageError, match="mix the same pairs"):
        AugmentConfig(guided_mix=0.5, cutmix=1.0)
    with pytest.raises(UsageError, match="guided_mix"):
        AugmentConfig(guided_mix=1.5)


def test_saliency_needs_a_model_that_a_rank_can_run_alone(tmp_path: Path, cache: Path) -> None:
    config = tiny.config(cache, tmp_path, augment={"guided_crop": 0.5})
    sharded = World(0, 0, 1, torch.device("cpu"), "fsdp2")
    with pytest.raises(UsageError, match=r"expected augment\.guide random"):
        build.training_state(config, sharded, 10, 1)


GUIDED: dict[str, dict[str, Any]] = {
    "augment": {"guided_crop": 0.5, "guided_mix": 0.5},
    "output": {"enabled": True, "sigma": 1.0},
}


def test_the_saliency_of_a_model_leaves_its_training_alone(tmp_path: Path, cache: Path) -> None:
    config = tiny.config(cache, tmp_path, **GUIDED)
    state = build.training_state(config, tiny.ALONE, 10, 4)
    state.wrapped.model.train()
    before = {name: value.clone() for name, value in state.wrapped.bare.state_dict().items()}
    images = torch.randn(4, 3, config.data.image_size, config.data.image_size)
    random = torch.get_rng_state()
    salient = step._saliency(state, images, LABELS)
    assert salient.shape == (4, *images.shape[2:])
    assert (salient >= 0).all()
    assert salient.amax() > 0
    assert all(torch.equal(before[name], value) for name, value in state.wrapped.bare.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in state.wrapped.bare.parameters())
    assert state.wrapped.model.training
    assert state.wrapped.bare.training
    assert not state.attachments["output"].describe()["touched"][0]["shape"], "no output was seen"


def test_guided_by_saliency_is_another_run_than_by_chance_or_by_nothing(tmp_path: Path, cache: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "saliency": {"guided_mix": 1.0},
        "random": {"guided_mix": 1.0, "guide": "random"},
        "none": {},
    }
    for name, augment in ways.items():
        tiny.train(tiny.config(cache, tmp_path / name, augment=augment))
    saliency, random, none = (tiny.tensors(tmp_path / name) for name in ways)
    assert tiny.different(saliency, random)
    assert tiny.different(saliency, none)
    assert tiny.different(random, none)
