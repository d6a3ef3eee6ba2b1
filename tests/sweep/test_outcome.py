"""What became of a training, judged by what it has left."""

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from gmscale import cli, heartbeat, launched, ownership
from gmscale import train as training
from gmscale.errors import UsageError
from gmscale.heartbeat import Record
from gmscale.parallel import Stepped, Wrapped
from gmscale.stopping import STOPPED
from gmscale.sweep.outcome import Outcome, judge
from gmscale.sweep.process import TrialProcess, run_command


def train(cache: Path, run_dir: Path, *flags: str, **sections: dict[str, Any]) -> Outcome:
    """Train in a process of its own, and judge it."""
    log = run_dir.parent / "log"
    argv = ["gmscale", "train", *tiny.flags(cache, run_dir, **sections), *flags]
    return judge(run_dir, run_command(argv, log, {}, timeout_s=120), log)


def shown(run_dir: Path, **fields: Any) -> None:
    """Leave the record of rank 0."""
    folder = run_dir / "heartbeats"
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(rank=0, size=1, host="node", pid=7, step=12, phase="backward", **fields)
    (folder / "rank-00000.json").write_text(json.dumps(vars(record)))


def log_of(folder: Path, *lines: str) -> Path:
    (folder / "log").write_text("".join(f"{line}\n" for line in lines))
    return folder / "log"


# -- ends of real runs ---------------------------------------------------------------------------------------------
def test_a_finished_run_gives_its_numbers(finished_run: Path) -> None:
    found = judge(finished_run, 0, None)
    summary = json.loads((finished_run / "summary.json").read_text())
    assert (found.state, found.error) == ("finished", "")
    assert found.values["top1"] == summary["top1"]
    assert {
        "top5",
        "loss",
        "best_top1",
        "ema_top1",
        "images_per_s",
        "kept_entries",
        "wall_s",
    } <= found.values.keys()
    assert judge(finished_run, -9, None) == found  # whatever came after the summary


def test_a_finished_run_whose_loss_is_not_finite_has_diverged(finished_run: Path, tmp_path: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    for loss in (math.nan, math.inf, None):
        (tmp_path / "summary.json").write_text(json.dumps(summary | {"loss": loss}))
        found = judge(tmp_path, 0, None)
        assert (found.state, found.error) == ("diverged", "the loss of the last evaluation is not finite")
        assert "loss" not in found.values
        assert found.values["top1"] == summary["top1"]


@pytest.mark.slow
def test_a_run_that_diverges_is_no_crash(cache: Path, tmp_path: Path) -> None:
    huge = {"lr": 1e30, "warmup_epochs": 0}
    found = train(cache, tmp_path / "run", run={"epochs": 3.0, "max_nonfinite": 4}, optim=huge)
    assert found.state == "diverged"
    assert "lower optim.lr" in found.error
    assert "\n" not in found.error
    assert judge(tmp_path / "run", None, None).state == "diverged"  # by what the run itself has left


def test_a_run_whose_statistics_break_has_diverged(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One skipped step, far from max_nonfinite, ends the run."""
    monkeypatch.setattr(Wrapped, "nonfinite_gradients", lambda _: ["head.weight"])
    monkeypatch.setattr(Wrapped, "nonfinite_buffers", lambda _: ["stem.bn.running_mean"])
    monkeypatch.setattr(training, "train_step", lambda *_: Stepped(float("nan"), skipped=True))
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        cli.main(["train", *tiny.flags(cache, run_dir)])
    assert left.value.code == 1
    found = judge(run_dir, 1, None)
    assert found.state == "diverged"
    assert found.error.startswith("step 1 left stem.bn.running_mean not finite")


def test_a_usage_error_is_final_and_one_line(cache: Path, tmp_path: Path) -> None:
    found = train(cache, tmp_path / "run", "--optim.lrr=1")
    assert (found.state, found.may_be_tried_again) == ("failed", False)
    assert "lrr" in found.error
    assert not found.error.startswith("gmscale")


@pytest.mark.slow
def test_a_killed_run_failed_and_one_that_was_stopped_did_not(cache: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    argv = ["gmscale", "train", *tiny.flags(cache, run_dir, run={"epochs": 500.0})]
    process = TrialProcess(argv, run_dir, log, {})
    assert process.next_result(120) is not None, log.read_text()
    status = process.kill()
    found = judge(run_dir, status, log)
    assert (found.state, found.may_be_tried_again) == ("failed", True)
    assert found.error == "was killed by SIGKILL (out of memory? the kernel's log says so)"
    assert judge(run_dir, None, None).error.startswith("ended without a word, last in ")
    again = TrialProcess(argv, run_dir, log, {})
    while "validation:" not in log.read_text().rpartition("\n$ ")[2]:
        assert again.wait(0.1) is None, log.read_text()
    assert judge(run_dir, again.stop(60), log) == Outcome("interrupted")
    assert judge(run_dir, None, log) == Outcome("interrupted")  # as the run has said itself


def test_python_s_own_errors_are_told(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    broken = "def f():\n  try:\n    1 / 0\n  except ZeroDivisionError:\n    raise KeyError('a')\nf()"
    status = run_command([sys.executable, "-c", broken], log, {})
    assert judge(tmp_path, status, log).error == "KeyError: 'a'"


# -- the words that are told ---------------------------------------------------------------------------------------
TRACEBACK = (
    "gmscale: unexpected error in step 3, forward",
    "Traceback (most recent call last):",
    '  File "x.py", line 1, in f',
    "torch.AcceleratorError: CUDA error: an illegal memory access",
    "CUDA kernel errors might be asynchronously reported",
)
MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. ...; lower data.batch_size_per_device"
LAUNCHED = (
    "gmscale launch: 2 ranks on this node",
    "gmscale launch: rank 1 (host a, process 9) was killed by SIGKILL in step 3, backward",
    "gmscale launch: rank 0 (host a, process 8) ended with status 1 in step 3, backward: connection closed",
    "gmscale launch: failed 4 times, at most at step 3, and --max_restarts is 3",
)


@pytest.mark.parametrize(
    ("status", "lines", "error"),
    [
        (1, (f"gmscale: error: {MEMORY}",), MEMORY),
        (1, TRACEBACK, "torch.AcceleratorError: CUDA error: an illegal memory access"),
        (1, LAUNCHED, "rank 1 (host a, process 9) was killed by SIGKILL in step 3, backward"),
        (1, ("gmscale: error: rank 0: bad", *LAUNCHED), "rank 0: bad"),
        (1, ("$ gmscale train", "gmscale: error: old", "$ gmscale train", "gmscale: error: new"), "new"),
        (1, ("$ gmscale train", "gmscale: error: old", "$ gmscale train"), "ended with status 1 and without"),
        (0, ("all is well",), "ended with status 0 and without summary.json"),
        (-11, (), "was killed by SIGSEGV"),
        (-6, ("gmscale: error: gloo is gone",), "was killed by SIGABRT: gloo is gone"),
        (1, ("gmscale: error: " + "long " * 5000,), "long long"),
        (1, ("x" * 70_000, "gmscale: error: at the end of a long log"), "at the end of a long log"),
    ],
)
def test_the_error_is_the_last_attempt_s(tmp_path: Path, status: int, lines: tuple[str, ...], error: str) -> None:
    found = judge(tmp_path, status, log_of(tmp_path, *lines))
    assert (found.state, found.may_be_tried_again) == ("failed", True)
    assert found.error.startswith(error)
    assert len(found.error) <= 300


def test_the_run_s_own_record_speaks_where_there_is_no_log(tmp_path: Path) -> None:
    shown(tmp_path, status=1, error="OSError: no space", final=True)
    assert judge(tmp_path, 1, None).error == "OSError: no space"
    assert judge(tmp_path, None, tmp_path / "no log").error == "OSError: no space"
    assert judge(tmp_path, 3, None).error == "ended with status 3 and without summary.json"  # another attempt's


def test_nothing_at_all_is_a_failure_too(tmp_path: Path) -> None:
    assert judge(tmp_path / "no run", None, None).error == "ended without a word: killed, or its node is gone"


def test_a_skipped_step_before_a_crash_is_not_divergence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "phase": "skipped", "in_a_row": 1, "cause": "a"}\n')
    assert judge(tmp_path, 1, log_of(tmp_path, *TRACEBACK)).state == "failed"
    assert judge(tmp_path, 1, log_of(tmp_path, "gmscale: error: the loss was not finite")).state == "diverged"
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "phase": "train"}\n')
    assert judge(tmp_path, 1, log_of(tmp_path, "gmscale: error: the loss was not finite")).state == "failed"


@pytest.mark.parametrize("status", [STOPPED, 130, -signal.SIGTERM, -signal.SIGINT])
def test_who_was_asked_to_stop_was_interrupted(tmp_path: Path, status: int) -> None:
    assert judge(tmp_path, status, None) == Outcome("interrupted")


def test_a_run_directory_that_is_still_taken_may_be_free_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with heartbeat.Heartbeat().shared(tmp_path):
        monkeypatch.setenv(launched.WORLD, "another.0")
        with pytest.raises(UsageError) as refused:
            ownership.take(tmp_path)
    found = judge(tmp_path, 2, log_of(tmp_path, f"gmscale: error: {refused.value}"))
    assert (found.state, found.may_be_tried_again) == ("failed", True)
    assert "is being trained already" in found.error
