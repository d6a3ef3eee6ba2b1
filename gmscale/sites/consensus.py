"""Agreement `consensus` of site `ddp`: one keep map for all ranks, and only what it keeps travels.

For every bucket the ranks average the lateral maps of what they have to send (gradient plus residual), derive the
keep maps from the mean, pack the kept units beside the bucket's unmasked parameters, all-reduce the packed values
and unpack them: mask(mean of s) * mean of gradients. What is not kept stays in each rank's residual.

* Whatever a rank decides (which units, packed or dense) follows from the reduced maps alone, so ranks never part.
  They compute it alike as long as they run on the same kind of device.
* Every collective is issued by the hook, in bucket order. The hook waits for the maps; only unpacking is left to
  the future's callback, which gloo runs on a thread of its own.
* A GPU is waited for once a bucket, to learn how much is kept.
* The reported time leaves out the wait for the maps (which is the network's) and the unpacking (another thread's).
* Stacked on a 16-bit compression hook, values and maps travel in 16 bits; maps always in bfloat16, since float16
  would lose small ones. Each rank holds back its own rounding errors.
"""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with the types themselves.
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gmscale.errors import UsageError
from gmscale.masking import GradientMask, lateral
from gmscale.masking.plan import MaskPlan
from gmscale.masking.units import Part, parts_of
from gmscale.sites.attachment import _Mean
from gmscale.sites.ddp import WIRE_DTYPES, DDPAttachment, Hook, gradients_of, let_gloo_finish_at_exit
from gmscale.sites.packing import KeptUnits, Run, kept_index
from gmscale.sites.selection import Selection

_FEWEST_ENTRIES = 512  # smaller parameters travel whole: packing them would cost more than it saves
_LARGEST_SHARE = 0.9  # of a parameter's entries; with more kept, packing would not pay


class _Masked(NamedTuple):
    """One masked parameter of a bucket, in this step."""

    name: str
    gradient: Tensor
    start: int
    """Of its entries in the bucket's buffer."""
    residual: Tensor | None


class _Decision(NamedTuple):
    """What becomes of a masked parameter: the same on all ranks."""

    m: Tensor
    finite: bool
    dense: str | None
    """Why all of it travels; None: only its kept units."""
    parts: tuple[Part, ...]
    counts: tuple[int, ...]
    """Kept units of each part."""


class _Wire(NamedTuple):
    """What the all-reduce gets, and what turns its result into a mean."""

    values: Tensor
    pieces: tuple[Run | KeptUnits, ...]
    """Where the values belong; none where `values` is the bucket's buffer itself."""
    scale: float


@dataclass
class _Bucket:
    """What is kept from step to step for one bucket."""

    room: Tensor | None = None
    wire: _Wire | None = None
    """Of the last step, because a callback on another CUDA stream may still read it when the hook has returned."""

    def room_for(self, entries: int, like: Tensor) -> Tensor:
        """Return a flat tensor with arbitrary contents."""
        if self.room is None or len(self.room) < entries:
            self.room = like.new_empty(entries + entries // 8)
        return self.room[:entries]


class ConsensusAttachment(DDPAttachment):
    """A mask that all ranks share, in a DDP communication hook; masks once per optimizer step."""

    agreement = "consensus"

    def __init__(self, mask: GradientMask, selection: Selection | None, inner: Hook, rank: int) -> None:
        super().__init__(mask, selection, inner, rank=0)  # the random operator draws alike on all ranks
        self._wire_dtype = WIRE_DTYPES[inner]
        self._buckets: dict[tuple[int, ...], _Bucket] = {}
        self._always_dense = _why_never_packed(mask)

    def hook(self, state: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Agree on the bucket's keep maps and reduce what they keep."""
        buffer = bucket.buffer()
        group = state or dist.group.WORLD
        assert group is not None, "a DDP model has a process group"
        with torch.no_grad():
            masked = self._masked(bucket) if self._active and self._strength else []
            if not masked:
                return super().hook(state, bucket)
            if buffer.device.type == "cpu":
                let_gloo_finish_at_exit()
            self._before_mask([(parameter.name, parameter.gradient) for parameter in masked])
            with self._clock.running(buffer.device, 0.0):
                plan = self._plan([p.name for p in masked], [p.gradient for p in masked])
                maps = self._own_maps(plan, masked)
                mean = maps.div(group.size()).to(self._map_dtype(maps, buffer.dtype))
            dist.all_reduce(mean, group=group, async_op=True).wait()
            with self._clock.running(buffer.device, 1.0 if bucket.is_last() else 0.0):
                decisions = self._decide(plan, masked, mean.to(maps.dtype))
                self._see(masked, plan.views(maps), decisions)
                memory = self._memory(bucket)
                wire = memory.wire = self._pack(bucket, memory, masked, decisions, group.size())
            if self._observe:
                self._bytes.add(mean.nbytes + wire.values.nbytes, bucket)
            future = dist.all_reduce(wire.values, group=group, async_op=True).get_future()
        return future.then(self._unpack(buffer, masked, decisions, wire))

    # -- one map for all ranks --------------------------------------------------------------------------------
    def _masked(self, bucket: dist.GradBucket) -> list[_Masked]:
        start, masked = 0, []
        for parameter, gradient in gradients_of(bucket):
            name = self._name_of(parameter)
            if name is not None and not self.mask.passes(gradient.shape):
                masked.append(_Masked(name, gradient, start, self._residual(name, gradient)))
            start += parameter.numel()
        return masked

    def _memory(self, bucket: dist.GradBucket) -> _Bucket:
        key = tuple(id(parameter) for parameter in bucket.parameters())
        if key not in self._buckets:  # DDP has rebuilt its buckets: forget those that these parameters were in
            self._buckets = {k: memory for k, memory in self._buckets.items() if not set(k) & set(key)}
            self._buckets[key] = _Bucket()
        return self._buckets[key]

    def _own_maps(self, plan: MaskPlan, masked: list[_Masked]) -> Tensor:
        """Add the residuals to the gradients; return this rank's lateral maps of the sums, flat."""
        maps = plan.lateral_maps([p.gradient for p in masked], [p.residual for p in masked])
        for parameter, s in zip(masked, plan.views(maps), strict=True):
            if self._wire_dtype == torch.float16 and parameter.gradient.dtype != torch.float16:
                # What float16 cannot carry counts as not finite, on all ranks: no residual may take part in it.
                largest = parameter.gradient.abs().amax()
                s += torch.where(largest > torch.finfo(torch.float16).max, math.inf, 0.0)
        return maps

    def _map_dtype(self, maps: Tensor, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if (self._wire_dtype or dtype).itemsize == 2 else maps.dtype

    def _decide(self, plan: MaskPlan, masked: list[_Masked], mean: Tensor) -> list[_Decision]:
        generators = [self._generator(p.name, p.gradient.device) for p in masked]
        keep_maps = plan.views(plan.keep_maps(mean, generators))
        parts = [parts_of(p.gradient.shape, p.gradient.stride(), self.mask.block) or () for p in masked]
        facts = []
        for s, m, of_gradient in zip(plan.views(mean), keep_maps, parts, strict=True):
            facts += [s.amax().double(), *(part.of_map(m).count_nonzero().double() for part in of_gradient)]
        numbers = iter(torch.stack(facts).tolist())  # the one time that the host waits for a GPU
        return [
            self._decision(p.gradient, m, of_gradient, next(numbers), [int(next(numbers)) for _ in of_gradient])
            for p, m, of_gradient in zip(masked, keep_maps, parts, strict=True)
        ]

    def _decision(
        self, gradient: Tensor, m: Tensor, parts: tuple[Part, ...], largest: float, counts: list[int]
    ) -> _Decision:
        finite, share = math.isfinite(largest), 1.0
        if largest == 0:  # all ranks have nothing to send, though a map without contrast inhibits nothing
            counts = [0] * len(parts)
        if parts:
            share = (
                sum(n * part.size[part.reduced] for n, part in zip(counts, parts, strict=True)) / gradient.numel()
            )
        dense = None
        if not finite:
            dense = "not finite"
        elif self._always_dense or self._strength != 1:
            dense = self._always_dense or f"strength {self._strength:g}"
        elif not parts:
            dense = "memory layout"
        elif gradient.numel() < _FEWEST_ENTRIES:
            dense = "few entries"
        elif share > _LARGEST_SHARE:
            dense = "no contrast" if share == 1 else f"{share:.0%} kept"
        return _Decision(m, finite, dense, parts, tuple(counts))

    def _see(self, masked: list[_Masked], maps: list[Tensor], decisions: list[_Decision]) -> None:
        """Note for the report what travels whole and what the common mask keeps of this rank's gradients."""
        if not self._observe:
            return
        for parameter, s, decision in zip(masked, maps, decisions, strict=True):
            if decision.dense:
                self._dense[parameter.name] = decision.dense
            kept = self.mask.kept(parameter.gradient, s, decision.m)
            self._kept.setdefault(parameter.name, _Mean()).add(kept.entries, kept.energy)

    # -- what travels -----------------------------------------------------------------------------------------
    def _pack(
        self,
        bucket: dist.GradBucket,
        memory: _Bucket,
        masked: list[_Masked],
        decisions: list[_Decision],
        world_size: int,
    ) -> _Wire:
        """Split every gradient into what is sent and what is held; return what is sent, ready to be summed."""
        buffer, end = bucket.buffer(), 0
        pieces: list[Run | KeptUnits] = []
        sent = []
        for parameter, decision in zip(masked, decisions, strict=True):
            gradient = parameter.gradient
            if decision.dense is None:
                if parameter.start > end:
                    pieces.append(Run(buffer[end : parameter.start]))
                end = parameter.start + gradient.numel()
                pieces += self._kept_units(parameter, decision)
            elif not self.mask.rescale:  # which needs the norm of the mean: the callback masks
                self._mask_dense(parameter, decision, _headroom(world_size))
            if self._watcher is not None:
                sent.append((parameter.name, self._sent(parameter, decision)))
        self._after_mask(sent)
        if end < buffer.numel():
            pieces.append(Run(buffer[end:]))
        wire = self._load(memory, buffer, tuple(pieces), world_size)
        for parameter, decision in zip(masked, decisions, strict=True):
            if decision.dense is None:
                parameter.gradient.zero_()  # the callback puts the kept units back
        return wire

    def _kept_units(self, parameter: _Masked, decision: _Decision) -> list[KeptUnits]:
        gradient, residual = parameter.gradient, parameter.residual
        if residual is not None:
            residual.copy_(gradient)  # what is kept is taken out of it later
        return [
            KeptUnits(gradient, part, kept_index(part.of_map(decision.m), count), residual)
            for part, count in zip(decision.parts, decision.counts, strict=True)
            if count
        ]

    def _mask_dense(self, parameter: _Masked, decision: _Decision, headroom: float) -> None:
        gradient, residual = parameter.gradient, parameter.residual
        assert self._strength is not None
        self.mask.apply_map_(
            gradient, decision.m, strength=self._strength, residual=residual, finite=decision.finite
        )
        if residual is not None and decision.finite and self._rounds(gradient.dtype):
            # Twice, because sent + held has to be exact: the first difference rounds where little is sent, but
            # what is left after taking it off is exact and still fits the 16 bits.
            total = gradient + residual
            residual.copy_(_wide(total) - _wide(self._narrow(gradient, headroom)) * headroom)
            torch.sub(total, residual, out=gradient)

    def _sent(self, parameter: _Masked, decision: _Decision) -> Tensor:
        """Return what this rank sends of a gradient, dense and up to the rounding of 16 bits."""
        gradient = parameter.gradient
        if decision.dense is None:
            return gradient * lateral.expand(decision.m, gradient, self.mask.block)
        if self.mask.rescale:
            assert self._strength is not None
            gradient = gradient.clone()
            self.mask.apply_map_(gradient, decision.m, strength=self._strength, residual=None, finite=True)
        return gradient

    def _load(self, memory: _Bucket, buffer: Tensor, pieces: tuple[Run | KeptUnits, ...], world_size: int) -> _Wire:
        """Copy the pieces into one flat tensor in the precision of the wire, hold back what that loses."""
        rounds, headroom = self._rounds(buffer.dtype), _headroom(world_size)
        entries = sum(piece.entries for piece in pieces)
        if len(pieces) == 1 and entries == buffer.numel() and not rounds:
            values, pieces = buffer, ()  # all of the bucket travels
        else:
            values = memory.room_for(max(1, entries), buffer)  # ranks that keep nothing still have to meet
            values[:1].zero_()
            for piece, segment in _segments(pieces, values):
                piece.take(segment)
        narrow = self._narrow(values, headroom) if rounds else values
        if self.mask.error_feedback:
            if rounds:
                values.copy_(_wide(values) - _wide(narrow) * headroom)
            for piece, segment in _segments(pieces, values):
                if isinstance(piece, KeptUnits):
                    piece.hold(segment if rounds else None)
        if not rounds:
            narrow.div_(headroom if narrow.itemsize == 2 else world_size)
        return _Wire(narrow, pieces, headroom / world_size if narrow.itemsize == 2 else 1.0)

    def _unpack(
        self, buffer: Tensor, masked: list[_Masked], decisions: list[_Decision], wire: _Wire
    ) -> Callable[[torch.futures.Future[list[Tensor]]], Tensor]:
        """Return the callback that makes the sum over ranks the bucket's mean gradient."""

        @torch.no_grad()
        def unpack(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            values = future.value()[0].to(buffer.dtype)
            if wire.scale != 1:
                values.mul_(wire.scale)
            for piece, segment in _segments(wire.pieces, values):
                piece.put(segment)
            if self.mask.rescale:
                for parameter, decision in zip(masked, decisions, strict=True):
                    assert self._strength is not None
                    self.mask.apply_map_(
                        parameter.gradient, decision.m, strength=self._strength, residual=None, finite=True
                    )
            return buffer

        return unpack

    def _rounds(self, dtype: torch.dtype) -> bool:
        return self._wire_dtype not in (None, dtype)

    def _narrow(self, values: Tensor, headroom: float) -> Tensor:
        """Return values in the 16 bits of the wire, divided by a power of two against overflow of their sum."""
        return torch.div(values, headroom, out=torch.empty_like(values, dtype=self._wire_dtype))


def check_hook(hook: Hook, hook_state: object) -> None:
    """Raise UsageError if consensus cannot do what this communication hook does."""
    if hook not in WIRE_DTYPES:
        name = getattr(hook, "__name__", repr(hook))
        raise UsageError(
            f"mask.agreement 'consensus' packs what travels itself and cannot run hook {name}; "
            f"it stacks with {', '.join(h.__name__ for h in WIRE_DTYPES)} of torch's default_hooks"
        )
    if hook_state is not None and not isinstance(hook_state, dist.ProcessGroup):
        raise UsageError(f"hook_state is {type(hook_state).__name__}; consensus expects a process group or None")


def _why_never_packed(mask: GradientMask) -> str | None:
    operator = mask.random_like if mask.operator == "random" else mask.operator
    if mask.rescale:
        return "rescale"
    return "soft gate" if operator == "pool" and mask.gate == "soft" else None


def _headroom(world_size: int) -> float:
    """Return the smallest power of two from `world_size` on: dividing by it loses nothing."""
    return 2.0 ** math.ceil(math.log2(world_size))


def _segments(pieces: tuple[Run | KeptUnits, ...], values: Tensor) -> Iterator[tuple[Run | KeptUnits, Tensor]]:
    start = 0
    for piece in pieces:
        yield piece, values[start : start + piece.entries]
        start += piece.entries


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
