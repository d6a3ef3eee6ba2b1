"""The gradient mask in plain NumPy float64: the definition that every fast path is compared with (law 5).

Written for reading, not for speed. `settings` are GradientMask's own field names; its defaults apply.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float64]

TOL = 1e-6  # relative to the largest entry of the map: contrast rule and hard gates
NORMS: dict[str, Callable[[Array], float]] = {
    "l2": lambda v: float(np.sqrt((v * v).sum())),
    "l1": lambda v: float(np.abs(v).sum()),
    "max": lambda v: float(np.abs(v).max()),
}


# -- lateral map: gradient -> s [rows, cols] ------------------------------------------------------
def is_kernels(shape: tuple[int, ...]) -> bool:
    """True where the unit is a convolution kernel g[o, i]: something is left after the first two dimensions."""
    return len(shape) >= 3 and int(np.prod(shape[2:])) > 1


def lateral_map(g: Array, norm: str = "l2", block: int = 16) -> Array:
    """Norms of the units: kernels, else blocks of `block` inputs of a row, else single elements."""
    g = np.asarray(g, np.float64)
    if g.ndim == 1:
        return np.abs(g)[None, :]
    O, I = g.shape[:2]
    if is_kernels(g.shape):
        return np.array([[NORMS[norm](g[o, i].ravel()) for i in range(I)] for o in range(O)])
    rows = g.reshape(O, I)
    return np.array([[NORMS[norm](row[b : b + block]) for b in range(0, I, block)] for row in rows])


def expand(m: Array, shape: tuple[int, ...], block: int = 16) -> Array:
    """The keep map at the shape of the gradient: every entry of a unit gets its unit's value."""
    if len(shape) == 1:
        return m.reshape(shape).copy()
    if is_kernels(shape):
        return np.broadcast_to(m.reshape(*m.shape, *[1] * (len(shape) - 2)), shape).copy()
    return np.repeat(m, block, axis=1)[:, : shape[1]].reshape(shape)


# -- kernels --------------------------------------------------------------------------------------
def squared_radius(half: int) -> Array:
    axis = np.arange(-half, half + 1, dtype=np.float64)
    return axis[:, None] ** 2 + axis[None, :] ** 2


def half_width(reach: float, kernel_size: int | None) -> int:
    return int(np.ceil(3 * reach)) if kernel_size is None else (kernel_size - 1) // 2


def log_kernel(sigma: float, kernel_size: int | None = None) -> Array:
    """Minus the Laplacian of a Gaussian, zero-mean, its positive entries summing to one."""
    q = squared_radius(half_width(sigma, kernel_size)) / (2 * sigma**2)
    raw = (1 - q) * np.exp(-q)
    kernel = raw - raw.mean()
    return kernel / kernel[kernel > 0].sum()


def dog_kernel(sigma: float, ratio: float = 1.6, kernel_size: int | None = None) -> Array:
    """A Gaussian minus a wider one, each of sum one on the same support; positive entries sum to one."""
    r2 = squared_radius(half_width(ratio * sigma, kernel_size))
    narrow, wide = (np.exp(-r2 / (2 * width**2)) for width in (sigma, ratio * sigma))
    kernel = narrow / narrow.sum() - wide / wide.sum()
    return kernel / kernel[kernel > 0].sum()


def paper_kernel(sigma: float) -> Array:
    """The authors' 5x5 kernel: scipy's -LoG of an impulse, divided by its absolute sum."""
    impulse = np.zeros((5, 5))
    impulse[2, 2] = 1
    kernel = -ndimage.gaussian_laplace(impulse, sigma)
    return kernel / np.abs(kernel).sum()


# -- responses: a unit survives a hard gate where its response is not below -TOL * scale ------------
def windows(s: Array, size: int) -> Array:
    """The size x size neighbourhood of every entry, reflected at the border: [rows, cols, size, size]."""
    return np.lib.stride_tricks.sliding_window_view(np.pad(s, size // 2, mode="reflect"), (size, size))


def correlate(s: Array, kernel: Array) -> Array:
    return (windows(s, len(kernel)) * kernel).sum((-1, -2))


def licnn_response(s: Array, a: float, b: float, size: int) -> Array:
    """LICNN's x minus its inhibition, entry by entry and offset by offset; x = s / ||s||."""
    x = s / np.linalg.norm(s)
    half = size // 2
    padded = np.pad(x, half, mode="reflect")
    inhibition = np.zeros_like(x)
    for row, col in np.ndindex(x.shape):
        zone = padded[row : row + size, col : col + size]
        differential = 0.0
        for u, v in np.ndindex(size, size):
            d = np.hypot(u - half, v - half) / size
            differential += d * np.exp(-d) * max(zone[u, v] - x[row, col], 0.0)
        inhibition[row, col] = a * np.exp(-zone.mean()) + b * differential
    return x - inhibition / np.linalg.norm(inhibition)


def response(s: Array, **settings: Any) -> tuple[Array, float]:
    """The response of a hard operator, and the scale that its tolerance is relative to."""
    operator = settings.get("operator", "pool")
    kernel_size = settings.get("kernel_size")
    sigma = settings.get("sigma")
    if operator == "pool":
        kappa = settings.get("kappa")
        return s - (1.0 if kappa is None else kappa) * s.mean(), s.max()
    if operator == "licnn":
        r = licnn_response(s, settings.get("licnn_a", 0.1), settings.get("licnn_b", 0.9), kernel_size or 7)
        return r, s.max() / np.linalg.norm(s)
    if operator == "dog":
        kernel = dog_kernel(sigma or 1.0, settings.get("ratio", 1.6), kernel_size)
    elif settings.get("paper_compat"):
        kernel = paper_kernel(sigma or 11.0)
    else:
        kernel = log_kernel(sigma or 1.0, kernel_size)
    return correlate(s, kernel), s.max()


# -- keep map -------------------------------------------------------------------------------------
def has_contrast(s: Array) -> bool:
    """Law 7; a map with NaN or inf counts as one without contrast."""
    return bool(np.isfinite(s).all() and s.size and s.max() - s.min() > TOL * s.max())


def keep_map(s: Array, permutation: NDArray[np.intp] | None = None, **settings: Any) -> Array:
    """m in [0, 1]: 1 keeps a unit. For `random`, m of `random_like` in the order of `permutation`."""
    s = np.asarray(s, np.float64)
    if settings.get("operator") == "random":
        like = keep_map(s, **{**settings, "operator": settings.get("random_like", "pool"), "gate": "hard"})
        return like.ravel()[permutation].reshape(s.shape)
    if not has_contrast(s):
        return np.ones_like(s)
    if settings.get("gate") == "soft":
        kappa = settings.get("kappa")
        u = s / s.max()
        return u**2 / (u**2 + (0.5 if kappa is None else kappa) ** 2 * (u**2).mean())
    r, scale = response(s, **settings)
    return np.where(r < -TOL * scale, 0.0, 1.0)


def near_threshold(s: Array, margin: float, **settings: Any) -> NDArray[np.bool_]:
    """Where a hard gate's decision is within `margin` (relative): rounding may decide there, so tests look away."""
    s = np.asarray(s, np.float64)
    top = s.max()
    if np.isfinite(s).all() and abs(top - s.min() - TOL * top) < min(margin, TOL / 2) * top:
        return np.ones(s.shape, bool)
    if settings.get("gate") == "soft" or not has_contrast(s):
        return np.zeros(s.shape, bool)
    r, scale = response(s, **settings)
    return np.abs(r + TOL * scale) < margin * scale


# -- apply ----------------------------------------------------------------------------------------
def factor(g: Array, strength: float, norm: str = "l2", block: int = 16, **settings: Any) -> Array:
    """What every entry of the gradient is multiplied by, in [1 - strength, 1]."""
    m = keep_map(lateral_map(g, norm, block), **settings)
    return 1 - strength * (1 - expand(m, np.shape(g), block))


def apply(g: Array, strength: float, rescale: bool = False, mask_1d: bool = False, **settings: Any) -> Array:
    """The masked gradient, without error feedback."""
    g = np.asarray(g, np.float64)
    if g.ndim == 0 or (g.ndim == 1 and not mask_1d) or strength == 0:
        return g.copy()
    masked = g * factor(g, strength, **settings)
    before, after = np.linalg.norm(g), np.linalg.norm(masked)
    if rescale and np.isfinite(before) and before > 0 and after > 0:
        masked *= before / after
    return masked


def error_feedback(g: Array, residual: Array, strength: float, **settings: Any) -> tuple[Array, Array]:
    """One step: (what travels, what is held back); a non-finite gradient travels alone and unmasked."""
    total = g + residual
    if not np.isfinite(total).all():
        return g.copy(), residual.copy()
    sent = apply(total, strength, **settings)
    return sent, total - sent


# -- layer outputs --------------------------------------------------------------------------------
def output_map(g: Array, norm: str = "l2") -> Array:
    """The map of one sample g[H, W, C]: the norm over channels at every position."""
    return np.array([[NORMS[norm](g[row, col]) for col in range(g.shape[1])] for row in range(g.shape[0])])


def apply_output(
    g: Array, strength: float, layout: str, grid: tuple[int, int, int] | None = None, **settings: Any
) -> Array:
    """The masked output gradient: NCHW, NHWC, or tokens NLD on a `grid` of (rows, cols, leading other tokens)."""
    masked = np.array(g, np.float64)
    norm, rescale = settings.get("norm", "l2"), settings.get("rescale", False)
    settings = {k: v for k, v in settings.items() if k not in ("norm", "rescale")}
    for sample in masked:  # views of `masked`, written in place
        if layout == "NCHW":
            view = sample.transpose(1, 2, 0)
        elif layout == "NHWC":
            view = sample
        else:
            rows, cols, prefix = grid
            view = sample[prefix:].reshape(rows, cols, -1)
        if min(view.shape[:2]) < 7:
            continue
        before = np.linalg.norm(view)
        view *= 1 - strength * (1 - keep_map(output_map(view, norm), **settings)[:, :, None])
        after = np.linalg.norm(view)
        if rescale and np.isfinite(before) and before > 0 and after > 0:
            view *= before / after
    return masked
