"""gmscale bench: what it measures and what it refuses; its numbers are for people, not for tests."""

import json
import sys

import pytest

from gmscale import bench
from gmscale.errors import RunError, UsageError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet81"], "did you mean 'resnet"),
        (["--variants", "poool"], "did you mean 'pool'"),
        (["--rounds", "0"], "expected at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(arguments, message):
    with pytest.raises(UsageError, match=message):
        bench.main(["step", *arguments])


def test_failing_processes_are_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunError, match="status 1"):
        bench.main(["step", "--model", "test_resnet"])


@pytest.mark.slow
def test_every_variant_gets_time_memory_and_ratio(tmp_path):
    out = tmp_path / "bench.json"
    size = ["--model", "test_resnet", "--image_size", "32", "--batch_size", "2", "--rounds", "2", "--steps", "1"]
    assert bench.main(["step", *size, "--processes", "1", "--variants", "pool", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["variants"]) == {"plain DDP", "pool"}
    assert result["variants"]["plain DDP"]["ratio"] == 1.0
    for row in result["variants"].values():
        assert row["step_ms"] > 0
        assert row["peak_memory_mb"] > 50
    assert result["variants"]["pool"]["hook_ms"] > 0
    assert result["environment"]["torch"]
