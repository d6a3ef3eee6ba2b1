"""Encoded images become Pillow's pixels; damaged ones, huge ones and what is no image at all become ImageError."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from skimage import data as photographs

from gmscale.data.faults import ImageError
from gmscale.data.images.decode import decode, jpeg_header


@cache
def photograph() -> Image.Image:
    return Image.fromarray(photographs.coffee())


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def assert_as_pillow(data: bytes) -> None:
    pixels = decode(data)
    np.testing.assert_array_equal(pixels, by_pillow(data))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    colors=st.sampled_from(["RGB", "L", "CMYK"]),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    progressive=st.booleans(),
    restart=st.integers(0, 3),
    keep_rgb=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_jpegs_have_pillows_pixels(
    width: int,
    height: int,
    colors: str,
    quality: int,
    subsampling: str,
    progressive: bool,
    restart: int,
    keep_rgb: bool,
) -> None:
    image = photograph().crop((200, 100, 200 + width, 100 + height)).convert(colors)
    options: dict[str, object] = (
        {"keep_rgb": True} if keep_rgb and colors == "RGB" else {"subsampling": subsampling}
    )
    data = encoded(
        image, "JPEG", quality=quality, progressive=progressive, restart_marker_blocks=restart, **options
    )
    assert_as_pillow(data)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_ycck_and_rarer_subsampling_have_pillows_pixels(subsampling: str) -> None:
    inks = np.ascontiguousarray(255 - np.asarray(photograph().crop((0, 0, 65, 47)).convert("CMYK")))
    ycck = simplejpeg.encode_jpeg(inks, colorspace="CMYK", colorsubsampling=subsampling)
    header = jpeg_header(ycck)
    assert header is not None
    assert header.colors == "YCCK"
    assert_as_pillow(ycck)
    pixels = np.ascontiguousarray(np.asarray(photograph())[:47, :65])
    assert_as_pillow(simplejpeg.encode_jpeg(pixels, colorsubsampling=subsampling))


def segments(jpeg: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return a JPEG's (marker, content) pairs and the coded data of its only scan."""
    found, place = [], 2
    while True:
        marker, length = jpeg[place + 1], int.from_bytes(jpeg[place + 2 : place + 4], "big")
        found.append((marker, jpeg[place + 4 : place + 2 + length]))
        place += 2 + length
        if marker == 0xDA:
            return found, jpeg[place:-2]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


@pytest.mark.parametrize("factors", [((2, 2), (2, 1), (1, 2)), ((3, 1), (1, 1), (1, 1)), ((1, 1), (2, 2), (2, 2))])
def test_unusual_subsampling_has_pillows_pixels(factors: tuple[tuple[int, int], ...]) -> None:
    # TurboJPEG refuses these. Each channel is a scan of its own, from a grey JPEG of the channel.
    width, height = 64, 48
    planes = photograph().convert("YCbCr").resize((width, height)).split()
    most_h, most_v = (max(factor[axis] for factor in factors) for axis in range(2))
    tables, scans = b"", b""
    for number, (plane, (h, v)) in enumerate(zip(planes, factors, strict=True), 1):
        found, coded = segments(encoded(plane.resize((-(-width * h // most_h), -(-height * v // most_v))), "JPEG"))
        tables = b"".join(segment(marker, content) for marker, content in found if marker in (0xDB, 0xC4))
        scans += segment(0xDA, bytes([1, number, 0, 0, 63, 0])) + coded
    layout = b"".join(bytes([number, 16 * h + v, 0]) for number, (h, v) in enumerate(factors, 1))
    frame = segment(0xC0, struct.pack(">BHHB", 8, height, width, 3) + layout)
    jpeg = b"\xff\xd8" + tables + frame + scans + b"\xff\xd9"
    assert jpeg_header(jpeg) is None
    assert_as_pillow(jpeg)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_other_formats_have_pillows_pixels(form: str, mode: str) -> None:
    image = photograph().crop((0, 0, 41, 33)).convert(mode)
    if (form, mode) in (("BMP", "LA"), ("GIF", "LA")):
        image = image.convert("L")
    assert_as_pillow(encoded(image, form))


def test_palettes_with_transparency_and_16_bits_have_pillows_pixels() -> None:
    palette = photograph().crop((0, 0, 41, 33)).convert("P")
    assert_as_pillow(encoded(palette, "PNG", transparency=bytes(range(256))))
    assert_as_pillow(encoded(Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)), "PNG"))


@pytest.mark.parametrize("form", ["WEBP", "GIF", "PNG"])
def test_the_first_frame_of_an_animation_counts(form: str) -> None:
    first = photograph().crop((0, 0, 41, 33))
    data = encoded(first, form, save_all=True, append_images=[first.rotate(180)], lossless=True)
    assert_as_pillow(data)


def test_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photograph().crop((0, 0, 41, 33)), "JPEG", exif=exif)
    assert decode(data).shape == (33, 41, 3)
    assert_as_pillow(data)


@pytest.mark.parametrize("form", ["baseline", "progressive", "CMYK", "PNG", "WEBP"])
def test_a_truncated_image_is_bad_wherever_it_ends(form: str) -> None:
    image = photograph().crop((0, 0, 90, 70))
    if form in ("PNG", "WEBP"):
        data = encoded(image, form)
    else:
        data = encoded(
            image.convert("CMYK" if form == "CMYK" else "RGB"), "JPEG", progressive=form == "progressive"
        )
    decode(data)
    # A PNG's last 12 bytes say only that it ends.
    for end in np.linspace(0, len(data) - (13 if form == "PNG" else 1), 60, dtype=int):
        with pytest.raises(ImageError) as caught:
            decode(data[:end])
        assert caught.value.reason == "corrupt image"
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("form", "share"), [("baseline", 0.3), ("progressive", 0.5), ("PNG", 1.0)])
def test_most_damage_is_found_where_pillow_finds_little(form: str, share: float) -> None:
    image = photograph().resize((200, 150))
    data = encoded(image, "PNG") if form == "PNG" else encoded(image, "JPEG", progressive=form == "progressive")
    rng = np.random.default_rng(0)
    found, by_pillow_too, trials = 0, 0, 100
    for place in rng.integers(700, len(data) - 40, trials):
        damaged = bytearray(data)
        damaged[place : place + 16] = rng.bytes(16)
        try:
            decode(bytes(damaged))
        except ImageError:
            found += 1
        try:
            by_pillow(bytes(damaged))
        except (OSError, SyntaxError):
            by_pillow_too += 1
    assert found >= share * trials
    # What decodes to other pixels, as a wrong bit in a JPEG mostly does, nobody can tell.
    assert found >= by_pillow_too * (1 if form == "PNG" else 3)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]),
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_an_image_or_bad(rest: bytes, magic: bytes) -> None:
    try:
        pixels = decode(magic + rest)
    except ImageError as error:
        bad = error
    else:
        assert pixels.shape[2] == 3
        return
    assert "\n" not in str(bad)


@pytest.mark.parametrize(
    "data", [b"", b"<!DOCTYPE html>\n<title>404</title>", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_what_is_no_image_is_bad_and_shown(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason == "corrupt image"
    assert f"{len(data)} bytes" in str(caught.value)


def png_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize("make", [png_of, jpeg_of, bmp_of, gif_of])
@pytest.mark.parametrize("size", [(65000, 65000), (10_000, 10_001)])
@pytest.mark.filterwarnings("error")
def test_an_image_that_claims_to_be_huge_is_not_decoded(
    make: Callable[[int, int], bytes], size: tuple[int, int]
) -> None:
    with pytest.raises(ImageError) as caught:
        decode(make(*size))
    assert caught.value.reason == "oversized image"
    assert "pixels" in str(caught.value)


def with_stray_bytes(data: bytes) -> bytes:
    """Return a JPEG with bytes before its end marker that belong to nothing."""
    assert data.endswith(b"\xff\xd9")
    return data[:-2] + bytes(50) + data[-2:]


def test_jpegs_that_only_pillow_accepts_are_taken_unless_strict() -> None:
    data = with_stray_bytes(encoded(photograph(), "JPEG", quality=90))
    with pytest.raises(ImageError, match=r"extraneous|cannot load"):
        decode(data)
    np.testing.assert_array_equal(decode(data, strict=False), by_pillow(data))
    with pytest.raises(ImageError):  # Pillow does not accept this one either
        decode(data[: len(data) // 2], strict=False)
