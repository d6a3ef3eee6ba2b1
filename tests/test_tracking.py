"""metrics.jsonl: valid JSON, durable, cut back to the checkpoint on resume; and the lines people read."""

import io
import json
from pathlib import Path

from rich.console import Console

from gmscale.tracking import StepClock, Tracker

TRAIN = {"loss": 1.5, "top1": 40.0, "images_per_s": 100.0, "step_ms": 50.0}
MASKED = {**TRAIN, "hook_ms": 2.0, "hook_share": 0.04, "kept_entries": 0.3, "kept_energy": 0.95}
RESULT = {"loss": 1.0, "top1": 50.0, "top5": 90.0, "count": 10}


def tracker(folder: Path, resume_step: int = 0, out: io.StringIO | None = None) -> Tracker:
    return Tracker(folder, "pool mask", 100, 10, resume_step, Console(file=out or io.StringIO(), width=200))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resume_drops_what_it_makes_again_and_a_torn_line(tmp_path):
    with tracker(tmp_path) as first:
        for step in (10, 20, 30):
            first.log("train", step, TRAIN)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "epo')
    with tracker(tmp_path, resume_step=20) as second:
        second.log("train", 30, MASKED)
    assert [r["step"] for r in records(tmp_path)] == [10, 20, 30]
    assert records(tmp_path)[-1]["hook_ms"] == 2.0


def test_medians_include_the_lines_from_before_a_resume(tmp_path):
    with tracker(tmp_path) as first:
        first.log("train", 10, {**MASKED, "kept_entries": 0.1})
        first.log("train", 20, {**MASKED, "kept_entries": 0.2})
        first.log("validation", 20, RESULT)
    with tracker(tmp_path, resume_step=20) as second:
        second.log("train", 30, {**MASKED, "kept_entries": 0.9})
    assert second.medians("kept_entries", "absent") == {"kept_entries": 0.2, "absent": None}


def test_a_number_that_is_not_finite_is_null_and_said(tmp_path):
    out = io.StringIO()
    with tracker(tmp_path, out=out) as diverged:
        diverged.log("train", 10, {**TRAIN, "loss": float("nan")})
    assert records(tmp_path)[0]["loss"] is None
    assert "loss not finite" in out.getvalue()


def test_the_lines_say_everything(tmp_path):
    out = io.StringIO()
    with tracker(tmp_path, out=out) as run:
        run.log("train", 10, MASKED)
        run.log("validation", 10, RESULT)
        run.log("layers", 10, {"kept_entries": {"conv": 0.3}, "kept_energy": {"conv": 0.9}})
    train, validation = out.getvalue().splitlines()
    for part in ("pool mask", "epoch 1.00/10", "loss 1.500", "top1 40.0 %", "100 images/s", "ETA"):
        assert part in train
    for part in ("hook 2.0 ms (4.0 % of step)", "kept 30 % of entries, 95 % energy"):
        assert part in train
    assert "validation: loss 1.000  top1 50.0 %  top5 90.0 %  (10 images)" in validation


def test_the_clock_leaves_out_what_is_no_step():
    clock = StepClock()
    for _ in range(4):
        with clock.waiting():
            pass
    with clock.paused():
        sum(range(2_000_000))
    values = clock.values(global_batch_size=8)
    assert values["step_ms"] < 10
    assert values["data_ms"] <= values["step_ms"]
