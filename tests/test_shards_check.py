"""gmscale shards verify and info: every fault is found and counted, and what is whole is not suspected."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gmscale.data.tars.writer import write_shard
from gmscale.errors import UsageError
from gmscale.shards.commands import main

SHARDS, PER_SHARD = 4, 5
Output = pytest.CaptureFixture[str]


def jpeg(number: int) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (16, 20, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of sound shards with all that _info.json can say of them."""
    directory = tmp_path_factory.mktemp("shards")
    names = [f"a-train-{shard:04}.tar" for shard in range(SHARDS)]
    stats = []
    for shard, name in enumerate(names):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        samples: list[dict[str, str | bytes]] = [
            {"__key__": f"{i:04}", "jpg": jpeg(i), "cls": str(i % 3)} for i in numbers
        ]
        stats.append(write_shard(directory / name, samples))
    split = {
        "name": "train",
        "num_samples": SHARDS * PER_SHARD,
        "filenames": names,
        "shard_lengths": [PER_SHARD] * SHARDS,
        "sha256": [each.sha256 for each in stats],
        "bytes": [each.bytes for each in stats],
    }
    info = {"name": "a", "splits": {"train": split}, "classes": ["x", "y", "z"]}
    (directory / "_info.json").write_text(json.dumps(info))
    return directory


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(whole, tmp_path / "shards")


def verify(capsys: Output, shards: Path | str, *options: str) -> tuple[int, dict[str, Any]]:
    workers = () if "--workers" in options else ("--workers", "0")
    status = main(["verify", str(shards), "--json", *workers, *options])
    (findings,) = json.loads(capsys.readouterr().out)
    return status, findings


def shard(directory: Path, number: int) -> Path:
    return directory / f"a-train-{number:04}.tar"


def change(path: Path, at: int, to: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(to)] = to
    path.write_bytes(data)


def offset(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset_data


def forget_hashes(directory: Path) -> None:
    """Leave what timm's own _info.json has."""
    info = json.loads((directory / "_info.json").read_text())
    del info["splits"]["train"]["sha256"], info["splits"]["train"]["bytes"]
    (directory / "_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("options", [[], ["--full"], ["--full", "--workers", "2"]])
def test_sound_shards_have_no_fault(whole: Path, capsys: Output, options: list[str]) -> None:
    status, findings = verify(capsys, whole, *options)
    assert (status, findings["faults"], findings["listed"]) == (0, 0, [])
    assert (findings["shards"], findings["samples"]) == (SHARDS, SHARDS * PER_SHARD)
    assert findings["bytes"] == sum(path.stat().st_size for path in whole.glob("*.tar"))
    assert not list(whole.glob("_index*"))


def test_all_faults_are_found_at_once(shards: Path, capsys: Output) -> None:
    forget_hashes(shards)
    shard(shards, 0).unlink()
    change(shard(shards, 1), offset(shard(shards, 1), "0005.cls"), b"7")
    change(shard(shards, 1), offset(shard(shards, 1), "0006.cls"), b"?")
    change(shard(shards, 2), offset(shard(shards, 2), "0012.jpg") - 500, b"!!")
    change(shard(shards, 3), offset(shard(shards, 3), "0017.jpg") + 300, bytes(200))
    status, findings = verify(capsys, shards, "--full")
    assert status == 1
    assert findings["of_shards"] == {"missing shard": 1, "damaged header": 1}
    assert findings["of_samples"] == {"bad label": 2, "corrupt image": 1}
    assert [(fault["shard"][8:12], fault["key"], fault["reason"]) for fault in findings["listed"]] == [
        ("0000", None, "missing shard"),
        ("0001", "0005", "bad label"),
        ("0001", "0006", "bad label"),
        ("0002", None, "damaged header"),
        ("0003", "0017", "corrupt image"),
    ]
    # Without a look at the pixels one of them stays hidden.
    assert verify(capsys, shards)[1]["faults"] == 4
    # Other processes find the same.
    several = verify(capsys, shards, "--full", "--workers", "2")[1]
    assert several | {"seconds": 0} == findings | {"seconds": 0}


def cut(directory: Path) -> None:
    path = shard(directory, 1)
    path.write_bytes(path.read_bytes()[:-12000])


def change_a_bit(directory: Path) -> None:
    """Change a bit in an image's header, of its resolution: its pixels stay."""
    path = shard(directory, 1)
    start = offset(path, "0006.jpg")
    change(path, start + 13, bytes([path.read_bytes()[start + 13] ^ 1]))


def drop_a_sample(directory: Path) -> None:
    samples: list[dict[str, str | bytes]] = [{"__key__": str(i), "jpg": jpeg(i), "cls": "1"} for i in range(4)]
    write_shard(shard(directory, 1), samples)
    forget_hashes(directory)


@pytest.mark.parametrize(
    ("damage", "options", "reasons"),
    [
        (cut, [], {"truncated shard": 2}),
        (lambda directory: shard(directory, 1).write_bytes(b""), [], {"truncated shard": 1, "empty shard": 1}),
        (change_a_bit, [], {}),
        (change_a_bit, ["--full"], {"wrong hash": 1}),
        (drop_a_sample, [], {"wrong sample count": 1}),
    ],
)
def test_what_info_says_is_compared(
    shards: Path, capsys: Output, damage: Callable[[Path], object], options: list[str], reasons: dict[str, int]
) -> None:
    damage(shards)
    status, findings = verify(capsys, shards, *options)
    assert status == int(bool(reasons))
    assert findings["of_shards"] == reasons
    assert findings["bad_shards"] == status
    assert findings["of_samples"] == {}


def test_a_pattern_needs_no_info(shards: Path, capsys: Output) -> None:
    (shards / "_info.json").unlink()
    change(shard(shards, 1), offset(shard(shards, 1), "0005.cls"), b"x")
    status, findings = verify(capsys, f"{shards}/a-train-{{0001..0002}}.tar")
    assert (status, findings["shards"], findings["faults"]) == (1, 2, 1)
    with pytest.raises(UsageError, match=r"without it, name the shards, such as 'a-train-\{0000\.\.0003\}\.tar'"):
        main(["verify", str(shards)])


def test_people_read_a_table_and_the_first_faults(shards: Path, capsys: Output) -> None:
    for number in range(PER_SHARD):
        change(shard(shards, 1), offset(shard(shards, 1), f"{PER_SHARD + number:04}.jpg"), bytes(50))
    assert main(["verify", str(shards), "--full", "--workers", "0", "--list", "2"]) == 1
    said = capsys.readouterr().out
    assert "5 corrupt image" in said
    assert "  a-train-0001.tar: wrong hash: differs from the SHA-256 in _info.json\n" in said
    assert "  a-train-0001.tar: 0005: corrupt image: '0005.jpg': " in said
    assert "  and 4 more" in said
    assert main(["verify", str(shards), "--workers", "0"]) == 0
    assert "no fault (headers, sizes and labels; --full reads images and hashes)" in capsys.readouterr().out


def test_info_reads_no_shard(shards: Path, capsys: Output) -> None:
    def info() -> dict[str, Any]:
        assert main(["info", str(shards), "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        return found

    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.iterdir()}
    found = info()
    assert (found["samples"], found["shards"], found["classes"]) == (SHARDS * PER_SHARD, SHARDS, 3)
    assert (found["shortest_shard"], found["longest_shard"]) == (PER_SHARD, PER_SHARD)
    assert (found["hashes"], found["index"], found["per_class"]) == (True, "missing", None)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.iterdir()} == before

    from gmscale.data.index import open_index
    from gmscale.shards.reshard import open_given

    open_index(open_given(str(shards), "train")[0])
    found = info()
    assert (found["index"], found["per_class"], found["bad_samples"]) == ("fits", [6, 7.0, 7], 0)
    assert main(["info", str(shards)]) == 0
    assert "samples of a class: median" in capsys.readouterr().out

    shard(shards, 2).unlink()
    found = info()
    assert found["index"] == "out of date"
    assert "a-train-0002.tar" in found["fault"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["biuld"], "'biuld'; expected one of build, verify, info, crop; did you mean 'build'"),
        (["verify", "nowhere"], "nowhere is not a directory of shards, nor a pattern"),
        (["verify", "{shards}", "--split", "tran"], "no split 'tran'.*did you mean 'train'"),
        (["verify", "{shards}", "--workers", "-1"], "--workers is -1"),
        (["info", "https://a.b/c"], "name the --split"),
        (["info", "{shards}", "--full"], "unrecognized arguments: --full"),
    ],
)
def test_a_mistake_is_one_line(whole: Path, argv: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        main([argument.replace("{shards}", str(whole)) for argument in argv])
    assert "\n" not in str(caught.value)
