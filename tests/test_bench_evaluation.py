"""gmscale bench evaluate: both ways judge the same images alike; the times are for people, not for tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from gmscale import bench
from gmscale.bench import evaluation
from gmscale.errors import RunError, UsageError
from gmscale.evaluation.accuracy import Accuracy

TINY = ["--model", "test_byobnet", "--size", "12", "--image_size", "64", "--batch_size", "5", "--rounds", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; expected a whole number in"),
        (["--size", "3"], "--size is 3; expected a whole number in"),
        (["--workers", "-1"], "--workers is -1; expected a whole number in"),
        (["--model", "resnet81"], "--model: timm has no model 'resnet81'; did you mean 'resnet"),
        (["--split", "other"], "--split is of a --source; name one"),
        (["--source", "nowhere"], "nowhere is not a directory"),
        (["--json", "nowhere/result.json"], "no directory nowhere to write in"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        bench.main(["evaluate", *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_both_ways_find_the_same_of_all_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    assert bench.main(["evaluate", *TINY, "--workers", workers, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    again, ours = result["ways"]["timm validate.py against itself"], result["ways"]["gmscale evaluate"]
    assert ours["top1"] == pytest.approx(again["top1"])
    assert all(row["images_per_s"] > 0 and len(row["ratio_quartiles"]) == 2 for row in (again, ours))
    assert result["set"]["images"] == 12
    assert "gmscale evaluate" in capsys.readouterr().out


def test_different_findings_are_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Accuracy.measure

    def wrong(self: Accuracy, subject: Any) -> dict[str, Any]:
        return {"top1": real(self, subject)["top1"] + 20}

    monkeypatch.setattr(evaluation.Accuracy, "measure", wrong)
    with pytest.raises(RunError, match="not the same"):
        bench.main(["evaluate", *TINY, "--workers", "0"])
