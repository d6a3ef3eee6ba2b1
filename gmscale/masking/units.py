"""A gradient's units as strided views, in chunks that stay in the cache.

A mask needs several operations an entry. On CPU they are done chunk by chunk, so that an entry comes from memory
once for the lateral map and once when the keep map is applied, and intermediate results never leave the cache.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Unit = Literal["kernel", "row block", "element"]
_CHUNK = 2**17  # entries that a CPU thread works on at a time


class Part(NamedTuple):
    """Units of equal size: a 3-D view of the gradient beside the view of the map that broadcasts against it."""

    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: int
    reduced: Literal[1, 2]
    """The dimension that runs over a unit's entries: the last one where these are neighbours in memory."""
    map_size: tuple[int, int, int]
    map_stride: tuple[int, int, int]
    map_offset: int

    def of(self, gradient: Tensor) -> Tensor:
        return gradient.as_strided(self.size, self.stride, gradient.storage_offset() + self.offset)

    def of_map(self, s: Tensor) -> Tensor:
        """The view of a contiguous map that broadcasts against `of(gradient)`."""
        return s.as_strided(self.map_size, self.map_stride, s.storage_offset() + self.map_offset)


def unit_of(shape: tuple[int, ...]) -> Unit:
    """Return what one entry of the lateral map of a gradient of this shape stands for."""
    if len(shape) == 1:
        return "element"
    return "kernel" if len(shape) > 2 and prod(shape[2:]) > 1 else "row block"


def map_shape(shape: tuple[int, ...], block: int) -> tuple[int, int]:
    """Return (rows, columns) of the lateral map of a gradient of this shape."""
    unit = unit_of(shape)
    if unit == "element":
        return 1, shape[0]
    return shape[0], shape[1] if unit == "kernel" else -(-shape[1] // block)


@lru_cache(maxsize=8192)
def parts_of(shape: tuple[int, ...], stride: tuple[int, ...], block: int) -> tuple[Part, ...] | None:
    """Return the parts of a gradient; None if its strides do not allow a view of its units."""
    unit, (rows, cols) = unit_of(shape), map_shape(shape, block)
    if unit == "element":
        return (_part((1, cols, 1), (0, stride[0], 0), 0, cols, 0),)
    if unit == "kernel":
        inner = _merged_stride(shape[2:], stride[2:])
        if inner is None:
            return None
        return (_part((rows, cols, prod(shape[2:])), (stride[0], stride[1], inner), 0, cols, 0),)
    whole, tail = divmod(shape[1], block)
    parts = []
    if whole:
        strides = (stride[0], block * stride[1], stride[1])
        parts.append(_part((rows, whole, block), strides, 0, cols, 0))
    if tail:
        parts.append(_part((rows, 1, tail), (stride[0], 0, stride[1]), whole * block * stride[1], cols, whole))
    return tuple(parts)


def chunks(part: Part, map_: Tensor, *gradients: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views (map, gradient, ...) of the same units, small enough for the cache; on a GPU all at once."""
    views = part.of_map(map_), *(part.of(g) for g in gradients)
    if map_.device.type != "cpu":
        yield views
        return
    rows, row = part.size[0], part.size[1] * part.size[2]
    at_once = max(1, _CHUNK * torch.get_num_threads() // row)
    if rows <= at_once:
        yield views
    else:
        yield from zip(*(view.split(at_once) for view in views), strict=True)


def _part(
    size: tuple[int, int, int], stride: tuple[int, int, int], offset: int, map_cols: int, map_offset: int
) -> Part:
    """Lay out units of `size` (rows, columns, entries of a unit)."""
    (R, C, K), (r, c, k) = size, stride
    if k != 1 and K > 1:  # channels_last: entries of a unit lie far apart, those of neighbouring units together
        return Part((R, K, C), (r, k, c), offset, 1, (R, 1, C), (map_cols, 0, 1), map_offset)
    if r == C * c and map_cols == C:  # rows of units follow each other, in the gradient and in the map
        return Part((R * C, 1, K), (c, 0, k), offset, 2, (R * C, 1, 1), (1, 0, 0), map_offset)
    return Part((R, C, K), (r, c, k), offset, 2, (R, C, 1), (map_cols, 1, 0), map_offset)


def _merged_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """Return the stride of these dimensions taken as one, in row-major order; None if there is none."""
    merged, expected = 0, 0
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n == 1:
            continue
        if not expected:
            merged, expected = step, step
        elif step != expected:
            return None
        expected *= n
    return merged
