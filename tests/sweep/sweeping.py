"""Sweeps so small that a test can run one: their files, their program, and what they leave behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import yaml

from gmscale import trials
from gmscale.trials import Record


def write(folder: Path, cache: Path, sweep: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """Write the file of a sweep in `folder`/sweep, of trainings of 6 steps an epoch; return the file."""
    settings = tiny.settings(cache, folder / "unused", **sections)
    settings["run"].pop("dir")
    held = {**settings, "sweep": {"dir": str(folder / "sweep"), "retries": 1, **sweep}}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(held))
    return path


class Sweep:
    """`gmscale sweep` as a process of its own."""

    def __init__(self, log: Path, *argv: str, env: dict[str, str] | None = None) -> None:
        self.log = log
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gmscale", "sweep", *argv],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self, timeout_s: float = 240) -> int:
        return self.process.wait(timeout_s)


def run(log: Path, *argv: str, status: int = 0, timeout_s: float = 240) -> str:
    """Run `gmscale sweep` to its end; return what it said."""
    sweep = Sweep(log, *argv)
    assert sweep.wait(timeout_s) == status, sweep.output
    return sweep.output


def records(folder: Path) -> dict[int, Record]:
    """What the ledger says, once there is one."""
    return trials.read(folder / "sweep") if (folder / "sweep" / "trials.jsonl").exists() else {}


def wait_until(what: str, sweep: Sweep, happened: Callable[[], Any], timeout_s: float = 120) -> None:
    """Wait for something that a living sweep is to do."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert sweep.process.poll() is None, f"ended before {what}:\n{sweep.output}"
        assert time.monotonic() < deadline, f"waited for {what}:\n{sweep.output}"
        time.sleep(0.1)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "sweep" / "trials.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]
