"""The processes of one trial: started, followed by what they evaluate, asked to stop, and never left behind.

Imports neither torch nor Ray.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gmscale.errors import RunError
from gmscale.sweep import tether
from gmscale.trials import Result

COMMAND = "$ "  # begins the line of a log that says what was started; its output follows
_LOOK_S = 0.1  # between two looks at metrics.jsonl
_DYING_S = 60.0  # for processes that were killed; one that waits for a file system or a GPU cannot die
_VALUES = ("loss", "top1", "top5")


class Process:
    """A command, its output appended to `log`, that ends with this process, and with it all that it has started.

    `env` adds to the environment. A command that begins with `gmscale` is run by this interpreter. When `poll` or
    `stop` has returned its status, nothing of it lives any more. It also ends when this object is forgotten.
    """

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str], cwd: str | None = None) -> None:
        started = [sys.executable, "-m", "gmscale", *argv[1:]] if argv[0] == "gmscale" else list(argv)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            output.write(f"{COMMAND}{shlex.join(argv)}\n".encode())
            output.flush()
            # -I -S: a start of 20 ms, and no module beside the tether that hides one of Python's
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *started],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                cwd=cwd,
                start_new_session=True,  # Ctrl-C is for the sweep, which decides what it means
            )
        assert self._process.stdin is not None
        self._let_go = weakref.finalize(self, self._process.stdin.close)

    @property
    def pid(self) -> int:
        """The process that everything of the command lives below."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._released(self._process.poll())

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Return the exit status, or None if it still runs after `timeout_s`."""
        try:
            return self._released(self._process.wait(timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def stop(self, grace_s: float) -> int:
        """Ask it to stop, and kill it if it has not after `grace_s`; return the exit status."""
        self._process.terminate()
        status = self.wait(grace_s)
        return self.kill() if status is None else status

    def kill(self) -> int:
        """Kill everything at once; return the exit status. Raises RunError if the kernel does not let it die."""
        self._let_go()
        status = self.wait(_DYING_S)
        if status is None:
            raise RunError(f"processes below {self.pid} do not die within {_DYING_S:.0f} s of being killed")
        return status

    def _released(self, status: int | None) -> int | None:
        """Close the pipe to a process that has ended."""
        if status is not None:
            self._let_go()
        return status


class TrialProcess(Process):
    """A training in `run_dir`, whose evaluations it returns one after another, those after `after_step` only."""

    def __init__(
        self,
        argv: Sequence[str],
        run_dir: Path,
        log: Path,
        env: Mapping[str, str],
        cwd: str | None = None,
        after_step: int = 0,
    ) -> None:
        super().__init__(argv, log, env, cwd)
        self._metrics = _Metrics(run_dir / "metrics.jsonl")
        self._after_step = after_step
        self._pending: deque[Result] = deque()

    def next_result(self, timeout_s: float) -> Result | None:
        """Return the next evaluation; None if there is none after `timeout_s`, or when the process has ended.

        Values that were not finite are not in it. An evaluation that a resumed run repeats is not returned again.
        """
        deadline = time.monotonic() + timeout_s
        while not self._pending:
            ended = self.poll() is not None  # asked before the file is read, so the last record is not missed
            self._read()
            left = deadline - time.monotonic()
            if not self._pending:
                if ended or left <= 0:
                    return None
                self.wait(min(_LOOK_S, left))
        return self._pending.popleft()

    def _read(self) -> None:
        self._pending.extend(_results(self._metrics, self._after_step))
        if self._pending:
            self._after_step = self._pending[-1].step


class _Metrics:
    """The records of metrics.jsonl as it grows; all of them again when a resumed run has cut it back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end, self._last = 0, b""  # of what was read: its end, and its last line

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield what has been written since the last call, without a last line that is not whole."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._end - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._end, self._last = 0, b""
                    file.seek(0)
                lines = file.readlines()
        except OSError:  # it is not there yet, or is being replaced on a shared file system
            return
        for line in lines:
            if not line.endswith(b"\n"):
                return
            self._end, self._last = self._end + len(line), line
            try:
                record = json.loads(line)
            except ValueError:
                continue  # spoiled by a full disk
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _results(metrics: _Metrics, after_step: int) -> Iterator[Result]:
    for record in metrics.new():
        if record.get("phase") == "validation" and record["step"] > after_step:
            after_step = record["step"]
            values = {name: record[name] for name in _VALUES if _is_finite(record.get(name))}
            yield Result(record["step"], record["epoch"], values)


def results_of(run_dir: Path) -> list[Result]:
    """Return the evaluations of the run in `run_dir`, in order."""
    return list(_results(_Metrics(run_dir / "metrics.jsonl"), after_step=0))


def run_command(
    argv: Sequence[str],
    log: Path,
    env: Mapping[str, str],
    cwd: str | None = None,
    timeout_s: float | None = None,
) -> int:
    """Run a command to its end and return its exit status, as `Process` does.

    Raises RunError if it has not ended after `timeout_s`; nothing of it lives then.
    """
    process = Process(argv, log, env, cwd)
    status = process.wait(timeout_s)
    if status is None:
        process.kill()
        raise RunError(f"{' '.join(argv[:2])} still ran after {timeout_s:g} s and was killed; see {log}")
    return status


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
