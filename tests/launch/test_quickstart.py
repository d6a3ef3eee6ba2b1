"""The quickstart script, shrunk, in the environment it made."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.skipif(
    not list((ROOT / ".venv").glob("gmscale-*.stamp")), reason="launch/*.sh has not made .venv in this checkout"
)
def test_quickstart_trains_three_arms_and_names_the_report_and_the_next_commands(tmp_path):
    shrunk = {"--seeds": "1", "--run.epochs": "0.5", "--data.size": "320"}
    command = ["./launch/quickstart.sh", "--run.dir", str(tmp_path / "runs"), "--data.cache_dir", str(tmp_path)]
    for flag, value in shrunk.items():
        command += [flag, value]
    clean = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=clean)
    assert result.returncode == 0, result.stdout + result.stderr
    summaries = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [s["arm"] for s in summaries] == ["no mask", "pool mask", "random mask"]
    assert (tmp_path / "runs" / "report.html").exists()
    for words in (
        "Toy-sized",
        "fewer than five seeds",
        "report.html",
        "./launch/torchrun.sh --config",
        "sbatch --nodes",
    ):
        assert words in result.stdout
    assert "installing" not in result.stdout  # a second run reuses the environment
