"""Gradient tensor <-> lateral map: the 2-D grid of units that inhibit each other.

A unit is what the mask keeps or damps as a whole: one k x k kernel of a convolution, a row block of inputs
of a linear layer or 1x1 convolution, one element of a 1-D parameter (METHOD.md, "Lateral map").
"""

from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from gmscale.masking.units import Unit, chunks, map_shape, parts_of, unit_of

__all__ = ["Norm", "Unit", "expand", "lateral_map", "map_dtype", "map_shape", "unit_entries", "unit_of"]

Norm = Literal["l2", "l1", "max"]


def map_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the lateral map of a gradient of this dtype: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lateral_map(
    gradient: Tensor,
    norm: Norm = "l2",
    block: int = 16,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the lateral map s >= 0: one norm a unit, [O, I] or [O, ceil(I / block)] or [1, N].

    Low precision is computed in float32 (float16 norms overflow at 3e4). A last row block shorter than
    `block` has the plain norm of what it holds. A `residual` is first added to the gradient, in place and in the
    same pass over memory. `out` must be contiguous.
    """
    if out is None:
        shape = map_shape(gradient.shape, block)
        out = torch.empty(shape, dtype=map_dtype(gradient.dtype), device=gradient.device)
    parts = parts_of(gradient.shape, gradient.stride(), block)
    if residual is not None and (parts is None or residual.stride() != gradient.stride()):
        gradient.add_(residual)
        residual = None
    if parts is None:  # strides that do not allow a view of the units
        return lateral_map(gradient.contiguous(), norm, block, out=out)
    for part in parts:
        if residual is None:
            for s, g in chunks(part, out, gradient):
                _norm(g, norm, part.reduced, s)
        else:
            for s, g, r in chunks(part, out, gradient, residual):
                _norm(g.add_(r), norm, part.reduced, s)
    return out


def expand(m: Tensor, gradient: Tensor, block: int = 16) -> Tensor:
    """Return a map as a tensor that broadcasts against `gradient`, in the gradient's dtype."""
    m = m.to(gradient.dtype)
    unit = unit_of(gradient.shape)
    if unit == "element":
        return m.squeeze(0)
    if unit == "row block" and block > 1:
        m = m.repeat_interleave(block, dim=1)[:, : gradient.shape[1]]
    return m.reshape(*m.shape, *(1,) * (gradient.ndim - 2))


def unit_entries(gradient: Tensor, block: int = 16) -> tuple[int, int]:
    """Return how many gradient entries a unit holds: (every unit, the units of the last column)."""
    unit = unit_of(gradient.shape)
    if unit == "element":
        return 1, 1
    if unit == "kernel":
        size = prod(gradient.shape[2:])
        return size, size
    inputs = gradient.shape[1]
    return min(block, inputs), (inputs - 1) % block + 1


def _norm(x: Tensor, norm: Norm, reduced: int, out: Tensor) -> None:
    """Write the norms of the units x [R, K, C] (`reduced` 1) or [R, C, K] (2) to `out`."""
    dtype, entries, on_cpu = out.dtype, x.shape[reduced], x.device.type == "cpu"
    if entries == 1:
        torch.abs(x, out=out) if x.dtype == dtype else out.copy_(x.to(dtype).abs_())
        return
    if norm == "max":
        out.copy_(x.abs().amax(reduced, keepdim=True))
        return
    x = x.to(dtype)
    if norm == "l2" and (not on_cpu or (reduced == 2 and entries % 16 == 0)):
        torch.linalg.vector_norm(x, dim=reduced, keepdim=True, out=out)
        return
    # On CPU vector_norm is slow over entries that are no neighbours (30 times) or no whole vectors (twice).
    terms = x * x if norm == "l2" else x.abs()
    if reduced == 1 or not on_cpu:
        torch.sum(terms, reduced, keepdim=True, out=out)
    else:
        sums = out if out.is_contiguous() else torch.empty(out.shape, dtype=dtype)
        torch.mv(terms.view(-1, entries), _ones(entries, dtype), out=sums.view(-1))
        if sums is not out:
            out.copy_(sums)
    if norm == "l2":
        out.sqrt_()


@lru_cache(maxsize=64)
def _ones(n: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(n, dtype=dtype)
