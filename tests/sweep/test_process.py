"""The processes of a trial: followed, stopped, and gone with whoever started them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from gmscale.errors import RunError
from gmscale.stopping import STOPPED
from gmscale.sweep.process import Process, TrialProcess, run_command
from gmscale.trials import Result

PYTHON = [sys.executable, "-c"]
# Two generations below the command, the younger one in a session of its own, as the ranks of a launcher are.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("family", os.getpid(), child.pid, flush=True)
time.sleep({seconds})
"""


def wait_until(condition: Callable[[], Any], timeout_s: float = 30.0) -> float:
    """Wait until it holds; return the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "it did not happen"
        time.sleep(0.01)
    return time.monotonic() - began


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def below(pid: int) -> list[int]:
    """Every process below this one."""
    found = [pid]
    for parent in found:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(path.parent.name))
    return found[1:]


def family(log: Path) -> list[int]:
    """The processes that FAMILY has told of, once it has."""
    wait_until(lambda: log.exists() and "\nfamily " in log.read_text() and log.read_text().endswith("\n"))
    return [int(pid) for pid in log.read_text().split("\nfamily ")[1].split()]


# -- beginning and ending ------------------------------------------------------------------------------------------
def test_the_status_and_the_output_are_those_of_the_command(tmp_path: Path) -> None:
    log = tmp_path / "logs/1.log"
    said = "import os, sys; print(os.environ['OMP_NUM_THREADS'], sys.stdin.read() == ''); sys.exit(7)"
    assert run_command([*PYTHON, said], log, {"OMP_NUM_THREADS": "3"}) == 7
    assert run_command(["gmscale", "--version"], log, {}) == 0
    assert run_command(["no-such-command"], log, {}) == 1
    lines = log.read_text().splitlines()
    assert lines[1] == "3 True"
    assert lines[2] == "$ gmscale --version"  # what people can type
    assert lines[3].startswith("gmscale ")
    assert lines[5] == "gmscale: error: no-such-command cannot be started: No such file or directory"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_signal_is_passed_on_as_a_signal(tmp_path: Path, number: int) -> None:
    assert run_command([*PYTHON, f"import os; os.kill(os.getpid(), {number})"], tmp_path / "log", {}) == -number


def test_an_extra_process_costs_little_time(tmp_path: Path) -> None:
    def took(run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    bare = min(took(lambda: subprocess.run(["true"], check=True)) for _ in range(5))
    tethered = min(took(lambda: run_command(["true"], tmp_path / "log", {})) for _ in range(5))
    assert tethered - bare < 0.25  # 0.03 on an idle machine; an import of torch takes seconds


def test_what_a_command_leaves_behind_is_gone_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_command([*PYTHON, FAMILY.format(seconds=0)], log, {}) == 0
    assert not any(map(lives, family(log)))


def test_a_command_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RunError, match=r"-c still ran after 1 s and was killed; see .*log$"):
        run_command([*PYTHON, FAMILY.format(seconds=600)], log, {}, timeout_s=1.0)
    assert not any(map(lives, family(log)))


def test_killing_reaches_sessions_of_their_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = Process([*PYTHON, FAMILY.format(seconds=600)], log, {})
    pids = family(log)
    assert all(map(lives, pids))
    assert process.kill() == -signal.SIGKILL
    assert process.poll() == -signal.SIGKILL
    assert not any(map(lives, pids))  # at once: nothing is left to wait for


def test_a_process_that_is_forgotten_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = Process([*PYTHON, FAMILY.format(seconds=600)], log, {})
    pids = family(log)
    del process
    wait_until(lambda: not any(map(lives, pids)))


def test_one_that_does_not_listen_is_killed_after_its_grace(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)"
    process = Process([*PYTHON, f"{deaf}; time.sleep(600)"], tmp_path / "log", {})
    wait_until(lambda: "\ndeaf" in (tmp_path / "log").read_text())
    began = time.monotonic()
    assert process.stop(grace_s=0.5) == -signal.SIGKILL
    assert 0.5 <= time.monotonic() - began < 5


PARENT = """
import sys, threading, time
from pathlib import Path
from gmscale.sweep.process import Process
kept = []
thread = threading.Thread(target=lambda: kept.append(Process(sys.argv[2:], Path(sys.argv[1]), {})))
thread.start()
thread.join()  # its end must not be taken for that of this process
time.sleep(600)
"""


def start_parent(log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*PYTHON, PARENT, str(log), *PYTHON, FAMILY.format(seconds=600)])


def test_everything_ends_with_its_parent_but_not_with_a_thread(tmp_path: Path) -> None:
    with start_parent(tmp_path / "log") as parent:
        pids = family(tmp_path / "log")
        time.sleep(0.3)
        assert all(map(lives, pids))
        parent.kill()
        wait_until(lambda: not any(map(lives, pids)), 5.0)


def test_the_command_ends_when_only_what_ties_it_is_killed(tmp_path: Path) -> None:
    process = Process([*PYTHON, FAMILY.format(seconds=600)], tmp_path / "log", {})
    main, child = family(tmp_path / "log")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not lives(main), 5.0)
    os.kill(child, signal.SIGKILL)  # in a session of its own: a rank looks after its launcher itself


# -- following -----------------------------------------------------------------------------------------------------
def line(step: int, phase: str = "validation", top1: float | None = 50.0) -> str:
    record = {"step": step, "epoch": step / 10, "phase": phase, "top1": top1, "top5": 90.0, "loss": 1.0, "count": 8}
    return json.dumps(record) + "\n"


@pytest.fixture
def follow(tmp_path: Path) -> Any:
    """A trial whose process does nothing, so that the test can write its metrics.jsonl."""
    started = []

    def start(after_step: int = 0, seconds: float = 600) -> TrialProcess:
        argv = [*PYTHON, f"import time; time.sleep({seconds})"]
        started.append(TrialProcess(argv, tmp_path, tmp_path / "log", {}, after_step=after_step))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_evaluations_come_in_order_and_once(tmp_path: Path, follow: Any) -> None:
    metrics, process = tmp_path / "metrics.jsonl", follow(after_step=10)
    assert process.next_result(0) is None  # no file yet
    metrics.write_text(
        line(10) + line(15, "train") + line(20) + line(20, "validation_ema") + "not JSON\n" + line(30)
    )
    assert process.next_result(5) == Result(20, 2.0, {"loss": 1.0, "top1": 50.0, "top5": 90.0})
    assert process.next_result(0).step == 30
    began = time.monotonic()
    assert process.next_result(0.3) is None
    assert 0.3 <= time.monotonic() - began < 3


def test_half_a_line_is_waited_for(tmp_path: Path, follow: Any) -> None:
    process, text = follow(), line(10)
    with open(tmp_path / "metrics.jsonl", "w", buffering=1) as metrics:
        metrics.write(text[:-1])  # a whole object, but who knows
        metrics.flush()
        assert process.next_result(0.2) is None
        metrics.write("\n" + line(20)[:30])
        metrics.flush()
        assert process.next_result(5).step == 10
        assert process.next_result(0.2) is None
        metrics.write(line(20)[30:])
    assert process.next_result(5).step == 20


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_a_resumed_run_cuts_back_is_read_again(tmp_path: Path, follow: Any, replaced: bool) -> None:
    metrics, process = tmp_path / "metrics.jsonl", follow()
    metrics.write_text(line(10) + line(15, "train") + line(20))
    assert [process.next_result(5).step for _ in range(2)] == [10, 20]
    kept = line(10)
    if replaced:
        (tmp_path / "new").write_text(kept)
        os.replace(tmp_path / "new", metrics)
    else:
        os.truncate(metrics, len(kept))
    if replaced:  # one case looks between the cut and what follows, the other sees a longer file at once
        assert process.next_result(0) is None
    with open(metrics, "a") as file:
        file.write(line(15, "train", top1=51.0) + line(20) + line(25, "train") + line(30))
    assert process.next_result(5).step == 30  # 20 is not said again
    assert process.next_result(0) is None


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path, follow: Any) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(10, top1=None))
    assert follow().next_result(5).values == {"loss": 1.0, "top5": 90.0}


def test_nothing_is_lost_when_the_process_has_ended(tmp_path: Path, follow: Any) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(10) + line(20))
    process = follow(seconds=0)
    assert process.wait(30) == 0
    assert [process.next_result(5).step for _ in range(2)] == [10, 20]
    began = time.monotonic()
    assert process.next_result(120) is None
    assert time.monotonic() - began < 5  # there is nothing to wait for


# -- real trainings ------------------------------------------------------------------------------------------------
LONG = {"run": {"epochs": 200.0, "save_every_steps": 10_000}}


def trial(cache: Path, folder: Path, *before: str, after_step: int = 0) -> TrialProcess:
    argv = ["gmscale", *before, "train", *tiny.flags(cache, folder / "run", **LONG)]
    return TrialProcess(argv, folder / "run", folder / "log", {"OMP_NUM_THREADS": "1"}, after_step=after_step)


@pytest.mark.slow
def test_a_training_is_followed_stopped_and_goes_on(cache: Path, tmp_path: Path) -> None:
    process = trial(cache, tmp_path)
    steps = []
    for _ in range(2):
        result = process.next_result(120)
        assert result is not None, (tmp_path / "log").read_text()
        steps.append(result.step)
        assert result.epoch == pytest.approx(result.step / 6, abs=1e-3)
        assert {"top1", "top5", "loss"} == set(result.values)
    assert process.stop(grace_s=60) == STOPPED
    stopped_at = tiny.checkpoint_steps(tmp_path / "run")[-1]
    again = trial(cache, tmp_path, after_step=steps[-1])
    while steps[-1] <= stopped_at:
        result = again.next_result(120)
        assert result is not None, (tmp_path / "log").read_text()
        steps.append(result.step)
    again.kill()
    assert steps == list(range(6, steps[-1] + 1, 6))


@pytest.mark.slow
def test_ranks_die_when_their_launcher_is_killed(cache: Path, tmp_path: Path) -> None:
    process = trial(cache, tmp_path, "launch", "--nproc_per_node", "2")
    assert process.next_result(100) is not None, (tmp_path / "log").read_text()
    (launcher, *rest) = below(process.pid)
    assert len(rest) >= 2
    os.kill(launcher, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert not any(map(lives, rest))


@pytest.mark.slow
def test_a_launcher_and_its_ranks_stop_with_a_checkpoint(cache: Path, tmp_path: Path) -> None:
    process = trial(cache, tmp_path, "launch", "--nproc_per_node", "2")
    assert process.next_result(100) is not None, (tmp_path / "log").read_text()
    pids = below(process.pid)
    assert process.stop(grace_s=60) == STOPPED
    assert not any(map(lives, pids))
    assert tiny.checkpoint_steps(tmp_path / "run")


@pytest.mark.slow
def test_a_trial_can_be_started_again_as_soon_as_its_parent_is_dead(cache: Path, tmp_path: Path) -> None:
    first = subprocess.Popen(
        [*PYTHON, PARENT, str(tmp_path / "log"), "gmscale", "train", *tiny.flags(cache, tmp_path / "run", **LONG)]
    )
    with first:
        wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists(), 60)
        first.kill()
    again = trial(cache, tmp_path)
    result = again.next_result(120)
    again.kill()
    assert result is not None, (tmp_path / "log").read_text()  # ownership.py would have refused company
