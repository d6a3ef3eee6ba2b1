"""gmscale bench loop: that every loop trains what it should and is measured the same; times are for people."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gmscale import bench
from gmscale.bench import loop, scale
from gmscale.bench.loop import Run
from gmscale.bench.loops import WARM_UP, Task
from gmscale.bench.photographs import Copies, photographs
from gmscale.config import parse
from gmscale.errors import RunError, UsageError

pytestmark = pytest.mark.slow

STEPS = WARM_UP + 1
TASK = Task(
    loop="",
    model="test_byobnet",
    image_size=32,
    batch_size=2,
    steps=STEPS,
    workers=1,
    amp="none",
    classes=10,
    shards="",
    folders="",
    directory="",
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    directory = tmp_path_factory.mktemp("loop")
    samples = photographs((STEPS + 1) * TASK.batch_size)
    copies = Copies(samples, directory)
    loop._add_validation(copies.shards, samples[: loop._VALIDATION])
    return replace(TASK, shards=str(copies.shards), folders=str(copies.folders), directory=str(directory))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet81"], "did you mean 'resnet"),
        (["--steps", "4"], "--steps is 4; expected at least 5"),
        (["--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (["--processes", "1", "0"], "--processes has 0; expected at least 1"),
        (["--amp", "fp16"], "invalid choice: 'fp16'"),
        (["--json", "/no/such/file.json"], "no directory /no/such to write in"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "run", None)
    with pytest.raises(UsageError, match=message):
        bench.main(["loop", *arguments])


# -- runs -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "Accelerate", "gmscale exact"])
def test_a_loop_trains_and_says_when_its_steps_ended(name: str, task: Task, tmp_path: Path) -> None:
    if name == "Accelerate":
        pytest.importorskip("accelerate")
    named = replace(task, loop=name, directory=str(tmp_path))
    before = time.monotonic()
    found = loop.run(named, 1)
    after = time.monotonic()
    said = json.loads(named.answer(0).read_text())
    assert len(said["ends"]) == STEPS
    assert before - 0.02 <= said["started"] <= said["ends"][0]  # the system counts in hundredths
    assert said["ends"] == sorted(said["ends"])
    assert said["ends"][-1] <= after
    assert found.images_per_s > 0
    assert 50 < found.peak_memory_mb < 8192


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(task: Task, tmp_path: Path) -> None:
    named = replace(task, loop="timm", model="vit_base_patch16_224", image_size=224, directory=str(tmp_path))
    named.write(tmp_path / "task.json")
    command = [sys.executable, "-m", "gmscale.bench.loops", str(tmp_path / "task.json")]
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; p = subprocess.Popen({command}); print(p.pid); p.wait()"],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    while "torch" not in Path(f"/proc/{child}/maps").read_text():  # so far it has come by then
        pass
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.read()  # ends when the child has


def test_a_loop_that_fails_says_why(task: Task, tmp_path: Path) -> None:
    missing = replace(task, loop="gmscale exact", shards="/no/such/place", directory=str(tmp_path))
    with pytest.raises(
        RunError, match=r"gmscale exact on 1 processes failed \(status 2\): gmscale: error: .*place"
    ):
        loop.run(missing, 1)


# -- what is compared -------------------------------------------------------------------------------------------
def test_ours_trains_what_the_task_says(task: Task) -> None:
    command, *arguments = task.arguments("fast")
    config, _ = parse(arguments, "gmscale train")
    assert command == "train"
    assert (config.model.name, config.data.image_size) == (task.model, task.image_size)
    assert (config.data.decode, config.data.source) == ("fast", task.shards)
    assert (config.augment.crop_scale, config.augment.hflip, config.augment.color_jitter) == ((0.08, 1.0), 0.5, 0.0)
    assert (config.optim.opt, config.optim.lr, config.optim.sched) == ("sgd", task.lr, "cosine")
    assert not config.mask.enabled
    assert round(config.run.epochs * (STEPS + 1)) == STEPS


def test_rates_count_the_steps_after_the_warm_up_of_the_slowest_rank() -> None:
    quick: dict[str, Any] = {"started": 10.0, "ends": [13.0, 14.0, 15.0, 16.0, 17.0], "peak_memory_mb": 100.0}
    slow = {"started": 10.5, "ends": [14.0, 15.0, 16.0, 17.0, 19.0], "peak_memory_mb": 90.0}
    found = loop._measured([quick, slow], replace(TASK, steps=5, batch_size=8))
    assert found == Run(images_per_s=8 * 2 / 2.0, start_s=3.5, peak_memory_mb=100.0)


def test_ratios_are_of_the_same_round() -> None:
    rounds = [
        {"timm": Run(10.0, 5.0, 100.0), "gmscale exact": Run(20.0, 4.0, 150.0)},
        {"timm": Run(20.0, 5.0, 100.0), "gmscale exact": Run(20.0, 5.0, 150.0)},
        {"timm": Run(40.0, 5.0, 100.0), "gmscale exact": Run(60.0, 10.0, 150.0)},
    ]
    rows = loop.rows_of(rounds)
    assert rows["timm"] == {"images_per_s": 20.0, "start_s": 5.0, "peak_memory_mb": 100.0}
    ours = rows["gmscale exact"]
    assert ours["images_per_s_to_timm"] == 1.5  # not 20 / 20
    assert ours["images_per_s_to_timm_quartiles"] == [1.25, 1.75]
    assert ours["start_s_to_timm"] == 1.0
    assert ours["peak_memory_mb_to_timm"] == 1.5
    assert "images_per_s_to_Accelerate" not in ours


def test_the_command_shows_every_loop_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[tuple[str, int]] = []

    def measured(task: Task, processes: int) -> Run:
        order.append((task.loop, processes))
        assert len(list(Path(task.folders).rglob("*.jpg"))) == 6 * 2 * processes
        assert Path(task.shards, "validation-0000.tar").exists()
        return Run(100.0 if task.loop.startswith("gmscale") else 50.0, 2.0, 300.0)

    monkeypatch.setattr(loop, "run", measured)
    monkeypatch.setattr(loop, "find_spec", lambda name: None if name == "accelerate" else object())
    out = tmp_path / "loop.json"
    few = ["--steps", "5", "--batch_size", "2", "--rounds", "2", "--processes", "1", "3"]
    assert bench.main(["loop", "--model", "test_byobnet", *few, "--json", str(out)]) == 0
    names = ["timm", "gmscale exact", "gmscale fast"]
    assert order == [(name, n) for n in (1, 3) for turn in (names, names[::-1]) for name in turn]
    found = json.loads(out.read_text())
    assert (found["model"], found["steps"], found["skipped"]) == ("test_byobnet", 5, {"Accelerate": "accelerate"})
    assert found["processes"]["3"]["gmscale fast"]["images_per_s_to_timm"] == 2.0
    shown = capsys.readouterr().out
    for words in ("gmscale exact", "2.00 (2.00-2.00)", "Accelerate not measured: accelerate is not installed"):
        assert words in shown


def test_a_resume_in_the_middle_of_an_epoch_finds_its_images(tmp_path: Path) -> None:
    split = scale.make(tmp_path, shards=3, samples=90)
    scale._resume(tmp_path, split)
