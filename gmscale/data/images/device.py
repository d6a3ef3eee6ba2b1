"""What happens to a batch on the device: bytes become normalised floats, are mixed and partly erased.

Bytes travel from the loader to the device, a quarter of what floats would take, and with them the few numbers
that were drawn for them in the loader's processes. Nothing here waits for a GPU, except where it decodes.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmscale.data.config import LUMA, AugmentConfig, DataConfig
from gmscale.data.images.erasing import Erasure, draw_erasure, erase
from gmscale.data.images.guided import Guided, draw_guided
from gmscale.data.images.mixing import Mix, draw_mix, mix_images, mix_labels

if TYPE_CHECKING:
    from gmscale.data.batch import Batch

Channels = tuple[float, ...]

# Numbers that a CPU works on at a time, so that they stay in its cache from one step to the next.
_BLOCK = 2**19


class Late(NamedTuple):
    """What was drawn for a micro-batch to be done on the device: small tensors on the CPU."""

    mix: Mix | None
    erasure: Erasure | None
    guided: Guided | None = None
    """For guided.guide, after everything else: it may need the model."""


def draw_late(augment: AugmentConfig, image_size: int, seeds: NDArray[np.uint64], epoch: int) -> Late | None:
    """Draw mixing, erasing and guiding for one micro-batch from its samples' seeds [N]; None if there is none.

    With mixing on, N is even (see mixing.check_mixing).
    """
    may_mix = not 0 < augment.mix_off_epoch <= epoch
    mix = draw_mix(augment, image_size, seeds) if augment.mixes and may_mix else None
    erasure = draw_erasure(augment, image_size, seeds) if augment.erase_prob > 0 else None
    guided = draw_guided(augment, image_size, seeds, mixes=may_mix) if augment.guided else None
    return None if mix is None and erasure is None and guided is None else Late(mix, erasure, guided)


def to_device(
    batch: "Batch", data: DataConfig, augment: AugmentConfig, classes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return normalised float32 images [N, C, S, S] in channels_last memory, and targets, on the device.

    C is data.channels. Targets are the labels, int64 [N]; of mixed batches float32 [N, classes], the mixed one-hot
    labels without smoothing. What is drawn for guided.guide is left to that. As in timm, mixing comes before
    normalisation and erasing after it; timm rounds mixed images to bytes, here they stay floats.
    """
    mix, erasure, _ = batch.late or (None, None, None)
    pixels = _pixels(batch, data, device)
    targets = batch.labels.to(device, non_blocking=True)
    if mix is not None:
        mix = Mix(*(part.to(device, non_blocking=True) for part in mix))
        targets = mix_labels(targets, mix, classes)
    mean, std = data.statistics
    images = torch.empty(pixels.shape, dtype=torch.float32, device=device, memory_format=torch.channels_last)
    block = len(images)
    if device.type == "cpu":
        block = 2 * max(1, _BLOCK // (2 * images[0].numel()))  # neighbours stay together
    for first in range(0, len(images), block):
        own = slice(first, first + block)
        images[own] = pixels[own]
        if mix is not None:
            mix_images(images[own], Mix(*(part[own] for part in mix)))
        _normalize(images[own], mean, std)
    if erasure is not None:
        erase(images, erasure, augment.erase_mode)
    return images, targets


def normalize(images: Tensor, data: DataConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uint8 `images` [N, 3, H, W] as the model takes them: `dtype` [N, data.channels, H, W].

    Channels come to mean 0 and deviation 1; with three of them strides are kept.
    """
    floats = (_brightness(images) if data.channels == 1 else images).float()
    _normalize(floats, *data.statistics)
    return floats.to(dtype)


def _pixels(batch: "Batch", data: DataConfig, device: torch.device) -> Tensor:
    """Return uint8 [N, data.channels, S, S] on the device."""
    if isinstance(batch.images, Tensor):
        pixels = batch.images.to(device, non_blocking=True)
    else:
        from gmscale.data.images.gpu import decode_images

        pixels = decode_images(batch.images, data.image_size, device)
    return _brightness(pixels) if data.channels == 1 else pixels


def _brightness(pixels: Tensor) -> Tensor:
    """Return uint8 [N, 3, H, W] as brightness, uint8 [N, 1, H, W]: bit for bit Pillow's mode L."""
    red, green, blue = pixels.int().unbind(1)
    luma = (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + 2**15) >> 16
    return luma.to(torch.uint8)[:, None]


def _normalize(images: Tensor, mean: Channels, std: Channels) -> None:
    channels, width = images.shape[1], images.shape[3]
    offset, scale = _constants(mean, std, width, images.device)
    if images.is_contiguous(memory_format=torch.channels_last):
        # Whole rows: a CPU takes several times as long to repeat three numbers along a pixel.
        images.permute(0, 2, 3, 1).view(*images.shape[:1], -1, channels * width).sub_(offset).mul_(scale)
    else:
        images.sub_(offset[:channels, None, None]).mul_(scale[:channels, None, None])


@lru_cache
def _constants(mean: Channels, std: Channels, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept on the device: copying them there at each step would make a GPU wait.
    offset = torch.tensor(mean, device=device).mul(255)
    scale = torch.tensor(std, device=device).mul(255).reciprocal()
    return offset.repeat(width), scale.repeat(width)
