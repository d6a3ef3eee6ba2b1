"""Gradient quality: the formulas against NumPy, and the two cases that tell a good measure from a bad one."""

import numpy as np
import pytest
import torch

from gmscale import GradientMask
from gmscale.masking import quality


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel(), b.ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def gain_of(masked: torch.Tensor, raw: torch.Tensor, following: torch.Tensor) -> float:
    return float(quality.alignment_gains(raw, [masked], following)[1])


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# -- formulas -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_alignment_gain_is_the_difference_of_cosines(dtype):
    tensors = [torch.from_numpy(draw(seed, 4, 3, 3, 3)).to(dtype) for seed in range(3)]
    masked, raw, following = (t.double().numpy() for t in tensors)
    expected = cosine(masked, following) - cosine(raw, following)
    alignment, gain, none = quality.alignment_gains(tensors[1], [tensors[0], tensors[1]], tensors[2]).tolist()
    assert alignment == pytest.approx(cosine(raw, following), abs=1e-12)
    assert gain == pytest.approx(expected, abs=1e-12)
    assert none == 0


def test_alignment_gain_has_no_scale():
    masked, raw, following = (torch.from_numpy(draw(seed, 50)) for seed in range(3))
    plain = gain_of(masked, raw, following)
    assert gain_of(masked * 65536, raw * 65536, following / 3) == pytest.approx(plain)
    huge = gain_of(*(t.float() * 1e25 for t in (masked, raw, following)))  # squares overflow float32
    assert huge == pytest.approx(plain, abs=1e-6)


def test_a_vector_that_is_zero_points_nowhere_and_a_non_finite_one_has_no_cosine():
    g = torch.ones(3)
    assert quality.cosine(torch.zeros(3), g) == 0
    assert gain_of(torch.zeros(3), g, g) == pytest.approx(-1)
    for bad in (float("nan"), float("inf")):
        assert quality.cosine(torch.tensor([1.0, bad, 0.0]), g).isnan()


def test_combine_weights_by_entries_and_leaves_out_what_is_not_finite():
    entries = {"a": 30, "b": 10, "c": 1000, "d": 5}
    assert quality.combine({"a": 0.2, "b": -0.2, "c": float("nan"), "d": None}, entries) == pytest.approx(0.1)
    assert quality.combine({"c": float("nan")}, entries) is None


def test_diagnostics_match_numpy():
    samples = 3.0 + draw(0, 5, 200)  # five ranks' gradients
    mean, covariance = samples.mean(0), np.cov(samples.T)
    spread = quality.spread(float(mean @ mean), float((samples**2).sum(1).mean()), 5)
    trace = np.trace(covariance)
    assert spread.snr == pytest.approx(np.sqrt(mean @ mean / trace))
    assert spread.noise_scale == pytest.approx(trace / (mean @ mean - trace / 5))
    inner = samples @ samples.T
    pairs = inner[~np.eye(5, dtype=bool)].mean()
    assert spread.agreement == pytest.approx(pairs / np.diag(inner).mean())
    ours = quality.gsnr(torch.from_numpy(mean), torch.from_numpy(samples.var(0, ddof=1)))
    assert float(ours) == pytest.approx(np.sort(mean**2 / samples.var(0, ddof=1))[99])  # the lower median


def test_diagnostics_of_gradients_that_are_equal_or_zero():
    equal = quality.spread(4.0, 4.0, 2)
    assert (equal.snr, equal.noise_scale, equal.agreement) == (float("inf"), 0.0, 1.0)
    assert all(np.isnan(quality.spread(0.0, 0.0, 2)))


def test_gsnr_of_a_large_parameter_is_near_the_median_of_all_entries():
    samples = 1.0 + draw(0, 4, 300_000)
    mean, variance = samples.mean(0), samples.var(0, ddof=1)
    ours = float(quality.gsnr(torch.from_numpy(mean).view(300, 1000), torch.from_numpy(variance).view(300, 1000)))
    assert ours == pytest.approx(np.median(mean**2 / variance), rel=0.05)


# -- what dQ must tell apart --------------------------------------------------------------------------------------
def two_steps(signal: np.ndarray, noise: float, ranks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each rank's gradient on two independent batches: [ranks, *signal.shape] twice."""
    first, second = (signal + noise * draw(2 * seed + i, ranks, *signal.shape) for i in range(2))
    return first, second


def test_a_mask_that_removes_noise_gains_and_a_random_one_of_equal_density_does_not():
    signal = np.zeros((16, 16, 3, 3))
    signal[:, ::8] = 2.0  # every eighth kernel carries signal, the others only noise
    mask = GradientMask(strength=1.0, error_feedback=False)
    control = GradientMask(operator="random", strength=1.0, error_feedback=False)
    for seed in range(3):
        first, second = (torch.from_numpy(x) for x in two_steps(signal, 1.0, 2, seed))
        generator = torch.Generator().manual_seed(seed)
        masked = torch.stack([mask.apply(g) for g in first]).mean(0)
        random = torch.stack([control.apply(g, generator=generator) for g in first]).mean(0)
        gain, gain_of_control = (gain_of(m, first.mean(0), second.mean(0)) for m in (masked, random))
        assert gain > 0.02
        assert gain_of_control < 0 < gain


def test_zeroing_all_but_one_layer_improves_the_diagnostics_but_not_the_gain():
    layers = {"body": np.full((100, 100), 0.1), "head": np.full((10, 10), 0.6)}
    steps = {name: two_steps(signal, 1.0, 4, i) for i, (name, signal) in enumerate(layers.items())}
    entries = {name: signal.size for name, signal in layers.items()}

    def of(keep: set[str]) -> tuple[float, quality.Spread]:
        gains, of_mean, of_norms = {}, 0.0, 0.0
        for name, (first, second) in steps.items():
            masked = first if name in keep else np.zeros_like(first)
            tensors = (torch.from_numpy(x.mean(0)) for x in (masked, first, second))
            gains[name] = gain_of(*tensors)
            of_mean += float((masked.mean(0) ** 2).sum())
            of_norms += float((masked**2).sum() / len(masked))
        return quality.combine(gains, entries), quality.spread(of_mean, of_norms, 4)

    gain, untouched = of({"body", "head"})
    gain_of_head, only_head = of({"head"})
    assert gain == 0
    assert gain_of_head < -0.01
    assert only_head.snr > untouched.snr
    assert only_head.noise_scale < untouched.noise_scale
    assert only_head.agreement > untouched.agreement
