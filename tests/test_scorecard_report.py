"""The page on scorecards, of synthetic ones whose numbers can be checked by hand."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from synthetic_scorecards import make_card, make_scored_run

from gmscale import scorecards
from gmscale.errors import UsageError
from gmscale.report import scorecard_figures as figures
from gmscale.report import scorecard_tables as tables
from gmscale.report.scorecard import write_scorecards
from gmscale.report.scorecard_comparison import Comparison, compare, load_cards, scored_arms

VOID = {"meta", "img", "br", "line"}


class Page(HTMLParser):
    """Checks that every element is closed; keeps the addresses and the words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += " " + data

    @property
    def text(self) -> str:
        return " ".join(self.words.split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """Masked runs of two arms, 1.5 points better and 0.1 worse, and baselines of three learning rates."""
    root = tmp_path_factory.mktemp("runs")
    masked, baselines = [], []
    for seed in range(5):
        masked.append(make_scored_run(root / f"pool-{seed}", "pool 0.5", seed, 1.5, pictures=seed == 0))
        masked.append(make_scored_run(root / f"log-{seed}", "log <b>", seed, -0.1))
        for lr, gain in ((0.05, -1.0), (0.1, 0.0), (0.2, -2.0)):
            run = make_scored_run(
                root / f"{lr}-{seed}", "no mask", seed, gain, lr=lr, pictures=seed == 0 and lr == 0.1
            )
            baselines.append(run)
    return masked, baselines


def compared(masked: list[Path], baselines: list[Path]) -> dict[tuple[str, str], Comparison]:
    cards = [*load_cards(masked, baseline=False), *load_cards(baselines, baseline=True)]
    return {(one.metric, one.arm.label): one for one in compare(scored_arms(cards), 1.0)}


def top1s(runs: list[Path], name: str) -> list[float]:
    return [
        json.loads((run / "scorecard.json").read_text())["accuracy"]["top1"] for run in runs if name in str(run)
    ]


def test_metrics_have_names_that_say_how_they_were_measured() -> None:
    card = make_card()
    found = scorecards.metrics(card)
    assert found["top1"] == card["accuracy"]["top1"]
    assert found["pruned global 0.8 top1"] == card["pruning"][2]["top1"]
    assert found["pruned 2:4 finetuned 50 top1"] == card["pruning"][13]["top1"]
    assert found["pgd linf 4/255 10 steps top1"] == card["attacks"][7]["top1"]
    assert found["square linf 2/255 200 queries 250 images top1"] == card["attacks"][4]["top1"]
    mean_error = fmean(entry["error"] for entry in card["corruptions"])
    assert found["corruptions 500 images mean error"] == pytest.approx(mean_error)
    assert found["saliency log 100 images iou"] == 100 * card["saliency"][1]["iou"]
    assert not any("randomisation" in name or "gain" in name for name in found)


def test_metrics_of_little_are_few_and_of_other_conditions_are_others() -> None:
    assert set(scorecards.metrics(make_card(everything=False))) == {"top1", "top5", "loss", "ece"}
    card = make_card()
    card["corruptions"] = card["corruptions"][1:]
    card["saliency"][0]["iou"] = None
    found = scorecards.metrics(card)
    assert "corruptions 500 images without gaussian_noise mean error" in found
    card["corruptions"] = card["corruptions"][:2]
    assert "corruptions 500 images impulse_noise, shot_noise mean error" in scorecards.metrics(card)
    assert "saliency log-paper 100 images iou" not in found


def test_what_is_better() -> None:
    higher = {name for name in scorecards.metrics(make_card()) if scorecards.higher_is_better(name)}
    lower = scorecards.metrics(make_card()).keys() - higher
    assert lower == {
        "loss",
        "ece",
        "corruptions 500 images mean error",
        *(f"saliency {method} 100 images deletion" for method in ("log-paper", "log", "gradcam")),
    }
    assert {name for name in lower | higher if scorecards.unit(name) == "nats"} == {"loss"}


def test_arms_are_compared_with_the_best_baseline_by_seed(runs: tuple[list[Path], list[Path]]) -> None:
    found = compared(*runs)
    one = found["top1", "pool 0.5"]
    assert (one.reference.label, one.control, one.better) == ("no mask, lr 0.1", "", True)
    differences = [a - b for a, b in zip(top1s(runs[0], "pool"), top1s(runs[1], "0.1-"), strict=True)]
    assert one.seed_differences == pytest.approx(differences)
    assert one.paired.mean == pytest.approx(fmean(differences))
    assert one.bootstrap is not None
    assert min(differences) <= one.bootstrap[0] < one.bootstrap[1] <= max(differences)
    assert one.verdict.startswith("higher than the baseline by 1.")
    assert found["ece", "pool 0.5"].better is True  # lower is better
    assert found["top1", "log <b>"].verdict == "no significant difference (5 paired seeds); equal within ±1 points"


def test_holm_counts_every_comparison_of_the_page(runs: tuple[list[Path], list[Path]]) -> None:
    found = compared(*runs)
    ordered = sorted(found.values(), key=lambda one: one.paired.p or 0.0)
    assert len(found) == 2 * len(scorecards.metrics(make_card()))
    assert ordered[0].adjusted_p == pytest.approx(min(1.0, len(found) * (ordered[0].paired.p or 0.0)))


def test_each_metric_has_its_own_best_baseline(tmp_path: Path) -> None:
    for lr, top1, ece in ((0.1, 80.0, 2.0), (0.2, 79.0, 1.0)):
        run = make_scored_run(tmp_path / f"b{lr}", lr=lr, everything=False)
        card = make_card(everything=False)
        card["accuracy"] |= {"top1": top1, "ece": ece}
        (run / "scorecard.json").write_text(json.dumps(card))
    masked = make_scored_run(tmp_path / "m", "pool", everything=False)
    found = compared([masked], sorted(tmp_path.glob("b*")))
    assert found["top1", "pool"].reference.lr == 0.1
    assert found["ece", "pool"].reference.lr == 0.2


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({0.1: 0.0}, "baseline at one learning rate"),
        ({0.1: 0.0, 0.2: -1.0}, "best baseline at the edge of its learning rates, 0.1 to 0.2"),
        ({0.05: -1.0, 0.1: 0.0, 0.2: -1.0}, ""),
    ],
)
def test_a_baseline_that_was_not_tuned_is_called_so(rates: dict[float, float], words: str, tmp_path: Path) -> None:
    masked = [make_scored_run(tmp_path / f"m{s}", "pool", s, 3.0, everything=False) for s in range(5)]
    baselines = [
        make_scored_run(tmp_path / f"b{lr}-{s}", "no mask", s, gain, lr=lr, everything=False)
        for lr, gain in rates.items()
        for s in range(5)
    ]
    assert compared(masked, baselines)["top1", "pool"].control == words
    text = Page(write_scorecards(masked, baselines, tmp_path / "page.html").read_text()).text
    assert ("Uncontrolled comparison" in text) == bool(words)
    assert ("top1 (uncontrolled)" in text) == bool(words)


def test_the_metrics_whose_baseline_is_not_tuned_are_named(tmp_path: Path) -> None:
    """The best rate for ece lies at the edge, for the others inside."""
    masked = [make_scored_run(tmp_path / f"m{s}", "pool", s, 3.0, everything=False) for s in range(5)]
    baselines = []
    for lr, gain, ece in ((0.05, -1.0, 5.0), (0.1, 0.0, 4.0), (0.2, -1.0, 3.0)):
        for s in range(5):
            run = make_scored_run(tmp_path / f"b{lr}-{s}", "no mask", s, gain, lr=lr, everything=False)
            card = json.loads((run / "scorecard.json").read_text())
            card["accuracy"]["ece"] = ece
            (run / "scorecard.json").write_text(json.dumps(card))
            baselines.append(run)
    text = Page(write_scorecards(masked, baselines, tmp_path / "page.html").read_text()).text
    assert "0.05 to 0.2, by ece. A gain" in text
    assert "Uncontrolled, as the baseline is not tuned: 1 of these." in text


def test_a_lucky_seed_of_another_learning_rate_is_not_overlooked(tmp_path: Path) -> None:
    masked = [make_scored_run(tmp_path / f"m{s}", "pool", s, 3.0, everything=False) for s in range(5)]
    baselines = [make_scored_run(tmp_path / f"b{s}", "no mask", s, everything=False) for s in range(5)]
    baselines += [
        make_scored_run(tmp_path / f"c{lr}", "no mask", 0, 9.0, lr=lr, everything=False) for lr in (0.05, 0.2)
    ]
    one = compared(masked, baselines)["top1", "pool"]
    assert (one.reference.lr, one.paired.n) == (0.1, 5)
    assert "does better on fewer seeds" in one.control


def test_few_seeds_are_no_evidence(tmp_path: Path) -> None:
    masked = [make_scored_run(tmp_path / f"m{s}", "pool", s, 5.0, everything=False) for s in range(4)]
    baselines = [make_scored_run(tmp_path / f"b{s}", "no mask", s, everything=False) for s in range(4)]
    text = Page(write_scorecards(masked, baselines, tmp_path / "page.html").read_text()).text
    assert "nothing here is evidence of a difference" in text
    assert "fewer than five seeds: not evidence" in text
    assert "▲ better" not in text


def test_without_named_baselines_masks_are_compared_with_no_mask(tmp_path: Path) -> None:
    runs = [
        make_scored_run(tmp_path / "m", "pool", everything=False),
        make_scored_run(tmp_path / "b", everything=False),
    ]
    assert [one.reference.label for one in compared(runs, []).values()] == ["no mask"] * 4


def test_models_on_different_images_are_not_compared(tmp_path: Path) -> None:
    runs = [make_scored_run(tmp_path / name, name, everything=False) for name in ("pool", "no mask")]
    (runs[0] / "scorecard.json").write_text(json.dumps(make_card(limit=10, everything=False)))
    text = Page(write_scorecards(runs, [], tmp_path / "page.html").read_text()).text
    assert "The scorecards are of different images, so nothing is compared." in text
    assert "Against the best baseline" not in text


def test_a_model_that_is_its_own_baseline_is_not_compared(tmp_path: Path) -> None:
    runs = [make_scored_run(tmp_path / name, everything=False) for name in ("one", "other")]
    text = Page(write_scorecards(runs[:1], runs[1:], tmp_path / "page.html").read_text()).text
    assert "The models differ from their baselines by the seed at most: they are one arm." in text


def test_the_page_is_whole_and_needs_nothing_else(runs: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    raw = write_scorecards(*runs, tmp_path / "deep" / "page.html").read_text()
    page = Page(raw)
    assert "script" not in page.tags
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert sum(address.startswith("data:image/png") for address in page.addresses) == 4 * (1 + 3 * 2)
    assert "log <b>" not in raw  # what the user wrote is escaped
    for heading in (
        "Accuracy and calibration",
        "Pruning",
        "Attacks",
        "Corruptions",
        "Saliency",
        "Gradient quality",
    ):
        assert f"<h2>{heading}</h2>" in raw
    own_gradients = (
        "gmscale changes training gradients only: the model's own gradients are true, and attacks use them."
    )
    assert own_gradients in page.text
    assert "a sign that gradients mislead" in page.text
    assert "white-box black-box transfer" in page.text
    assert "Of 100 comparisons with at least 5 paired seeds" in page.text
    assert str(tmp_path) not in raw


def test_the_same_cards_give_the_same_page(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run", everything=False)
    pages = [write_scorecards([run], [], tmp_path / f"{number}.html").read_bytes() for number in range(2)]
    assert pages[0] == pages[1]


def test_the_page_of_one_model(tmp_path: Path) -> None:
    card = make_card(everything=False) | {"name": "resnet18.a1_in1k"}
    (tmp_path / "card.json").write_text(json.dumps(card))
    page = Page(write_scorecards([tmp_path / "card.json"], [], tmp_path / "page.html").read_text())
    assert "resnet18.a1_in1k on embedded" in page.text
    assert f"Top1 {card['accuracy']['top1']:.1f} %" in page.text
    assert "no evidence on how it was trained" in page.text
    assert "Attacks" not in page.text
    assert "Pruning" not in page.text


@pytest.mark.parametrize("section", ["shifts", "pruning", "attacks", "corruptions", "saliency", "quality"])
def test_any_section_may_stand_alone(section: str, tmp_path: Path) -> None:
    whole = make_card()
    card: dict[str, Any] = make_card(everything=False) | {section: whole[section][:1]}
    (tmp_path / "card.json").write_text(json.dumps(card))
    Page(write_scorecards([tmp_path / "card.json"], [], tmp_path / "page.html").read_text())


def test_what_was_asked_for_on_more_images_than_there_are_is_on_all(tmp_path: Path) -> None:
    card = make_card() | {"samples": 250}
    card["corruptions"] += [entry | {"images": 9000} for entry in card["corruptions"]]
    (tmp_path / "card.json").write_text(json.dumps(card))
    (loaded,) = load_cards([tmp_path / "card.json"], baseline=False)
    assert {e["images"] for section in ("attacks", "corruptions", "saliency") for e in loaded.entries(section)} == {
        None,
        100,
    }
    assert len(loaded.entries("corruptions")) == len(card["corruptions"]) // 2, "each once"
    assert any(name.startswith("square linf 4/255 200 queries top1") for name in loaded.values)
    text = Page(write_scorecards([tmp_path / "card.json"], [], tmp_path / "page.html").read_text()).text
    assert "250 images" not in text


def test_weights_can_go_up_to_the_first_share_that_harms(tmp_path: Path) -> None:
    card = make_card(everything=False)
    card["accuracy"]["top1"] = 80.0
    tops = {0.95: 80.0, 0.5: 79.8, 0.8: 60.0, 0.7: 79.5}
    card["pruning"] = [{"sparsity": share, "how": "global", "top1": top} for share, top in tops.items()]
    (tmp_path / "card.json").write_text(json.dumps(card))
    text = Page(write_scorecards([tmp_path / "card.json"], [], tmp_path / "page.html").read_text()).text
    assert "top1 within 1 point 70 %" in text


def test_ways_of_pruning_stand_together_by_rising_share(tmp_path: Path) -> None:
    card = make_card()
    card["pruning"].sort(key=lambda entry: entry["sparsity"])
    (tmp_path / "card.json").write_text(json.dumps(card))
    table = tables.pruning(scored_arms(load_cards([tmp_path / "card.json"], baseline=False)))
    assert table
    shares = ("0.25", "0.5", "0.8", "0.9")
    rows = [*(f"global {share}" for share in shares), "global 0.9 finetuned 50"]
    rows += [*(f"layer {share}" for share in shares), "2:4", "2:4 finetuned 50"]
    assert [row.name for row in table.rows] == [*rows, *(f"structured {share}" for share in shares)]


def test_wide_intervals_of_few_seeds_do_not_hide_the_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked, baselines = (
        [make_scored_run(tmp_path / f"{arm}-{seed}", arm, seed, gain, everything=False) for seed in (0, 1)]
        for arm, gain in (("pool", 0.1), ("no mask", 0.0))
    )
    arms = scored_arms([*load_cards(masked, baseline=False), *load_cards(baselines, baseline=True)])
    found = compare(arms, 1.0)
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr(figures, "svg", lambda figure: drawn.append(figure.axes[0].get_xlim()) or "drawn")
    assert figures.differences(found, figures.styles(arms)) == "drawn"
    differences = [d for one in found if one.metric != "loss" for d in one.seed_differences]
    ends = [abs(one.paired.high or 0.0) for one in found if one.metric != "loss"]
    reach = max(map(abs, drawn[0]))
    assert max(map(abs, differences)) < reach <= 2 * max(map(abs, differences)) < max(ends)


def test_scorecards_of_the_first_version_are_still_read(tmp_path: Path) -> None:
    card: dict[str, Any] = make_card(everything=False)
    card["accuracy"] = {"top1": 80.0, "top5": 99.0, "loss": 0.5}
    card["pruning"] = [{"sparsity": 0.8, "measured": 0.8, "top1": 70.0}]
    card["attacks"] = [{"attack": "fgsm", "norm": "linf", "eps": 4 / 255, "steps": 1, "restarts": 1, "top1": 10.0}]
    (tmp_path / "card.json").write_text(json.dumps(card))
    text = Page(write_scorecards([tmp_path / "card.json"], [], tmp_path / "page.html").read_text()).text
    assert "global 0.8 70.0" in text
    assert "L-inf 4/255 – 10.0" in text


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    run = make_scored_run(tmp_path / "run", everything=False, pictures=True)
    (run / "gallery" / "gallery.json").write_text("{")
    with pytest.raises(UsageError, match=r"gallery\.json cannot be read as JSON"):
        write_scorecards([run], [], tmp_path / "page.html")
    (run / "scorecard.json").unlink()
    with pytest.raises(UsageError, match=r"run has no scorecard; make one with: gmscale evaluate .*run$"):
        write_scorecards([run], [], tmp_path / "page.html")


def test_the_page_needs_no_torch() -> None:
    code = "import sys, gmscale.report.scorecard\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
