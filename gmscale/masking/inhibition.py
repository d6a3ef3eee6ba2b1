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
_STRIP = 16
Extreme = float | Tensor


def extremes(s: Tensor) -> tuple[Extreme, Extreme]:
    """Return (smallest, largest) entry of each map: numbers for one map on CPU, else tensors [..., 1, 1].

    Tensors because reading them would make the host wait for a GPU.
    """
    if s.device.type == "cpu" and s.ndim == 2:
        low, high = torch.aminmax(s)
        return low.item(), high.item()
    return s.amin((-2, -1), keepdim=True), s.amax((-2, -1), keepdim=True)


def has_contrast(lowest: Extreme, highest: Extreme) -> bool | Tensor:
    """Return whether a map is neither constant, one entry, all zero nor non-finite (laws 4 and 7)."""
    return is_finite(highest) & (highest - lowest > TOLERANCE * highest)


def is_finite(highest: Extreme) -> bool | Tensor:
    """Return whether a map with this largest entry, and with it the gradient, is finite."""
    return math.isfinite(highest) if isinstance(highest, float) else torch.isfinite(highest)


def hard_gate(response: Tensor, highest: Extreme) -> Tensor:
    """Return m = 1 where the response to a map is not negative (beyond rounding), else 0; overwrites it."""
    return response.ge_(-TOLERANCE * highest)  # in place: on CPU a comparison to bool takes five times as long


def pool_hard(s: Tensor, kappa: float, highest: Extreme) -> Tensor:
    """Each unit against the mean of its peers: m = 1 where s >= kappa * mean(s), up to rounding, else 0."""
    return (s >= kappa * s.mean(-1, keepdim=True).mean(-2, keepdim=True) - TOLERANCE * highest).to(s.dtype)


def pool_soft(s: Tensor, kappa: float, highest: Extreme) -> Tensor:
    """Divisive normalisation: m = s^2 / (s^2 + kappa^2 * mean(s^2)) (Heeger 1992)."""
    energy = (s / highest).square_()  # relative to the largest unit, so that tiny gradients do not underflow
    return energy / (energy + kappa**2 * energy.mean(-1, keepdim=True).mean(-2, keepdim=True))


def centre_surround(s: Tensor, kernel: Tensor) -> Tensor:
    """Correlate the map [..., rows, cols] with a centre-positive kernel [k, k] under reflect padding.

    One convolution whose output channels are `_STRIP` neighbouring columns: torch's CPU convolution works across
    channels, so that this is five times as fast as one channel.
    """
    cols, half = s.shape[-1], kernel.shape[-1] // 2
    padded = _reflect_pad(s, half, -cols % _STRIP)
    padded = padded.reshape(-1, 1, *padded.shape[-2:])
    # TF32 would be too coarse for the gate's tolerance, and autocast too.
    dtype = torch.float64 if s.device.type == "cuda" else s.dtype
    with torch.autocast(s.device.type, enabled=False):
        weight = _strip_weight(kernel, dtype, s.device)
        # With a channels_last input the output is laid out as the map is.
        strips_of = padded.to(dtype).as_strided(padded.shape, (padded[0].numel(), 1, padded.shape[-1], 1))
        response = F.conv2d(strips_of, weight, stride=(1, _STRIP))
    by_column = response.permute(0, 2, 3, 1).reshape(*s.shape[:-1], -1)
    return by_column[..., :cols].to(s.dtype).contiguous()


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


@lru_cache(maxsize=64)
def _strip_weight(kernel: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [_STRIP, 1, k, k + _STRIP - 1]: the kernel, a column further right from one channel to the next."""
    k = kernel.shape[-1]
    weight = torch.zeros(_STRIP, 1, k, k + _STRIP - 1, dtype=dtype)
    for column in range(_STRIP):
        weight[column, 0, :, column : column + k] = kernel
    return weight.to(device)


def _reflect_pad(s: Tensor, half: int, more_cols: int = 0) -> Tensor:
    """Pad the last two axes as numpy.pad(mode='reflect') does, also where the pad exceeds the map.

    `more_cols` pads the columns further on the right.
    """
    rows, cols = s.shape[-2:]
    if half < rows and half + more_cols < cols:
        maps = s.reshape(-1, rows, cols)
        padded = F.pad(maps, (half, half + more_cols, half, half), mode="reflect")
        return padded.view(*s.shape[:-2], *padded.shape[1:])
    padded = s.index_select(-2, _reflected(rows, half, half, s.device))
    return padded.index_select(-1, _reflected(cols, half, half + more_cols, s.device))


@lru_cache(maxsize=1024)
def _reflected(n: int, before: int, after: int, device: torch.device) -> Tensor:
    i = torch.arange(-before, n + after, device=device)
    if n == 1:
        return torch.zeros_like(i)
    i = i % (2 * (n - 1))
    return torch.minimum(i, 2 * (n - 1) - i)
