"""Encoded bytes -> pixels, strictly: what is damaged raises, and what claims to be huge is never allocated.

The pixels are those of Pillow's `Image.open(...).convert("RGB")`; like there and in timm, EXIF orientation is
ignored and of several frames the first counts. JPEGs are decoded by simplejpeg: faster, and an error where Pillow
would return grey or smeared pixels silently.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from gmscale.data.faults import ImageError

MAX_PIXELS = 100_000_000

# What Pillow decodes by itself: others start a program (EPS) or are not images of a data set.
_FORMATS = ("PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF")


class JpegHeader(NamedTuple):
    """What a JPEG says of itself."""

    height: int
    width: int
    colors: str
    """YCbCr, Gray, RGB, CMYK or YCCK."""


def jpeg_header(encoded: bytes) -> JpegHeader | None:
    """Return the header of a JPEG; None where Pillow must decode: other formats and unusual chroma subsampling.

    Raises ImageError for an image of more than MAX_PIXELS.
    """
    if not encoded.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colors, _subsampling = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError):  # unusual subsampling; whatever else it is, Pillow refuses it too
        return None
    _check_size(height, width)
    return JpegHeader(height, width, colors)


def decode(encoded: bytes, strict: bool = True) -> NDArray[np.uint8]:
    """Return the pixels [H, W, 3] of an image in any of the usual formats, contiguous.

    Raises ImageError for one that is damaged, truncated, no image at all, or of more than MAX_PIXELS; unless
    `strict`, not for a JPEG that Pillow decodes all the same.
    """
    header = jpeg_header(encoded)
    if header is not None:
        try:
            return decode_jpeg(encoded, header)
        except ImageError:
            if strict:
                raise
    return decode_by_pillow(encoded)


def decode_jpeg(encoded: bytes, header: JpegHeader, shrink: int = 1) -> NDArray[np.uint8]:
    """Return a JPEG's pixels [H, W, 3], or with `shrink` 2, 4 or 8 at H and W divided by it, rounded up.

    Shrunk images come from the low frequencies alone. Raises ImageError if any bit is found to be wrong.
    """
    height, width = -(-header.height // shrink), -(-header.width // shrink)
    # Pillow has its own conversion from four inks to RGB.
    four_inks = header.colors in ("CMYK", "YCCK")
    try:
        pixels = simplejpeg.decode_jpeg(
            encoded, "CMYK" if four_inks else "RGB", min_height=height, min_width=width, strict=True
        )
        if four_inks:
            inks = Image.frombytes("CMYK", pixels.shape[1::-1], pixels.tobytes(), "raw", "CMYK;I")
            pixels = np.array(inks.convert("RGB"))
    except Exception as error:
        raise ImageError("corrupt image", _one_line(error)) from error
    return pixels


def decode_by_pillow(encoded: bytes) -> NDArray[np.uint8]:
    """Return what Pillow makes of an image: pixels [H, W, 3]. Raises ImageError."""
    # Pillow warns of large images, palettes and damaged metadata: once per process, without saying which image.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                _check_size(image.height, image.width)
                if image.format == "PNG":
                    image.verify()  # the checksums, which decoding skips; the image is spent after it
                    image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
                return np.array(image.convert("RGB"))
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError("oversized image", _one_line(error)) from error
        except Image.UnidentifiedImageError as error:
            raise ImageError("corrupt image", f"not an image: {_beginning(encoded)}") from error
        except Exception as error:  # Pillow's decoders raise anything, from OSError to struct.error
            raise ImageError("corrupt image", _one_line(error)) from error


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ImageError(
            "oversized image", f"{width} x {height} pixels; expected at most {MAX_PIXELS // 10**6} million"
        )


def _beginning(encoded: bytes) -> str:
    return f"{len(encoded)} bytes that begin with {encoded[:16]!r}" if encoded else "0 bytes"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
