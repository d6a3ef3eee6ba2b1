"""Gradient quality: the held-out alignment gain, and diagnostics that are never evidence (METHOD.md).

The formulas are ours: the paper's own definition of gradient quality is not public. All take gradients of any
shape and compute in float64.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return cos(a, b) = <a, b> / (|a| |b|), 0-d: 0 if either is zero (it points nowhere), NaN if not finite."""
    return _cosines((a,), b)[0]


def alignment_gains(raw: Tensor, masked: Sequence[Tensor], following: Tensor) -> Tensor:
    """Return [cos(raw, following), dQ of masked[0], dQ of masked[1], ...], shape [1 + len(masked)].

    dQ = cos(m, following) - cos(raw, following) is the held-out alignment gain of a masked gradient m. m and `raw`
    are means over ranks of one step, `following` is the raw mean of the next, whose batch is independent. An entry
    that the mask zeroes lowers dQ unless it was noise. Source: METHOD.md, "Gradient quality".
    """
    cosines = _cosines((raw, *masked), following)
    return torch.cat((cosines[:1], cosines[1:] - cosines[0]))


def combine(values: Mapping[str, float | None], entries: Mapping[str, int]) -> float | None:
    """Return the mean of per-parameter values, weighted by the parameters' entries; None if none is finite.

    The weights are fixed: a mask that moves the gradient from one layer to another cannot weight its own sum.
    """
    finite = {name: value for name, value in values.items() if value is not None and isfinite(value)}
    total = sum(entries[name] for name in finite)
    return sum(value * entries[name] for name, value in finite.items()) / total if total else None


# -- diagnostics, never evidence: zeroing all but the last layer improves every one of them ------------------------
class Spread(NamedTuple):
    """Diagnostic: how far the gradients of n samples agree. A sample is one rank's gradient of one step."""

    snr: float
    """|mean| / sqrt(trace of the covariance): the plug-in estimate, which grows with the number of samples."""
    noise_scale: float
    """Trace of the covariance / |true gradient|^2, in samples (McCandlish et al., arXiv 1812.06162, appendix A)."""
    agreement: float
    """Mean inner product of two samples' gradients / mean squared norm: their mean cosine if norms are equal."""


def spread(norm_of_mean: float, mean_of_norms: float, samples: int) -> Spread:
    """Return the diagnostics from |mean g|^2 and the mean of |g|^2 over n >= 2 samples.

    Appendix A.1 of McCandlish et al., at B_small = 1 and B_big = n samples, has the unbiased estimates
    |G|^2 = (n |mean g|^2 - mean |g|^2) / (n - 1) and S = (mean |g|^2 - |mean g|^2) n / (n - 1); the simple noise
    scale is S / |G|^2, negative or infinite where the signal is not above the noise.
    """
    signal = (samples * norm_of_mean - mean_of_norms) / (samples - 1)
    trace = (mean_of_norms - norm_of_mean) * samples / (samples - 1)
    return Spread(
        snr=_ratio(norm_of_mean**0.5, max(trace, 0.0) ** 0.5),
        noise_scale=_ratio(trace, signal),
        agreement=_ratio(signal, mean_of_norms),
    )


def gsnr(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the median over entries of mean^2 / variance, 0-d; NaN where every entry of every sample is zero.

    Diagnostic: gradient signal-to-noise ratio, Liu et al., arXiv 2001.07384, eq. 1, with ranks for samples. They
    average over entries; with as few samples as there are ranks that mean diverges. Of a large parameter the
    median is over 65536 entries, evenly spaced.
    """
    mean, variance = (x.reshape(-1)[:: -(-x.numel() // 2**16)].double() for x in (mean, variance))
    return (mean.square() / variance).nanmedian()


def _cosines(vectors: Sequence[Tensor], other: Tensor) -> Tensor:
    other = other.reshape(-1).double()
    length = torch.linalg.vector_norm(other)
    cosines = []
    for vector in vectors:
        vector = vector.reshape(-1).double()
        norms = torch.linalg.vector_norm(vector) * length
        cosines.append(torch.where(norms == 0, 0.0, torch.dot(vector, other) / norms))
    return torch.stack(cosines)


def _ratio(a: float, b: float) -> float:
    if b == 0:
        return float("nan") if a == 0 else float("inf")
    return a / b
