"""gmscale verify: its verdicts, what it finds on real processes, and that a broken mask does not pass."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from gmscale import cli, verify
from gmscale.errors import UsageError
from gmscale.sites.attachment import Attachment
from gmscale.verify.comparisons import comparisons
from gmscale.verify.verdict import Difference, Verdict, classify, difference
from gmscale.verify.ways import Batches, Trajectory, Way, train

ROUNDING, REQUIRED, EQUAL = "rounding", "required by the mathematics", "bitwise equal"


# -- verdicts -----------------------------------------------------------------------------------------------------
def verdict(gradient: float, weights: float | None = None, **why: float | str) -> str:
    weights = gradient if weights is None else weights
    return classify(Difference(gradient, gradient, weights, weights), 1e-4, 1e-2, **why).kind


def test_differences_are_equal_rounding_or_unexpected():
    assert verdict(0) == EQUAL
    assert verdict(1e-6) == ROUNDING
    assert verdict(0, 1e-3) == ROUNDING
    assert verdict(1e-3) == "UNEXPECTED"
    assert verdict(1e-6, 0.1) == "UNEXPECTED"
    assert verdict(math.nan) == "UNEXPECTED"
    assert verdict(0, math.inf) == "UNEXPECTED"


def test_what_the_mathematics_requires_must_be_there():
    assert verdict(0.2, must_differ="why") == REQUIRED
    for nothing in (0, 1e-6):
        assert verdict(nothing, must_differ="why") == "UNEXPECTED"
    assert verdict(0.2, may_differ="why") == REQUIRED
    assert verdict(1e-6, may_differ="why") == ROUNDING


def test_a_mask_that_is_not_the_mask_is_unexpected_whatever_the_difference():
    for gradient in (0, 1e-6, 0.2):
        for why in ({}, {"must_differ": "why"}, {"may_differ": "why"}):
            for error in (0.01, math.nan, math.inf):
                assert verdict(gradient, mask_error=error, **why) == "UNEXPECTED"
    assert verdict(0.2, mask_error=1e-7, may_differ="why") == REQUIRED


def test_differences_are_relative_to_the_largest_gradient_and_the_largest_change():
    a = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5])}
    ours = {"w": torch.tensor([1.0, 2.5]), "b": torch.tensor([0.5])}
    before = {"w": torch.tensor([1.0, 6.0]), "b": torch.tensor([0.0])}
    assert difference((ours, ours), (a, a), before) == Difference(0.5, 0.25, 0.5, 0.125)
    assert difference((None, ours), (a, a), before) == Difference(None, None, 0.5, 0.125)
    assert math.isnan(difference(({}, ours), (a, a), before).gradient_rel)  # a gradient that is missing


# -- a mask that is broken ----------------------------------------------------------------------------------------
def batches(config_side: int) -> Batches:
    draws = np.random.default_rng(0)
    images = draws.standard_normal((2, 8, 3, config_side, config_side), dtype=np.float32)
    return Batches(images, draws.integers(10, size=(2, 8)), 10)


@pytest.fixture
def config(tmp_path):
    return tiny.config(tmp_path, tmp_path / "run", optim={"lr": 0.01})


@pytest.mark.parametrize("settings", [{}, {"operator": "log"}, {"error_feedback": False, "rescale": True}], ids=str)
def test_what_arrives_is_the_mask_of_the_gradient(config, settings):
    config = replace(config, mask=replace(config.mask, **settings))
    assert train(config, Way(masked=True), batches(32), tiny.ALONE).mask_error < 1e-6


def test_a_mask_that_does_nothing_or_too_much_is_found(config, monkeypatch):
    real = Attachment._mask_all

    def nothing(self, gradients):
        self._before_mask(gradients)
        self._after_mask(gradients)

    def unseen(self, gradients):
        pass

    def one_layer_twice(self, gradients):
        real(self, gradients)
        for name, gradient in gradients:
            if name == "stem.conv.weight":
                gradient.copy_(self.mask.apply(gradient, strength=1.0))

    for broken in (nothing, unseen, one_layer_twice):
        monkeypatch.setattr(Attachment, "_mask_all", broken)
        error = train(config, Way(masked=True), batches(32), tiny.ALONE).mask_error
        assert classify(Difference(0, 0, 0, 0), 1e-4, 1e-2, mask_error=error).kind == "UNEXPECTED"


def test_without_a_mask_nothing_must_differ(config):
    def required(**settings: object) -> bool:
        masked = replace(config, mask=replace(config.mask, **settings))
        return bool(comparisons(masked, 2, verify.NAMES, False)["ranks"].on_must_differ)

    assert required()
    assert required(agreement="consensus")
    assert not required(strength=0.0)
    assert not required(enabled=False)


# -- the command --------------------------------------------------------------------------------------------------
def found(cache: Path, tmp_path: Path, compare: str, *flags: str) -> dict[tuple[str, str], dict]:
    argv = tiny.flags(cache, tmp_path / "run")
    out = tmp_path / "verify.json"
    status = verify.main([*argv, "--compare", *compare.split(), "--json", str(out), *flags])
    rows = json.loads(out.read_text())["rows"]
    assert status == int(any(row["verdict"]["kind"] == "UNEXPECTED" for row in rows))
    return {(row["name"], row["mask"]): row for row in rows}


def test_every_comparison_gets_the_verdict_it_deserves(cache, tmp_path, capsys):
    rows = found(cache, tmp_path, "ranks buckets strength0 accumulation bf16 channels_last batchnorm")
    kinds = {key: row["verdict"]["kind"] for key, row in rows.items()}
    assert kinds["ranks", "off"] == ROUNDING
    assert kinds["ranks", "on"] == REQUIRED
    assert rows["ranks", "on"]["verdict"]["reason"] == "mask-then-average is not average-then-mask"
    assert kinds["buckets", "off"] == kinds["buckets", "on"] == EQUAL
    assert kinds["strength0", "off"] == EQUAL
    assert kinds["accumulation", "off"] == kinds["channels_last", "off"] == ROUNDING
    assert kinds["bf16", "off"] == ROUNDING
    assert kinds["batchnorm", "off"] == REQUIRED
    assert "UNEXPECTED" not in kinds.values()
    assert {row["mask_error"] is None for (_, mask), row in rows.items() if mask == "on"} == {False}
    shown = capsys.readouterr().out
    assert "2 ranks : 1 rank" in shown
    assert "required by the mathematics: mask-then-average is not average-then-mask" in shown


def test_consensus_differs_from_the_mask_of_one_rank_and_is_what_it_says(cache, tmp_path):
    rows = found(cache, tmp_path, "ranks", "--mask.agreement", "consensus")
    assert rows["ranks", "on"]["verdict"]["kind"] == REQUIRED
    assert "mean map" in rows["ranks", "on"]["verdict"]["reason"]
    assert rows["ranks", "on"]["mask_error"] < 1e-5


def test_a_mask_without_strength_makes_no_difference(cache, tmp_path):
    rows = found(cache, tmp_path, "ranks", "--mask.strength", "0")
    assert rows["ranks", "on"]["verdict"]["kind"] == ROUNDING


def test_data_that_is_not_here_is_made_up(cache, tmp_path, capsys):
    found(cache, tmp_path, "strength0", "--data.source", str(tmp_path / "imagenet"))
    assert "8 made-up images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "rank"], "--compare is 'rank'; expected one of ranks, .*; did you mean 'ranks'"),
        (["--images", "6", "--ranks", "4"], "--images is 6; expected a multiple of 2 and of --ranks 4"),
        (["--steps", "0"], r"--steps is 0; expected a whole number in \[1"),
        (["--ranks", "1"], r"--ranks is 1; expected a whole number in \[2"),
        (["--mask.stength", "1"], "mask.strength"),
    ],
    ids=["compare", "images", "steps", "ranks", "flag"],
)
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UsageError, match=message) as error:
        verify.main(flags)
    assert "\n" not in str(error.value)


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="starts its own processes"):
        verify.main([])


def test_help_names_the_comparisons(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "--help"])
    assert "channels_last" in capsys.readouterr().out


def test_a_compiler_that_fails_is_a_row_that_says_so(config, monkeypatch):
    from gmscale.verify import comparisons as module

    def broken(*_):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(module, "train", broken)
    reason = module._train(config, Way(compiled=True), batches(32), tiny.ALONE)
    assert reason == "torch.compile failed: no C++ compiler found"
    row = module._row(
        "compile", comparisons(config, 2, verify.NAMES, False)["compile"], "off", reason, "", config, 2
    )
    assert row.verdict == Verdict("skipped", reason)


@pytest.mark.parametrize(("in_float64", "kind"), [(1e-12, "rounding"), (1e-3, "UNEXPECTED")])
def test_float64_settles_whether_a_difference_is_rounding(config, monkeypatch, in_float64, kind):
    from gmscale.verify import comparisons as module

    def trained(config, way, batches, world):
        """A gradient of which one entry goes another way in channels_last, in float32 as at a ReLU's corner."""
        off = (in_float64 if way.float64 else 1e-3) if way.channels_last else 0.0
        gradient = {"w": torch.tensor([1.0, 1.0 + off], dtype=torch.float64)}
        zero = {"w": torch.zeros(2, dtype=torch.float64)}
        return Trajectory(gradient, zero, {"w": -0.1 * gradient["w"]}, None)

    monkeypatch.setattr(module, "train", trained)
    config = replace(config, mask=replace(config.mask, enabled=False))
    (row,) = module.run(tiny.ALONE, config, batches(32), ["channels_last"])["rows"]
    assert row["verdict"]["kind"] == kind
    assert row["difference"]["gradient_rel"] == pytest.approx(1e-3, rel=1e-2)
