"""data.decode gpu: the loader's processes draw, the device decodes, cuts, resizes and flips.

Whether a JPEG is intact is not known without decoding it, so a loader process finds only what its header and its
end betray; nvJPEG decodes most damaged images to wrong pixels without a word. Where that matters, use fast.
"""

import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from gmscale.data.config import AugmentConfig, DataConfig
from gmscale.data.faults import ImageError
from gmscale.data.images.decode import JpegHeader, decode, jpeg_header
from gmscale.data.images.views import Augmentation, View, check_interpolation, show_exactly
from gmscale.errors import RunError, UsageError

# Images decoded together; with the limit on one of them, what decoded images take on the device is bounded.
_TOGETHER = 64
_MOST_PIXELS = 2**24


class EncodedImages(NamedTuple):
    """N images, most still encoded. A few tensors rather than many: each costs a file when it leaves a process."""

    data: Tensor
    """uint8 [bytes]: JPEGs, or pixels [S, S, 3] where a loader process had to decode, one after the other."""
    ends: Tensor
    """int64 [N]: where in `data` each ends."""
    boxes: Tensor
    """int64 [N, 4]: top, left, height, width of the part to show; all -1 for pixels, which are ready."""
    flags: Tensor
    """bool [N, 3]: whether to resize bicubically (else bilinearly), to mirror, to turn upside down."""


class EncodedAssembly:
    """Makes the EncodedImages of a batch (see transforms.Assembly), with the draws of data.decode exact.

    What nvJPEG would refuse or get wrong (other formats, four inks, RGB JPEGs, very large ones) is decoded here,
    exactly.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig) -> None:
        check_interpolation(data, augment)
        for key in ("auto_augment", "color_jitter"):
            if value := getattr(augment, key):
                raise UsageError(
                    f"data.decode gpu cannot apply augment.{key}, which is {value!r}; "
                    f"expected {type(value)()!r}, or data.decode fast"
                )
        self.size, self.augmentation, self.strict = data.image_size, Augmentation(data, augment), data.strict

    def begin(self, count: int) -> list[tuple[bytes, View | None] | None]:
        return [None] * count

    def put(self, images: list[tuple[bytes, View | None] | None], row: int, encoded: bytes) -> None:
        header = jpeg_header(encoded)
        if header is not None and _nvjpeg_takes(encoded, header):
            images[row] = (encoded, self.augmentation.draw(header.height, header.width))
            return
        pixels = decode(encoded, self.strict)
        view = self.augmentation.draw(*pixels.shape[:2])
        images[row] = (show_exactly(pixels, view, self.size).tobytes(), None)

    def end(self, images: list[tuple[bytes, View | None] | None]) -> EncodedImages:
        rows = [row for row in images if row is not None]
        assert len(rows) == len(images), "a row without an image"
        views = [view for _, view in rows]
        return EncodedImages(
            data=torch.frombuffer(bytearray().join(data for data, _ in rows), dtype=torch.uint8),
            ends=torch.tensor([len(data) for data, _ in rows]).cumsum(0),
            boxes=torch.tensor([view[:4] if view else (-1,) * 4 for view in views]),
            flags=torch.tensor(
                [
                    (view.interpolation == "bicubic", view.mirrored, view.upside_down) if view else (False,) * 3
                    for view in views
                ]
            ),
        )


def _nvjpeg_takes(encoded: bytes, header: JpegHeader) -> bool:
    # Data after the end marker is rare: then, as where the marker is missing, strict decoding here decides.
    return (
        header.colors in ("YCbCr", "Gray")
        and header.height * header.width <= _MOST_PIXELS
        and encoded.endswith(b"\xff\xd9")
    )


def decode_images(images: EncodedImages, size: int, device: torch.device) -> Tensor:
    """Return uint8 [N, 3, size, size] in channels_last memory on `device`.

    Raises RunError for an image that does not decode.
    """
    ends = images.ends.tolist()
    pieces = [images.data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    boxes, flags = images.boxes.tolist(), images.flags.tolist()
    out = torch.empty(
        (len(ends), 3, size, size), dtype=torch.uint8, device=device, memory_format=torch.channels_last
    )
    encoded = [row for row, (_, _, height, _) in enumerate(boxes) if height >= 0]
    for row in set(range(len(ends))).difference(encoded):
        out[row] = pieces[row].view(size, size, 3).permute(2, 0, 1).to(device, non_blocking=True)
    for first in range(0, len(encoded), _TOGETHER):
        rows = encoded[first : first + _TOGETHER]
        for row, pixels in zip(rows, _decode_jpegs([pieces[row] for row in rows], device), strict=True):
            out[row] = _show(pixels, boxes[row], flags[row], size)
    return out


def check_device(device: torch.device) -> None:
    """Raise UsageError unless `device` is a GPU on which torchvision decodes JPEGs."""
    if device.type != "cuda":
        raise UsageError(f"data.decode gpu needs a CUDA device, not {device.type}; expected exact or fast here")
    trial = simplejpeg.encode_jpeg(np.full((8, 8, 3), 128, dtype=np.uint8))
    try:
        _decode_on_device([torch.frombuffer(bytearray(trial), dtype=torch.uint8)], device)
    except RuntimeError as error:
        raise UsageError(
            f"data.decode gpu needs a torchvision that decodes on {device} ({str(error).splitlines()[0]}); "
            "expected exact or fast with this one"
        ) from error


def _decode_jpegs(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
    try:
        return _decode_on_device(encoded, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of one of them, without saying which
        return [torch.from_numpy(_decode_here(one)).permute(2, 0, 1).to(device) for one in encoded]


def _decode_on_device(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return the pixels, uint8 [3, H, W], of each JPEG. Raises RuntimeError if one of them does not decode."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:
        raise UsageError(
            f"data.decode gpu needs torchvision.io.decode_jpeg ({error}); expected exact or fast without it"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision 0.29 asks for torchcodec instead
        return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)


def _decode_here(encoded: Tensor) -> NDArray[np.uint8]:
    try:
        return decode(encoded.numpy().tobytes())
    except ImageError as error:
        raise RunError(
            f"data.decode gpu: {error}; exact or fast would say of which image, and replace it"
        ) from error


def _show(pixels: Tensor, box: list[int], flags: list[bool], size: int) -> Tensor:
    top, left, height, width = box
    if not (height and width):  # of an image of a few pixels
        return pixels.new_zeros(3, size, size)
    bicubic, mirrored, upside_down = flags
    shown = interpolate(
        pixels[None, :, top : top + height, left : left + width].float(),  # on a GPU it resizes only floats
        (size, size),
        mode="bicubic" if bicubic else "bilinear",
        antialias=True,
    )[0]
    axes = [axis for axis, flip in ((1, upside_down), (2, mirrored)) if flip]
    return (shown.flip(axes) if axes else shown).round_().clamp_(0, 255).byte()
