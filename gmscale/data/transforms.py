"""Image -> uint8 tensor in a loader process; uint8 -> normalised float on the device.

Bytes travel from the loader to the device, a quarter of what floats would take.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from PIL import Image
from timm.data import create_transform

from gmscale.data.config import DataConfig
from gmscale.errors import UsageError

Transform = Callable[[Image.Image], torch.Tensor]
Channels = tuple[float, float, float]


def train_transform(config: DataConfig) -> Transform:
    """Return timm's random training augmentation: RGB image -> uint8 [3, H, W]."""
    try:
        return create_transform(
            config.image_size,
            is_training=True,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment or None,
            interpolation="bilinear",
            mean=config.mean,
            std=config.std,
            use_prefetcher=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        # The other arguments are checked already; timm asserts on a policy's name without saying which.
        raise UsageError(f"data.auto_augment: timm cannot read the policy {config.auto_augment!r}") from error


def eval_transform(config: DataConfig) -> Transform:
    """Return the fixed transform of evaluation: shorter side resized, centre cropped, uint8 [3, H, W]."""
    # crop_pct 1 leaves an image alone that already has the right size.
    return create_transform(
        config.image_size, is_training=False, interpolation="bilinear", crop_pct=1.0, use_prefetcher=True
    )


def normalize(
    images: torch.Tensor, mean: Channels, std: Channels, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return uint8 `images` [N, 3, H, W] as `dtype` with channels' mean 0 and deviation 1, strides kept."""
    offset, scale = _constants(mean, std, images.device)
    return images.float().sub_(offset).mul_(scale).to(dtype)


@lru_cache
def _constants(mean: Channels, std: Channels, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Kept on the device: copying them there at each step would make a GPU wait.
    offset = torch.tensor(mean, device=device).mul(255).view(3, 1, 1)
    scale = torch.tensor(std, device=device).mul(255).reciprocal().view(3, 1, 1)
    return offset, scale
