"""What is drawn for a training image, and the cutting and resizing that show it.

The draws and what they mean are timm's. Cutting and resizing, which take the time, are done here: exactly as timm
does them with Pillow, or faster and almost so.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import str_to_pil_interp
from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip

from gmscale.data.config import AugmentConfig, DataConfig
from gmscale.data.workers import random_states_kept
from gmscale.errors import UsageError


class _Sized(Image.Image):
    """All that timm wants of an image to draw a crop: its size. A tensor that has one would cost more."""

    def __init__(self, width: int, height: int) -> None:
        self._width_height = (width, height)

    @property
    def size(self) -> tuple[int, int]:
        return self._width_height


class View(NamedTuple):
    """What was drawn for one image: the part of it that is shown, how that is resized, whether it is flipped."""

    top: int
    left: int
    height: int
    width: int
    interpolation: str
    """bilinear, bicubic or lanczos"""
    mirrored: bool
    upside_down: bool

    def shrunk(self, factor: int) -> "View":
        """Return the same part of the image at 1 / `factor` of its height and width, to the nearest pixel."""
        top, left = round(self.top / factor), round(self.left / factor)
        height = round((self.top + self.height) / factor) - top
        width = round((self.left + self.width) / factor) - left
        return self._replace(top=top, left=left, height=height, width=width)


class Augmentation:
    """timm's random training transform, in two parts: what it draws before resizing, and what it does after it."""

    def __init__(self, data: DataConfig, augment: AugmentConfig) -> None:
        if augment.interpolation == "lanczos" and augment.auto_augment and "3a" not in augment.auto_augment:
            raise UsageError(
                f"augment.auto_augment {augment.auto_augment!r} turns images, for which augment.interpolation "
                "lanczos is not made; expected bilinear, bicubic or random with it"
            )
        try:
            transforms = create_transform(
                data.image_size,
                is_training=True,
                scale=augment.crop_scale,
                ratio=augment.crop_ratio,
                hflip=augment.hflip,
                vflip=augment.vflip,
                color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # None is for none
                auto_augment=augment.auto_augment or None,
                interpolation=augment.interpolation,
                mean=data.mean,
                std=data.std,
                use_prefetcher=True,
            ).transforms
        except (AssertionError, KeyError, ValueError) as error:
            # The other arguments are checked already; timm asserts on a policy's name without saying which.
            raise UsageError(
                f"augment.auto_augment: timm cannot read the policy {augment.auto_augment!r}"
            ) from error
        # torchvision compares with them as 32-bit floats.
        self._hflip, self._vflip = float(np.float32(augment.hflip)), float(np.float32(augment.vflip))
        self._crop = transforms[0]
        self.changes: list[Callable[[Image.Image], Image.Image]] = [
            transform
            for transform in transforms[1:-1]
            if not isinstance(transform, RandomHorizontalFlip | RandomVerticalFlip)
        ]
        for change in self.changes:
            _let_posterize_keep_no_bits(change)
        try:
            with random_states_kept():
                self.change(Image.new("RGB", (data.image_size, data.image_size)))
        except Exception as error:  # timm reads some policies that it cannot carry out
            raise UsageError(f"augment.auto_augment {augment.auto_augment!r}: {error}") from error

    def draw(self, height: int, width: int) -> View:
        """Draw a view of an image [height, width]."""
        crop = self._crop.get_params(_Sized(width, height), self._crop.scale, self._crop.ratio)
        top, left, height, width = crop
        mode = self._crop.interpolation
        mode = random.choice(mode) if isinstance(mode, tuple) else mode
        mirrored = self._hflip > 0 and torch.rand(1).item() < self._hflip
        upside_down = self._vflip > 0 and torch.rand(1).item() < self._vflip
        return View(top, left, height, width, mode.value, mirrored, upside_down)

    def change(self, image: Image.Image) -> Image.Image:
        """Apply what comes after cropping, resizing and flipping."""
        for change in self.changes:
            image = change(image)
        return image


def _let_posterize_keep_no_bits(policy: Any) -> None:
    """Let a policy's strongest posterize make an image black, as Pillow did before version 13 refused it."""
    found: list[Any] = getattr(policy, "ops", None) or getattr(policy, "policy", [])
    for operation in (op for entry in found for op in (entry if isinstance(entry, list) else [entry])):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **settings)


def check_interpolation(data: DataConfig, augment: AugmentConfig) -> None:
    """Raise UsageError where only Pillow can resize."""
    if augment.interpolation == "lanczos":
        raise UsageError(
            f"augment.interpolation lanczos needs data.decode exact, which is {data.decode!r}; "
            "expected bilinear, bicubic or random with it"
        )


def show_exactly(pixels: NDArray[np.uint8], view: View, size: int) -> Image.Image:
    """Return `view` of contiguous `pixels` [H, W, 3], resized as Pillow does; black if it is empty."""
    width = pixels.shape[1]
    # Cropped first, as in torchvision: resize(box=...) would look across the view's border.
    image = Image.frombytes(
        "RGB",
        (view.width, view.height),
        pixels.reshape(-1)[3 * (view.top * width + view.left) :],
        "raw",
        "RGB",
        3 * width,
    )
    if image.size != (size, size):
        image = image.resize((size, size), str_to_pil_interp(view.interpolation))
    if view.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view.upside_down:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image


def show_fast(pixels: NDArray[np.uint8], view: View, out: NDArray[np.uint8]) -> None:
    """Write `view` of `pixels` [H, W, 3] to `out` [size, size, 3], by Pillow's filters with shorter weights.

    Few pixels differ, nearly all by one level. torch has vector code for this where the processor has AVX2;
    elsewhere it is slower than Pillow.
    """
    if not (view.height and view.width):  # of an image of a few pixels
        out[:] = 0
        return
    part = pixels[None, view.top : view.top + view.height, view.left : view.left + view.width]
    # What interpolate(antialias=True) calls, which cannot write whole pixels: channels would come apart.
    resize = getattr(torch.ops.aten, f"_upsample_{view.interpolation}2d_aa").out
    resize(_channels_first(part), out.shape[:2], False, None, None, out=_channels_first(out[None]))
    flipped = [axis for axis, flip in ((0, view.upside_down), (1, view.mirrored)) if flip]
    if flipped:
        out[:] = torch.from_numpy(out).flip(flipped).numpy()


def _channels_first(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)
