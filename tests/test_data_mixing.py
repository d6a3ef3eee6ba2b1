"""Mixing is timm's: its own code is the oracle, given our random numbers; and what timm draws, we draw as often."""

from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from timm.data import Mixup
from timm.data import mixup as timm_mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from gmscale.data.config import AugmentConfig
from gmscale.data.images.draws import ERASING, MIXING, Streams, number, whole_number
from gmscale.data.images.mixing import Mix, check_mixing, draw_mix, mix_images, mix_labels
from gmscale.errors import UsageError

S = 32
CLASSES = 11


def seeds(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.random.Philox(key=seed).random_raw(count)


def pictures(count: int, size: int = S) -> Tensor:
    """Bytes as floats, in channels_last memory."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator)
    return pixels.float().contiguous(memory_format=torch.channels_last)


def labels(count: int) -> Tensor:
    return torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(count))


def swapped(values: Tensor) -> Tensor:
    """Put each neighbour in the other's place."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def taken(mix: Mix) -> Tensor:
    """What each image takes of its neighbour: [N, S, S]."""
    return mix.down[:, :, None] * mix.across[:, None, :]


class NumpyOf:
    """numpy as timm's mixup sees it, with the random numbers of one stream."""

    def __init__(self, random: np.random.RandomState, minmax: bool) -> None:
        def beta(a: float, b: float) -> float:
            # With minmax, timm draws a lam from Beta(1, 1) that it does not use.
            return 0.5 if minmax and a == 1.0 else random.beta(a, b)

        def randint(low: int, high: int, size: None) -> int:
            return low + whole_number(random, high - low)

        self.random = SimpleNamespace(rand=random.random_sample, beta=beta, randint=randint)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


SETTINGS: list[dict[str, Any]] = [
    {"mixup": 0.8},
    {"cutmix": 1.0},
    {"cutmix": 0.3, "mix_prob": 0.5},
    {"cutmix_minmax": (0.2, 0.9)},
    {"mixup": 0.2, "cutmix": 1.0},
    {"mixup": 2.0, "cutmix": 0.5, "mix_prob": 0.7, "mix_switch_prob": 0.3},
    {"mixup": 0.4, "cutmix_minmax": (0.3, 0.8), "mix_prob": 0.8},
]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_timm_with_the_same_random_numbers_mixes_the_same(
    setting: dict[str, Any], mode: Literal["batch", "pair", "elem"], monkeypatch: pytest.MonkeyPatch
) -> None:
    count, smoothing = 24, 0.1
    augment = AugmentConfig(mix_mode=mode, **setting)
    mix = draw_mix(augment, S, seeds(count))
    images, targets = pictures(count), mix_labels(labels(count), mix, CLASSES)
    mix_images(images, mix)

    # timm pairs i with N - 1 - i. Whoever shares a draw is a batch of its own; of `elem`, both images of a pair
    # are drawn for, and only the one that is meant is kept.
    permutation = torch.cat([torch.arange(0, count, 2), torch.arange(1, count, 2).flip(0)])
    pairs = torch.stack([torch.arange(0, count, 2), torch.arange(1, count, 2)], 1)
    groups = {"batch": [permutation], "pair": list(pairs), "elem": [*pairs, *pairs.flip(1)]}[mode]
    oracle = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        cutmix_minmax=augment.cutmix_minmax,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=smoothing,
        num_classes=CLASSES,
    )
    streams = Streams()
    for group in groups:
        random = streams.start(int(seeds(count)[group[0]]), MIXING)
        monkeypatch.setattr(timm_mixup, "np", NumpyOf(random, augment.cutmix_minmax is not None))
        expected, expected_targets = oracle(pictures(count)[group], labels(count)[group])
        kept = slice(1) if mode == "elem" else slice(None)
        torch.testing.assert_close(images[group][kept], expected[kept], rtol=1e-6, atol=1e-4)
        smoothed = targets[group] * (1 - smoothing) + smoothing / CLASSES
        torch.testing.assert_close(smoothed[kept], expected_targets[kept], rtol=1e-6, atol=1e-6)


def test_cross_entropy_smooths_mixed_labels_as_timm_does() -> None:
    mix = draw_mix(AugmentConfig(mixup=0.8, cutmix=1.0, mix_mode="pair"), S, seeds(16))
    logits = torch.randn(16, CLASSES, generator=torch.Generator().manual_seed(0))
    ours = F.cross_entropy(logits, mix_labels(labels(16), mix, CLASSES), label_smoothing=0.1)
    order = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2).flip(0)])
    smoothed = timm_mixup.mixup_target(labels(16)[order], CLASSES, mix.lam[order, None], smoothing=0.1)
    torch.testing.assert_close(ours, SoftTargetCrossEntropy()(logits[order], smoothed))


def boxes(mix: Mix) -> NDArray[np.int64]:
    """Return top, left, height, width of the rectangle of each image that has one."""
    down, across = mix.down.numpy(), mix.across.numpy()
    cut = (down.max(1) == 1) & (across.min(1) == 0)
    down, across = down[cut], across[cut]
    return np.stack([down.argmax(1), across.argmax(1), down.sum(1), across.sum(1)], 1).astype(np.int64)


def test_mixup_shares_are_distributed_as_timms() -> None:
    np.random.seed(0)
    for alpha in (0.2, 0.8, 2.0):
        theirs, _ = Mixup(mixup_alpha=alpha)._params_per_elem(20000)
        ours = draw_mix(AugmentConfig(mixup=alpha, mix_mode="elem"), 2, seeds(20000)).lam.numpy()
        assert stats.ks_2samp(ours, theirs).pvalue > 0.01


@pytest.mark.parametrize("setting", [{"cutmix": 1.0}, {"cutmix": 0.3}, {"cutmix_minmax": (0.2, 0.9)}], ids=str)
def test_cutmix_rectangles_are_distributed_as_timms(setting: dict[str, Any]) -> None:
    augment = AugmentConfig(mix_mode="elem", **setting)
    ours = boxes(draw_mix(augment, S, seeds(20000)))
    np.random.seed(0)
    alpha = augment.cutmix or 1.0
    corners = [
        timm_mixup.cutmix_bbox_and_lam((3, S, S), lam, augment.cutmix_minmax)[0]
        for lam in np.random.beta(alpha, alpha, 10000)
    ]
    top, bottom, left, right = np.array(corners).T
    theirs = np.stack([top, left, bottom - top, right - left], 1)
    # Of a rectangle that is clipped to nothing, or covers the image, ours keep no trace.
    theirs = theirs[(theirs[:, 2:].min(1) > 0) & (theirs[:, 2:].max(1) < S)]
    ours = ours[(ours[:, 2:].min(1) > 0) & (ours[:, 2:].max(1) < S)]
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.01


def test_mixup_cutmix_and_neither_come_as_often_as_asked_for() -> None:
    count = 20000
    augment = AugmentConfig(mixup=0.8, cutmix=1.0, mix_prob=0.6, mix_switch_prob=0.3, mix_mode="elem")
    mix = draw_mix(augment, S, seeds(count))
    mixed_up = int(((mix.down == mix.down[:, :1]).all(1) & (mix.lam < 1)).sum())
    unmixed = int((mix.lam == 1).sum())
    # A few rectangles are empty, and a few cover the image, which counts as mixed up here.
    assert unmixed / count == pytest.approx(0.4, abs=0.015)
    assert mixed_up / count == pytest.approx(0.6 * 0.7, abs=0.015)


AUGMENTS = st.builds(
    AugmentConfig,
    mixup=st.sampled_from([0.0, 0.2, 1.0]),
    cutmix=st.sampled_from([0.3, 1.0]),
    cutmix_minmax=st.sampled_from([None, (0.2, 0.9), (0.5, 0.5), (1.0, 1.0)]),
    mix_prob=st.sampled_from([0.5, 1.0]),
    mix_mode=st.sampled_from(["batch", "pair", "elem"]),
)


@settings(max_examples=60, deadline=None)
@given(AUGMENTS, st.integers(0, 2**64 - 1), st.integers(1, 4), st.integers(3, 17))
def test_what_an_image_gives_up_its_neighbour_fills(
    augment: AugmentConfig, seed: int, pairs: int, size: int
) -> None:
    mix = draw_mix(augment, size, seeds(2 * pairs, seed))
    share = taken(mix)
    # The mean over the pixels is the label's share, for mixup as for a rectangle clipped by the border.
    torch.testing.assert_close(share.mean((1, 2)), 1 - mix.lam, rtol=1e-5, atol=1e-6)
    before = pictures(2 * pairs, size)
    after = before.clone(memory_format=torch.preserve_format)
    mix_images(after, mix)
    expected = before * (1 - share[:, None]) + swapped(before) * share[:, None]
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-4)
    targets = mix_labels(labels(2 * pairs), mix, CLASSES)
    torch.testing.assert_close(targets.sum(1), torch.ones(2 * pairs))
    assert targets.min() >= 0
    if augment.mix_mode != "elem":
        # Between two who share a draw nothing is lost.
        torch.testing.assert_close(after + swapped(after), before + swapped(before), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("mode", ["pair", "elem"])
def test_a_cut_is_copied_bit_for_bit(mode: Literal["pair", "elem"]) -> None:
    mix = draw_mix(AugmentConfig(cutmix=1.0, mix_mode=mode), S, seeds(8))
    before, after = pictures(8), pictures(8)
    mix_images(after, mix)
    assert torch.equal(after, torch.where(taken(mix)[:, None] == 1, swapped(before), before))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("mode", ["pair", "elem"])
def test_the_division_of_a_batch_changes_nothing(mode: Literal["pair", "elem"]) -> None:
    augment = AugmentConfig(mixup=0.8, cutmix=1.0, mix_mode=mode)
    whole = draw_mix(augment, S, seeds(12))
    for size in (2, 4, 6):
        parts = [draw_mix(augment, S, seeds(12)[first : first + size]) for first in range(0, 12, size)]
        for one, several in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat(several))


def test_in_mode_batch_all_images_of_a_micro_batch_share_the_draw_of_the_first() -> None:
    augment = AugmentConfig(mixup=0.8, cutmix=1.0)
    mix = draw_mix(augment, S, seeds(8))
    for values, alone in zip(mix, draw_mix(augment, S, seeds(8)[:2]), strict=True):
        assert torch.equal(values, alone[:1].expand_as(values))


def test_an_image_whose_neighbour_has_its_label_keeps_it_whole() -> None:
    mix = draw_mix(AugmentConfig(mixup=0.8, mix_mode="elem"), S, seeds(4))
    targets = mix_labels(torch.full((4,), 3), mix, CLASSES)
    torch.testing.assert_close(targets, F.one_hot(torch.full((4,), 3), CLASSES).float())


def test_draws_are_the_same_in_every_version_of_numpy() -> None:
    # Whoever resumes a run after an update of numpy mixes the same images in the same way.
    random = Streams().start(2**64 - 1, MIXING)
    assert whole_number(random, 10**9) == 654829510
    assert number(random, -1, 1) == 0.5554865154422042
    some = np.array([0, 1, 2, 2**64 - 1], dtype=np.uint64)
    for alpha, lam in (
        (0.8, [0.2031368762254715, 0.7105204463005066, 0.9492236375808716, 0.8645963072776794]),
        (2.0, [0.44319403171539307, 0.5585800409317017, 0.6920567154884338, 0.2915291488170624]),
    ):
        drawn = draw_mix(AugmentConfig(mixup=alpha, mix_mode="elem"), S, some).lam
        assert drawn.tolist() == pytest.approx(lam, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 2.0])  # numpy draws them differently, above 1 from pairs of normal numbers
def test_a_stream_starts_anew_whatever_was_drawn_before(alpha: float) -> None:
    streams = Streams()
    first = [streams.start(7, MIXING).beta(alpha, alpha)]
    for _ in range(3):
        streams.start(8, MIXING).randn()
        first.append(streams.start(7, MIXING).beta(alpha, alpha))
    assert len(set(first)) == 1
    assert streams.start(7, ERASING).beta(alpha, alpha) != first[0]


def test_streams_of_one_seed_are_independent() -> None:
    streams = Streams()
    values = [[streams.start(seed, stream).random_sample() for seed in range(5000)] for stream in (MIXING, ERASING)]
    assert abs(stats.pearsonr(*values).statistic) < 0.04
    for column in values:
        assert stats.kstest(column, "uniform").pvalue > 0.01


def test_an_odd_micro_batch_cannot_be_mixed() -> None:
    with pytest.raises(UsageError, match=r"data\.batch_size_per_device is 7; expected an even number.* 8"):
        check_mixing(AugmentConfig(cutmix=1.0), 7)
    check_mixing(AugmentConfig(cutmix=1.0), 8)
    check_mixing(AugmentConfig(), 7)
