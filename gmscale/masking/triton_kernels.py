# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The mask of many CUDA gradients in three kernel launches, whatever their number.

1. `_maps`: lateral maps, and of each tile of units the statistics that the inhibition needs;
2. `_statistics`: those of the tiles together, one program a gradient, in a fixed order (no atomics);
3. `_apply`: keep map, and the gradient (with error feedback the residual too) masked in place.

A gradient is read once for its map, and read and written once to be masked. Descriptor tables say where the units
of each gradient lie (gmscale.masking.units). Nothing here makes the host wait for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmscale.masking import inhibition
from gmscale.masking.lateral import map_dtype, map_shape
from gmscale.masking.mask import GradientMask
from gmscale.masking.units import Part, parts_of

UNITS = 128  # units that a program works on
TILES = 1024  # tiles whose statistics are read at a time
_TAPS = 16  # entries of each unit that it loads at a time
_WIDEST = 31  # kernel [k, k] that is correlated entry by entry
_FIELDS = 15  # numbers in a row of the layout table
_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


class FusedMask:
    """One mask for many gradients of one dtype, device, and fixed shapes and strides."""

    def __init__(self, mask: GradientMask, gradients: Sequence[Tensor]) -> None:
        self.mask = mask
        first = gradients[0]
        self._device, self._dtype = first.device, first.dtype
        self._map_dtype = map_dtype(first.dtype)
        self._strides = [g.stride() for g in gradients]
        rows: list[tuple[int, ...]] = []
        tiles: list[tuple[int, int]] = []
        spans: list[tuple[int, int, int]] = []
        start = 0
        for number, g in enumerate(gradients):
            map_rows, map_cols = map_shape(g.shape, mask.block)
            first_tile = len(tiles)
            for part in parts_of(g.shape, g.stride(), mask.block) or ():
                tiles += [(len(rows), unit) for unit in range(0, _units(part), UNITS)]
                rows.append(_row(part, number, start, map_rows, map_cols, g.element_size()))
            spans.append((first_tile, len(tiles), map_rows * map_cols))
            start += map_rows * map_cols
        self._layout, self._tiles, self._spans = self._table(rows), self._table(tiles), self._table(spans)
        self._pointers: tuple[tuple[int, ...], Tensor] | None = None
        self._numbers: tuple[float, Tensor] | None = None
        kernel = mask.kernel()
        self._kernel = None if kernel is None else self._sent(kernel.to(self._map_dtype))
        self._s = torch.empty(start, dtype=self._map_dtype, device=self._device)
        self._m = torch.empty_like(self._s)
        self._partial = self._s.new_empty(max(1, len(tiles)), 5)
        self._total = self._s.new_empty(len(gradients), 4)

    @staticmethod
    def supports(mask: GradientMask, gradients: Sequence[Tensor]) -> bool:
        """Whether the kernels do what `mask` does to these gradients; else the eager path serves.

        They know the operators pool, log and dog; not licnn, random, rescale and very wide kernels.
        """
        kernel = mask.kernel()
        return (
            mask.operator in ("pool", "log", "dog")
            and (kernel is None or len(kernel) <= _WIDEST)
            and not mask.rescale
            and len({(g.dtype, g.device) for g in gradients}) == 1
            and gradients[0].dtype in _DTYPES
            and all(parts_of(g.shape, g.stride(), mask.block) for g in gradients)
        )

    def fits(self, gradients: Sequence[Tensor], residuals: Sequence[Tensor | None]) -> bool:
        """Whether these are laid out as those that this was made for; residuals for all of them or for none."""
        with_residuals = {r is not None for r in residuals}
        return (
            len(with_residuals) == 1
            and all(g.stride() == stride for g, stride in zip(gradients, self._strides, strict=True))
            and all(
                r is None or (r.stride() == stride and r.dtype == self._dtype)
                for r, stride in zip(residuals, self._strides, strict=True)
            )
        )

    def mask_(
        self, gradients: Sequence[Tensor], residuals: Sequence[Tensor | None], strength: float
    ) -> tuple[Tensor, Tensor]:
        """Mask the gradients in place; return their lateral maps and keep maps, flat, overwritten by the next call.

        `strength` is above 0.
        """
        pointers, numbers = self._pointers_to(gradients, residuals), self._numbers_with(strength)
        constants: dict[str, Any] = {
            "DTYPE": _DTYPES[self._dtype],
            "MAP_DTYPE": _DTYPES[self._map_dtype],
            "FIELDS": _FIELDS,
            "UNITS": UNITS,
            "TAPS": _TAPS,
            "FEEDBACK": residuals[0] is not None,
        }
        kernel = self._s if self._kernel is None else self._kernel  # pool does not read it
        size = 0 if self._kernel is None else self._kernel.shape[-1]
        soft = not self.mask.is_hard
        operator = "soft" if soft else "pool" if self._kernel is None else "stencil"
        tiles = (len(self._tiles),)
        with torch.cuda.device_of(self._s):
            _maps[tiles](
                pointers, self._layout, self._tiles, self._s, self._partial, NORM=self.mask.norm, **constants
            )
            _statistics[(len(gradients),)](
                self._partial, self._spans, numbers, self._total,
                OPERATOR=operator, MAP_DTYPE=_DTYPES[self._map_dtype], BLOCK=TILES,
            )  # fmt: skip
            _apply[tiles](
                pointers, self._layout, self._tiles, self._s, self._m, self._total, numbers, kernel,
                OPERATOR=operator, SIZE=size, HELD_FIRST=not soft and strength >= 0.5, SENT_FIRST=strength <= 0.5,
                enable_fp_fusion=False,  # g - g * h in one rounding would break sent + held = total
                **constants,
            )  # fmt: skip
        return self._s, self._m

    def _pointers_to(self, gradients: Sequence[Tensor], residuals: Sequence[Tensor | None]) -> Tensor:
        """Return the addresses of the gradients and residuals, as a table that is sent only when they change."""
        addresses = (
            *(g.data_ptr() for g in gradients),
            *(0 if r is None else r.data_ptr() for r in residuals),
        )
        if self._pointers is None or self._pointers[0] != addresses:
            pairs = list(zip(addresses[: len(gradients)], addresses[len(gradients) :], strict=True))
            self._pointers = addresses, self._table(pairs)
        return self._pointers[1]

    def _numbers_with(self, strength: float) -> Tensor:
        # A kernel's float arguments are float32, too coarse for float64 gradients.
        if self._numbers is None or self._numbers[0] != strength:
            values = [strength, self.mask.effective_kappa, inhibition.TOLERANCE]
            self._numbers = strength, self._sent(torch.tensor(values, dtype=torch.float64))
        return self._numbers[1]

    def _table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return self._sent(torch.tensor(rows, dtype=torch.int64))

    def _sent(self, table: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return table
        return table.pin_memory().to(self._device, non_blocking=True)


def _units(part: Part) -> int:
    return part.size[0] * part.size[3 - part.reduced]


def _row(part: Part, number: int, start: int, map_rows: int, map_cols: int, itemsize: int) -> tuple[int, ...]:
    """Describe a part: see the loads in `_maps` and `_apply`."""
    along, across = part.reduced, 3 - part.reduced  # the dimensions over a unit's entries and over units
    entries = part.size[along]
    row = (
        number, part.offset * itemsize, _units(part), part.size[across],
        part.stride[0], part.stride[across], part.stride[along], entries,
        start, part.map_offset, part.map_stride[0], part.map_stride[across],
        int(along == 1 or entries == 1), map_rows, map_cols,
    )  # fmt: skip
    assert len(row) == _FIELDS
    return row


@triton.jit
def _entries(at, k0, inner, entries, inside, UNITS_LAST: tl.constexpr, TAPS: tl.constexpr):
    """Offsets of entries k0 to k0 + TAPS of some units, and which of them there are."""
    k = k0 + tl.arange(0, TAPS)
    if UNITS_LAST:  # lanes run over units
        offsets = k[:, None].to(tl.int64) * inner + at[None, :]
        there = (k < entries)[:, None] & inside[None, :]
    else:
        offsets = at[:, None] + k[None, :].to(tl.int64) * inner
        there = inside[:, None] & (k < entries)[None, :]
    return offsets, there


@triton.jit
def _accumulate(
    acc, poison, g, r, at, inner, entries, inside,
    UNITS_LAST: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr, MAP_DTYPE: tl.constexpr,
    TAPS: tl.constexpr, FEEDBACK: tl.constexpr,
):  # fmt: skip
    """Add the entries of units to their norms (of l2, the squares); `poison` becomes NaN at a non-finite entry."""
    axis: tl.constexpr = 0 if UNITS_LAST else 1
    for k0 in range(0, entries, TAPS):
        offsets, there = _entries(at, k0, inner, entries, inside, UNITS_LAST, TAPS)
        x = tl.load(g + offsets, mask=there, other=0.0).to(MAP_DTYPE)
        if FEEDBACK:
            x = (x + tl.load(r + offsets, mask=there, other=0.0).to(MAP_DTYPE)).to(DTYPE).to(MAP_DTYPE)
        if NORM == "l2":
            acc += tl.sum(x * x, axis)
        elif NORM == "l1":
            acc += tl.sum(tl.abs(x), axis)
        else:
            acc = tl.maximum(acc, tl.max(tl.abs(x), axis))
        if NORM == "max":  # a maximum may drop NaN
            poison += tl.sum(x * 0.0, axis)
    return acc, poison


@triton.jit
def _maps(
    pointers, layout, tiles, s_flat, partial,
    NORM: tl.constexpr, DTYPE: tl.constexpr, MAP_DTYPE: tl.constexpr,
    FIELDS: tl.constexpr, UNITS: tl.constexpr, TAPS: tl.constexpr, FEEDBACK: tl.constexpr,
):  # fmt: skip
    """Lateral map of a tile of units, and its smallest, largest, sum, relative energy, number of non-finite."""
    tile = tl.program_id(0)
    row = layout + tl.load(tiles + 2 * tile) * FIELDS
    pair = pointers + tl.load(row) * 2
    byte = tl.load(row + 1)
    g = (tl.load(pair) + byte).to(tl.pointer_type(DTYPE))
    r = (tl.load(pair + 1) + byte).to(tl.pointer_type(DTYPE))
    unit = tl.load(tiles + 2 * tile + 1).to(tl.int32) + tl.arange(0, UNITS)
    units, columns = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    inside = unit < units
    i, j = (unit // columns).to(tl.int64), (unit % columns).to(tl.int64)
    at = i * tl.load(row + 4) + j * tl.load(row + 5)
    inner, entries = tl.load(row + 6), tl.load(row + 7).to(tl.int32)
    s = tl.zeros([UNITS], MAP_DTYPE)
    poison = tl.zeros([UNITS], MAP_DTYPE)
    if tl.load(row + 12) != 0:
        s, poison = _accumulate(
            s, poison, g, r, at, inner, entries, inside, True, NORM, DTYPE, MAP_DTYPE, TAPS, FEEDBACK
        )
    else:
        s, poison = _accumulate(
            s, poison, g, r, at, inner, entries, inside, False, NORM, DTYPE, MAP_DTYPE, TAPS, FEEDBACK
        )
    if NORM == "l2":
        s = tl.sqrt(s)
    s += poison
    map_at = tl.load(row + 8) + tl.load(row + 9) + i * tl.load(row + 10) + j * tl.load(row + 11)
    tl.store(s_flat + map_at, s, mask=inside)
    out = partial + 5 * tile
    largest = tl.max(tl.where(inside, s, 0.0), 0)
    relative = tl.where(inside & (s > 0), s / largest, 0.0)
    tl.store(out, tl.min(tl.where(inside, s, float("inf")), 0))
    tl.store(out + 1, largest)
    tl.store(out + 2, tl.sum(tl.where(inside, s, 0.0), 0))
    tl.store(out + 3, tl.sum(relative * relative, 0))
    tl.store(out + 4, tl.sum((inside & (s - s != 0.0)).to(MAP_DTYPE), 0))


@triton.jit
def _statistics(
    partial, spans, numbers, total, OPERATOR: tl.constexpr, MAP_DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Of one map: its largest entry, threshold (soft: the pool's energy), whether it has contrast, is finite."""
    span = spans + 3 * tl.program_id(0)
    first, last = tl.load(span).to(tl.int32), tl.load(span + 1).to(tl.int32)
    units = tl.load(span + 2).to(MAP_DTYPE)
    kappa, tolerance = tl.load(numbers + 1).to(MAP_DTYPE), tl.load(numbers + 2).to(MAP_DTYPE)
    low = tl.full([BLOCK], float("inf"), MAP_DTYPE)
    high = tl.zeros([BLOCK], MAP_DTYPE)
    sums = tl.zeros([BLOCK], MAP_DTYPE)
    wrong = tl.zeros([BLOCK], MAP_DTYPE)
    for t in range(first, last, BLOCK):
        tile = t + tl.arange(0, BLOCK)
        there = tile < last
        low = tl.minimum(low, tl.load(partial + 5 * tile, mask=there, other=float("inf")))
        high = tl.maximum(high, tl.load(partial + 5 * tile + 1, mask=there, other=0.0))
        sums += tl.load(partial + 5 * tile + 2, mask=there, other=0.0)
        wrong += tl.load(partial + 5 * tile + 4, mask=there, other=0.0)
    lowest, highest = tl.min(low, 0), tl.max(high, 0)
    finite = tl.sum(wrong, 0) == 0.0
    contrast = finite & (highest - lowest > tolerance * highest)
    if OPERATOR == "soft":
        energy = tl.zeros([BLOCK], MAP_DTYPE)
        for t in range(first, last, BLOCK):
            tile = t + tl.arange(0, BLOCK)
            there = tile < last
            share = tl.load(partial + 5 * tile + 1, mask=there, other=0.0) / highest
            energy += share * share * tl.load(partial + 5 * tile + 3, mask=there, other=0.0)
        threshold = kappa * kappa * tl.sum(energy, 0) / units
    elif OPERATOR == "pool":
        threshold = kappa * (tl.sum(sums, 0) / units) - tolerance * highest
    else:
        threshold = -tolerance * highest
    out = total + 4 * tl.program_id(0)
    tl.store(out, highest)
    tl.store(out + 1, threshold)
    tl.store(out + 2, contrast.to(MAP_DTYPE))
    tl.store(out + 3, finite.to(MAP_DTYPE))


@triton.jit
def _reflected(i, n, SIZE: tl.constexpr):
    """Index of numpy.pad(mode='reflect') for i, which lies less than SIZE outside of 0 to n - 1."""
    period = tl.maximum(2 * (n - 1), 1)
    i = tl.where(n == 1, 0, (i + period * SIZE) % period)
    return tl.minimum(i, 2 * (n - 1) - i)


@triton.jit
def _split_store(
    g, r, keep, at, inner, entries, inside, strength, finite,
    UNITS_LAST: tl.constexpr, DTYPE: tl.constexpr, MAP_DTYPE: tl.constexpr, TAPS: tl.constexpr,
    FEEDBACK: tl.constexpr, HELD_FIRST: tl.constexpr, SENT_FIRST: tl.constexpr,
):  # fmt: skip
    """Mask the entries of units; every operation rounds to DTYPE, as the eager path does."""
    axis: tl.constexpr = 0 if UNITS_LAST else 1
    if FEEDBACK:
        held_share = tl.expand_dims(((1.0 - keep) * strength).to(DTYPE).to(MAP_DTYPE), axis)
        sent_share = (1.0 - held_share).to(DTYPE).to(MAP_DTYPE)
    else:
        factor = tl.expand_dims((1.0 - (1.0 - keep) * strength).to(DTYPE).to(MAP_DTYPE), axis)
    for k0 in range(0, entries, TAPS):
        offsets, there = _entries(at, k0, inner, entries, inside, UNITS_LAST, TAPS)
        x = tl.load(g + offsets, mask=there, other=0.0).to(MAP_DTYPE)
        if FEEDBACK:
            before = tl.load(r + offsets, mask=there, other=0.0).to(MAP_DTYPE)
            x = (x + before).to(DTYPE).to(MAP_DTYPE)
            if HELD_FIRST:  # everything or at least half of an entry is held, or nothing
                held = (x * held_share).to(DTYPE).to(MAP_DTYPE)
            else:
                held = (x - (x * sent_share).to(DTYPE).to(MAP_DTYPE)).to(DTYPE).to(MAP_DTYPE)
                if not SENT_FIRST:
                    held = tl.where(held_share <= 0.5, held, (x * held_share).to(DTYPE).to(MAP_DTYPE))
            held = tl.where(finite, held, before)
            tl.store(r + offsets, held.to(DTYPE), mask=there)
            tl.store(g + offsets, (x - held).to(DTYPE), mask=there)
        else:
            tl.store(g + offsets, (x * factor).to(DTYPE), mask=there)


@triton.jit
def _apply(
    pointers, layout, tiles, s_flat, m_flat, total, numbers, kernel,
    OPERATOR: tl.constexpr, SIZE: tl.constexpr, HELD_FIRST: tl.constexpr, SENT_FIRST: tl.constexpr,
    DTYPE: tl.constexpr, MAP_DTYPE: tl.constexpr,
    FIELDS: tl.constexpr, UNITS: tl.constexpr, TAPS: tl.constexpr, FEEDBACK: tl.constexpr,
):  # fmt: skip
    """Keep map of a tile of units, applied to their entries in place."""
    tile = tl.program_id(0)
    row = layout + tl.load(tiles + 2 * tile) * FIELDS
    number, byte = tl.load(row), tl.load(row + 1)
    g = (tl.load(pointers + 2 * number) + byte).to(tl.pointer_type(DTYPE))
    r = (tl.load(pointers + 2 * number + 1) + byte).to(tl.pointer_type(DTYPE))
    unit = tl.load(tiles + 2 * tile + 1).to(tl.int32) + tl.arange(0, UNITS)
    units, columns = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    inside = unit < units
    i, j = (unit // columns).to(tl.int64), (unit % columns).to(tl.int64)
    at = i * tl.load(row + 4) + j * tl.load(row + 5)
    inner, entries = tl.load(row + 6), tl.load(row + 7).to(tl.int32)
    start = tl.load(row + 8)
    map_at = tl.load(row + 9) + i * tl.load(row + 10) + j * tl.load(row + 11)
    s = tl.load(s_flat + start + map_at, mask=inside, other=0.0)
    of_map = total + 4 * number
    highest, threshold = tl.load(of_map), tl.load(of_map + 1)
    contrast, finite = tl.load(of_map + 2) != 0.0, tl.load(of_map + 3) != 0.0
    if OPERATOR == "soft":
        energy = (s / highest) * (s / highest)
        keep = energy / (energy + threshold)
    elif OPERATOR == "pool":
        keep = (s >= threshold).to(MAP_DTYPE)
    else:
        map_rows, map_cols = tl.load(row + 13).to(tl.int32), tl.load(row + 14).to(tl.int32)
        y, x = (map_at // map_cols).to(tl.int32), (map_at % map_cols).to(tl.int32)
        response = tl.zeros([UNITS], MAP_DTYPE)
        for u in range(SIZE):
            line = start + _reflected(y + u - SIZE // 2, map_rows, SIZE).to(tl.int64) * map_cols
            for v in range(SIZE):
                column = _reflected(x + v - SIZE // 2, map_cols, SIZE)
                response += tl.load(kernel + u * SIZE + v) * tl.load(s_flat + line + column, mask=inside, other=0.0)
        keep = (response >= threshold).to(MAP_DTYPE)
    keep = tl.where(contrast, keep, 1.0)
    tl.store(m_flat + start + map_at, keep, mask=inside)
    strength = tl.load(numbers).to(MAP_DTYPE)
    if tl.load(row + 12) != 0:
        _split_store(
            g, r, keep, at, inner, entries, inside, strength, finite,
            True, DTYPE, MAP_DTYPE, TAPS, FEEDBACK, HELD_FIRST, SENT_FIRST,
        )  # fmt: skip
    else:
        _split_store(
            g, r, keep, at, inner, entries, inside, strength, finite,
            False, DTYPE, MAP_DTYPE, TAPS, FEEDBACK, HELD_FIRST, SENT_FIRST,
        )  # fmt: skip
