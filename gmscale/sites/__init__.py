"""Where a mask meets a gradient."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmscale.errors import UsageError, check_choice
from gmscale.masking import GradientMask
from gmscale.sites.attachment import Attachment, MaskReport
from gmscale.sites.ddp import Hook, attach_ddp, mask_wrapper
from gmscale.sites.probe import GradientProbe, QualityReport
from gmscale.sites.single import attach_single

__all__ = [
    "PARAMETER_SITES",
    "SITES",
    "Attachment",
    "GradientProbe",
    "MaskReport",
    "QualityReport",
    "attach",
    "mask_wrapper",
]

PARAMETER_SITES = ("ddp", "deepspeed", "fsdp2", "single")
SITES = (*PARAMETER_SITES, "output")


def attach(
    model: nn.Module,
    mask: GradientMask,
    site: str = "ddp",
    *,
    hook: Hook | None = None,
    hook_state: Any = None,
    layers: str | Sequence[str] | None = None,
    sigmas: Mapping[str, float] | Sequence[float] | None = None,
) -> Attachment:
    """Attach a gradient mask to a model and return the Attachment.

    Parameter sites mask weight gradients: `ddp`, the communication hook of a DistributedDataParallel model,
    before the all-reduce; `deepspeed`, a DeepSpeed engine or the model it will be made of, before ZeRO's
    reduction; `fsdp2`, a model under `fully_shard`, before the reduce-scatter; `single`, one process. `output`
    masks the gradients of layer outputs during backpropagation, together with a parameter site or alone.

    `hook` and `hook_state` (ddp) name the communication hook that runs after the mask, by default the plain
    all-reduce. `layers` and `sigmas` (output) choose the layers and the width of the kernel for each. Raises
    UsageError (a ValueError) for an unknown site, a model the site cannot serve, or a mask that touches nothing
    (law 8).
    """
    check_choice(site, SITES, "site")
    if hook is not None and site != "ddp":
        raise UsageError(f"hook belongs to site 'ddp'; site {site!r} has no communication hook")
    if site != "output" and (layers is not None or sigmas is not None):
        raise UsageError(f"layers and sigmas belong to site 'output'; site {site!r} takes mask.include and exclude")
    if mask.agreement != "local" and site != "ddp":
        raise UsageError(f"mask.agreement {mask.agreement!r} needs site 'ddp'; site {site!r} has only 'local'")
    if site == "ddp":
        return attach_ddp(model, mask, hook, hook_state)
    if site == "deepspeed":
        from gmscale.sites.deepspeed import attach_deepspeed

        return attach_deepspeed(model, mask)
    if site == "fsdp2":
        from gmscale.sites.fsdp2 import attach_fsdp2

        return attach_fsdp2(model, mask)
    if site == "output":
        from gmscale.sites.output import attach_output

        return attach_output(model, mask, layers, sigmas)
    if isinstance(model, DistributedDataParallel):
        raise UsageError("site 'single' would mask after the all-reduce of this DDP model; use site='ddp'")
    return attach_single(model, mask)
