"""Where a mask meets a gradient."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmscale.errors import UsageError, check_choice
from gmscale.masking import GradientMask
from gmscale.sites.attachment import Attachment, MaskReport
from gmscale.sites.ddp import Hook, attach_ddp, mask_wrapper
from gmscale.sites.single import attach_single

__all__ = ["SITES", "Attachment", "MaskReport", "attach", "mask_wrapper"]

SITES = ("ddp", "single")


def attach(
    model: nn.Module, mask: GradientMask, site: str = "ddp", *, hook: Hook | None = None, hook_state: Any = None
) -> Attachment:
    """Attach a gradient mask to a model and return the Attachment.

    Sites: `ddp`, the communication hook of a DistributedDataParallel model (masks each rank's gradient before
    the all-reduce), and `single`, a model trained in one process. `hook` and `hook_state` name the DDP
    communication hook that runs after the mask (default: the plain all-reduce). Raises UsageError (a
    ValueError) for an unknown site, a model the site cannot serve, or a mask that touches nothing (law 8).
    """
    check_choice(site, SITES, "site")
    if site == "ddp":
        return attach_ddp(model, mask, hook, hook_state)
    if isinstance(model, DistributedDataParallel):
        raise UsageError("site 'single' would mask after the all-reduce of this DDP model; use site='ddp'")
    if hook is not None:
        raise UsageError("hook belongs to site 'ddp'; site 'single' has no communication hook")
    return attach_single(model, mask)
