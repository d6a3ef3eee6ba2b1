"""One source image -> the bytes that go into a shard: proven to be an image, re-encoded only where asked."""

import io
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image

from gmscale.data.faults import ImageError
from gmscale.data.images.decode import MAX_PIXELS, decode
from gmscale.errors import UsageError, check_choice, check_range

FORMATS = ("keep", "jpg", "png", "webp")
CHECKS = ("decode", "header")

_FOREIGN = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"<": "an HTML or XML page",
    b"{": "JSON",
}
_PILLOW = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Recipe:
    """What is done to every image."""

    check: str = "decode"
    """decode proves each image by decoding it, header reads only its format and size."""
    resize: int | None = None
    """Largest shorter side in pixels."""
    format: str = "keep"
    quality: int = 95

    def __post_init__(self) -> None:
        check_choice(self.check, CHECKS, "--check")
        check_choice(self.format, FORMATS, "--format")
        if self.resize is not None:
            check_range(self.resize, "--resize", 1, whole=True)
        check_range(self.quality, "--quality", 1, 100, whole=True)
        if self.format == "png" and self.quality != Recipe.quality:
            raise UsageError("--quality does nothing with --format png, which loses nothing")

    @property
    def encodes(self) -> bool:
        """Whether some image may be written anew, and the bytes so depend on Pillow."""
        return self.resize is not None or self.format != "keep"


def recode(encoded: bytes, recipe: Recipe) -> tuple[str, bytes]:
    """Return the extension and the bytes of an image for a shard; raise ImageError.

    The extension follows from the content, whatever the file was called. An image that needs no change comes back
    byte for byte. Others become RGB and lose their metadata; an EXIF orientation is not applied, as it is not in
    training either.
    """
    extension = sniff(encoded)
    width, height = _size(encoded, extension)
    if width * height > MAX_PIXELS:
        raise ImageError("oversized image", f"{width} x {height} pixels; expected at most {MAX_PIXELS}")
    target = extension if recipe.format == "keep" else recipe.format
    shrinks = recipe.resize is not None and min(width, height) > recipe.resize
    if target == extension and not shrinks:
        if recipe.check == "decode":
            decode(encoded)
        return extension, encoded
    image = Image.fromarray(decode(encoded))
    if shrinks and recipe.resize is not None:
        image = _shrink(image, recipe.resize)
    return target, _encode(image, target, recipe.quality)


def sniff(encoded: bytes) -> str:
    """Return jpg, png or webp by the first bytes; raise ImageError for anything else."""
    if encoded.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return "webp"
    if not encoded:
        raise ImageError("empty image", "0 bytes")
    looks = next((name for magic, name in _FOREIGN.items() if encoded.lstrip().startswith(magic)), None)
    found = f"is {looks}" if looks else f"begins with {encoded[:8]!r}"
    raise ImageError("corrupt image", f"{found}; expected a JPEG, PNG or WebP")


def _size(encoded: bytes, extension: str) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which decode judges
            with Image.open(io.BytesIO(encoded), formats=[_PILLOW[extension]]) as image:
                return image.size
    except Image.DecompressionBombError as error:
        raise ImageError("oversized image", str(error)) from None
    except Exception as error:  # Pillow's readers raise anything, from OSError to struct.error
        raise ImageError("corrupt image", f"its header cannot be read: {error}") from None


def _shrink(image: Image.Image, shorter: int) -> Image.Image:
    scale = shorter / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _encode(image: Image.Image, extension: str, quality: int) -> bytes:
    options: dict[str, Any] = {} if extension == "png" else {"quality": quality}
    buffer = io.BytesIO()
    try:
        image.save(buffer, _PILLOW[extension], **options)
    except (OSError, ValueError) as error:  # WebP ends at 16383 pixels a side, JPEG at 65535
        raise ImageError(
            "oversized image", f"{image.width} x {image.height} cannot be {extension}: {error}"
        ) from None
    return buffer.getvalue()
