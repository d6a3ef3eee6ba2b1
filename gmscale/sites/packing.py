"""What travels of a bucket, as pieces that are taken into one flat buffer and put back from it.

Kept units are copied as wholes: rows of neighbouring entries where a unit lies in one piece, else position by
position over all kept units at once (channels_last, a short last row block). Both are far cheaper on CPU than a
boolean mask over entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gmscale.masking.units import Part


class Run(NamedTuple):
    """Neighbouring entries of the bucket's buffer that all travel."""

    run: Tensor

    @property
    def entries(self) -> int:
        return self.run.numel()

    def take(self, out: Tensor) -> None:
        out.copy_(self.run)

    def put(self, values: Tensor) -> None:
        self.run.copy_(values)


class KeptUnits(NamedTuple):
    """The kept units of one part of a gradient (masking/units.py)."""

    gradient: Tensor
    part: Part
    kept: Tensor
    """int64 [units], rising: which of the part's units are kept, counted row by row."""
    residual: Tensor | None
    """Of the gradient's strides."""

    @property
    def entries(self) -> int:
        return len(self.kept) * self.part.size[self.part.reduced]

    def take(self, out: Tensor) -> None:
        _gather(self.gradient, self.part, self.kept, out)

    def put(self, values: Tensor) -> None:
        _scatter(self.gradient, self.part, self.kept, values)

    def hold(self, values: Tensor | None) -> None:
        """Hold back `values` of the kept units; None: nothing."""
        assert self.residual is not None
        _scatter(self.residual, self.part, self.kept, values)


def kept_index(keep: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` non-zero entries of a map, flattened, in rising order.

    On a GPU without `nonzero`, which would make the host wait.
    """
    keep = keep.flatten() != 0
    return keep.nonzero().squeeze(1) if keep.device.type == "cpu" else _known_number_kept(keep, count)


def _known_number_kept(keep: Tensor, count: int) -> Tensor:
    slot = torch.where(keep, keep.cumsum(0) - 1, count)
    index = torch.empty(count + 1, dtype=torch.int64, device=keep.device)
    return index.scatter_(0, slot, torch.arange(len(keep), device=keep.device))[:count]


def _gather(tensor: Tensor, part: Part, index: Tensor, out: Tensor) -> None:
    rows = _as_rows(tensor, part)
    if rows is not None:
        torch.index_select(rows, 0, index, out=out.view(len(index), -1))
        return
    flat, first, step = _as_positions(tensor, part, index)
    for position, at_position in enumerate(out.view(-1, len(index))):
        torch.index_select(flat[position * step :], 0, first, out=at_position)


def _scatter(tensor: Tensor, part: Part, index: Tensor, values: Tensor | None) -> None:
    """Write `values`, in the order of `_gather`, or zeros."""
    rows = _as_rows(tensor, part)
    if rows is not None:
        if values is None:
            rows.index_fill_(0, index, 0)
        else:
            rows.index_copy_(0, index, values.view(len(index), -1))
        return
    flat, first, step = _as_positions(tensor, part, index)
    for position in range(part.size[part.reduced]):
        target = flat[position * step :]
        if values is None:
            target.index_fill_(0, first, 0)
        else:
            target.scatter_(0, first, values.view(-1, len(index))[position])  # thrice as fast as index_copy_


def _as_rows(tensor: Tensor, part: Part) -> Tensor | None:
    """Return the part as [units, entries of a unit] if its units lie in memory like that."""
    units, single, entries = part.size
    if part.reduced != 2 or single != 1 or (entries > 1 and part.stride[2] != 1):
        return None
    return tensor.as_strided((units, entries), (part.stride[0], 1), tensor.storage_offset() + part.offset)


def _as_positions(tensor: Tensor, part: Part, index: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return (memory from the part's first entry on, where each kept unit begins in it, step between entries)."""
    column = 3 - part.reduced
    cols, (row_step, column_step) = part.size[column], (part.stride[0], part.stride[column])
    first = index * column_step
    if row_step != cols * column_step:
        row = torch.div(index, cols, rounding_mode="floor")
        first += row * (row_step - cols * column_step)
    length = 1 + sum((n - 1) * step for n, step in zip(part.size, part.stride, strict=True))
    flat = tensor.as_strided((length,), (1,), tensor.storage_offset() + part.offset)
    return flat, first, part.stride[part.reduced]
