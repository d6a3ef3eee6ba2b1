"""Random erasing is timm's: its own code is the oracle for where, and the noise is normal."""

import random as python_random
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from timm.data import random_erasing as timm_erasing
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from gmscale.data.config import AugmentConfig
from gmscale.data.images import erasing
from gmscale.data.images.draws import ERASING, Streams, number, whole_number
from gmscale.data.images.erasing import Erasure, draw_erasure, erase, normals

S = 32
Mode = Literal["const", "rand", "pixel"]
MODES: tuple[Mode, ...] = ("const", "rand", "pixel")


def seeds(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.random.Philox(key=seed).random_raw(count)


def ones(count: int, size: int = S) -> Tensor:
    return torch.ones(count, 3, size, size).contiguous(memory_format=torch.channels_last)


def by_loops(images: Tensor, erasure: Erasure) -> Tensor:
    """Return which pixels lie in a rectangle: bool [N, S, S]."""
    inside = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    for _, image, top, left, height, width, _ in erasure.rectangles.tolist():
        inside[image, top : top + height, left : left + width] = True
    return inside


class RandomOf:
    """Python's random as timm sees it, with the random numbers of one stream."""

    def __init__(self, random: np.random.RandomState) -> None:
        self._random = random

    def random(self) -> float:
        return self._random.random_sample()

    def uniform(self, low: float, high: float) -> float:
        return number(self._random, low, high)

    def randint(self, low: int, high: int) -> int:
        return low + whole_number(self._random, high - low + 1)


def test_timm_with_the_same_random_numbers_erases_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 200
    erasure = draw_erasure(AugmentConfig(erase_prob=0.7, erase_count=3), S, seeds(count))
    ours = ones(count)
    erase(ours, erasure, "const")
    streams = Streams()
    for image, seed in zip(ours, seeds(count).tolist(), strict=True):
        random = streams.start(seed, ERASING)

        def zeros(*_: object, random: np.random.RandomState = random, **__: object) -> Tensor:
            whole_number(random, 1)  # our key of the noise
            return torch.zeros(3, 1, 1)

        monkeypatch.setattr(timm_erasing, "random", RandomOf(random))
        monkeypatch.setattr(timm_erasing, "_get_pixels", zeros)
        theirs = RandomErasing(probability=0.7, mode="const", max_count=3, device="cpu")(torch.ones(3, S, S))
        assert torch.equal(image, theirs)
    assert set(erasure.rectangles[:, 0].tolist()) == {0, 1, 2}


def test_rectangles_are_distributed_as_timms() -> None:
    count = 6000
    drawn = draw_erasure(AugmentConfig(erase_prob=0.5), S, seeds(count)).rectangles
    assert len(drawn) / count == pytest.approx(0.5, abs=0.02)
    ours = drawn[:, 2:6].numpy()
    python_random.seed(0)
    timm = RandomErasing(probability=1, mode="const", device="cpu")
    theirs = []
    for _ in range(3000):
        erased = timm(torch.ones(1, S, S))[0] == 0
        down, across = erased.any(1).numpy(), erased.any(0).numpy()
        theirs.append((down.argmax(), across.argmax(), down.sum(), across.sum()))
    for statistic in (lambda t, l, h, w: h * w, lambda t, l, h, w: h / w, lambda t, *_: t, lambda t, l, *_: l):
        assert stats.ks_2samp(statistic(*ours.T), statistic(*np.array(theirs).T)).pvalue > 0.01


def test_an_image_loses_one_to_erase_count_rectangles_of_together_at_most_a_third() -> None:
    size = 224
    rectangles = draw_erasure(AugmentConfig(erase_prob=1, erase_count=4), size, seeds(400)).rectangles
    counts = rectangles[:, 1].bincount()
    assert [int((counts == n).sum()) for n in range(6)] == pytest.approx([0, 100, 100, 100, 100, 0], abs=30)
    area = torch.zeros(400).index_add(0, rectangles[:, 1], (rectangles[:, 4] * rectangles[:, 5]).float())
    assert float(area.min()) / size**2 > 0.018
    assert float(area.max()) / size**2 < 0.345


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(MODES), st.integers(0, 2**64 - 1), st.integers(1, 6), st.integers(1, 4), st.integers(2, 40))
def test_only_what_lies_in_a_rectangle_changes(mode: Mode, seed: int, count: int, turns: int, size: int) -> None:
    erasure = draw_erasure(AugmentConfig(erase_prob=0.8, erase_count=turns), size, seeds(count, seed))
    images = ones(count, size)
    erase(images, erasure, mode)
    inside = by_loops(images, erasure)
    assert torch.equal((images != 1).any(1), inside)
    if mode == "const":
        assert torch.equal((images == 0).all(1), inside)


@pytest.mark.parametrize("mode", MODES)
def test_the_division_of_a_batch_changes_nothing(mode: Mode) -> None:
    augment = AugmentConfig(erase_prob=0.6, erase_count=2)
    whole = ones(12)
    erase(whole, draw_erasure(augment, S, seeds(12)), mode)
    for size in (1, 3, 4):
        for first in range(0, 12, size):
            part = ones(size)
            erase(part, draw_erasure(augment, S, seeds(12)[first : first + size]), mode)
            assert torch.equal(part, whole[first : first + size])


def test_rand_fills_each_rectangle_with_its_own_normal_colour() -> None:
    images = ones(3000)
    erasure = draw_erasure(AugmentConfig(erase_prob=1), S, seeds(3000))
    erase(images, erasure, "rand")
    colours = []
    for _, image, top, left, height, width, _ in erasure.rectangles.tolist():
        patch = images[image, :, top : top + height, left : left + width].flatten(1)
        assert torch.equal(patch, patch[:, :1].expand_as(patch))
        colours.append(patch[:, 0].numpy())
    for channel in np.array(colours).T:
        assert stats.kstest(channel, "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(np.array(colours).T) - np.eye(3)).max() < 0.05


def test_pixels_are_normal_and_unrelated_to_their_neighbours_channels_and_other_images() -> None:
    images = ones(2, 256)
    whole = torch.tensor([[0, image, 0, 0, 256, 256, key] for image, key in ((0, 5), (1, 2**53 - 1))])
    erase(images, Erasure(whole), "pixel")
    noise = images.numpy()
    assert stats.kstest(noise.ravel()[::3], "norm").pvalue > 0.01
    assert np.abs(noise).max() < 5.1
    columns = [*noise[0], noise[1, 0], noise[0, 0][::-1], np.roll(noise[0, 0], 1, 1), np.roll(noise[0, 0], 1, 0)]
    related = np.corrcoef([column.ravel() for column in columns]) - np.eye(len(columns))
    assert np.abs(related).max() < 0.02


def test_a_later_rectangle_covers_an_earlier_one() -> None:
    images = ones(1)
    rectangles = torch.tensor([[0, 0, 0, 0, 20, 20, 1], [1, 0, 10, 10, 20, 20, 2]])
    erase(images, Erasure(rectangles), "rand")
    colours = normals(torch.tensor([1, 2]))
    assert torch.equal(images[0, :, 5, 5], colours[0])
    assert torch.equal(images[0, :, 15, 15], colours[1])
    assert torch.equal(images[0, :, 25, 25], colours[1])


def test_no_pixel_is_written_twice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU writes in any order: of two rectangles that overlap, it might leave either on top.
    together: list[list[int]] = []

    def spy(images: Tensor, rectangles: Tensor, pixels: int, mode: Mode) -> None:
        together.append(rectangles[:, 1].tolist())

    monkeypatch.setattr(erasing, "_fill", spy)
    erasure = draw_erasure(AugmentConfig(erase_prob=0.8, erase_count=3), S, seeds(50))
    erase(ones(50), erasure, "rand")
    assert len(together) == 3
    assert all(len(set(images)) == len(images) for images in together)
    assert sum(map(len, together)) == len(erasure.rectangles)


def test_noise_is_splitmix64_through_the_normal_quantiles() -> None:
    step, bits = 0x9E3779B97F4A7C15, 2**64 - 1

    def mixed(state: int) -> int:
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & bits
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & bits
        return state ^ (state >> 31)

    assert mixed(step) == 0xE220A8397B1DCDAF  # the first number of the reference code from seed 0
    keys = [0, step, 2**63, bits, *(int(seed) for seed in seeds(200))]
    expected = [
        [stats.norm.ppf(((mixed(key) >> shift) % 2**21 + 0.5) / 2**21) for shift in (0, 21, 42)] for key in keys
    ]
    found = normals(torch.tensor(np.array(keys, dtype=np.uint64).view(np.int64)))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-5)

    images = ones(1)
    erase(images, Erasure(torch.tensor([[0, 0, 4, 6, 3, 5, 77]])), "pixel")
    keys = [(77 + pixel * step) & bits for pixel in range(15)]
    noise = normals(torch.tensor(np.array(keys, dtype=np.uint64).view(np.int64)))
    assert torch.equal(images[0, :, 4:7, 6:11], noise.T.reshape(3, 3, 5))


def test_nothing_to_erase_is_nothing_done() -> None:
    erasure = draw_erasure(AugmentConfig(erase_prob=0), S, seeds(4))
    assert erasure.rectangles.shape == (0, 7)
    images = ones(4)
    for mode in MODES:
        erase(images, erasure, mode)
    assert torch.equal(images, ones(4))


def test_a_turn_in_which_no_rectangle_fitted_is_passed_over() -> None:
    images = ones(1)
    erase(images, Erasure(torch.tensor([[1, 0, 0, 0, 2, 2, 9]])), "pixel")
    assert int((images != 1).any(1).sum()) == 4


def test_draws_are_the_same_in_every_version_of_numpy() -> None:
    some = np.array([0, 1, 2, 2**64 - 1], dtype=np.uint64)
    assert draw_erasure(AugmentConfig(erase_prob=0.5, erase_count=2), S, some).rectangles.tolist() == [
        [0, 1, 0, 12, 10, 3, 3011895521419999],
        [0, 3, 25, 6, 6, 9, 4409443962110088],
        [1, 3, 0, 1, 10, 9, 6798381300745875],
    ]
