"""Traces: what is in them, and the steps that a run does not do."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from gmscale.profiling import StepProfiler


def run(folder: Path, steps: tuple[int, int] | None, done: int = 0, total: int = 6, fails_at: int = 0) -> list[str]:
    """Do steps that multiply matrices; return what was said."""
    said: list[str] = []
    with StepProfiler(folder, steps, tiny.ALONE, done, total, said.append) as profiler:
        for step in range(done + 1, total + 1):
            profiler.before(step)
            torch.ones(4, 4) @ torch.ones(4, 4)
            if step == fails_at:
                raise KeyError
            profiler.after(step)
    return said


def events(file: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name", "").startswith(name)]


@pytest.mark.parametrize(
    ("asked", "done", "traced"),
    [((2, 4), 0, (2, 4)), ((1, 1), 0, (1, 1)), ((2, 4), 3, (4, 4)), ((5, 9), 0, (5, 6)), ((1, 10**9), 0, (1, 6))],
)
def test_a_trace_holds_the_steps_that_were_asked_for(
    tmp_path: Path, asked: tuple[int, int], done: int, traced: tuple[int, int]
) -> None:
    said = run(tmp_path / "profile", asked, done)
    first, last = traced
    file = tmp_path / "profile" / f"rank-00000-steps-{first}-{last}.json"
    assert list(file.parent.iterdir()) == [file]
    assert said == [f"wrote {file} (open it in https://ui.perfetto.dev)"]
    ranges = sorted(events(file, "step "), key=lambda e: e["ts"])
    assert [e["name"] for e in ranges] == [f"step {n}" for n in range(first, last + 1)]
    products = [e["ts"] for e in events(file, "aten::mm")]
    assert all(any(r["ts"] <= t <= r["ts"] + r["dur"] for r in ranges) for t in products)
    assert len(products) == len(ranges)


@pytest.mark.parametrize(("steps", "done"), [((7, 9), 0), ((2, 4), 4), ((1, 2), 6)])
def test_steps_that_the_run_does_not_do_are_said(tmp_path: Path, steps: tuple[int, int], done: int) -> None:
    (line,) = run(tmp_path / "profile", steps, done)
    asked, does = f"run.profile_steps {steps[0]} to {steps[1]}", f"this run does steps {done + 1} to 6"
    assert line == f"{asked}: {does}, so there will be no trace"
    assert not (tmp_path / "profile").exists()


def test_without_steps_nothing_happens(tmp_path: Path) -> None:
    assert run(tmp_path / "profile", None) == []
    assert not (tmp_path / "profile").exists()


def test_a_failed_run_ends_its_trace_and_a_later_one_can_trace(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        run(tmp_path / "profile", (2, 4), fails_at=3)
    assert not (tmp_path / "profile").exists()
    assert len(run(tmp_path / "profile", (1, 2))) == 1


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    (line,) = run(tmp_path / "profile", (1, 2))
    assert "rank-00000-steps-1-2.json cannot be written" in line


def test_training_traces_its_steps_with_the_mask_in_them(tmp_path: Path) -> None:
    tiny.build(tmp_path)
    config = tiny.config(tmp_path, tmp_path / "run", run={"profile_steps": [2, 3], "epochs": 0.5})
    tiny.train(config)
    file = tmp_path / "run" / "profile" / "rank-00000-steps-2-3.json"
    assert {e["name"] for e in events(file, "step ")} == {"step 2", "step 3"}
    assert events(file, "Optimizer.step#SGD.step")
    assert events(file, "gradient mask")
