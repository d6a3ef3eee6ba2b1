"""Three arms at equal seeds: equal beginnings, a table, a report, and nothing done twice."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import tiny
import yaml
from safetensors.torch import load_file

from gmscale.compare import arms, compare, runs
from gmscale.config import TrainConfig
from gmscale.errors import UsageError

ARMS = ("no mask", "pool mask", "random mask")
SEEDS = 2


def settings(cache: Path, root: Path) -> TrainConfig:
    run = {"seed": 3, "epochs": 0.5, "log_every": 1, "save_every_steps": 1, "keep_checkpoints": 9}
    return tiny.config(cache, root, run=run)


@pytest.fixture(scope="module")
def comparison(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a finished comparison and what it printed."""
    root = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert compare(settings(cache, root), SEEDS, tiny.ALONE)
    return root, printed.getvalue()


def folders(root: Path) -> list[Path]:
    return sorted(p.parent for p in root.glob("*/seed-*/summary.json"))


def test_every_arm_ran_with_every_seed(comparison: tuple[Path, str]) -> None:
    root, _ = comparison
    assert [str(f.relative_to(root)) for f in folders(root)] == [
        f"{arm.replace(' ', '-')}/seed-{seed}" for arm in ARMS for seed in (3, 4)
    ]
    summaries = json.loads((root / "comparison.json").read_text())
    assert sorted((s["arm"], s["seed"]) for s in summaries) == [(arm, seed) for arm in ARMS for seed in (3, 4)]


def test_arms_differ_in_the_mask_alone(comparison: tuple[Path, str]) -> None:
    root, _ = comparison
    for seed in (3, 4):
        configs = [
            yaml.safe_load((root / a.replace(" ", "-") / f"seed-{seed}" / "config.yaml").read_text()) for a in ARMS
        ]
        for config in configs:
            del config["run"]["arm"], config["run"]["dir"]
        masks = [config.pop("mask") for config in configs]
        assert configs[0] == configs[1] == configs[2]
        assert [(m["enabled"], m["operator"], m["random_like"]) for m in masks] == [
            (False, "pool", "pool"), (True, "pool", "pool"), (True, "random", "pool")
        ]  # fmt: skip


def test_equal_seeds_begin_equally_and_part_after_the_first_step(comparison: tuple[Path, str]) -> None:
    root, _ = comparison
    first, heads = {}, {}
    for folder in folders(root):
        train = [r for r in tiny.metrics(folder) if r["phase"] == "train"]
        first[folder.parent.name, folder.name] = train[0]["loss"]
        head = load_file(folder / "checkpoints" / "step-00000001" / "model.safetensors")["head.fc.weight"]
        heads[folder.parent.name, folder.name] = head.sum().item()
    for seed in ("seed-3", "seed-4"):
        assert len({loss for (_, s), loss in first.items() if s == seed}) == 1
        assert len({head for (_, s), head in heads.items() if s == seed}) == 3
    assert len(set(first.values())) == SEEDS


def test_the_masks_keep_equally_many_entries(comparison: tuple[Path, str]) -> None:
    root, _ = comparison
    for seed in (3, 4):
        kept = [
            next(r for r in tiny.metrics(root / arm / f"seed-{seed}") if r["phase"] == "layers")["kept_entries"]
            for arm in ("pool-mask", "random-mask")
        ]
        assert kept[0].keys() == kept[1].keys()
        assert sum(kept[0].values()) / len(kept[0]) == pytest.approx(sum(kept[1].values()) / len(kept[1]), abs=0.1)


def test_the_table_is_honest(comparison: tuple[Path, str]) -> None:
    root, printed = comparison
    for words in (*ARMS, "2 paired seeds", "Toy-sized", "learning rate", "too few", str(root / "report.html")):
        assert words in printed.replace("\n", "") or words in printed
    page = (root / "report.html").read_text()
    assert all(arm in page for arm in ARMS)


def test_again_repeats_nothing(
    comparison: tuple[Path, str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = comparison
    before = {p: p.stat().st_mtime_ns for f in folders(root) for p in f.rglob("*")}
    assert compare(settings(cache, root), SEEDS, tiny.ALONE)
    assert {p: p.stat().st_mtime_ns for f in folders(root) for p in f.rglob("*")} == before
    assert capsys.readouterr().out.count("finished already") == 3 * SEEDS


def test_a_comparison_needs_a_mask_that_is_not_random(cache: Path, tmp_path: Path) -> None:
    for mask in ({"enabled": False}, {"operator": "random"}):
        with pytest.raises(UsageError, match="needs a mask"):
            arms(tiny.config(cache, tmp_path, mask=mask))
    with pytest.raises(UsageError, match="pause_after_epochs is set"):
        arms(tiny.config(cache, tmp_path, run={"pause_after_epochs": 1.0}))
    with pytest.raises(UsageError, match="--seeds"):
        compare(settings(cache, tmp_path), 0, tiny.ALONE)


def test_an_interrupted_comparison_is_still_paired(cache: Path, tmp_path: Path) -> None:
    order = [(r.run.arm, r.run.seed) for r in runs(settings(cache, tmp_path), 2)]
    assert order == [(arm, seed) for seed in (3, 4) for arm in ARMS]
