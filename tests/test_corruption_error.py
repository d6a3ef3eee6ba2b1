"""The mean corruption error, by hand and without torch."""

import subprocess
import sys
from typing import Any

import pytest

from gmscale.corruption_error import EXTRA, FAMILIES, GROUPS, mean_corruption_error, suites


def entry(family: str, top1: list[float], clean: float = 90.0, **more: Any) -> dict[str, Any]:
    return {"family": family, "top1": top1, "clean_top1": clean, "images": None, **more}


OWN = [entry("fog", [80, 70, 60, 50, 40]), entry("snow", [90, 90, 80, 80, 60])]
REFERENCE = [entry("fog", [60, 50, 40, 30, 20], 80), entry("snow", [80, 80, 80, 60, 50], 80)]


def test_families_are_imagenet_cs() -> None:
    assert len(FAMILIES) == 15
    assert sum(map(len, GROUPS.values())) == 19
    assert not {*FAMILIES} & {*EXTRA}


def test_without_a_baseline_it_is_a_mean_of_errors() -> None:
    found = mean_corruption_error([*OWN, entry("spatter", [0, 0, 0, 0, 0])])
    assert found["mean_error"] == pytest.approx((40 + 20) / 2)
    assert found["families"] == 2
    assert found["missing"] == [family for family in FAMILIES if family not in ("fog", "snow")]
    assert found["reference"] == "none"
    assert "mce" not in found


def test_a_baseline_is_the_reference() -> None:
    found = mean_corruption_error(OWN, REFERENCE)
    assert found["reference"] == "baseline"
    assert found["compared"] == 2
    assert found["mce"] == pytest.approx(100 * (200 / 300 + 100 / 150) / 2)
    assert found["relative_mce"] == pytest.approx(100 * ((200 - 50) / (300 - 100) + (100 - 50) / (150 - 100)) / 2)


def test_a_model_is_its_own_hundred_percent() -> None:
    found = mean_corruption_error(OWN, OWN)
    assert found["mce"] == found["relative_mce"] == pytest.approx(100)


def test_only_families_that_both_have_are_compared() -> None:
    found = mean_corruption_error(OWN, REFERENCE[:1])
    assert found["families"] == 2
    assert found["compared"] == 1
    assert found["mce"] == pytest.approx(100 * 200 / 300)


def test_what_cannot_be_is_none() -> None:
    assert mean_corruption_error([])["mean_error"] is None
    assert mean_corruption_error(OWN, [entry("frost", [50] * 5)])["mce"] is None
    perfect = [entry("fog", [100] * 5, 100)]
    assert mean_corruption_error(OWN, perfect)["mce"] is None
    unharmed = mean_corruption_error(OWN, [entry("fog", [80] * 5, 80)])
    assert unharmed["mce"] == pytest.approx(200)
    assert unharmed["relative_mce"] is None


def test_errors_on_different_images_are_kept_apart() -> None:
    entries = [*OWN, entry("fog", [1] * 5, path="C"), entry("fog", [2] * 5, images=100)]
    assert suites(entries) == {(None, None): OWN, ("C", None): entries[2:3], (None, 100): entries[3:]}
    with pytest.raises(ValueError, match="twice"):
        mean_corruption_error(entries)


def test_it_needs_no_torch() -> None:
    code = "import sys, gmscale.corruption_error; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
