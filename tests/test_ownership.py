"""One start of a run at a time writes its directory."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from gmscale import ownership
from gmscale.errors import RunError, UsageError

LIVES = """
import sys, time
from pathlib import Path
from gmscale.heartbeat import Heartbeat
with Heartbeat().shared(Path(sys.argv[1])):
    print("beats", flush=True)
    {then}
"""


def start(run_dir: Path, then: str) -> subprocess.Popen[str]:
    """Start a process that shares its heartbeat, and wait until it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", LIVES.format(then=then), str(run_dir)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "beats\n"
    return process


def test_the_newest_start_owns_the_directory(tmp_path: Path) -> None:
    first = ownership.take(tmp_path)
    first.check()
    second = ownership.take(tmp_path)
    second.check()
    with pytest.raises(RunError, match=r"was taken over by a newer start of this run \(see .*00002\.json\)"):
        first.check()


def test_a_directory_in_which_a_rank_lives_is_refused(tmp_path: Path) -> None:
    with start(tmp_path, "time.sleep(60)") as process:
        try:
            with pytest.raises(UsageError, match=f"is being trained already, by process {process.pid} on "):
                ownership.take(tmp_path)
        finally:
            process.kill()
    assert not (tmp_path / "starts").exists()
    ownership.take(tmp_path)  # it is dead: nobody waits for it


def test_a_rank_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    with start(tmp_path, "time.sleep(1)"):
        ownership.take(tmp_path)


def test_a_run_whose_directory_was_taken_over_writes_no_more_checkpoints(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    config = tiny.config(cache, run_dir, run={"save_every_steps": 1})
    tiny.after_step(3, lambda: ownership.take(run_dir), monkeypatch)
    with pytest.raises(RunError, match="was taken over"):
        tiny.train(config)
    assert set(tiny.checkpoint_steps(run_dir)) <= {1, 2}
    monkeypatch.undo()
    tiny.train(config)  # the same command goes on
    assert tiny.checkpoint_steps(run_dir)[-1] == 6
