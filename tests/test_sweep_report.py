"""The page of a sweep on ledgers that were made up."""

import base64
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_sweep import BASE, SPACE, baselines, confirmation, large, record, write
from test_report import Page, make_run

from gmscale.errors import UsageError
from gmscale.report import write_report
from gmscale.trials import MASK, Branch, Record, Result

STRONG = {"mask.strength": 0.5, "optim.lr": 0.02}
SEARCHED = {"mask.strength": {"uniform": [0.1, 1.0]}, "optim.lr": {"loguniform": [0.001, 0.1]}}


def searched(*more: Record) -> list[Record]:
    controls = baselines({0.01: 58.0, 0.02: 60.0, 0.04: 57.0}, 1)
    return [
        *controls,
        record(10, MASK, STRONG, top1=63.0),
        record(11, MASK, {**STRONG, "mask.strength": 0.3}),
        *more,
    ]


def page(folder: Path, records: list[Record], **sweep: Any) -> Page:
    return Page(write_report([write(folder, records, **({"space": SEARCHED} | sweep))]))


def svg(found: Page, alt: str) -> str:
    uri = re.search(rf'src="data:image/svg\+xml;base64,([^"]*)" alt="{alt}"', found.source)
    assert uri is not None, f"no figure {alt!r}"
    return base64.b64decode(uri[1]).decode()


# ---- the words --------------------------------------------------------------------------------------------------


def test_a_confirmed_winner_is_the_first_sentence(tmp_path: Path) -> None:
    found = page(tmp_path, [*searched(), *confirmation(STRONG, gain=2.0, first=50)])
    title = "Sweep of resnet18 on embedded "
    assert found.text.partition(title + "Confirmed")[1], found.text[:400]
    assert 'class="conclusion confirmed"' in found.source
    assert "chosen from 2 mask configurations" in found.text
    assert "mask minus its random twin" in found.text
    assert "+2.02 +1.88 to +2.16" in found.text
    assert "the reference" in found.text
    assert "Toy-sized data." in found.text
    assert "Uncontrolled" not in found.text


def test_no_winner(tmp_path: Path) -> None:
    found = page(tmp_path, [*searched(), *confirmation(STRONG, gain=0.02, first=50)])
    assert "No configuration beat the tuned baseline in top1" in found.text
    assert 'class="conclusion confirmed"' not in found.source
    assert "Confirmed" not in found.text


def test_not_confirmed(tmp_path: Path) -> None:
    found = page(tmp_path, searched())
    assert "the winner of a search is not a winner yet" in found.text
    assert "Not confirmed yet. The best configurations of the search have still to be trained" in found.text
    assert "Confirmation on fresh seeds" not in found.text


def test_controls_that_are_switched_off(tmp_path: Path) -> None:
    found = page(tmp_path, [record(1, MASK, STRONG, top1=63.0)], no_mask_lr=[], random_mask=False, confirm_seeds=0)
    assert found.text.count("Uncontrolled.") == 2
    assert "It is switched off (sweep.confirm_seeds 0)" in found.text


def test_diverged_and_failed_trials_are_listed_with_their_errors(tmp_path: Path) -> None:
    lost = record(20, MASK, {"mask.strength": 0.9, "optim.lr": 0.1}, state="diverged", failures=["loss is NaN"])
    broken = record(
        21, MASK, {"mask.strength": 0.8, "optim.lr": 0.1}, state="failed", failures=["no disk", "bus error"]
    )
    found = page(tmp_path, searched(lost, broken))
    assert "Diverged trials. 1 trial diverged" in found.text
    assert "Failed trials. 1 trial failed after all retries" in found.text
    assert "0020 mask diverged 1 loss is NaN 0021 mask failed 1 no disk bus error" in found.text


def test_a_sweep_that_still_runs_has_a_page(tmp_path: Path) -> None:
    found = page(
        tmp_path, [record(1, MASK, STRONG, state="running"), record(2, MASK, STRONG, seed=1, state="planned")]
    )
    assert "Not finished. 2 of 2 trials have not ended (1 running)" in found.text
    assert "Not known yet: 0 of 2 search trials have ended." in found.text


def test_nasty_names_are_escaped(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>&$\\frac"
    settings = {"mask.operator": evil, "optim.lr": 0.02}
    broken = record(12, MASK, {**settings, "optim.lr": 0.05}, state="failed", failures=[evil])
    tame = record(13, MASK, {"mask.operator": "pool", "optim.lr": 0.02}, top1=61.0)
    found = page(
        tmp_path / "<b>&",
        [*baselines({0.01: 58.0, 0.02: 60.0}, 1), record(10, MASK, settings, top1=63.0), broken, tame],
        base=BASE | {"model": {"name": evil}},
        space={"mask.operator": [evil, "pool"], "optim.lr": [0.02, 0.05]},
    )
    assert "script" not in found.tags
    assert f"Sweep of {evil} on embedded" in found.text
    assert found.text.count(evil) > 4


# ---- figures, tables, commands ----------------------------------------------------------------------------------


def test_the_page_of_a_large_sweep_is_whole_and_shows_its_best_200_trials(tmp_path: Path) -> None:
    found = page(tmp_path, large(260, stop=True), space=SPACE, scheduler="asha")
    assert all(address.startswith("data:image/svg+xml;base64,") for address in found.addresses)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert not re.search(r"url\(|@import|https?://", found.source)
    assert "Of 260 trials 200 are shown; the ledger, trials.jsonl, has all." in found.text
    rows = re.findall(r"<tr><th>\d{4}</th><td>(?:search|confirm)", found.source)
    assert len(rows) == 200
    assert "The scheduler (asha) stopped" in found.text
    for alt in (
        "Settings and top1 of mask configurations",
        "top1 against each hyper-parameter",
        "Validation top1 of the search over epochs",
        "Validation top1 of the confirmation over epochs",
        "Differences in top1 on the seeds of the confirmation",
    ):
        assert "<svg" in svg(found, alt)


def test_several_objectives_have_fronts_and_tables_of_their_own(tmp_path: Path) -> None:
    objectives = ["pruned_top1", "loss"]
    found = page(tmp_path, large(40), space=SPACE, objectives=objectives)
    assert "<svg" in svg(found, "loss against pruned_top1")
    assert "Not beaten in both objectives" in found.text
    for objective in objectives:
        assert "<svg" in svg(found, f"Settings and {objective} of mask configurations")
        assert f"baseline in {objective}" in found.text or f"Confirmed in {objective}" in found.text


def test_commands_train_the_best_of_each_arm(tmp_path: Path) -> None:
    found = page(tmp_path, [*searched(), *confirmation(STRONG, gain=2.0, first=50)], workers=2)
    (mask,) = (line for line in re.findall(r"<pre>(.*?)</pre>", found.source) if "0010" in line)
    words = shlex.split(mask)
    assert words[:4] == ["gmscale", "launch", "--nproc_per_node", "2"]
    assert {"--mask.strength=0.5", "--optim.lr=0.02", "--run.seed=0"} <= set(words)
    assert "no mask (lr 0.02), trial 0002" in found.text


def test_the_schedule_of_the_best_trial_goes_back_through_its_parents(tmp_path: Path) -> None:
    results = [Result(60 * e, float(e), {"top1": 50.0 + e}) for e in range(1, 5)]
    parent = record(10, MASK, STRONG, results=results, top1=54.0)
    best = record(11, MASK, {"mask.strength": 0.9, "optim.lr": 0.1}, results=results, top1=60.0)
    best.branches += [Branch(1, 120, 2.0, 10, 0, {"mask.strength": 0.4, "optim.lr": 0.02})]
    found = page(tmp_path, [*baselines({0.01: 58.0, 0.02: 60.0}, 1), parent, best], scheduler="pbt")
    assert "Schedule of the best trial" in found.text
    drawn = svg(found, "Settings of trial 0011 over epochs")
    assert drawn.count('<g id="axes_') == 1  # only the strength changed: 0.5, then 0.4
    assert "--run.pause_after_epochs=2.0" in found.text


def test_listed_values_that_the_ledger_writes_in_another_way(tmp_path: Path) -> None:
    tried = [record(i, MASK, {"mask.kappa": kappa}, top1=60.0 + i) for i, kappa in enumerate((0.001, 1.0, 2), 1)]
    found = page(tmp_path, tried, space={"mask.kappa": ["1e-3", 1, 2.0]})
    assert "<svg" in svg(found, "Settings and top1 of mask configurations")
    assert "<svg" in svg(found, "top1 against each hyper-parameter")


def test_a_sweep_in_which_nothing_varied_or_ended_has_a_page(tmp_path: Path) -> None:
    found = page(tmp_path, [record(1, MASK, {}, state="planned")], space={"mask.strength": [0.5]})
    assert "1 trial" in found.text
    assert found.addresses == []


def test_a_trial_that_diverged_at_once(tmp_path: Path) -> None:
    nothing = record(1, MASK, STRONG, state="diverged", top1=float("nan"))
    found = page(
        tmp_path, [nothing, replace(nothing, trial=replace(nothing.trial, number=2, settings={"optim.lr": 1}))]
    )
    assert "None of 2 mask configurations was trained to the end with a finite top1." in found.text


# ---- what is no sweep -------------------------------------------------------------------------------------------


def test_a_sweep_and_a_run_have_no_page_together(tmp_path: Path) -> None:
    sweep, run = write(tmp_path / "sweep", searched()), make_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"runs or about one sweep; got the sweep .*/sweep and other paths"):
        write_report([run, sweep])


def test_the_run_of_one_trial_has_a_page_as_any_run(tmp_path: Path) -> None:
    sweep = write(tmp_path / "sweep", searched())
    assert "Training report" in Page(write_report([make_run(sweep / "trials" / "0010")])).text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("base.yaml", None, r"base\.yaml of the sweep cannot be read: .*No such file"),
        ("sweep.yaml", "- 1", r"sweep\.yaml of the sweep holds a list"),
        ("sweep.yaml", "objectives: [top1]", r"sweep\.yaml: expected space of a sweep, a dict that is not empty"),
        ("trials.jsonl", '{"event": "ended", "trial": 1, "time": 0}\n', r"line 1: not an event"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    sweep = write(tmp_path, searched())
    (sweep / name).unlink()
    if content is not None:
        (sweep / name).write_text(content)
    with pytest.raises(UsageError, match=words) as raised:
        write_report([sweep])
    assert "\n" not in str(raised.value)


def test_out_names_another_place(tmp_path: Path) -> None:
    sweep = write(tmp_path / "sweep", searched())
    assert write_report([sweep], tmp_path / "there" / "page.html") == tmp_path / "there" / "page.html"
    assert write_report([sweep]) == sweep / "report.html"
