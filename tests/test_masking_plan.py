"""MaskPlan: many gradients at once are masked as GradientMask masks each of them, and as the oracle says."""

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

import gmscale
from gmscale.masking import GradientMask
from gmscale.masking import units as units_module
from gmscale.masking.plan import MaskPlan

SHAPES = [
    (12, 9, 3, 3),
    (7, 3, 7, 7),
    (24, 1, 3, 3),
    (10, 37, 1, 1),
    (13, 50),
    (6, 48),
    (9, 5),
    (4, 5, 2, 3, 2),
    (33,),
    (),
    (0, 4),
    (2, 2, 3, 3),
    (1, 1, 5, 5),
    (16, 16),
]
OPERATORS: list[dict[str, Any]] = [
    {},
    {"gate": "soft"},
    {"operator": "log"},
    {"operator": "dog", "sigma": 0.6},
    {"operator": "licnn", "kernel_size": 3},
    {"operator": "random", "random_like": "log"},
    {"norm": "l1", "block": 5},
    {"norm": "max", "block": 1},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "strided"]


def gradients(dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> list[Tensor]:
    return [laid_out(gradient(shape, dtype, seed), layout) for shape in SHAPES]


def gradient(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    rng = np.random.default_rng([seed, *shape])
    spread = np.exp(rng.standard_normal((*shape[:2], *(1,) * (len(shape) - 2))))
    return torch.from_numpy(np.asarray(rng.standard_normal(shape) * spread)).to(dtype)


def laid_out(g: Tensor, layout: str) -> Tensor:
    """The same gradient in another memory layout; `strided`: not even one view of a unit's entries."""
    if layout == "channels_last" and g.ndim == 4:
        return g.to(memory_format=torch.channels_last)
    if layout == "strided" and g.ndim >= 2:
        return torch.zeros(*g.shape[:-1], g.shape[-1] + 1, dtype=g.dtype)[..., :-1].copy_(g)
    return g


def generators(mask: GradientMask) -> list[torch.Generator | None]:
    return [torch.Generator().manual_seed(i) if mask.operator == "random" else None for i in range(len(SHAPES))]


def mask_of(**settings: Any) -> GradientMask:
    return GradientMask(**{"error_feedback": False, "mask_1d": True, **settings})


@pytest.mark.parametrize("settings", OPERATORS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_and_its_stages_equal_the_single_gradient(settings: dict[str, Any], layout: str) -> None:
    for dtype in DTYPES:
        for mask_1d in (True, False):
            mask = mask_of(**settings, mask_1d=mask_1d)
            alone, together, staged = (gradients(dtype, layout) for _ in range(3))
            for g, generator in zip(alone, generators(mask), strict=True):
                mask.apply_(g, strength=0.7, generator=generator)
            plan = MaskPlan(mask, together)
            plan.mask_(together, strength=0.7, generators=generators(mask))
            flat_s = plan.lateral_maps(staged)
            plan.apply_(staged, plan.keep_maps(flat_s, generators(mask)), strength=0.7)
            for a, b, c in zip(alone, together, staged, strict=True):
                assert torch.equal(a, b)
                assert torch.equal(a, c)
                assert a.stride() == b.stride() == c.stride()


@pytest.mark.parametrize("settings", [o for o in OPERATORS if o.get("operator") != "random"], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_against_the_oracle(settings: dict[str, Any], layout: str) -> None:
    mask = mask_of(**settings)
    masked = gradients(torch.float64, layout)
    plan = MaskPlan(mask, masked)
    plan.mask_(masked, strength=0.7)
    for g, before in zip(masked, gradients(torch.float64), strict=True):
        if g.numel():
            expected = oracle.apply(before.numpy(), 0.7, mask_1d=True, **settings)
            np.testing.assert_allclose(g.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("chunk", [64, 2**17])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_do_not_change_the_result(chunk: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units_module, "_CHUNK", chunk)
    mask = mask_of()
    masked, held = gradients(torch.float64, layout), gradients(torch.float64, layout, seed=1)
    expected = [
        oracle.error_feedback(g.numpy(), r.numpy(), 0.7, mask_1d=True) if g.numel() else None
        for g, r in zip(gradients(torch.float64), held, strict=True)
    ]
    held = [r.clone() for r in held]
    MaskPlan(mask, masked).mask_(masked, strength=0.7, residuals=held)
    for g, r, pair in zip(masked, held, expected, strict=True):
        if pair is not None and g.ndim:
            np.testing.assert_allclose(g.numpy(), pair[0], rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(r.numpy(), pair[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("settings", OPERATORS, ids=str)
def test_error_feedback_loses_nothing(settings: dict[str, Any], strength: float) -> None:
    for dtype in DTYPES:
        mask = mask_of(**settings)
        total, held = gradients(dtype, "channels_last"), gradients(dtype, "channels_last", seed=1)
        staged, staged_held = [g.clone() for g in total], [r.clone() for r in held]
        sums = [g + r for g, r in zip(total, held, strict=True)]
        plan = MaskPlan(mask, total)
        plan.mask_(total, strength=strength, residuals=held, generators=generators(mask))
        for g, r, expected in zip(total, held, sums, strict=True):
            if g.numel() and g.ndim:  # a scalar passes through, its residual too
                assert torch.equal(g.double() + r.double(), expected.double())
        if strength:
            flat_s = plan.lateral_maps(staged, staged_held)
            flat_m = plan.keep_maps(flat_s, generators(mask))
            of_masked = [r if s.numel() else None for r, s in zip(staged_held, plan.views(flat_s), strict=True)]
            plan.apply_(staged, flat_m, strength=strength, flat_s=flat_s, residuals=of_masked)
            assert all(torch.equal(a, b) for a, b in zip(total, staged, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(held, staged_held, strict=True))


def test_strength_zero_changes_no_bit() -> None:
    mask, masked = mask_of(), gradients()
    masked[0][0, 0, 0, 0] = -0.0
    before = [g.clone() for g in masked]
    MaskPlan(mask, masked).mask_(masked, strength=0.0)
    for g, expected in zip(masked, before, strict=True):
        assert torch.equal(g.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_travels_as_it_came_and_the_others_are_masked(value: float) -> None:
    mask = mask_of(error_feedback=True)
    masked, clean = gradients(), gradients()
    held = [torch.ones_like(g) for g in masked]
    clean_held = [torch.ones_like(g) for g in masked]
    masked[4][2, 3] = value
    plan = MaskPlan(mask, masked)
    plan.mask_(masked, strength=0.5, residuals=held)
    plan.mask_(clean, strength=0.5, residuals=clean_held)
    for i, (g, r) in enumerate(zip(masked, held, strict=True)):
        if i != 4:
            assert torch.equal(g, clean[i])
            assert torch.equal(r, clean_held[i])
    assert torch.equal(held[4], torch.ones_like(held[4]))
    expected = gradients()[4]
    expected[2, 3] = value
    torch.testing.assert_close(masked[4], expected, equal_nan=True, rtol=0, atol=1e-5)


def test_no_contrast_no_inhibition() -> None:
    flat = [torch.ones(shape) for shape in SHAPES]
    # Blocks of one, because a last block that is shorter has a smaller norm.
    MaskPlan(mask_of(block=1), flat).mask_(flat, strength=1.0)
    assert all(torch.equal(g, torch.ones(shape)) for g, shape in zip(flat, SHAPES, strict=True))


def test_rescale_gives_each_gradient_its_norm_back() -> None:
    mask, masked = mask_of(rescale=True), gradients()
    MaskPlan(mask, masked).mask_(masked, strength=0.7)
    for g, before in zip(masked, gradients(), strict=True):
        torch.testing.assert_close(torch.linalg.vector_norm(g), torch.linalg.vector_norm(before))


def test_what_was_kept_is_that_of_the_single_gradient() -> None:
    mask, masked, alone = mask_of(mask_1d=False), gradients(), gradients()
    kept = MaskPlan(mask, masked).mask_(masked, strength=0.5, observe=True)
    for shares, g in zip(kept, alone, strict=True):
        expected = mask.apply_(g, strength=0.5, observe=True)
        assert (shares is None) == (expected is None) == mask.passes(g.shape)
        if shares is not None and expected is not None:
            assert shares.entries == expected.entries
            assert shares.energy == expected.energy


def test_views_are_the_maps_in_order_and_empty_where_a_gradient_passes() -> None:
    mask, g = mask_of(mask_1d=False), gradients()
    plan = MaskPlan(mask, g)
    flat = plan.lateral_maps(g)
    views = plan.views(flat)
    assert [tuple(v.shape) for v in views] == list(plan.map_shapes)
    assert views[SHAPES.index((33,))].numel() == views[SHAPES.index(())].numel() == 0
    assert torch.equal(torch.cat([v.flatten() for v in views]), flat)
    assert plan.lateral_maps(g).data_ptr() == flat.data_ptr(), "buffers are reused"
    np.testing.assert_allclose(views[4].numpy(), oracle.lateral_map(g[4].numpy()), rtol=1e-6)


def test_a_site_plans_once_and_again_when_gradients_come_together_anew() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 5))
    attachment = gmscale.attach(model, GradientMask(block=2), site="single")
    a, b = torch.randn(6, 4), torch.randn(5, 6)
    attachment._mask_all([("0.weight", a), ("1.weight", b)])
    first = dict(attachment._plans)
    attachment._mask_all([("0.weight", a.clone()), ("1.weight", b.clone())])
    assert dict(attachment._plans) == first
    attachment._mask_all([("1.weight", b)])
    assert len(attachment._plans) == 1, "a rebuilt bucket's plan replaces the old one"
    assert not first.keys() & attachment._plans.keys()


def test_what_is_held_back_follows_the_memory_layout_of_the_gradient() -> None:
    model = torch.nn.Conv2d(6, 8, 3)
    attachment = gmscale.attach(model, GradientMask(), site="single")
    g = gradient((8, 6, 3, 3), torch.float64, 0)
    held = gradient((8, 6, 3, 3), torch.float64, 1)
    sent, kept = oracle.error_feedback(g.numpy(), held.numpy(), 0.5)
    attachment.load_state_dict({"grad_scale": 1.0, "residuals": {"weight": held}})
    g = laid_out(g, "channels_last")
    attachment._mask_all([("weight", g)])
    residual = attachment.state_dict()["residuals"]["weight"]
    assert residual.stride() == g.stride()
    np.testing.assert_allclose(g.numpy(), sent, rtol=1e-12)
    np.testing.assert_allclose(residual.numpy(), kept, rtol=1e-12)
