"""Saving beside the training: never torn, never in its way, killed at any moment."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import small_checkpoints as small
import tiny
import torch

from gmscale import checkpoint, losses
from gmscale import step as one_step
from gmscale.checkpoint import saving
from gmscale.checkpoint.tensors import TensorFile
from gmscale.checkpoint.writing import Task
from gmscale.errors import RunError

both_ways = pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])


# ---- in the background -------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set; who waits for a task sets it."""
    opened = threading.Event()
    write, wait = saving.write_tensors, Task.wait

    def late(*arguments: Any) -> None:
        assert opened.wait(30)
        write(*arguments)

    def wait_for(task: Task, seconds: float) -> None:
        opened.set()
        wait(task, seconds)

    monkeypatch.setattr(saving, "write_tensors", late)
    monkeypatch.setattr(Task, "wait", wait_for)
    return opened


def test_training_goes_on_and_may_change_everything_that_is_being_saved(
    tmp_path: Path, gate: threading.Event
) -> None:
    contents = small.contents(2.0)
    saver = small.saver(tmp_path, background=True)
    saver.save(1, contents, None)
    assert saver.progress == (True, False)
    for tensor in (*contents.weights.values(), contents.per_rank["held"]):
        tensor.fill_(9.0)
    contents.optimizer["state"][0]["momentum_buffer"].fill_(9.0)
    contents.shared["value"] = 9.0
    contents.optimizer["param_groups"][0]["lr"] = 9.0
    saver.finish()
    path = checkpoint.latest(tmp_path)
    assert path is not None
    assert small.load(path) == {2.0}
    assert checkpoint.optimizer_state(path)["param_groups"][0]["lr"] == 0.1


def test_a_run_that_ends_with_an_error_completes_what_it_had_handed_over(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    config = tiny.config(cache, tmp_path, run={"save_every_steps": 1, "max_nonfinite": 1}, mask={"enabled": False})

    def poison() -> None:
        monkeypatch.setattr(losses, "training_loss", lambda logits, *_: logits.sum() * float("nan"))

    monkeypatch.setattr(one_step, "training_loss", lambda *arguments: losses.training_loss(*arguments))
    tiny.after_step(1, poison, monkeypatch)
    with pytest.raises(RunError, match=r"last good checkpoint is .*step-00000001"):
        tiny.train(config)
    assert tiny.checkpoint_steps(tmp_path) == [1]


def test_a_best_that_could_not_be_saved_is_not_the_one_to_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    saver = small.saver(tmp_path, said, keep_best=1)
    assert saver.is_best(0.0)
    saver.save(1, small.contents(), 50.0)
    assert (saver.is_best(50.0), saver.is_best(50.1)) == (False, True)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", Mock(side_effect=OSError(28, "No space left on device")))
        saver.save(2, small.contents(), 60.0)
        saver.settle()
    assert len(said) == 1
    assert saver.is_best(55.0)
    saver.save(3, small.contents(), 55.0)
    assert not small.saver(tmp_path, keep_best=1).is_best(55.0)  # also after a resume
    assert not small.saver(tmp_path, keep_best=0).is_best(100.0)


def test_a_checkpoint_gets_its_name_only_when_no_rank_is_writing(tmp_path: Path, gate: threading.Event) -> None:
    saver = small.saver(tmp_path, background=True)
    saver.save(1, small.contents(), None)
    for writing, failed in [(1, 0), (2, 0), (1, 1)]:
        saver.advance(writing, failed)
        assert checkpoint.latest(tmp_path) is None
    assert saver.step == 1
    saver._task.wait(30)
    assert saver.progress == (False, False)
    saver.advance(1, 0)  # another rank is still at it
    assert not (tmp_path / "checkpoints" / "step-00000001").exists()
    saver.advance(0, 0)
    saver._task.wait(30)
    assert small.load(tmp_path / "checkpoints" / "step-00000001") == {1.0}
    saver.advance(0, 0)
    assert saver.progress == (False, False)


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    saver = small.saver(tmp_path, background=True)
    saver.save(1, small.contents(1.0), None)
    assert saver.progress == (True, False)
    saver.save(2, small.contents(2.0), None)  # into the same memory
    assert tiny.checkpoint_steps(tmp_path) == [1]
    saver.finish()
    assert [small.load(path) for path in checkpoint.checkpoints(tmp_path)] == [{1.0}, {2.0}]


def test_other_shapes_than_the_last_time_are_saved(tmp_path: Path) -> None:
    saver = small.saver(tmp_path, background=True)
    for step, entries in ((1, 3), (2, 5), (3, 3)):
        saver.save(step, small.contents(float(step), entries), None)
        saver.finish()
        path = checkpoint.latest(tmp_path)
        assert path is not None
        assert small.load(path, entries) == {float(step)}


def test_what_is_not_a_disk_error_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(saving, "write_tensors", broken)
    saver = small.saver(tmp_path, background=True)
    saver.save(1, small.contents(), None)
    saver._task.wait(30)
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        saver.advance(0, 1)


DIES = """
import os, sys
sys.path.insert(0, sys.argv[2])
import small_checkpoints as small
from pathlib import Path
reading, _ = os.pipe()
os.fsync = lambda _: os.read(reading, 1)  # never comes back
saver = small.saver(Path(sys.argv[1]), background=True)
saver.save(1, small.contents(), None)
raise SystemExit(7)
"""


def test_an_exception_ends_the_process_while_a_thread_writes(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    ended = subprocess.run([sys.executable, "-c", DIES, tmp_path, here], timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (7, "")
    assert checkpoint.latest(tmp_path) is None
    small.saver(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_gpu_are_copied_before_save_returns(tmp_path: Path, gate: threading.Event) -> None:
    held = torch.full((1 << 22,), 2.0, device="cuda")
    saver = small.saver(tmp_path, background=True)
    saver.save(1, small.contents(per_rank={"held": held}), None)
    held.fill_(9.0)
    saver.finish()
    path = checkpoint.latest(tmp_path)
    assert path is not None
    assert checkpoint.load_rank(path, tiny.ALONE)["held"].unique().tolist() == [2.0]


# ---- killed ------------------------------------------------------------------------------------------------------


def test_an_unfinished_directory_is_ignored_and_swept_up(tmp_path: Path) -> None:
    first = small.save(tmp_path, 1)
    left_over = tmp_path / "checkpoints" / ".step-00000002.tmp"
    whole = first / ".model.safetensors.1234.tmp"

    def leave() -> None:
        shutil.copytree(first, left_over, dirs_exist_ok=True)
        whole.write_bytes(b"half")

    leave()
    assert checkpoint.latest(tmp_path) == first
    saver = small.saver(tmp_path)
    assert not left_over.exists()
    assert not whole.exists()
    leave()
    saver.save(2, small.contents(), None)
    assert not left_over.exists()
    assert tiny.checkpoint_steps(tmp_path) == [1, 2]


def _save_and_die(run_dir: Path, at_call: int, background: bool) -> None:
    """Save step 2 and SIGKILL this process just before its `at_call`-th write, sync, rename or removal."""
    calls = 0

    def deadly(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    os.fsync, os.unlink, os.rmdir = deadly(os.fsync), deadly(os.unlink), deadly(os.rmdir)
    TensorFile._write, Path.rename, Path.mkdir = map(deadly, (TensorFile._write, Path.rename, Path.mkdir))
    small.save(run_dir, 2, keep=1, value=2.0, background=background)


@both_ways
def test_killed_at_any_moment_the_newest_checkpoint_is_complete(tmp_path: Path, background: bool) -> None:
    context = multiprocessing.get_context("fork")
    seen = set()
    for at_call in range(1, 40):
        run_dir = tmp_path / str(at_call)
        small.save(run_dir, 1, value=1.0)
        process = context.Process(target=_save_and_die, args=(run_dir, at_call, background))
        process.start()
        process.join(30)
        newest = checkpoint.latest(run_dir)
        assert newest is not None
        step = checkpoint.read(newest)["step"]
        assert small.load(newest) == {float(step)}
        for path in (run_dir / "checkpoints").glob("step-*"):  # also one that was about to be removed
            small.load(path)
        seen.add(step)
        assert small.load(small.save(run_dir, 3, value=3.0)) == {3.0}  # and the run goes on
        assert all(p.name.startswith("step-") for p in (run_dir / "checkpoints").iterdir())
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    else:
        pytest.fail("never came through")
    assert seen == {1, 2}
    assert at_call > 15
