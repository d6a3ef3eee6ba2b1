"""gmscale: train image models at scale with a gradient mask.

Two lines in any DDP script::

    import gmscale
    gmscale.attach(ddp_model, gmscale.GradientMask(strength=0.5), site="ddp")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmscale.masking import GradientMask
    from gmscale.sites import Attachment, attach, mask_wrapper

__version__ = "0.1.0"
__all__ = ["Attachment", "GradientMask", "__version__", "attach", "mask_wrapper"]

_HOME = {
    "GradientMask": "gmscale.masking",
    "Attachment": "gmscale.sites",
    "attach": "gmscale.sites",
    "mask_wrapper": "gmscale.sites",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `gmscale report` and `gmscale --help` do not wait for torch.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gmscale' has no attribute {name!r}")
