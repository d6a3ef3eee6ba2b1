"""What a loader hands to the training process."""

from typing import NamedTuple

from torch import Tensor

from gmscale.data.faults import Fault
from gmscale.data.images.device import Late
from gmscale.data.images.gpu import EncodedImages


class Batch(NamedTuple):
    """One micro-batch of N images of side S; `device.to_device` makes of it what a model takes."""

    images: Tensor | EncodedImages
    """uint8 [N, 3, S, S] in channels_last memory, or encoded where the device decodes."""
    labels: Tensor
    """int64 [N]"""
    late: Late | None = None
    """What is done to the images on the device, where anything is."""
    faults: tuple[Fault, ...] = ()
    """Samples that were bad and have been replaced."""
