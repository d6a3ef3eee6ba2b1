"""Lateral inhibition: lateral map -> keep map in [0, 1]. Pure functions; sources in README.md.

Every operator returns a *response* r whose sign decides: a unit is kept unless its response lies below
-TOLERANCE times the largest entry of the map, so a flat neighbourhood, whose response is zero up to
rounding, inhibits nothing. A map is the last two dimensions; those before them are maps of their own.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gmscale.errors import UsageError

TOLERANCE = 1e-6


def has_contrast(s: Tensor) -> bool | Tensor:
    """Return whether a map is neither constant, one entry, all zero nor non-finite (laws 4 and 7).

    A bool for one map on CPU; else a tensor [..., 1, 1], on a GPU because reading it would make the host wait.
    """
    if s.device.type == "cpu" and s.ndim == 2:
        low, high = torch.aminmax(s)
        lowest, highest = low.item(), high.item()
        return math.isfinite(highest) and highest - lowest > TOLERANCE * highest
    lows, highs = s.amin((-2, -1), keepdim=True), _largest(s)
    return highs - lows > TOLERANCE * highs


def hard_gate(response: Tensor, s: Tensor) -> Tensor:
    """Return m = 1 where the response is not negative (beyond rounding), else 0."""
    return (response >= -TOLERANCE * _largest(s)).to(s.dtype)


def pool_response(s: Tensor, kappa: float) -> Tensor:
    """Each unit against the mean of its peers: r = s - kappa * mean(s)."""
    return s - kappa * s.mean((-2, -1), keepdim=True)


def pool_soft(s: Tensor, kappa: float) -> Tensor:
    """Divisive normalisation: m = s^2 / (s^2 + kappa^2 * mean(s^2)) (Heeger 1992)."""
    energy = (s / _largest(s)).square_()  # relative to the largest unit, so that tiny gradients do not underflow
    return energy / (energy + kappa**2 * energy.mean((-2, -1), keepdim=True))


def centre_surround(s: Tensor, kernel: Tensor) -> Tensor:
    """Correlate the map [..., rows, cols] with a centre-positive kernel under reflect padding."""
    padded = _reflect_pad(s, kernel.shape[-1] // 2)
    maps = padded.reshape(-1, 1, *padded.shape[-2:])
    return F.conv2d(maps, kernel.to(s)[None, None]).view(s.shape)


def licnn_response(s: Tensor, zone: int, a: float, b: float) -> Tensor:
    """LICNN (Cao et al., AAAI 2018): r = x - inhibition, both L2-normalised over the map.

    inhibition = a * exp(-mean of the zone) + b * sum over the zone of d * exp(-d) * relu(x_uv - x_centre),
    with d the distance from the centre divided by the zone's width.
    """
    length = _length(s)
    x = s / length
    half = zone // 2
    padded = _reflect_pad(x, half)
    mean, difference = torch.zeros_like(x), torch.zeros_like(x)
    rows, cols = x.shape[-2:]
    for u in range(zone):
        for v in range(zone):
            neighbour = padded[..., u : u + rows, v : v + cols]
            mean += neighbour
            d = math.hypot(u - half, v - half) / zone
            difference.add_(F.relu(neighbour - x), alpha=d * math.exp(-d))
    inhibition = a * torch.exp(-mean / zone**2) + b * difference
    # Scaled back to s, because hard_gate measures its tolerance against the map itself.
    return (x - inhibition / _length(inhibition)) * length


@lru_cache(maxsize=64)
def log_kernel(sigma: float, kernel_size: int | None = None) -> Tensor:
    """Negative Laplacian of Gaussian, [k, k] float64: sums to zero, centre positive, positive part sums to 1.

    k defaults to 2 * ceil(3 * sigma) + 1. Raises UsageError when `kernel_size` cuts the negative lobe off.
    """
    r2 = _squared_radius(_half_width(sigma, kernel_size))
    q = r2 / (2 * sigma**2)
    raw = (1 - q) * torch.exp(-q)
    if not (raw < 0).any():
        raise _lost_lobe("log", sigma, kernel_size)
    return _positive_part_to_one(raw - raw.mean())


@lru_cache(maxsize=64)
def dog_kernel(sigma: float, ratio: float = 1.6, kernel_size: int | None = None) -> Tensor:
    """Difference of Gaussians of widths sigma and ratio * sigma, [k, k] float64, normalised as log_kernel.

    k defaults to 2 * ceil(3 * ratio * sigma) + 1. Raises UsageError when `kernel_size` loses the lobe.
    """
    r2 = _squared_radius(_half_width(ratio * sigma, kernel_size))
    centre = torch.exp(-r2 / (2 * sigma**2))
    surround = torch.exp(-r2 / (2 * (ratio * sigma) ** 2))
    kernel = centre / centre.sum() - surround / surround.sum()
    # Two normalised Gaussians always cross, so the lobe is lost when the crossing of the untruncated pair
    # lies outside the support: then the negative entries are only an artefact of the normalisation.
    if not (centre / sigma**2 < surround / (ratio * sigma) ** 2).any():
        raise _lost_lobe("dog", sigma, kernel_size)
    return _positive_part_to_one(kernel)


@lru_cache(maxsize=16)
def paper_kernel(sigma: float) -> Tensor:
    """The authors' 5x5 kernel, centre positive, [5, 5] float64, absolute sum 1; not zero-mean.

    It is minus the answer of scipy.ndimage.gaussian_laplace (symmetric boundary, cut at 4 sigma) to a unit
    impulse in a 5x5 image, as the authors' public code builds it. From sigma 5 on it has no negative lobe.
    """
    radius = int(4 * sigma + 0.5)
    t = torch.arange(-radius, radius + 1, dtype=torch.float64)
    gauss = torch.exp(-(t**2) / (2 * sigma**2))
    gauss = gauss / gauss.sum()
    second = (t**2 / sigma**4 - 1 / sigma**2) * gauss
    # The impulse sits at 2; the response at i collects every offset t whose reflected position i + t is 2.
    position = (torch.arange(5)[:, None] + t.long()[None, :]) % 10
    hits = torch.minimum(position, 9 - position) == 2
    smooth, curve = (hits * gauss).sum(1), (hits * second).sum(1)
    kernel = -(torch.outer(curve, smooth) + torch.outer(smooth, curve))
    return kernel / kernel.abs().sum()


def _largest(s: Tensor) -> Tensor:
    return s.amax((-2, -1), keepdim=True)


def _length(s: Tensor) -> Tensor:
    return torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True)


def _half_width(widest_sigma: float, kernel_size: int | None) -> int:
    return math.ceil(3 * widest_sigma) if kernel_size is None else (kernel_size - 1) // 2


def _squared_radius(half: int) -> Tensor:
    t = torch.arange(-half, half + 1, dtype=torch.float64)
    return t[:, None] ** 2 + t[None, :] ** 2


def _positive_part_to_one(kernel: Tensor) -> Tensor:
    return kernel / kernel.clamp(min=0).sum()


def _lost_lobe(operator: str, sigma: float, kernel_size: int | None) -> UsageError:
    return UsageError(
        f"kernel_size {kernel_size} cuts off the negative lobe of the {operator} kernel at sigma {sigma:g}, "
        f"which would keep everything; leave kernel_size unset or make sigma smaller"
    )


def _reflect_pad(s: Tensor, half: int) -> Tensor:
    """Pad the last two axes as numpy.pad(mode='reflect') does, also where the pad exceeds the map."""
    rows, cols = (_reflected(n, half, s.device) for n in s.shape[-2:])
    return s.index_select(-2, rows).index_select(-1, cols)


def _reflected(n: int, half: int, device: torch.device) -> Tensor:
    i = torch.arange(-half, n + half, device=device)
    if n == 1:
        return torch.zeros_like(i)
    i = i % (2 * (n - 1))
    return torch.minimum(i, 2 * (n - 1) - i)
