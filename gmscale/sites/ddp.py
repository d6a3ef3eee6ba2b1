"""Site `ddp`: the mask in DistributedDataParallel's communication hook, before the all-reduce.

Each rank masks its own locally accumulated gradient once a step (agreement `local`), then the hook that would
have run without the mask does its work. What makes that survive DDP's ways:

* buckets are rebuilt after the first steps, so state is kept by parameter, never by bucket;
* the views that `GradBucket.gradients()` returns ignore the parameters' memory format, so they are cut out of
  the buffer with the parameter's own strides;
* `no_sync` steps do not call the hook; the sync step sees the accumulated sum.
"""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with the types themselves.
import atexit
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.nn.parallel import DistributedDataParallel

from gmscale.errors import UsageError
from gmscale.masking import GradientMask
from gmscale.sites.attachment import Attachment, MaskReport
from gmscale.sites.selection import Selection, Touched, select

Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]

# Precision in which torch's own hooks let a bucket travel; None: the bucket's.
WIRE_DTYPES: dict[Hook, torch.dtype | None] = {
    allreduce_hook: None,
    fp16_compress_hook: torch.float16,
    bf16_compress_hook: torch.bfloat16,
}


class DDPAttachment(Attachment):
    """A mask in a DDP communication hook; masks once per optimizer step."""

    site = "ddp"
    timing = "once per step"

    def __init__(self, mask: GradientMask, selection: Selection | None, inner: Hook, rank: int) -> None:
        super().__init__(mask, selection, rank)
        self._inner = inner
        self._ddp: DistributedDataParallel | None = None
        self._adopts = selection is None
        self._seen: set[int] = set()
        self._bytes = _Bytes()
        self._dense: dict[str, str] = {}

    def register(self, ddp: DistributedDataParallel, hook_state: Any) -> None:
        """Take the communication-hook slot of `ddp`; raise UsageError if it is taken."""
        try:
            ddp.register_comm_hook(hook_state, self.hook)
        except RuntimeError as error:
            raise UsageError(
                "this DDP model has a communication hook already (DDP allows one, and mixed_precision= takes it); "
                "instead of registering it, pass it to attach(model, mask, site='ddp', hook=..., hook_state=...)"
            ) from error
        self._ddp = ddp

    def hook(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Mask the bucket's gradients in place and hand it to the wrapped hook."""
        buffer = bucket.buffer()
        if buffer.device.type == "cpu":
            let_gloo_finish_at_exit()
        if self._active:
            share = 1.0 if bucket.is_last() else 0.0
            with torch.no_grad(), self._clock.running(buffer.device, share):
                named = ((self._name_of(parameter), gradient) for parameter, gradient in gradients_of(bucket))
                self._mask_all([(name, gradient) for name, gradient in named if name is not None])
            if bucket.is_last() and not self.touched:
                raise UsageError("the mask touches nothing: no parameter of this model has two dimensions or more")
        if self._observe and self._inner in WIRE_DTYPES:
            self._bytes.add(buffer.numel() * (WIRE_DTYPES[self._inner] or buffer.dtype).itemsize, bucket)
        return self._inner(state, bucket)

    def report(self) -> MaskReport:
        wire_bytes, dense_bytes = self._bytes.a_step()
        report = replace(
            super().report(), wire_bytes=wire_bytes, dense_bytes=dense_bytes, dense_parameters=self._dense
        )
        self._bytes, self._dense = _Bytes(), {}
        return report

    def no_sync(self) -> AbstractContextManager[None]:
        """DDP's own no_sync."""
        assert self._ddp is not None, "mask_wrapper: use the no_sync of your DDP model"
        return self._ddp.no_sync()

    def _name_of(self, parameter: Tensor) -> str | None:
        if self._adopts and id(parameter) not in self._seen:
            self._adopt(parameter)
        return self._names.get(id(parameter))

    def _adopt(self, parameter: Tensor) -> None:
        """Without a model (mask_wrapper) decide by shape: weights are what has several output channels."""
        self._seen.add(id(parameter))
        is_weight = parameter.ndim >= 2 and parameter.shape[0] > 1
        if is_weight or (parameter.ndim == 1 and self.mask.mask_1d):
            name = f"parameter{len(self._seen) - 1}"
            self._names[id(parameter)] = name
            self.touched = (*self.touched, Touched.of(name, parameter, self.mask))


def attach_ddp(model: nn.Module, mask: GradientMask, hook: Hook | None, hook_state: Any) -> DDPAttachment:
    """Attach `mask` to a DDP model; see `gmscale.attach`."""
    if not isinstance(model, DistributedDataParallel):
        raise UsageError(
            f"site 'ddp' needs a model wrapped in torch's DistributedDataParallel, not {type(model).__name__}; "
            f"wrap it first, or use site='single' for one process"
        )
    if hook is None:
        hook, hook_state = allreduce_hook, model.process_group
    elif mask.agreement == "consensus" and hook_state is None:
        hook_state = model.process_group
    kind = _attachment_class(mask, hook, hook_state)
    attachment = kind(mask, select(model.module, mask), hook, dist.get_rank(model.process_group))
    attachment.register(model, hook_state)
    return attachment


def mask_wrapper(hook: Hook, mask: GradientMask) -> Hook:
    """Return a communication hook that masks each bucket and then runs `hook` on it.

    Stacks with torch's own hooks: `ddp.register_comm_hook(None, mask_wrapper(fp16_compress_hook, mask))`.
    Mask first, compress after: wrap the mask around the compression, never the reverse. The wrapper does not
    know parameter names (no include or exclude) and its error feedback is not saved; for both use
    `attach(ddp, mask, site="ddp", hook=hook, hook_state=state)`.
    """
    if mask.include or mask.exclude:
        raise UsageError(
            "mask_wrapper does not know parameter names; use attach(..., hook=...) with include or exclude"
        )
    if mask.needs_time:
        raise UsageError(
            "mask_wrapper is not told the step; use attach(..., hook=...) with a schedule or random mask"
        )
    return _attachment_class(mask, hook, None)(mask, None, hook, rank=0).hook


def _attachment_class(mask: GradientMask, hook: Hook, hook_state: Any) -> type[DDPAttachment]:
    if mask.agreement == "local":
        return DDPAttachment
    from gmscale.sites import consensus  # which builds on this module

    consensus.check_hook(hook, hook_state)
    return consensus.ConsensusAttachment


class _Bytes:
    """Bytes that this rank hands to all-reduces, counted where they are issued."""

    def __init__(self) -> None:
        self._wire = self._dense = self._steps = 0

    def add(self, wire: int, bucket: dist.GradBucket) -> None:
        self._wire += wire
        self._dense += bucket.buffer().nbytes
        self._steps += bucket.is_last()

    def a_step(self) -> tuple[float, float] | tuple[None, None]:
        """Return (handed over, what plain DDP would); None where the hook does not say what it sends."""
        return (self._wire / self._steps, self._dense / self._steps) if self._steps else (None, None)


@cache
def let_gloo_finish_at_exit() -> None:
    # gloo's threads call the hook's Python callbacks and hold them a moment longer; if the interpreter ends first
    # the process aborts (without this in 9 of 36 runs of a short script on torch 2.14, with it in none of 30).
    # Sleeping lets them have the interpreter lock.
    atexit.register(time.sleep, 0.2)


def gradients_of(bucket: dist.GradBucket) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter, its gradient as a view of the bucket's buffer, in the parameter's own strides)."""
    buffer, offset = bucket.buffer(), 0
    for parameter in bucket.parameters():
        yield parameter, buffer.as_strided(parameter.shape, parameter.stride(), buffer.storage_offset() + offset)
        offset += parameter.numel()
