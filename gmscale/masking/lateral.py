"""Gradient tensor <-> lateral map: the 2-D grid of units that inhibit each other.

A unit is what the mask keeps or damps as a whole: one k x k kernel of a convolution, a row block of inputs
of a linear layer or 1x1 convolution, one element of a 1-D parameter (METHOD.md, "Lateral map").
"""

from itertools import product
from math import prod
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l2", "l1", "max"]
Unit = Literal["kernel", "row block", "element"]


def unit_of(shape: torch.Size | tuple[int, ...]) -> Unit:
    """Return what one entry of the lateral map of a gradient of this shape stands for."""
    if len(shape) == 1:
        return "element"
    return "kernel" if len(shape) > 2 and prod(shape[2:]) > 1 else "row block"


def map_shape(shape: torch.Size | tuple[int, ...], block: int) -> tuple[int, int]:
    """Return (rows, columns) of the lateral map of a gradient of this shape."""
    unit = unit_of(shape)
    if unit == "element":
        return 1, shape[0]
    return shape[0], shape[1] if unit == "kernel" else -(-shape[1] // block)


def lateral_map(gradient: Tensor, norm: Norm = "l2", block: int = 16) -> Tensor:
    """Return the lateral map s >= 0: one norm a unit, [O, I] or [O, ceil(I / block)] or [1, N].

    Low precision is computed in float32 (float16 norms overflow at 3e4). A last row block shorter than
    `block` has the plain norm of what it holds.
    """
    unit = unit_of(gradient.shape)
    if unit == "element":
        return gradient.abs().to(_map_dtype(gradient)).unsqueeze(0)
    if unit == "kernel":
        return _norm(gradient, norm, tuple(range(2, gradient.ndim)))
    matrix = gradient.reshape(gradient.shape[0], gradient.shape[1])
    whole = matrix.shape[1] // block * block
    s = _norm(matrix[:, :whole].unflatten(1, (-1, block)), norm, (2,)) if whole else None
    if whole == matrix.shape[1] and s is not None:
        return s
    tail = _norm(matrix[:, whole:], norm, (1,)).unsqueeze(1)
    return tail if s is None else torch.cat((s, tail), dim=1)


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


def _map_dtype(gradient: Tensor) -> torch.dtype:
    return torch.float64 if gradient.dtype == torch.float64 else torch.float32


def _norm(x: Tensor, norm: Norm, dims: tuple[int, ...]) -> Tensor:
    dtype = _map_dtype(x)
    if norm == "l1":
        return x.to(dtype).abs().sum(dims)
    if norm == "max":
        return x.abs().amax(dims).to(dtype)
    if x.device.type == "cpu" and x.stride(-1) != 1:
        # channels_last: torch's CPU reduction over dimensions that are not innermost is 30 times slower
        total = torch.zeros(x.shape[: -len(dims)], dtype=dtype)
        positions = x.movedim(dims, tuple(range(len(dims))))
        for position in product(*(range(x.shape[d]) for d in dims)):
            at_position = positions[position].to(dtype)
            total.addcmul_(at_position, at_position)
        return total.sqrt_()
    return torch.linalg.vector_norm(x, dim=dims, dtype=dtype)
