"""Scores of saliency maps against boxes, and deletion and insertion: laws, and plain NumPy as the oracle."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from gmscale.evaluation.saliency.deletion import blurred, deletion, insertion, probabilities
from gmscale.evaluation.saliency.localization import (
    centre,
    energy_pointing,
    iou,
    judged,
    pointing,
    scores,
    top_box,
)

H, W = 12, 17


def maps_of(seed: int, count: int = 6) -> Tensor:
    """Random maps [N, H, W], some of them with many equal values."""
    maps = torch.rand(count, H, W, generator=torch.Generator().manual_seed(seed))
    maps[: count // 2] = (maps[: count // 2] * 4).floor()
    return maps


def boxes_of(seed: int, count: int = 6, whole: bool = True) -> Tensor:
    rng = np.random.default_rng(seed)
    x, y = (np.sort(rng.uniform(0, side, (count, 2))) for side in (W, H))
    found = np.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), 1)
    if whole:
        found = np.floor(found) + np.array([0, 0, 1, 1])
    return torch.tensor(found, dtype=torch.float32)


def inside(box: Tensor) -> NDArray[np.bool_]:
    """The pixels of a box whose corners are whole."""
    x0, y0, x1, y1 = box.int().tolist()
    mask = np.zeros((H, W), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


seeds = st.integers(0, 10_000)


# ---- intersection over union -------------------------------------------------------------------------------------


@given(seed=seeds)
def test_iou_counts_pixels(seed: int) -> None:
    a, b = boxes_of(seed), boxes_of(seed + 1)
    masks = [(inside(one), inside(other)) for one, other in zip(a, b, strict=True)]
    expected = [(one & other).sum() / (one | other).sum() for one, other in masks]
    np.testing.assert_allclose(iou(a, b), expected, rtol=1e-6)


@given(seed=seeds)
def test_iou_is_symmetric_and_1_only_of_a_box_with_itself(seed: int) -> None:
    a, b = boxes_of(seed, whole=False), boxes_of(seed + 1, whole=False)
    assert torch.equal(iou(a, b), iou(b, a))
    assert torch.equal(iou(a, a), torch.ones(len(a)))
    assert ((iou(a, b) >= 0) & (iou(a, b) < 1)).all()


def test_boxes_that_only_touch_share_nothing() -> None:
    a = torch.tensor([[0.0, 0, 2, 2]]).expand(3, 4)
    b = torch.tensor([[2.0, 0, 4, 2], [0, 2, 2, 4], [3, 3, 5, 5]])
    assert iou(a, b).tolist() == [0, 0, 0]


# ---- the box of a map --------------------------------------------------------------------------------------------


@given(seed=seeds, share=st.sampled_from([0.02, 0.15, 0.5, 0.9]))
def test_the_top_box_is_around_the_largest_pixels(seed: int, share: float) -> None:
    maps = maps_of(seed)
    for found, own in zip(top_box(maps, share).tolist(), maps.numpy(), strict=True):
        quantile = np.sort(own, axis=None)[int(own.size * (1 - share)) - 1]
        rows, columns = np.nonzero(own > quantile if (own > quantile).any() else own == quantile)
        assert found == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_top_box_of_a_bright_object_is_its_box() -> None:
    maps = 0.01 * torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2.0, 3, 12, 9], [0, 0, 6, 10], [0, 17, 20, 20]])
    for own, (x0, y0, x1, y1) in zip(maps, boxes.int().tolist(), strict=True):
        own[y0:y1, x0:x1] += 1  # 60 of 400 pixels: 15 %
    assert torch.equal(top_box(maps), boxes)


def test_the_top_box_of_a_constant_map_is_the_image() -> None:
    assert top_box(torch.full((2, H, W), 0.3)).tolist() == [[0, 0, W, H]] * 2


# ---- pointing games ----------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_energy_is_summed_in_the_box(seed: int) -> None:
    maps, boxes = maps_of(seed), boxes_of(seed)
    expected = [own[inside(box)].sum() / own.sum() for own, box in zip(maps.numpy(), boxes, strict=True)]
    np.testing.assert_allclose(energy_pointing(maps, boxes), expected, rtol=1e-5, atol=1e-7)


@given(seed=seeds, power=st.integers(-40, 30))
def test_a_uniform_map_has_the_boxs_share_of_energy_at_any_scale(seed: int, power: int) -> None:
    boxes = boxes_of(seed, whole=False)
    share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (H * W)
    found = energy_pointing(torch.full((len(boxes), H, W), 10.0**power), boxes)
    np.testing.assert_allclose(found, share, rtol=1e-4, atol=1e-6)


@given(seed=seeds)
def test_energy_is_a_share_and_that_of_a_box_and_its_surroundings_is_all(seed: int) -> None:
    maps, boxes = maps_of(seed), boxes_of(seed, whole=False)
    boxes[:, 1], boxes[:, 3] = 0, H  # columns: what is left and right of them are boxes too
    left, right = boxes.clone(), boxes.clone()
    left[:, 0], left[:, 2], right[:, 0], right[:, 2] = 0, boxes[:, 0], boxes[:, 2], W
    parts = torch.stack([energy_pointing(maps, part) for part in (left, boxes, right)])
    assert ((parts >= 0) & (parts <= 1)).all()
    np.testing.assert_allclose(parts.sum(0), 1, rtol=1e-5)


def test_a_map_of_zeros_points_nowhere() -> None:
    assert energy_pointing(torch.zeros(1, H, W), torch.tensor([[0.0, 0, W, H]])).tolist() == [0]


@given(seed=seeds, tolerance=st.sampled_from([0, 1, 2.5, 4]))
def test_pointing_is_the_distance_of_the_largest_pixels(seed: int, tolerance: float) -> None:
    maps, boxes = maps_of(seed), boxes_of(seed)
    expected = []
    for own, (x0, y0, x1, y1) in zip(maps.numpy(), boxes.tolist(), strict=True):
        rows, columns = np.nonzero(own >= (1 - 1e-5) * own.max())  # the largest, but for rounding
        far = [
            math.hypot(max(x0 - c - 0.5, c + 0.5 - x1, 0), max(y0 - r - 0.5, r + 0.5 - y1, 0))
            for r, c in zip(rows, columns, strict=True)
        ]
        expected.append(np.mean([distance <= tolerance for distance in far]))
    np.testing.assert_allclose(pointing(maps, boxes, tolerance), expected, rtol=1e-6)


def test_what_a_constant_map_hits_is_the_boxs_share() -> None:
    box = torch.tensor([[0.0, 0, 4, 3]])
    assert pointing(torch.ones(1, H, W), box, 0).item() == pytest.approx(12 / (H * W))


def test_the_tolerance_is_15_pixels_at_224() -> None:
    maps = torch.zeros(2, 224, 224)
    maps[0, 100, 40], maps[1, 100, 41] = 1, 1  # 15.5 and 14.5 left of the box
    found = scores(maps, torch.tensor([[56.0, 90, 80, 120]]).expand(2, 4))
    assert found.pointing.tolist() == [0, 1]


def test_a_perfect_map_has_all_scores_and_an_opposite_one_none() -> None:
    box = torch.tensor([[3.0, 4, 8, 10]])
    perfect = torch.from_numpy(inside(box[0])).float()[None]
    assert [score.item() for score in scores(perfect, box)] == [1, 1, 1]
    elsewhere = torch.from_numpy(inside(torch.tensor([12, 0, 16, 3]))).float()[None]
    assert [score.item() for score in scores(elsewhere, box)] == [0, 0, 0]


def test_no_images_have_no_scores() -> None:
    assert all(score.shape == (0,) for score in scores(torch.empty(0, H, W), torch.empty(0, 4)))


def test_the_centre() -> None:
    found = centre(torch.empty(3, 40, 40))
    assert found.shape == (3, 40, 40)
    assert torch.allclose(found, found.flip(1))
    assert torch.equal(found, found.transpose(1, 2))
    middle = torch.tensor([[10.0, 10, 30, 30]]).expand(3, 4)
    corner = torch.tensor([[0.0, 0, 20, 20]]).expand(3, 4)
    # within a standard deviation on both axes: 0.683 squared, over what of the Gaussian is in the image
    assert energy_pointing(found, middle)[0].item() == pytest.approx((0.683 / 0.954) ** 2, abs=0.01)
    assert iou(top_box(found), middle)[0] > 0.7 > 0.3 > iou(top_box(found), corner)[0]
    assert pointing(found, middle, 0).tolist() == [1, 1, 1]


def test_the_protocol() -> None:
    def box(width: float) -> list[list[float]]:
        return [[0, 0, width, 10]]

    cases = [box(5), box(5.1), box(10), box(5) * 2, []]
    found = judged([torch.tensor(case).reshape(-1, 4) for case in cases], (10, 10))
    assert found.tolist() == [True, False, False, False, False]


# ---- deletion and insertion --------------------------------------------------------------------------------------

SIDE = 8
GREY = torch.tensor([0.5, 0.4, 0.3])[:, None, None]


def bright(pixels: Tensor) -> Tensor:
    """Logits of a model that asks how bright a square of four pixels is: of class 1 more, of class 0 less."""
    evidence = pixels[:, :, 2:4, 4:6].mean((1, 2, 3))
    return torch.stack((-20 * evidence, 20 * evidence), 1)


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) / 2 + 0.5


@settings(deadline=None, max_examples=20)
@given(seed=seeds, steps=st.sampled_from([1, 4, 7, 16]))
def test_curves_change_one_pixel_after_another(seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.rand(2, 3, 3, SIDE, SIDE, generator=generator)
    maps = torch.randperm(3 * SIDE * SIDE, generator=generator).view(3, SIDE, SIDE).float()
    labels = torch.tensor([0, 1, 1])
    found = probabilities(bright, start, end, labels, maps, steps)
    for i in range(3):
        order = np.argsort(-maps[i].numpy().ravel())
        for step in range(steps + 1):
            pixels = start[i].numpy().reshape(3, -1).copy()
            first = order[: round(step * SIDE * SIDE / steps)]
            pixels[:, first] = end[i].numpy().reshape(3, -1)[:, first]
            evidence = 20 * pixels.reshape(3, SIDE, SIDE)[:, 2:4, 4:6].mean() * (2 * labels[i].item() - 1)
            assert found[i, step].item() == pytest.approx(1 / (1 + math.exp(-2 * evidence)), rel=1e-4)


def test_areas_are_those_of_the_curves() -> None:
    pixels, labels, maps = images(), torch.tensor([1, 1, 0, 1]), maps_of(0, 4)[:, :SIDE, :SIDE]
    end = GREY.expand_as(pixels)
    for found, curve in (
        (deletion(bright, pixels, labels, maps, GREY), probabilities(bright, pixels, end, labels, maps, 16)),
        (insertion(bright, pixels, labels, maps), probabilities(bright, blurred(pixels), pixels, labels, maps, 16)),
    ):
        values = curve.double().numpy()
        np.testing.assert_allclose(found, ((values[:, 1:] + values[:, :-1]) / 2).mean(1), rtol=1e-5)


def test_the_map_of_what_a_model_looks_at_beats_others() -> None:
    pixels = images()
    pixels[:, :, 2:4, 4:6] = 1  # what the model looks at, in the dark once blurred
    pixels[:, :, :2] = pixels[:, :, 4:] = pixels[:, :, :, :4] = pixels[:, :, :, 6:] = 0
    labels, right = torch.ones(4, dtype=torch.int64), torch.zeros(4, SIDE, SIDE)
    right[:, 2:4, 4:6] = 1

    def margin(pixels: Tensor) -> Tensor:
        return bright(pixels) - torch.tensor([0, 16.0])

    grey = torch.zeros(3, 1, 1)
    gone = [
        deletion(margin, pixels, labels, maps, grey).mean() for maps in (right, maps_of(3, 4)[:, :8, :8], -right)
    ]
    come = [insertion(margin, pixels, labels, maps).mean() for maps in (right, maps_of(3, 4)[:, :8, :8], -right)]
    assert gone == sorted(gone)
    assert gone[0] < 0.1 < 0.9 < gone[2]
    assert come == sorted(come, reverse=True)
    assert come[0] > 0.9 > 0.1 > come[2]


def test_equal_pixels_follow_in_no_order_of_rows() -> None:
    """Half of a constant map's pixels are as much of the upper as of the lower half, nearly."""

    def upper(pixels: Tensor) -> Tensor:
        gone = (pixels[:, 0] == 0).float()
        return torch.stack((gone[:, : SIDE * 2].mean((1, 2)), gone[:, SIDE * 2 :].mean((1, 2))), 1).log()

    ones = torch.ones(1, 3, 4 * SIDE, 4 * SIDE)
    curve = probabilities(upper, ones, ones * 0, torch.tensor([0]), ones[:, 0], 2)
    assert curve[0, 1].item() == pytest.approx(0.5, abs=0.05)


def test_blur_takes_details_at_every_size() -> None:
    for side in (8, 32, 224, 448):
        checks = ((torch.arange(side)[:, None] // 2 + torch.arange(side) // 2) % 2).float().expand(1, 3, side, side)
        assert blurred(checks).std() < 0.1 * checks.std()
        assert blurred(checks).shape == checks.shape
    assert torch.allclose(blurred(torch.full((1, 3, 32, 32), 0.3)), torch.tensor(0.3))


def test_rounding_does_not_decide_which_pixel_of_a_plateau_is_pointed_at() -> None:
    maps = torch.ones(1, 8, 8)
    box = torch.tensor([[0.0, 0.0, 4.0, 8.0]])
    level = pointing(maps, box, 0.0)
    maps[0, 0, 7] += 1e-6  # outside of the box
    assert level.item() == 0.5
    assert pointing(maps, box, 0.0).item() == 0.5
