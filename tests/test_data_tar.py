"""The tar reader finds every member, and damage to headers never loses one silently."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmscale.data.faults import ShardError
from gmscale.data.tars.tar import Member, members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}
BLOCK = 512

fuzzing = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tar_of(contents: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in contents:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def block(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.USTAR_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def read(path: Path, data: bytes) -> list[Member]:
    path.write_bytes(data)
    return list(members(path))


def fault(path: Path, data: bytes) -> tuple[str, str]:
    with pytest.raises(ShardError) as caught:
        read(path, data)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.fault.reason, caught.value.fault.detail


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS.keys())
def test_the_members_are_those_that_tarfile_finds(tmp_path: Path, tar_format: int) -> None:
    path = tmp_path / "a.tar"
    names = ["0.jpg", "ü/ä.jpg", f"{'d' * 60}/{'e' * 60}/0.jpg", "x" * 100, "./0.cls", "a b.jpg"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["ü" * 300 + ".jpg", "\udcff.jpg"]
    with tarfile.open(path, "w", format=tar_format) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            other = tarfile.TarInfo(f"{kind!r}.jpg")
            other.type, other.linkname = kind, "elsewhere" if tar_format == tarfile.USTAR_FORMAT else "l" * 300
            tar.addfile(other)
        for size, name in enumerate(names, start=510):
            member = tarfile.TarInfo(name)
            member.size = size
            # A fraction of a second takes a PAX header.
            member.mtime = 0.5 if tar_format == tarfile.PAX_FORMAT else 0
            tar.addfile(member, io.BytesIO(b"." * size))
    with tarfile.open(path) as tar:
        expected = [Member(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert list(members(path)) == expected
    assert [member.name for member in expected] == names


def test_sizes_beyond_octal_and_from_pax(tmp_path: Path) -> None:
    size = 9 << 30
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        member = tarfile.TarInfo("0.jpg")
        member.size = size
        header = member.tobuf(tar_format)
        path = tmp_path / "large.tar"
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size + 2 * BLOCK)
        assert list(members(path)) == [("0.jpg", len(header), size)]


def test_a_global_pax_header_may_comment(tmp_path: Path) -> None:
    comment = b"16 comment=abcd\n"
    data = block("pax", b"g", len(comment)) + padded(comment) + tar_of([("0.jpg", b"x")])
    assert read(tmp_path / "a.tar", data) == [("0.jpg", 3 * BLOCK, 1)]


def test_a_signed_checksum_of_old_programs(tmp_path: Path) -> None:
    header = bytearray(block("ü.jpg"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in header)
    assert read(tmp_path / "a.tar", bytes(header) + bytes(1024)) == [("ü.jpg", BLOCK, 0)]


TWO = tar_of([("0.jpg", b"a" * 700), ("1.jpg", b"b" * 700)])
SECOND = 3 * BLOCK


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return block("pax", kind, len(records)) + padded(records) + TWO


FAULTS: dict[str, tuple[bytes, str, str]] = {
    "no bytes": (b"", "empty shard", "0 bytes"),
    "no member": (bytes(10240), "empty shard", "without a file"),
    "only a directory": (block("d/", tarfile.DIRTYPE) + bytes(1024), "empty shard", "without a file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(9), "compressed shard", "gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(900), "compressed shard", "zstd"),
    "xz": (b"\xfd7zXZ\0" + bytes(900), "compressed shard", "xz"),
    "bzip2": (b"BZh91AY" + bytes(900), "compressed shard", "bzip2"),
    "a web page": (b"\xef\xbb\xbf \n<!DOCTYPE html>" + b"404" * 300, "not a tar", "HTML or XML page"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not a tar", "Git LFS pointer"),
    "noise": (bytes(range(1, 256)) * 9, "not a tar", "begins with"),
    "a first header damaged": (b"?" + TWO[1:], "damaged header", "at byte 0"),
    "a later header damaged": (TWO[:SECOND] + b"?" + TWO[SECOND + 1 :], "damaged header", "1536, after '0.jpg'"),
    "a header of zeros": (TWO[:SECOND] + bytes(BLOCK) + TWO[SECOND + BLOCK :], "damaged header", "more after it"),
    "another tar appended": (TWO + TWO, "damaged header", "more after it"),
    "less than a header": (TWO[:200], "truncated shard", "200 bytes"),
    "cut inside a member": (TWO[: SECOND + 700], "truncated shard", "ends inside '1.jpg', at byte 2236"),
    "cut inside a header": (TWO[: SECOND + 100], "truncated shard", "at byte 1536, after '0.jpg'"),
    "cut between members": (TWO[:SECOND], "truncated shard", "without the two blocks of zeros"),
    "cut inside the end": (TWO[: 2 * SECOND + BLOCK], "truncated shard", "one block of zeros instead of two"),
    "a long tail of zeros": (TWO[:SECOND] + bytes(1 << 17), "truncated shard", "only zeros from byte 1536"),
    "a large PAX header": (block("pax", b"x", 2 << 20) + bytes(3 << 20), "oversized header", "2097152 bytes"),
    "a large long name": (block("@", b"L", 2 << 20) + bytes(3 << 20), "oversized header", "2097152 bytes"),
    "a name too long": (
        block("@", b"L", 5000) + padded(b"n" * 5000) + TWO,
        "oversized header",
        "a name of 5000 characters at byte 0",
    ),
    "a PAX header cut off": (block("pax", b"x", 5000) + b"9 a=b\n", "truncated shard", "extension header"),
    "PAX without records": (pax(b"no records"), "damaged header", "cannot be read"),
    "PAX of a wrong length": (pax(b"99 path=0.jpg\n"), "damaged header", "cannot be read"),
    "PAX of length zero": (pax(b"0 path=0.jpg\n"), "damaged header", "cannot be read"),
    "PAX of zeros": (pax(bytes(30)), "damaged header", "cannot be read"),
    "a PAX size": (pax(b"11 size=-1\n"), "damaged header", "PAX size of b'-1'"),
    "a global PAX path": (pax(b"12 path=abc\n", b"g"), "damaged header", "for all members"),
    "PAX sparse": (pax(b"22 GNU.sparse.major=1\n"), "sparse member", "holes"),
    "GNU sparse": (block("0.jpg", b"S") + bytes(1024), "sparse member", "holes"),
    "an unknown type": (block("0.jpg", b"M", 5) + bytes(2048), "damaged header", "unknown type b'M'"),
    "a header in place of a long name": (block("@", b"L", 400) + TWO, "damaged header", "long name with zeros"),
    "two long names": ((block("@", b"L", 5) + padded(b"a.jpg")) * 2 + TWO, "damaged header", "two names"),
    "zeros in a PAX path": (pax(b"12 path=a\0b\n"), "damaged header", "cannot be read"),
    "nothing after a long name": (block("@", b"L", 5) + padded(b"a.jpg") + bytes(1024), "damaged header", "1024"),
}


@pytest.mark.parametrize(("data", "reason", "detail"), FAULTS.values(), ids=FAULTS.keys())
def test_every_fault_is_named(tmp_path: Path, data: bytes, reason: str, detail: str) -> None:
    found_reason, found_detail = fault(tmp_path / "a.tar", data)
    assert found_reason == reason
    assert detail in found_detail


@pytest.mark.timeout(10)
def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for name, reason, detail in (
        ("pipe.tar", "unreadable shard", "not a regular file"),
        ("", "unreadable shard", "not a regular file"),
        ("missing.tar", "missing shard", "no such file"),
        ("\0.tar", "unreadable shard", "null byte"),
    ):
        with pytest.raises(ShardError, match=detail) as caught:
            list(members(tmp_path / name))
        assert caught.value.fault.reason == reason


def long_tar(tar_format: int) -> tuple[bytes, list[Member], list[int]]:
    """A tar of 12 members of up to 4 blocks, some with extension headers; the members, and where each begins."""
    draw = random.Random(1)
    contents = [
        (f"{number}{'-long' * 30 * (number % 3 == 1)}/{number}.jpg", draw.randbytes(draw.choice((0, 3, 512, 1900))))
        for number in range(12)
    ]
    if tar_format == tarfile.USTAR_FORMAT:
        contents = [(name[-120:].lstrip("-"), data) for name, data in contents]
    data = tar_of(contents, tar_format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = [(Member(member.name, member.offset_data, member.size), member.offset) for member in tar]
    return data, [member for member, _ in found], [offset for _, offset in found]


TARS = {name: long_tar(tar_format) for name, tar_format in FORMATS.items()}
formats = st.sampled_from(sorted(TARS))


def attempt(path: Path, data: bytes) -> list[Member] | None:
    try:
        return read(path, data)
    except ShardError:
        return None


@fuzzing
@given(formats, st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_changes_no_member(tmp_path: Path, tar_format: str, place: int, bit: int) -> None:
    data, expected, _ = TARS[tar_format]
    damaged = bytearray(data)
    damaged[place % len(data)] ^= 1 << bit
    found = attempt(tmp_path / "a.tar", bytes(damaged))
    # The records of an extension header have no checksum: there, a bit can change a name, but lose no member.
    assert found is None or [member[1:] for member in found] == [member[1:] for member in expected]
    in_contents = any(m.offset <= place % len(data) < m.offset + m.size for m in expected)
    assert found == expected or not in_contents


@fuzzing
@given(formats, st.integers(0, 10**6))
def test_a_cut_shard_is_found_unless_only_padding_is_lost(tmp_path: Path, tar_format: str, place: int) -> None:
    data, expected, _ = TARS[tar_format]
    cut = place % len(data)
    found = attempt(tmp_path / "a.tar", data[:cut])
    end = expected[-1].offset + -(-expected[-1].size // BLOCK) * BLOCK
    assert found == (expected if cut >= end + 2 * BLOCK else None)


@fuzzing
@given(formats, st.integers(0, 10**6), st.integers(1, 6000))
def test_zeros_lose_members_only_up_to_the_end(tmp_path: Path, tar_format: str, place: int, length: int) -> None:
    data, expected, starts = TARS[tar_format]
    first = place % len(data)
    damaged = data[:first] + bytes(len(data[first : first + length])) + data[first + length :]
    found = attempt(tmp_path / "a.tar", damaged)
    if found is not None and [member[1:] for member in found] != [member[1:] for member in expected]:
        # Nothing remains of the others.
        assert found == expected[: len(found)]
        assert not damaged[starts[len(found)] :].strip(b"\0")


@fuzzing
@given(formats, st.integers(0, 10**6), st.integers(1, 8))
def test_removed_blocks_take_no_more_members_than_blocks(
    tmp_path: Path, tar_format: str, place: int, count: int
) -> None:
    data, expected, _ = TARS[tar_format]
    first = place % (len(data) // BLOCK) * BLOCK
    found = attempt(tmp_path / "a.tar", data[:first] + data[first + count * BLOCK :])
    # Some of those lost can be whole ones behind the removed blocks, which are taken for contents in their place.
    assert found is None or len(expected) - count <= len(found) <= len(expected)


@fuzzing
@given(formats, st.integers(0, 10**6), st.integers(1, 8))
def test_repeated_blocks_lose_no_member(tmp_path: Path, tar_format: str, place: int, count: int) -> None:
    data, expected, _ = TARS[tar_format]
    first = place % (len(data) // BLOCK) * BLOCK
    again = data[first : first + count * BLOCK]
    found = attempt(tmp_path / "a.tar", data[:first] + again + data[first:])
    assert found is None or {member.name for member in expected} <= {member.name for member in found}
