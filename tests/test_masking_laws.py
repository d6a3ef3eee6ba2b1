"""Laws 1 to 4, 6, 7 and 10 of the method, for random gradients, operators, dtypes and strengths."""

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmscale.errors import UsageError
from gmscale.masking import GradientMask, inhibition, lateral

law = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,  # a suite that fails today and not tomorrow teaches nothing
    suppress_health_check=[HealthCheck.too_slow],
)

OPERATORS: list[dict[str, Any]] = [
    {},
    {"kappa": 0.4},
    {"gate": "soft"},
    {"operator": "log"},
    {"operator": "log", "sigma": 0.5},
    {"operator": "dog", "sigma": 0.7},
    {"operator": "licnn"},
    {"operator": "licnn", "kernel_size": 3},
    {"operator": "random"},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by bytes an element
EXPONENTS = {torch.float64: 100, torch.float32: 30, torch.bfloat16: 30, torch.float16: 4}  # decimal

operators = st.sampled_from(OPERATORS)
dtypes = st.sampled_from(DTYPES)
strengths = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, width=32))
# The map is float32, so the method is scale-free while the squares of a gradient are: from about 1e-17 to 1e17.
powers = st.integers(-45, 45)
seeds = st.integers(0, 2**32 - 1)
shapes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 70)),
    st.tuples(st.integers(1, 9), st.integers(1, 40), st.just(1), st.just(1)),
    st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 16), st.just(1), st.just(3), st.just(3)),
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5)),
    st.tuples(st.integers(1, 50)),
)


@st.composite
def ordinary(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = dtypes) -> Tensor:
    """A gradient whose units differ in size by a few powers of e."""
    shape = draw(shapes)
    rng = np.random.default_rng(draw(seeds))
    values = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[:2] + (1,) * (len(shape) - 2)))
    return torch.from_numpy(values).to(draw(dtypes))


@st.composite
def extreme(draw: st.DrawFn) -> Tensor:
    """A finite gradient with zeros (of both signs) and huge and tiny entries side by side."""
    dtype = draw(dtypes)
    g = draw(ordinary(st.just(torch.float64)))
    rng = np.random.default_rng(draw(seeds))
    top = EXPONENTS[dtype]
    low, high = sorted(draw(st.tuples(st.integers(-top, top), st.integers(-top, top))))
    g *= torch.from_numpy(10.0 ** rng.uniform(low, high, g.shape))
    g[torch.from_numpy(rng.random(g.shape) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])))] *= 0.0
    limit = torch.finfo(dtype).max
    return g.clamp(-limit, limit).to(dtype)


@st.composite
def poisoned(draw: st.DrawFn) -> Tensor:
    """A gradient with at least one NaN or infinity."""
    g = draw(extreme())
    places = draw(st.lists(st.integers(0, g.numel() - 1), min_size=1, max_size=4))
    g.view(-1)[places] = torch.tensor(draw(st.sampled_from([math.nan, math.inf, -math.inf])), dtype=g.dtype)
    return g


def make(**settings: Any) -> GradientMask:
    return GradientMask(**{"error_feedback": False, "mask_1d": True, **settings})


def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than equality: NaN equals itself, zero does not equal minus zero."""
    bits = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def same_after_adding_and_taking_out(g: Tensor, before: Tensor, held: Tensor) -> bool:
    """Whether g is `before` up to the rounding of + held - held (such a step is skipped anyway).

    An entry whose sum overflowed stays visible as inf.
    """
    largest = max(float(t.double().abs().nan_to_num(posinf=0).max()) for t in (before, held))
    overflowed = ~torch.isfinite(before + held)
    if torch.isfinite(g[overflowed]).any():
        return False
    g, before = g.masked_fill(overflowed, 0), before.masked_fill(overflowed, 0)
    return torch.allclose(g, before, rtol=0, atol=2 * torch.finfo(g.dtype).eps * largest)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Equality where NaN equals NaN, whatever its payload: a multiplication by one may change that."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0, math.inf, -math.inf), b.nan_to_num(0, math.inf, -math.inf)
    )


def adds_up(a: Tensor, b: Tensor, total: Tensor) -> bool:
    """Whether a + b is `total` in exact arithmetic: Knuth's two-sum in float64 leaves no error."""
    x, y, t = a.double(), b.double(), total.double()
    s = x + y
    back = s - x
    error = (x - (s - back)) + (y - back)
    return torch.equal(s, t) and not error.any()


# -- 1. identity ----------------------------------------------------------------------------------
@law
@given(st.one_of(extreme(), poisoned()), operators, st.booleans())
def test_law_1_strength_zero_changes_no_bit(g: Tensor, operator: dict[str, Any], rescale: bool) -> None:
    mask = make(rescale=rescale, **operator)
    before = g.clone()
    assert same_bits(mask.apply(g, strength=0.0), before)
    mask.apply_(g, strength=0.0)
    assert same_bits(g, before)


@law
@given(extreme(), operators)
def test_law_1_strength_zero_with_an_empty_residual_sends_the_gradient(g: Tensor, operator: dict[str, Any]) -> None:
    before, residual = g.clone(), torch.zeros_like(g)
    make(**operator).apply_(g, strength=0.0, residual=residual)
    assert torch.equal(g, before)
    assert not residual.any()


# -- 2. scale -------------------------------------------------------------------------------------
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
@settings(law, max_examples=12)
@given(ordinary(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])), strengths, powers, st.booleans())
def test_law_2_a_power_of_two_scales_every_bit(
    operator: dict[str, Any], g: Tensor, strength: float, power: int, rescale: bool
) -> None:
    mask = make(rescale=rescale, **operator)
    expected = mask.apply(g, strength=strength, generator=fixed()) * 2.0**power
    assert same_bits(mask.apply(g * 2.0**power, strength=strength, generator=fixed()), expected)


@law
@given(shapes, seeds, operators, strengths, st.integers(-6, 6))
def test_law_2_in_half_precision(
    shape: tuple[int, ...], seed: int, operator: dict[str, Any], strength: float, power: int
) -> None:
    # Whole numbers with 6 bits: far from overflow and from the subnormal numbers, scaled or not.
    g = torch.from_numpy(np.random.default_rng(seed).integers(-63, 64, shape)).half()
    mask = make(**operator)
    expected = mask.apply(g, strength=strength, generator=fixed()) * 2.0**power
    scaled = mask.apply(g * 2.0**power, strength=strength, generator=fixed())
    torch.testing.assert_close(scaled, expected, rtol=0, atol=2.0**-23)


@law
@given(ordinary(st.just(torch.float32)), operators, strengths, powers, seeds)
def test_law_2_with_error_feedback(
    g: Tensor, operator: dict[str, Any], strength: float, power: int, seed: int
) -> None:
    mask = make(**operator)
    residual = torch.randn(g.shape, generator=torch.Generator().manual_seed(seed))
    scaled, scaled_residual = g * 2.0**power, residual * 2.0**power
    mask.apply_(g, strength=strength, residual=residual, generator=fixed())
    mask.apply_(scaled, strength=strength, residual=scaled_residual, generator=fixed())
    assert same_bits(scaled, g * 2.0**power)
    assert same_bits(scaled_residual, residual * 2.0**power)


@law
@given(ordinary(st.just(torch.float64)), operators, strengths, st.floats(1e-6, 1e6))
def test_law_2_any_positive_factor(g: Tensor, operator: dict[str, Any], strength: float, c: float) -> None:
    mask = make(**operator)
    s = oracle.lateral_map(g.numpy())
    like = {"operator": "pool"} if operator.get("operator") == "random" else operator
    if oracle.near_threshold(s, 1e-12, **like).any():
        return
    expected = mask.apply(g, strength=strength, generator=fixed()) * c
    torch.testing.assert_close(mask.apply(g * c, strength=strength, generator=fixed()), expected, rtol=1e-9, atol=0)


# -- 3. support -----------------------------------------------------------------------------------
@law
@given(extreme(), operators, strengths)
def test_law_3_every_entry_shrinks_by_a_factor_of_at_least_one_minus_strength(
    g: Tensor, operator: dict[str, Any], strength: float
) -> None:
    before, masked = g.double(), make(**operator).apply(g, strength=strength).double()
    info = torch.finfo(g.dtype)
    rounding = before.abs() * info.eps + info.smallest_normal * info.eps
    assert (masked * before.sign() >= 0).all(), "no entry changes sign"
    assert (masked.abs() <= before.abs()).all()
    assert (masked.abs() >= (1 - strength) * before.abs() - rounding).all()


@law
@given(ordinary(st.just(torch.float64)), operators, strengths)
def test_law_3_rescale_is_one_positive_factor(g: Tensor, operator: dict[str, Any], strength: float) -> None:
    plain = make(**operator).apply(g, strength=strength, generator=fixed())
    scaled = make(rescale=True, **operator).apply(g, strength=strength, generator=fixed())
    if not plain.any():
        assert not scaled.any()
        return
    factor = float(g.norm() / plain.norm())
    torch.testing.assert_close(scaled, plain * factor, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_3_rescale_leaves_a_gradient_alone_of_which_nothing_is_kept(dtype: torch.dtype) -> None:
    g = torch.rand(4, 5, 3, 3, generator=fixed()).to(dtype)
    assert not make(kappa=100.0, rescale=True).apply(g, strength=1.0).any()
    zeros = torch.zeros_like(g)
    assert same_bits(make(rescale=True).apply(zeros, strength=1.0), zeros)


# -- 4. non-finite gradients stay visible ------------------------------------------------------------
@law
@given(poisoned(), operators, strengths, st.booleans())
def test_law_4_a_non_finite_gradient_is_left_alone(
    g: Tensor, operator: dict[str, Any], strength: float, rescale: bool
) -> None:
    mask = make(rescale=rescale, **operator)
    before = g.clone()
    assert same_values(mask.apply(g, strength=strength), before)
    mask.apply_(g, strength=strength)
    assert same_values(g, before)


@law
@given(poisoned(), operators, strengths, seeds)
def test_law_4_the_residual_never_absorbs_it(
    g: Tensor, operator: dict[str, Any], strength: float, seed: int
) -> None:
    before = g.clone()
    residual = torch.randn(g.shape, generator=torch.Generator().manual_seed(seed)).to(g.dtype)
    held = residual.clone()
    make(**operator).apply_(g, strength=strength, residual=residual)
    assert same_after_adding_and_taking_out(g, before, held)
    assert same_bits(residual, held)


@law
@given(dtypes, operators, strengths)
def test_law_4_an_overflowing_sum_leaves_both_alone(
    dtype: torch.dtype, operator: dict[str, Any], strength: float
) -> None:
    g = torch.randn(4, 3, 3, 3, generator=fixed()).to(dtype)
    g[1, 2, 0, 0] = torch.finfo(dtype).max
    residual = g.clone()
    before, held = g.clone(), residual.clone()
    make(**operator).apply_(g, strength=strength, residual=residual)
    assert not torch.isfinite(g[1, 2, 0, 0])
    assert same_after_adding_and_taking_out(g, before, held)
    assert same_bits(residual, before)


@law
@given(extreme(), operators, strengths)
def test_law_4_a_finite_gradient_stays_finite(g: Tensor, operator: dict[str, Any], strength: float) -> None:
    mask, residual = make(**operator), torch.zeros_like(g)
    assert mask.apply(g, strength=strength).isfinite().all()
    mask.apply_(g, strength=strength, residual=residual)
    assert g.isfinite().all()
    assert residual.isfinite().all()


# -- 6. zero-mean kernels ---------------------------------------------------------------------------
@law
@given(st.floats(0.3, 4), st.floats(1.05, 4))
def test_law_6_kernels(sigma: float, ratio: float) -> None:
    log, dog = inhibition.log_kernel(sigma), inhibition.dog_kernel(sigma, ratio)
    for kernel, reach in ((log, sigma), (dog, ratio * sigma)):
        rows, cols = kernel.shape
        assert rows == cols == 2 * math.ceil(3 * reach) + 1
        assert abs(float(kernel.sum())) < 1e-12
        assert float(kernel[kernel > 0].sum()) == pytest.approx(1)
        assert (kernel < 0).any()
        assert kernel.max() == kernel[rows // 2, cols // 2] > 0
        for mirrored in (kernel.flip(0), kernel.flip(1), kernel.t()):
            torch.testing.assert_close(mirrored, kernel, rtol=0, atol=1e-15)


@law
@given(st.floats(0.3, 4), st.integers(0, 6))
def test_law_6_a_size_without_the_negative_lobe_is_refused(sigma: float, half: int) -> None:
    if half**2 > sigma**2:  # (half, half) lies beyond the zero crossing at radius sqrt(2) sigma
        assert abs(float(inhibition.log_kernel(sigma, 2 * half + 1).sum())) < 1e-12
    else:
        with pytest.raises(UsageError, match="kernel_size"):
            inhibition.log_kernel(sigma, 2 * half + 1)


# -- 7. no contrast, no inhibition --------------------------------------------------------------------
@law
@given(
    st.sampled_from([(6, 5, 3, 3), (4, 32), (3, 16, 1, 1), (1, 1, 3, 3), (1, 9), (7,), (1,), (5, 1, 2)]),
    st.floats(1e-3, 1e3),
    seeds,
    dtypes,
    operators,
    strengths,
)
def test_law_7_equal_units_pass_through(
    shape: tuple[int, ...], size: float, seed: int, dtype: torch.dtype, operator: dict[str, Any], strength: float
) -> None:
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], shape)
    g = torch.from_numpy(signs * size).to(dtype)
    before, residual = g.clone(), torch.zeros_like(g)
    mask = make(**operator)
    assert same_bits(mask.apply(g, strength=strength), before)
    mask.apply_(g, strength=strength, residual=residual)
    assert same_bits(g, before)
    assert not residual.any()


@law
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), seeds, operators, st.floats(-30, 30))
def test_law_7_contrast_below_the_tolerance_is_none(
    size: tuple[int, int], seed: int, operator: dict[str, Any], exponent: float
) -> None:
    ripple = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flat = (1 + 5e-7 * ripple) * 10**exponent
    assert (make(**operator).keep_map(flat) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("operator", ["log", "dog"])
def test_law_7_a_flat_neighbourhood_inhibits_nothing(operator: str, dtype: torch.dtype) -> None:
    for level in (0.1, 0.3, 1 / 3, 0.7):
        s = torch.full((24, 24), level, dtype=dtype)
        s[3, 3] = 1.0
        m = make(operator=operator).keep_map(s)
        assert (m[12:, 12:] == 1).all()
        assert (m == 0).any()


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_law_7_empty_information(operator: dict[str, Any]) -> None:
    mask = make(**operator)
    for s in (
        torch.zeros(4, 5),
        torch.tensor([[3.0]]),
        torch.tensor([[1.0, math.nan]]),
        torch.tensor([[1.0, math.inf]]),
    ):
        assert (mask.keep_map(s) == 1).all()
    zeros = torch.zeros(4, 3, 3, 3)
    assert same_bits(mask.apply(zeros, strength=1.0), zeros)
    single = torch.randn(1, 1, 3, 3)
    assert same_bits(mask.apply(single, strength=1.0), single)


# -- 10. conservation -------------------------------------------------------------------------------
@law
@given(extreme(), operators, strengths, st.integers(0, 2**32 - 1))
def test_law_10_sent_plus_held_is_everything(
    g: Tensor, operator: dict[str, Any], strength: float, seed: int
) -> None:
    mask = make(**operator)
    scale = float(g.double().abs().median())
    residual = (torch.randn(g.shape, generator=torch.Generator().manual_seed(seed)).double() * scale).to(g.dtype)
    for _ in range(3):
        before, held, total = g.clone(), residual.clone(), g + residual
        mask.apply_(g, strength=strength, residual=residual)
        if lateral.lateral_map(total, "l2", 16).isfinite().all():
            assert adds_up(g, residual, total)
        else:
            assert same_after_adding_and_taking_out(g, before, held)
            assert same_bits(residual, held)
        g = before.roll(1, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0])
def test_law_10_at_every_strength(strength: float, dtype: torch.dtype) -> None:
    for operator in OPERATORS:
        g = torch.randn(12, 40, generator=fixed()).to(dtype)
        residual = torch.randn(12, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
        total = g + residual
        make(**operator).apply_(g, strength=strength, residual=residual)
        assert adds_up(g, residual, total)
