"""A checkpoint that cannot be written: a warning, the former one stands, and only a last one must come off."""

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_checkpoints as small
import tiny

from gmscale import checkpoint
from gmscale.checkpoint.tensors import TensorFile
from gmscale.errors import RunError

both_ways = pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def used(disk: Path) -> int:
    return shutil.disk_usage(disk).used


@both_ways
def test_a_full_disk_costs_one_warning_and_the_next_save_is_tried(small_disk: Path, background: bool) -> None:
    entries = 60_000  # 0.5 MB of weights, 0.5 MB of momentum
    said: list[str] = []
    saver = small.saver(small_disk, said, background=background, keep=1)

    def boundary() -> None:
        if saver._task is not None:
            saver._task.wait(30)
        saver.advance(int(saver.progress[0]), int(saver.progress[1]))

    saver.save(1, small.contents(1.0, entries), None)
    saver.finish()
    first = checkpoint.latest(small_disk)
    assert first is not None
    (small_disk / "other").write_bytes(b"x" * 2_500_000)
    before = used(small_disk)

    saver.save(2, small.contents(2.0, entries), None)
    for _ in range(4):
        boundary()
    final = small_disk / "checkpoints" / "step-00000002"
    assert len(said) == 1
    assert f"checkpoint {final} cannot be written ([Errno 28] No space left on device" in said[0]
    assert f"{first} stands, and the run goes on" in said[0]
    assert "\n" not in said[0]
    assert saver.step == 1
    assert used(small_disk) == before
    assert small.load(first, entries) == {1.0}

    (small_disk / "other").unlink()
    saver.save(2, small.contents(2.0, entries), None)
    saver.finish()
    assert small.load(final, entries) == {2.0}
    assert tiny.checkpoint_steps(small_disk) == [2]  # now the old one may go
    assert len(said) == 1


@both_ways
def test_a_save_that_a_run_ends_with_must_come_off(small_disk: Path, background: bool) -> None:
    saver = small.saver(small_disk, background=background)
    saver.save(1, small.contents(), None)
    saver.save(2, small.contents(2.0, entries=600_000), None)
    message = "step-00000002 cannot be written .*No space left.*step-00000001 stands; the same command goes on$"
    with pytest.raises(RunError, match=message):
        saver.finish()
    assert tiny.checkpoint_steps(small_disk) == [1]
    assert used(small_disk) < 100_000
    saver.finish()  # said once


BREAKABLE: dict[str, tuple[Any, str, Callable[[Path], bool]]] = {
    "mkdir": (Path, "mkdir", lambda path: path.name.startswith(".step")),
    "fsync": (os, "fsync", lambda _: True),
    "rename": (Path, "rename", lambda path: path.name.endswith(".tmp")),
    "write": (TensorFile, "_write", lambda _: True),
}


@both_ways
@pytest.mark.parametrize("broken", BREAKABLE)
def test_whatever_fails_the_former_checkpoint_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, background: bool
) -> None:
    """At each of its calls once."""
    owner, name, fits = BREAKABLE[broken]
    real = getattr(owner, name)
    first, said = small.save(tmp_path, 1, value=1.0), []
    saver = small.saver(tmp_path, said, background=background, keep=1)
    for at_call in range(1, 30):
        calls = 0

        def fail(*arguments: Any, at_call: int = at_call, **keywords: Any) -> Any:
            nonlocal calls
            calls += fits(arguments[0])
            if calls == at_call:
                no_room()
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            saver.save(2, small.contents(2.0), None)
            try:
                saver.finish()
            except RunError as error:
                assert "No space left" in str(error)  # noqa: PT017 - the last one does not fail
            else:
                break
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        assert small.load(newest) == {float(checkpoint.read(newest)["step"])}
        assert small.load(first) == {1.0}
        assert all(p.name.startswith("step-") for p in (tmp_path / "checkpoints").iterdir())
    assert at_call > 1
    assert tiny.checkpoint_steps(tmp_path) == [2]
    assert small.load(tmp_path / "checkpoints" / "step-00000002") == {2.0}
    assert said == []


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the checkpoints of some steps fail."""
    real = TensorFile._write

    def write(file: TensorFile, data: Any) -> None:
        if Path(file._file.name).parent.name in [f".step-{step:08d}.tmp" for step in steps]:
            no_room()
        real(file, data)

    monkeypatch.setattr(TensorFile, "_write", write)


def test_a_run_goes_on_and_ends_as_it_would_have(
    cache: Path, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_the_disk(monkeypatch, 4, 6)
    assert tiny.train(tiny.config(cache, tmp_path, **tiny.EVERYTHING)).summary is not None
    assert tiny.different(tiny.tensors(tmp_path), tiny.tensors(finished_run)) == []
    assert 4 not in tiny.checkpoint_steps(tmp_path)


def test_a_run_whose_last_checkpoint_fails_is_not_finished(
    cache: Path, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(cache, tmp_path, **tiny.EVERYTHING)
    with monkeypatch.context() as patch:
        fill_the_disk(patch, 9)
        with pytest.raises(RunError, match=r"step-00000009 cannot be written .*step-00000008 stands"):
            tiny.train(config)
    assert not (tmp_path / "summary.json").exists()
    assert tiny.train(config).summary is not None
    assert tiny.different(tiny.tensors(tmp_path), tiny.tensors(finished_run)) == []


def test_a_run_that_cannot_save_when_it_is_stopped_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.after_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    fill_the_disk(monkeypatch, 2)  # also handed over just before the signal is heard
    with pytest.raises(RunError, match=r"step-00000002 cannot be written .*there is none yet; the same command"):
        tiny.train(tiny.config(cache, tmp_path, **tiny.EVERYTHING))
