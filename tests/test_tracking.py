"""What a run tells: metrics.jsonl, TensorBoard and Weights & Biases, a full disk, and the lines people read."""

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmscale import config as configuration
from gmscale import tracking
from gmscale.errors import RunError, UsageError
from gmscale.tracking import StepClock, Tracker, jsonl
from gmscale.tracking.appending import Appender
from gmscale.tracking.lines import train_line

TRAIN = {
    "loss": 1.5,
    "top1": 40.0,
    "loss_max": 2.0,
    "images_per_s": 100.0,
    "step_ms": 50.0,
    "data_ms": 1.0,
    "memory_mb": 2048.0,
    "skipped_steps": 0,
    "bad_samples": 0,
}
MASKED = {**TRAIN, "hook_ms": 2.0, "hook_share": 0.04, "kept_entries": 0.3, "kept_energy": 0.95}
TROUBLED = {**MASKED, "loss_max": 7.0, "skipped_steps": 3, "bad_samples": 2}
RESULT = {"loss": 1.0, "top1": 50.0, "top5": 90.0, "count": 10}


def tracker(folder: Path, resume_step: int = 0, out: Any = None, **run: Any) -> Tracker:
    config = configuration.from_dict({"run": {"dir": str(folder), "arm": "pool mask", "epochs": 10, **run}})
    folder.mkdir(exist_ok=True)
    return Tracker(folder, config, 100, resume_step, Console(file=out or io.StringIO(), width=200))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: the steps and values of each tag."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


# -- resuming ---------------------------------------------------------------------------------------------------
def test_a_resume_drops_what_it_makes_again_and_a_torn_line(tmp_path: Path) -> None:
    with tracker(tmp_path) as first:
        for step in (10, 20, 30):
            first.log("train", step, TRAIN)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "epo')
    with tracker(tmp_path, resume_step=20) as second:
        second.log("train", 30, MASKED)
    assert [r["step"] for r in records(tmp_path)] == [10, 20, 30]
    assert records(tmp_path)[-1]["hook_ms"] == 2.0


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    with tracker(tmp_path) as first:
        for step in (10, 20, 30):
            first.log("train", step, {**TRAIN, "loss": 1.0, "by_layer": {"conv.weight": 0.5}, "note": "no number"})
    with tracker(tmp_path, resume_step=20) as second:
        second.log("train", 30, {**TRAIN, "loss": 2.0})
        second.log("train", 40, {**TRAIN, "loss": 3.0})
    found = board(tmp_path)
    assert found["train/loss"] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 3.0)]
    assert [step for step, _ in found["train_by_layer/conv.weight"]] == [10, 20]
    assert "train/note" not in found


SPOILED = st.binary(max_size=12).filter(lambda b: b"\n" not in b) | st.sampled_from(
    [b"\0\0\0\0", b'{"step": 3, "epo', b"[1]", b'{"phase": "train"}', b'{"step": "x"}']
)


@given(st.lists(st.integers(0, 9) | SPOILED, max_size=8), st.integers(0, 9), st.booleans())
def test_cutting_back_keeps_every_whole_record_up_to_the_step_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, lines: list[int | bytes], step: int, torn: bool
) -> None:
    def whole(line: int | bytes) -> bool:
        return isinstance(line, int)

    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    encoded = [jsonl.line_of({"step": x, "text": "ü"}) if isinstance(x, int) else x + b"\n" for x in lines]
    if torn and encoded:
        encoded[-1], lines = encoded[-1][:-1], [*lines[:-1], b"torn"]
    path.write_bytes(b"".join(encoded))
    jsonl.cut_back(path, step)
    assert [r["step"] for r in jsonl.read_records(path)] == [x for x in lines if whole(x) and x <= step]
    for line in path.read_bytes().splitlines():
        json.loads(line)


def test_a_file_that_cannot_be_cut_back_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(jsonl.line_of({"step": 5}) + jsonl.line_of({"step": 1}))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jsonl, "write_atomically", full)
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be cut back to step 1: No space left on device"):
        tracker(tmp_path, resume_step=1)


def test_medians_include_the_lines_from_before_a_resume(tmp_path: Path) -> None:
    with tracker(tmp_path) as first:
        first.log("train", 10, {**MASKED, "kept_entries": 0.1})
        first.log("train", 20, {**MASKED, "kept_entries": 0.2})
        first.log("validation", 20, RESULT)
    with tracker(tmp_path, resume_step=20) as second:
        second.log("train", 30, {**MASKED, "kept_entries": 0.9})
    assert second.medians("kept_entries", "absent") == {"kept_entries": 0.2, "absent": None}


# -- a full disk ------------------------------------------------------------------------------------------------
class Disk:
    """os.write with only so much room; a write takes what there is before the next one fails."""

    def __init__(self, room: int) -> None:
        self.room, self._write = room, os.write

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._write(descriptor, data[: self.room])
        self.room -= taken
        return taken


@given(
    st.lists(st.binary(min_size=1, max_size=9), max_size=9), st.lists(st.integers(0, 30), min_size=9, max_size=9)
)
def test_a_record_is_written_whole_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], room: list[int]
) -> None:
    path, said = tmp_path_factory.mktemp("full") / "file", []
    disk = Disk(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gmscale.tracking.appending.os.write", disk.write)
        appender = Appender(path, said.append, b"header")
        fits, expected = 0, b""
        for record, disk.room in zip(content, room, strict=False):
            needed = record if expected else b"header" + record
            if disk.room >= len(needed):
                fits, expected = fits + 1, expected + needed
            elif not expected and disk.room >= len(b"header"):
                expected = b"header"
            appender.append(record)
            assert path.read_bytes() == expected
        lost = min(len(content), len(room)) - fits
        assert appender.lost == lost
        appender.close()
    assert len(said) == (2 if lost else 0)


def test_a_record_that_cannot_be_cut_off_at_once_is_cut_off_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appender, disk = Appender(tmp_path / "file", lambda _: None), Disk(7)
    monkeypatch.setattr("gmscale.tracking.appending.os.write", disk.write)
    appender.append(b"one\n")
    with monkeypatch.context() as patch:
        patch.setattr("gmscale.tracking.appending.os.ftruncate", lambda *_: os.write(-1, b""))
        appender.append(b"a long one\n")
        assert (tmp_path / "file").read_bytes() == b"one\na l"
    disk.room = 100
    appender.append(b"two\n")
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("only Linux's root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_run_goes_on_on_a_full_disk_and_records_again_when_there_is_room(small_disk: Path) -> None:
    out = io.StringIO()
    with tracker(small_disk, out=out) as run:
        run.log("train", 1, TRAIN)
        hog = small_disk / "hog"
        with open(hog, "wb", buffering=0) as file:
            taken = os.write(file.fileno(), bytes(2**20))
        assert taken < 2**20
        for step in range(2, 60):
            run.log("train", step, {**TRAIN, "text": 200 * "x", **{f"value {n}": 1.0 for n in range(20)}})
            run.sync()
        hog.unlink()
        run.log("train", 60, TRAIN)
    steps = [r["step"] for r in records(small_disk)]
    assert steps[0] == 1
    assert steps[-1] == 60
    assert len(steps) < 60
    shown = board(small_disk)["train/loss"]
    assert shown[0] == (1, 1.5)
    assert shown[-1] == (60, 1.5)
    warnings = [line for line in out.getvalue().splitlines() if "cannot be written" in line]
    assert len(warnings) == 2  # one a file
    assert (
        f"{small_disk / 'metrics.jsonl'} cannot be written: No space left on device; the run goes on" in warnings[0]
    )


class Full(io.StringIO):
    """Standard output in a file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_log_file_on_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    with tracker(tmp_path, out=Full()) as run:
        run.log("train", 1, TRAIN)
        run.say("hello")
    assert len(records(tmp_path)) == 1


# -- Weights & Biases -------------------------------------------------------------------------------------------
class StandIn:
    """The part of the wandb module that we use; remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.ended: list[int] = []
        self.fails: Exception | None = None

    Settings = SimpleNamespace

    def init(self, **arguments: Any) -> "StandIn":
        self._fail()
        self.started.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        self._fail()
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)

    def _fail(self) -> None:
        if self.fails:
            raise self.fails


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_weights_and_biases_gets_the_scalars_of_one_run_also_after_a_resume(tmp_path: Path, wandb: StandIn) -> None:
    with tracker(tmp_path, wandb_project="cats") as first:
        first.log("train", 10, {**TRAIN, "by_layer": {"conv": 0.5}, "note": "no number"})
    with tracker(tmp_path, resume_step=10, wandb_project="cats") as second:
        second.log("train", 20, TRAIN)
    one, two = wandb.started
    assert one["id"] == two["id"]
    assert (one["project"], one["name"], one["resume"]) == ("cats", str(tmp_path), "allow")
    assert one["config"]["run"]["epochs"] == 10
    assert [line["step"] for line in wandb.logged] == [10, 20]
    assert wandb.logged[0]["train/loss"] == 1.5
    assert wandb.logged[0]["train_by_layer/conv"] == 0.5
    assert "train/note" not in wandb.logged[0]
    assert wandb.ended == [0, 0]
    with pytest.raises(KeyError), tracker(tmp_path, wandb_project="dogs") as failing:
        failing.log("train", 1, {"loss": {}["no such"]})
    assert wandb.started[-1]["id"] != one["id"]
    assert wandb.ended[-1] == 1


def test_no_project_means_no_weights_and_biases(tmp_path: Path, wandb: StandIn) -> None:
    with tracker(tmp_path) as run:
        run.log("train", 10, TRAIN)
    assert not wandb.started
    assert not (tmp_path / "wandb.json").exists()


def test_weights_and_biases_hears_no_credentials(tmp_path: Path, wandb: StandIn) -> None:
    secret = {"data": {"source": "https://me:word@place/set?token=1"}, "run": {"wandb_project": "cats"}}
    Tracker(tmp_path, configuration.from_dict(secret), 1, 0, Console(file=io.StringIO()))
    assert wandb.started[0]["config"]["data"]["source"] == "https://place/set"


def test_weights_and_biases_that_does_not_answer_costs_one_warning(tmp_path: Path, wandb: StandIn) -> None:
    out = io.StringIO()
    with tracker(tmp_path, out=out, wandb_project="cats") as run:
        wandb.fails = ConnectionError("no\nroute")
        run.log("train", 10, TRAIN)
        run.log("train", 20, TRAIN)
    assert out.getvalue().count("Weights & Biases: ConnectionError: no route; the run goes on") == 1
    assert len(records(tmp_path)) == 2
    with pytest.raises(UsageError, match=r"does not start \(ConnectionError: no route\).*WANDB_MODE=offline"):
        tracker(tmp_path, wandb_project="cats")


def test_weights_and_biases_that_is_not_installed_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        tracking.check(configuration.from_dict({"run": {"wandb_project": "cats"}}))
    tracking.check(configuration.from_dict({}))


# -- what people read -------------------------------------------------------------------------------------------
def test_a_number_that_is_not_finite_is_null_and_said(tmp_path: Path) -> None:
    out = io.StringIO()
    with tracker(tmp_path, out=out) as diverged:
        diverged.log("train", 10, {**TRAIN, "loss": float("nan")})
    assert records(tmp_path)[0]["loss"] is None
    assert "loss not finite" in out.getvalue()


def test_the_lines_say_everything(tmp_path: Path) -> None:
    out = io.StringIO()
    with tracker(tmp_path, out=out) as run:
        run.log("train", 10, MASKED)
        run.log("skipped", 11, {"in_a_row": 2, "cause": "first conv.weight"})
        run.log("validation", 20, RESULT)
        run.log("layers", 20, {"kept_entries": {"conv": 0.3}, "kept_energy": {"conv": 0.9}})
    train, skipped, validation = out.getvalue().splitlines()
    for part in ("pool mask", "epoch 1.00/10", "loss 1.500", "top1 40.0 %", "100 images/s", "2.0 GiB", "ETA"):
        assert part in train
    for part in ("data 1.0 ms (2.0 % of step)", "hook 2.0 ms (4.0 % of step)"):
        assert part in train
    assert "kept 30 % of entries, 95 % energy" in train
    for trouble in ("max", "bad", "skipped"):
        assert trouble not in train
    assert "step 11 skipped: gradients not finite (first conv.weight), 2 in a row" in skipped
    assert "validation: loss 1.000  top1 50.0 %  top5 90.0 %  (10 images)" in validation


@pytest.mark.parametrize("width", [None, 200, 120, 100, 80, 60])
def test_trouble_is_on_the_line_at_every_width_and_the_line_fits(width: int | None) -> None:
    line = train_line({**TROUBLED, "epoch": 12.3}, "pool 0.5", 90.0, "1:23:45", width)
    for part in ("loss 1.500 (max 7.000)", "2 bad", "3 s"):
        assert part in line
    assert "12.30/90" in line
    assert width is None or width < 120 or len(line) <= width


@pytest.mark.parametrize("width", [200, 120, 100])
def test_an_untroubled_line_says_everything_at_usual_widths(width: int) -> None:
    line = train_line({**MASKED, "epoch": 12.3}, "pool 0.5", 90.0, "1:23:45", width)
    assert len(line) <= width
    for part in ("12.30/90", "loss 1.500", "top1 40.0", "100", "data", "hook", "kept 30", "GiB", "ETA 1:23:45"):
        assert part in line


def test_a_largest_loss_that_is_not_finite_is_a_spike() -> None:
    line = train_line({**TRAIN, "epoch": 1.0, "loss_max": None}, "arm", 2.0, "0:01")
    assert "(max not finite)" in line


def test_a_terminal_shows_one_line_of_training_that_is_replaced(tmp_path: Path) -> None:
    out = io.StringIO()
    config = configuration.from_dict({"run": {"dir": str(tmp_path)}})
    console = Console(file=out, width=100, force_terminal=True, legacy_windows=False)
    with Tracker(tmp_path, config, 100, 0, console) as run:
        for step in (1, 2, 3):
            run.log("train", step, MASKED)
        run.log("validation", 3, RESULT)
    live, after = out.getvalue().split("validation:")
    assert live.count("loss") == 3
    assert "\n" not in live
    assert "top5 90.0 %" in after


def test_the_clock_leaves_out_what_is_no_step() -> None:
    clock = StepClock()
    for _ in range(4):
        with clock.waiting():
            pass
    with clock.paused():
        sum(range(2_000_000))
    values = clock.values(global_batch_size=8)
    assert values["step_ms"] < 10
    assert values["data_ms"] <= values["step_ms"]
