"""The study in configs/study: its sweeps are planned as they stand, its digits written, its tables right."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from gmscale import trials
from gmscale.sweep import config, planning
from gmscale.trials import BASELINE, MASK, RANDOM, Trial

STUDY = Path(__file__).parent.parent / "configs" / "study"
SWEEPS = sorted(STUDY.glob("*.yaml"))


def script(name: str, *arguments: str | Path) -> None:
    given, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        runpy.run_path(str(STUDY / name), run_name="__main__")
    finally:
        sys.argv = given


def planned(path: Path) -> list[Trial]:
    base, sweep, _ = config.parse(["--config", str(path)])
    return planning.search(base, sweep)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_says_what_it_is_and_what_it_found(path: Path) -> None:
    base, sweep, _ = config.parse(["--config", str(path)])
    head = path.read_text().partition("\nrun:")[0]
    assert "is ours" in " ".join(head.split())
    assert f"# command:  gmscale sweep --config configs/study/{path.name}\n" in head
    assert f"global batch {sweep.workers * base.data.batch_size_per_device}" in head
    for field in ("hours", "expected"):
        (said,) = re.findall(rf"^# {field}:\s+(.+)$", head, re.MULTILINE)
        assert re.search(r"\d", said), said
    assert sweep.dir == f"runs/study/embedded-{path.stem.replace('_', '-')}"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_all_arms_have_the_same_seeds_and_learning_rates(path: Path) -> None:
    found = planned(path)
    seeds = {(trial.arm, trial.configuration): set() for trial in found}
    rates: dict[str, set[float]] = {BASELINE: set(), MASK: set()}
    for trial in found:
        seeds[trial.arm, trial.configuration].add(trial.seed)
        if trial.arm in rates:
            rates[trial.arm].add(trial.settings.get("optim.lr", 0.0))
    assert all(len(own) >= 5 and own == seeds[found[0].arm, found[0].configuration] for own in seeds.values())
    assert len(rates[BASELINE]) >= 3
    if path.stem != "lead":
        assert rates[BASELINE] == rates[MASK]
        assert len(rates[MASK]) == 4
    assert any(trial.arm == RANDOM for trial in found)


def test_the_commands_of_the_page_are_those_of_its_sweeps() -> None:
    page = (STUDY / "README.md").read_text()
    (digits,) = re.findall(r'^digits="(.+)"$', page, re.MULTILINE)
    lines = re.findall(r"^gmscale sweep (--config configs/study/.+?)(?: #.*)?$", page, re.MULTILINE)
    found = [config.parse(shlex.split(line.replace("$digits", digits).strip())) for line in lines]
    assert len({sweep.dir for _, sweep, _ in found}) == len(lines) >= 5
    assert {base.data.source for base, _, _ in found} == {"embedded", "data/digits"}
    assert {path.name for path in SWEEPS} == set(re.findall(r"\]\((\w+\.yaml)\)", page))


def test_the_digits_are_written_once_by_class_and_split(tmp_path: Path) -> None:
    script("digits.py", tmp_path)
    train, validation = (
        {path.relative_to(tmp_path / split).as_posix() for path in (tmp_path / split).glob("*/*.png")}
        for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (4000, 1000)
    assert not train & validation
    assert {name.partition("/")[0] for name in train | validation} == set("0123456789")
    assert Image.open(tmp_path / "train" / next(iter(train))).size == (28, 28)


def test_the_tables_show_means_and_paired_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    flags = [f"--sweep.dir={folder}", "--sweep.objectives=[top1]", "--sweep.confirm_seeds=5"]
    base, sweep, _ = config.parse(["--config", str(STUDY / "consensus.yaml"), *flags])
    folder.mkdir()
    config.save(folder, base, sweep)
    ledger = trials.Ledger(folder)
    ledger.begin(planning.search(base, sweep))
    finish(folder, {BASELINE: 90.0, MASK: 90.2, RANDOM: 80.0})
    planning.plan_confirmation(ledger, base, sweep, trials.read(folder))
    finish(folder, {BASELINE: 91.0, MASK: 90.9, RANDOM: 80.0})

    script("tables.py", folder)
    text = capsys.readouterr().out
    (unmasked,) = re.findall(r"^\| no mask \|(.+)\|$", text, re.MULTILINE)
    assert unmasked.split(" | ")[1].strip() == "92.0 ± 1.6"  # lr 0.01: 90 + 1 + seeds 0 to 4 - 1
    masked = next(line for line in text.splitlines() if line.startswith("| mask |"))
    assert "+0.20 (+0.08 to +0.32)" in masked
    fresh = next(line for line in text.splitlines() if line.startswith("| mask (lr 0.04)"))
    assert "-0.10 (-0.22 to +0.02)" in fresh
    assert "equal within ±0.5 points" in fresh
    assert "| lr 0.01 | 40.0 % (40.0 to 40.0) |" in text


def finish(folder: Path, tops: dict[str, float]) -> None:
    """End what is planned: top1 grows with the rate and the seed; differences to no mask spread by seed."""
    for record in trials.read(folder).values():
        if record.ended:
            continue
        trial = record.trial
        rate = {0.005: 0, 0.01: 1, 0.02: 2, 0.04: 3}[trial.settings.get("optim.lr", 0.01)]
        spread = 0.1 * (trial.seed % 2 * 2 - 1) * (1 if trial.seed % 5 < 4 else 0) if trial.arm == MASK else 0.0
        top1 = tops[trial.arm] + rate + trial.seed % 5 - 1 + spread
        trials.Ledger(folder).end(trial, "finished", {"top1": top1}, 1.0)
        if trial.arm == MASK:
            run = trials.run_dir(folder, trial)
            run.mkdir(parents=True, exist_ok=True)
            (run / "metrics.jsonl").write_text('{"phase": "train", "wire_bytes": 40, "dense_bytes": 100}\n')
