"""Site `fsdp2`: each rank masks its own whole weight gradients before FSDP2's reduce-scatter.

FSDP2 (`torch.distributed.fsdp.fully_shard`) computes with unsharded parameters that exist from a module's
all-gather to its resharding, reduces their gradients, and puts only the shards of the mean into `p.grad`: hooks
on the parameters that the user sees never fire, or fire after the reduction. But the unsharded parameter is one
and the same object all through training. A forward pre-hook, which runs behind FSDP2's own, meets it right after
the all-gather and gives it a tensor hook once; that hook sees the whole local gradient in the dtype of the
backward pass, on its way into `.grad`. What makes this survive FSDP2's ways:

* the forward pre-hook also runs at recomputation (activation checkpointing) and at every later step, so it looks
  at the parameter's identity before it hooks;
* `set_requires_gradient_sync(False)` keeps gradients in places that only FSDP2 knows (in bf16 as fp32 sums), so
  every micro-batch is masked by itself. Reentrant checkpointing of a module that is used twice runs a backward
  pass a use, and each is masked by itself;
* an incoming gradient may share memory with another one, so a copy is masked; it is contiguous, as the parameters
  under `fully_shard` are, and `.grad` takes it over.

Error feedback holds a whole gradient on each rank, in the dtype of the gradient: unlike everything else of FSDP2
it is not divided by the number of ranks.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from gmscale.errors import UsageError
from gmscale.masking import GradientMask
from gmscale.sites.attachment import Attachment
from gmscale.sites.selection import Selection, select


class _Place(NamedTuple):
    """Where a masked parameter is registered; FSDP2 swaps shard and whole parameter there."""

    name: str
    owner: nn.Module
    attribute: str


class FSDP2Attachment(Attachment):
    """A mask in tensor hooks on FSDP2's unsharded parameters; masks every micro-batch.

    A module under `fully_shard` has to be run by calling it: methods declared by `register_fsdp_forward_method`
    pass no forward pre-hook, and a parameter that only they use is not masked (a warning says so).
    """

    site = "fsdp2"
    timing = "each micro-batch"

    def __init__(
        self, mask: GradientMask, selection: Selection, rank: int, places: dict[nn.Module, list[_Place]]
    ) -> None:
        super().__init__(mask, selection, rank)
        self._places = places
        self._hooked: dict[str, tuple[Tensor, RemovableHandle]] = {}
        self._share = 1 / len(selection.parameters)
        self._last_micro_batch = True
        self._unseen_warned = False
        self._handles = [
            module.register_forward_pre_hook(self._before_forward) for module, own in places.items() if own
        ]

    def at(
        self, step: int, total_steps: int | None = None, *, grad_scale: float = 1.0, observe: bool = True
    ) -> None:
        if self._step is not None and step != self._step:
            self._warn_of_unseen()
        super().at(step, total_steps, grad_scale=grad_scale, observe=observe)

    at.__doc__ = Attachment.at.__doc__

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context of the micro-batches before the last one of a step: each is masked, none is reduced."""
        before, self._last_micro_batch = self._last_micro_batch, False
        self._set_sync(False)
        try:
            yield
        finally:
            self._last_micro_batch = before
            self._set_sync(before)

    def detach(self) -> None:
        super().detach()
        for handle in (*self._handles, *(handle for _, handle in self._hooked.values())):
            handle.remove()
        self._hooked = {}

    def _set_sync(self, sync: bool) -> None:
        for module in self._places:
            assert isinstance(module, FSDPModule)
            module.set_requires_gradient_sync(sync, recurse=False)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _before_forward(self, module: nn.Module, args: Any) -> None:
        for name, owner, attribute in self._places[module]:
            parameter = getattr(owner, attribute)
            known = self._hooked.get(name)
            if (known is not None and known[0] is parameter) or not parameter.requires_grad:
                continue
            if isinstance(parameter, DTensor):
                raise UsageError(
                    f"site 'fsdp2': {name} is split over ranks even after the all-gather (tensor parallelism?), "
                    f"and the mask needs whole gradients; leave it alone with mask.exclude"
                )
            if known is not None:
                known[1].remove()
            self._hooked[name] = parameter, parameter.register_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor | None], Tensor | None]:
        def hook(gradient: Tensor | None) -> Tensor | None:
            untouched = self._strength == 0 and name not in self._residuals and self._watcher is None
            if gradient is None or untouched:
                return gradient
            share = self._share if self._last_micro_batch else 0.0
            with torch.no_grad(), self._clock.running(gradient.device, share):
                masked = gradient.clone(memory_format=torch.contiguous_format)
                self._mask_all([(name, masked)])
            return masked

        return hook

    def _warn_of_unseen(self) -> None:
        unseen = [touched.name for touched in self.touched if touched.name not in self._hooked]
        if unseen and not self._unseen_warned:
            self._unseen_warned = True
            warnings.warn(
                f"{len(unseen)} of {len(self.touched)} parameters were never masked so far (first: {unseen[0]}): "
                f"they are frozen, or the forward pass did not call their module under fully_shard",
                stacklevel=3,
            )


def attach_fsdp2(model: nn.Module, mask: GradientMask) -> FSDP2Attachment:
    """Attach `mask` to a model on which `fully_shard` was called; see `gmscale.attach`."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UsageError(
            f"site 'fsdp2' needs a model under torch.distributed.fsdp.fully_shard, not a {type(model).__name__} "
            f"without; call fully_shard(model) first, or use site='ddp' for DistributedDataParallel"
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward one may have left parameters whole
    selection = select(model, mask)
    return FSDP2Attachment(mask, selection, dist.get_rank(), _places(model, selection))


def _places(model: nn.Module, selection: Selection) -> dict[nn.Module, list[_Place]]:
    """Return the masked parameters that each module under `fully_shard` gathers."""
    names = {id(parameter): name for name, parameter in selection.parameters.items()}
    places: dict[nn.Module, list[_Place]] = {}
    sharded: dict[str, nn.Module] = {}  # module name -> the nearest module under fully_shard that contains it
    for path, module in model.named_modules():
        parent = sharded.get(path.rpartition(".")[0]) if path else None
        is_sharded = isinstance(module, FSDPModule)
        nearest = module if is_sharded else parent
        if nearest is not None:
            sharded[path] = nearest
            places.setdefault(nearest, [])
        for attribute, parameter in module.named_parameters(recurse=False):
            name = names.pop(id(parameter), None)
            if name is None:
                continue
            if nearest is None or not isinstance(parameter, DTensor):
                raise UsageError(
                    f"site 'fsdp2': {name} is not sharded, so FSDP2 would not reduce its masked gradient; "
                    f"call fully_shard on the whole model, or leave it alone with mask.exclude"
                )
            places[nearest].append(_Place(name, module, attribute))
    return places
