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
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from gmscale.errors import UsageError
from gmscale.masking import GradientMask
from gmscale.sites.attachment import Attachment
from gmscale.sites.selection import Selection, Touched, select

Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]


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
        if bucket.buffer().device.type == "cpu":
            _let_gloo_finish_at_exit()
        if self._active:
            share = 1.0 if bucket.is_last() else 0.0
            with torch.no_grad(), self._clock.running(bucket.buffer().device, share):
                named = ((self._name_of(parameter), gradient) for parameter, gradient in _gradients(bucket))
                self._mask_all([(name, gradient) for name, gradient in named if name is not None])
            if bucket.is_last() and not self.touched:
                raise UsageError("the mask touches nothing: no parameter of this model has two dimensions or more")
        return self._inner(state, bucket)

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
    attachment = DDPAttachment(mask, select(model.module, mask), hook, dist.get_rank(model.process_group))
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
    return DDPAttachment(mask, None, hook, rank=0).hook


@cache
def _let_gloo_finish_at_exit() -> None:
    # gloo's threads call the hook's Python callbacks and hold them a moment longer; if the interpreter ends first
    # the process aborts (without this in 9 of 36 runs of a short script on torch 2.14, with it in none of 30).
    # Sleeping lets them have the interpreter lock.
    atexit.register(time.sleep, 0.2)


def _gradients(bucket: dist.GradBucket) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter, its gradient as a view of the bucket's buffer, in the parameter's own strides)."""
    buffer, offset = bucket.buffer(), 0
    for parameter in bucket.parameters():
        yield parameter, buffer.as_strided(parameter.shape, parameter.stride(), buffer.storage_offset() + offset)
        offset += parameter.numel()
