"""Encoded images -> uint8 pixels of one size: randomly varied for training, fixed for evaluation."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform

from gmscale.data.config import AugmentConfig, DataConfig
from gmscale.data.faults import ImageError
from gmscale.data.images.decode import decode, decode_by_pillow, decode_jpeg, jpeg_header
from gmscale.data.images.gpu import EncodedAssembly, EncodedImages
from gmscale.data.images.views import Augmentation, View, check_interpolation, show_exactly, show_fast

Transform = Callable[[bytes, NDArray[np.uint8]], None]
"""Encoded image -> uint8 [S, S, 3], into which it writes. ImageError for what is none. Draws from the default
generators of random, numpy and torch."""

# A reduced JPEG keeps this multiple of the size asked for. With 1, images would differ from exact ones half as much
# again: the cut would be coarser, and less of the filter left to resizing.
_SPARE = 1.5


class ExactTransform:
    """Bitwise timm's training transform of Pillow's image."""

    def __init__(self, data: DataConfig, augment: AugmentConfig) -> None:
        self.size, self.augmentation, self.strict = data.image_size, Augmentation(data, augment), data.strict

    def __call__(self, encoded: bytes, out: NDArray[np.uint8]) -> None:
        pixels = decode(encoded, self.strict)
        view = self.augmentation.draw(*pixels.shape[:2])
        out[:] = np.asarray(self.augmentation.change(show_exactly(pixels, view, self.size)))


class FastTransform:
    """The same draws. JPEGs are decoded at 1/2, 1/4 or 1/8 where that leaves the view pixels to spare.

    On photographs the mean difference to exact pixels is 0.02 of 255 levels, and 2 where the JPEG was reduced: as
    much as Pillow's bilinear filter differs from averaging areas.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig) -> None:
        self.size, self.augmentation, self.strict = data.image_size, Augmentation(data, augment), data.strict

    def __call__(self, encoded: bytes, out: NDArray[np.uint8]) -> None:
        header = jpeg_header(encoded)
        if header is None:
            pixels = decode(encoded)
            view = self.augmentation.draw(*pixels.shape[:2])
        else:
            view = self.augmentation.draw(header.height, header.width)
            shrink, small = self.reduced(view)
            try:
                pixels = decode_jpeg(encoded, header, shrink)
                view = small
            except ImageError:
                if self.strict:
                    raise
                pixels = decode_by_pillow(encoded)
        show_fast(pixels, view, out)
        if self.augmentation.changes:
            out[:] = np.asarray(self.augmentation.change(Image.fromarray(out)))

    def reduced(self, view: View) -> tuple[int, View]:
        """Return by how much to shrink the JPEG, and the view of it then."""
        for shrink in (8, 4, 2):
            small = view.shrunk(shrink)
            if min(small.height, small.width) >= _SPARE * self.size:
                return shrink, small
        return 1, view


class EvalTransform:
    """timm's evaluation transform of Pillow's image."""

    def __init__(self, data: DataConfig) -> None:
        self._strict = data.strict
        # With crop_pct 1 it leaves an image alone that already has the right size.
        self._steps = create_transform(
            data.image_size,
            is_training=False,
            interpolation=data.eval_interpolation,
            crop_pct=data.crop_pct,
            use_prefetcher=True,
        ).transforms[:-1]

    def __call__(self, encoded: bytes, out: NDArray[np.uint8]) -> None:
        image = Image.fromarray(decode(encoded, self._strict))
        for step in self._steps:
            image = step(image)
        out[:] = np.asarray(image)


def eval_geometry(size: tuple[int, int], data: DataConfig) -> tuple[tuple[float, float], tuple[int, int]]:
    """Return scale and corner of what EvalTransform shows of an image of `size` width, height.

    A point (x, y) of the image is at (x, y) * scale - corner in the view.
    """
    shorter = math.floor(data.image_size / data.crop_pct)
    # rounded as torchvision does
    resized = [shorter if length == min(size) else int(shorter * length / min(size)) for length in size]
    scale = resized[0] / size[0], resized[1] / size[1]
    return scale, (round((resized[0] - data.image_size) / 2), round((resized[1] - data.image_size) / 2))


class Assembly(Protocol):
    """Makes the images of a batch: begin with their number, put each encoded one into its row, end."""

    def begin(self, count: int) -> Any:
        """Return a place for `count` images."""

    def put(self, images: Any, row: int, encoded: bytes) -> None:
        """Put an image there. Raises ImageError, after which another may take the row."""

    def end(self, images: Any) -> torch.Tensor | EncodedImages:
        """Return the images once every row has one."""


class PixelAssembly:
    """uint8 [N, 3, S, S] in channels_last memory."""

    def __init__(self, transform: Transform, size: int) -> None:
        self.transform, self.size = transform, size

    def begin(self, count: int) -> NDArray[np.uint8]:
        return np.empty((count, self.size, self.size, 3), dtype=np.uint8)

    def put(self, images: NDArray[np.uint8], row: int, encoded: bytes) -> None:
        self.transform(encoded, images[row])

    def end(self, images: NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(images).permute(0, 3, 1, 2)


def train_transform(data: DataConfig, augment: AugmentConfig) -> Transform:
    """Return the random training transform; `data.decode` is exact or fast."""
    if data.decode == "fast":
        check_interpolation(data, augment)
        return FastTransform(data, augment)
    assert data.decode == "exact", "on a GPU it is EncodedAssembly and decode_images"
    return ExactTransform(data, augment)


def eval_transform(data: DataConfig) -> Transform:
    """Return the fixed transform of evaluation: shorter side resized to S / crop_pct, the centre cut out."""
    return EvalTransform(data)


def train_assembly(data: DataConfig, augment: AugmentConfig) -> Assembly:
    """Return what makes training batches."""
    if data.decode == "gpu":
        return EncodedAssembly(data, augment)
    return PixelAssembly(train_transform(data, augment), data.image_size)


def eval_assembly(data: DataConfig) -> Assembly:
    """Return what makes validation batches."""
    return PixelAssembly(eval_transform(data), data.image_size)
