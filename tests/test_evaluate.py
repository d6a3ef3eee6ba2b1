"""gmscale evaluate: a finished run's scorecard, on one rank and several, also after an interruption."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml

from gmscale import cli, scorecards
from gmscale.data import ValLoader, val_loader
from gmscale.errors import UsageError
from gmscale.evaluation import command
from gmscale.evaluation.command import main as evaluate
from gmscale.evaluation.corruptions import FAMILIES
from gmscale.evaluation.saliency.maps import METHODS
from gmscale.evaluation.saliency.measurement import Saliency
from gmscale.evaluation.scorecard import Scorecard
from gmscale.evaluation.subject import spread
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks

QUICK = ["--prune", "0.5,0.8", "--attack", "fgsm,pgd", "--steps", "2"]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to write into."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What has been measured, one after another."""
    asked: list[Any] = []

    def counted(card: Scorecard, what: Any, found: Any) -> None:
        asked.append(what)
        add(card, what, found)

    add = Scorecard.add
    monkeypatch.setattr(Scorecard, "add", counted)
    return asked


def alone(*argv: Any) -> None:
    assert evaluate([str(a) for a in argv], lambda config, body: body(tiny.ALONE)) == 0


def card_of(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "scorecard.json").read_text()))


def error_of(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """Run gmscale evaluate, which must end with one line about a user's mistake; return that line."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *map(str, argv)])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert said.err.startswith("gmscale: error: ")
    assert said.err.count("\n") == 1
    return said.err


# ---- what is measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "name"), [("model", "top1"), ("ema", "ema_top1"), ("auto", "ema_top1")])
def test_accuracy_is_that_of_the_run(run: Path, weights: str, name: str) -> None:
    alone(run, "--prune", "0.5", "--weights", weights)
    card, summary = card_of(run), json.loads((run / "summary.json").read_text())
    assert card["accuracy"]["top1"] == summary[name]
    assert card["weights"] == ("model" if weights == "model" else "ema")
    if weights == "model":
        assert card["accuracy"]["loss"] == pytest.approx(summary["loss"], rel=1e-6)
        assert card["accuracy"]["top5"] == summary["top5"]
    assert (card["checkpoint"], card["step"], card["samples"]) == ("step-00000009", 9, tiny.VALIDATION_SIZE)


def test_the_scorecard_says_what_was_measured_and_how(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone(run, *QUICK, "--eps", "8/255", "--restarts", "2")
    card = card_of(run)
    assert [entry["sparsity"] for entry in card["pruning"]] == [0.5, 0.8]
    assert all(abs(entry["measured"] - entry["sparsity"]) < 1e-3 for entry in card["pruning"])
    how = {"norm": "linf", "eps": 8 / 255}
    found = {"top1", "clean_top1"}
    fgsm, pgd = ({key: value for key, value in entry.items() if key not in found} for entry in card["attacks"])
    assert fgsm == {"attack": "fgsm", **how, "steps": 1, "restarts": 1, "images": None, "surrogate": ""}
    assert pgd == {"attack": "pgd", **how, "steps": 2, "restarts": 2, "images": None, "surrogate": ""}
    assert all(0 <= entry["top1"] <= card["accuracy"]["top1"] for entry in card["attacks"])
    said = capsys.readouterr().out
    for words in (
        "averaged weights of step 9, 5 of 5 results to measure",
        "pruned by 80 %",
        "FGSM L-inf eps 8/255",
        "PGD L-inf eps 8/255, steps 2, restarts 2",
        "only white-box ones were measured, which misleading gradients can defeat",
        str(run / "scorecard.json"),
    ):
        assert words in said


@pytest.mark.slow
def test_by_default_everything_is_measured(run: Path, measured: list[Any]) -> None:
    alone(run, "--limit", "8")
    kinds = Counter(type(what).__name__ for what in measured)
    assert kinds == {
        "Accuracy": 1,
        "Pruning": 16,
        "Attack": 5,  # no baseline, so nothing to transfer from
        "Corruption": len(FAMILIES),
        "Saliency": len(METHODS),
        "GradientQuality": 1,
    }
    card = card_of(run)
    assert set(card) >= {"accuracy", "pruning", "attacks", "corruptions", "saliency", "quality"}
    assert {entry["attack"] for entry in card["attacks"]} == {"fgsm", "pgd", "apgd-ce", "apgd-dlr", "square"}
    page = (run / "scorecard.html").read_text()
    assert "gmscale changes training gradients only" in page
    assert len(json.loads((run / "gallery" / "gallery.json").read_text())) == 6
    measured.clear()
    alone(run, "--limit", "8")
    assert measured == []


@pytest.mark.slow
def test_what_a_model_cannot_be_measured_on_is_left_out_of_everything_only(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))

    def refuse(what: Saliency, subject: Any) -> Any:
        raise UsageError("this model has no grid")

    monkeypatch.setattr(Saliency, "measure", refuse)
    monkeypatch.setattr(command, "write_gallery", lambda *arguments: None)
    alone(run, "--limit", "4")
    said = capsys.readouterr().out
    assert said.count("this model has no grid") == len(METHODS)
    assert "saliency" not in card_of(run)
    with pytest.raises(UsageError, match="this model has no grid"):
        alone(run, "--limit", "4", "--saliency", "log")


def test_a_model_and_the_baseline_of_its_seed_meet_the_same_transferred_images(run: Path, tmp_path: Path) -> None:
    """Images are made on a baseline of another seed where there is one; the baselines are measured too."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["run"]["seed"] += 1
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    model = Path(shutil.copytree(run, tmp_path / "model"))
    ask = ["--attack", "transfer,pgd", "--steps", "2", "--no_page"]
    alone(model, "--baseline", run, other, *ask)
    cards = [card_of(path) for path in (model, run, other)]
    transferred = [next(e for e in card["attacks"] if e["attack"] == "transfer") for card in cards]
    assert all(entry["surrogate"] == cards[0]["sha256"][:12] for entry in transferred), (
        "all weights are the same here"
    )
    assert {len(card["attacks"]) for card in cards} == {2}
    # white-box images of the same weights: what transfers is as strong
    assert transferred[0]["top1"] == next(e for e in cards[0]["attacks"] if e["attack"] == "pgd")["top1"]
    assert not (tmp_path / "scorecards.html").exists()


def test_several_models_share_a_page(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["mask"]["enabled"], config["run"]["arm"] = False, "no mask"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    alone(run, "--baseline", other, "--prune", "0.5")
    page = (tmp_path / "scorecards.html").read_text()
    assert "fewer than five seeds" in page
    assert (run / "scorecard.json").exists()
    assert (other / "scorecard.json").exists()
    assert not (run / "scorecard.html").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--attack", "transfer"], "--attack transfer needs --baseline RUN"),
        (["--attack", "fgsm", "--eps", "1e400"], "--eps is '1e400'"),
        (["--attack", "pgd", "--norm", "l2"], "--norm l2 needs --eps"),
        (["--prune", "0.5", "--eps", "0.1"], "--eps says how --attack is measured"),
        (["--finetune", "5"], "--finetune says how --prune is measured"),
        (["--folder", "a=.", "--folder", "a=.."], "--folder a is given twice"),
        (["--out", "."], "--out . is a directory"),
        (["--page", "."], "--page . is a directory"),
        (["--out", "card.html"], "card.html would be both the scorecard and the page"),
        (["--finetune", "ten", "--prune", "0.5"], "--finetune is 'ten'"),
        (["--folder", "imagenet-a"], "--folder is 'imagenet-a'; expected NAME=DIR"),
        (["--corrupt", "frosty"], "frosty"),
        (["--saliency", "gradcan"], "--saliency is 'gradcan'"),
        (["--quality", "pol"], "--quality is 'pol'"),
        (["--pairs", "1", "--quality", "pool"], "--pairs is 1"),
        (["--baseline", "nowhere"], "nowhere: no such directory"),
        (["--real", "real.json"], "real.json"),
    ],
)
def test_a_mistake_in_the_wider_options_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert said in error_of(capsys, run, *argv)


def test_a_model_is_no_baseline_of_itself_in_another_spelling(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    assert "is given as a model and as its own --baseline" in error_of(capsys, run, "--baseline", "./run/")


@pytest.mark.parametrize(
    "mistake",
    [
        ["--folder", "x=folder"],
        ["--real", "file"],
        ["--saliency", "log", "--boxes", "file"],
        ["--boxes", "file"],
        ["--prune", "2:400"],
    ],
)
def test_what_does_not_fit_the_model_is_found_before_anything_is_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "no class of these").mkdir(parents=True)
    (tmp_path / "file").write_text("{")
    with pytest.raises(UsageError):
        alone(run, *mistake)
    assert not (run / "scorecard.json").exists()


def test_a_mistake_about_the_last_model_is_found_before_the_first_is_measured(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    alone(other, "--limit", "4", "--attack", "fgsm", "--no_page")
    with pytest.raises(UsageError, match="limit"):
        alone(run, other, "--attack", "fgsm")
    assert not (run / "scorecard.json").exists()


def test_no_result_is_said_to_be_of_more_images_than_there_are(run: Path, cache: Path) -> None:
    alone(run, "--attack", "fgsm", "--attack_images", "500", "--no_page")
    assert card_of(run)["attacks"][0]["images"] is None


def test_a_stream_is_read_as_a_whole_and_has_no_gallery(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["access"] = "stream"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    alone(run, "--saliency", "gradient")
    assert card_of(run)["saliency"][0]["images"] is None
    assert "no gallery" in capsys.readouterr().out
    assert (run / "scorecard.html").exists()
    assert not (run / "gallery").exists()
    with pytest.raises(UsageError, match="a part of the images needs data"):
        alone(run, "--attack", "fgsm", "--attack_images", "5")


def test_where_nothing_can_be_written_nothing_is_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command, "TemporaryFile", refuse)
    with pytest.raises(
        UsageError, match=r"no scorecard can be written in .*: Permission denied; name another file"
    ):
        alone(run, "--attack", "fgsm")


def test_values_for_sweeps(run: Path) -> None:
    assert scorecards.values(run, prune=0.8, eps=4 / 255) == {}
    alone(run, *QUICK, "--eps", repr(4 / 255))
    alone(run, "--attack", "pgd", "--eps", "0.1")
    alone(run, "--attack", "pgd", "--norm", "l2", "--eps", "4/255")
    alone(run, "--attack", "pgd", "--steps", "3", "--restarts", "2")
    alone(run, "--attack", "pgd", "--steps", "5")
    card = card_of(run)
    found = scorecards.values(run, prune=0.8, eps=4 / 255)
    strongest = next(e for e in card["attacks"] if e["norm"] == "linf" and e["steps"] * e["restarts"] == 6)
    assert found == {
        "pruned_top1": card["pruning"][1]["top1"],
        "fgsm_top1": next(e for e in card["attacks"] if e["attack"] == "fgsm")["top1"],
        "pgd_top1": strongest["top1"],
    }
    assert scorecards.values(run, prune=0.9, eps=0.2) == {}


def test_a_limit_takes_images_from_the_whole_split(run: Path, cache: Path) -> None:
    config = tiny.config(cache, run).data
    whole = val_loader(config, 0, 1)
    images = torch.cat([images for images, _, _ in whole])
    labels = torch.cat([labels for _, labels, _ in whole])
    index = spread(whole.index, 7)  # type: ignore[union-attr]
    chosen = np.arange(7) * 25 // 7
    few = [ValLoader(index, replace(config, eval_batch_size_per_device=2), rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([batch[0] for loader in few for batch in loader]), images[chosen])
    assert torch.equal(torch.cat([batch[1] for loader in few for batch in loader]), labels[chosen])
    alone(run, "--prune", "0.5", "--limit", "7")
    assert (card_of(run)["samples"], card_of(run)["settings"]["limit"]) == (7, 7)


def test_a_limit_beyond_the_split_is_none(run: Path) -> None:
    alone(run, "--prune", "0.5", "--limit", "1000")
    assert card_of(run)["settings"]["limit"] is None
    alone(run, "--prune", "0.8")  # belongs together


# ---- what is there already ---------------------------------------------------------------------------------------


def test_results_that_are_there_are_not_measured_again(run: Path, measured: list[Any]) -> None:
    alone(run, *QUICK)
    first = card_of(run)
    measured.clear()
    alone(run, *QUICK, "--batch_size", "3")
    assert measured == []
    assert card_of(run) == first
    alone(run, "--prune", "0.6")
    assert [what.sparsity for what in measured] == [0.6]
    merged = card_of(run)
    assert [entry["sparsity"] for entry in merged["pruning"]] == [0.5, 0.6, 0.8]
    assert merged["attacks"] == first["attacks"]


def test_an_interrupted_evaluation_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    alone(other, *QUICK)
    done: list[Any] = []

    def until_the_fourth(card: Scorecard, what: Any, found: Any) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(what)
        add(card, what, found)

    add = Scorecard.add
    monkeypatch.setattr(Scorecard, "add", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        alone(run, *QUICK)
    assert (len(card_of(run)["pruning"]), card_of(run).get("attacks")) == (2, None)
    done.clear()
    alone(run, *QUICK)
    assert len(done) == 2
    assert card_of(run) == card_of(other)


def test_results_of_weights_that_are_no_more_are_dropped(run: Path, measured: list[Any]) -> None:
    alone(run, "--prune", "0.5,0.8")
    path = run / "scorecard.json"
    path.write_text(json.dumps(card_of(run) | {"sha256": "0"}))
    measured.clear()
    alone(run, "--prune", "0.8")
    assert len(measured) == 2
    assert [entry["sparsity"] for entry in card_of(run)["pruning"]] == [0.8]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["--checkpoint", "8"], "results of checkpoint step-00000009, these would be of step-00000008"),
        (["--weights", "model"], "results of weights ema, these would be of model"),
        (["--limit", "5"], "results of limit unset, these would be of 5"),
    ],
)
def test_one_scorecard_is_of_one_model_and_one_set_of_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: list[str], said: str
) -> None:
    alone(run, "--prune", "0.5")
    before = card_of(run)
    capsys.readouterr()
    error = error_of(capsys, run, "--prune", "0.5", *other)
    assert said in error
    assert "--out" in error
    assert card_of(run) == before
    alone(run, "--prune", "0.5", *other, "--out", tmp_path / "other.json")
    assert card_of(run) == before
    assert (tmp_path / "other.json").exists()


# ---- several ranks -----------------------------------------------------------------------------------------------


def _rank(world: World, run_dir: str, out: str) -> dict[str, Any]:
    argv = [run_dir, *QUICK, "--eps", "0.05", "--restarts", "2", "--batch_size", "4", "--out", out]
    evaluate(argv, lambda config, body: body(world))
    return {}


def test_two_ranks_find_what_one_finds(run: Path, tmp_path: Path) -> None:
    alone(run, *QUICK, "--eps", "0.05", "--restarts", "2")
    run_ranks(_rank, 2, str(run), str(tmp_path / "two.json"))
    one, two = card_of(run), json.loads((tmp_path / "two.json").read_text())
    assert two["accuracy"].pop("loss") == pytest.approx(one["accuracy"].pop("loss"), rel=1e-5)
    assert two == one


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prune", "1"], "--prune is 1; expected a share between 0 and 1"),
        (["--prune", "0.5,half"], "--prune is 'half'; expected a number"),
        (["--prune", ""], "--prune is ''"),
        (["--attack", "pgd,fsgm"], "--attack is 'fsgm'; expected one of fgsm, pgd, apgd-ce"),
        (["--eps", "1.5"], "--eps is 1.5; expected a number in [0, 1]"),
        (["--eps", "4/0"], "--eps is '4/0'"),
        (["--norm", "L2"], "--norm is 'L2'; expected one of linf, l2; did you mean 'l2'?"),
        (["--norm", "l2", "--eps", "-1"], "--eps is -1"),
        (["--steps", "0"], "--steps is 0"),
        (["--attack", "fgsm", "--restarts", "0"], "--restarts is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--weights", "emma"], "--weights is 'emma'; expected one of auto, model, ema; did you mean 'ema'?"),
        (["--checkpoint", "7"], "has no checkpoint of step 7"),
        (["--out", "nowhere/card.json"], "there is no directory nowhere"),
        (["--prunes", "0.5"], "--prunes"),
    ],
)
def test_a_mistake_is_one_line(
    finished_run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert said in error_of(capsys, finished_run, *argv)


def test_a_run_that_cannot_be_evaluated_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such directory" in error_of(capsys, run / "nowhere")
    (run / "scorecard.json").write_text("[]")
    assert "is not a scorecard" in error_of(capsys, run)
    (run / "scorecard.json").write_text('{"accuracy":')
    assert "cannot be read as JSON" in error_of(capsys, run)
    shutil.rmtree(run / "checkpoints")
    assert "holds no complete checkpoint" in error_of(capsys, run)
    (run / "summary.json").unlink()
    assert "has not finished (no summary.json)" in error_of(capsys, run)


def test_sweeps_read_scorecards_without_torch() -> None:
    import subprocess

    code = "import sys, gmscale.scorecards\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
