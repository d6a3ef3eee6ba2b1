"""A sweep without Ray: the lines of its jobs, and what they come to."""

import shlex
from pathlib import Path

import pytest
import sweeping
import tiny

from gmscale import config, trials
from gmscale.cli import main
from gmscale.trials import MASK


def sweep(*argv: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *argv])
    assert caught.value.code == 0


def test_jobs_train_and_record_trials_until_the_confirmation(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweeping.write(
        tmp_path,
        cache,
        {"space": {"mask.strength": [0.5]}, "search": "grid", "no_mask_lr": [1], "confirm_seeds": 2, "workers": 2},
    )
    sweep("--config", str(file), "--plan")
    said = capsys.readouterr().out
    folder = tmp_path / "sweep"
    assert f"# NPROC_PER_NODE=2 sbatch --array=1-3 slurm/array_sweep.sbatch {folder}" in said
    assert said.count("gmscale launch --nproc_per_node 2 train") == 3
    lines = (folder / "trials.txt").read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if number < 3:
            tiny.train(config.parse(shlex.split(line))[0])
            sweep("--resume", str(folder), "--record", str(number))
    sweep("--resume", str(folder), "--record", "3")  # whose job was lost before it began
    records = trials.read(folder)
    assert [record.state for record in records.values()][:2] == ["finished", "finished"]
    assert records[1].results
    assert records[1].values["top1"] == records[1].results[-1].values["top1"]

    capsys.readouterr()
    tiny.train(config.parse(shlex.split(lines[2]))[0])
    sweep("--resume", str(folder), "--record", "3")
    sweep("--resume", str(folder), "--plan")
    said = capsys.readouterr().out
    assert "--array=4-9" in said
    arms = [record.trial.arm for record in trials.read(folder).values() if record.trial.stage == "confirm"]
    assert arms.count(MASK) == 2


def test_what_an_array_cannot_do_is_shown_and_said(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweeping.write(
        tmp_path, cache, {"space": {"mask.strength": [0.5, 1.0]}, "scheduler": "asha", "trials": 2}
    )
    sweep("--config", str(file), "--plan")
    said = capsys.readouterr().out
    assert "# 7 trials planned; scheduler asha decides which go on: gmscale sweep --resume" in said
    assert not (tmp_path / "sweep" / "trials.txt").exists()


def test_an_unknown_trial_is_refused(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sweeping.write(tmp_path, cache, {"space": {"mask.strength": [0.5, 1.0]}, "search": "grid"})
    sweep("--config", str(file), "--plan")
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "--resume", str(tmp_path / "sweep"), "--record", "99"])
    assert caught.value.code == 2
    assert "has trials 1 to 7" in capsys.readouterr().err
