"""Section `sweep`: what cannot be is said before anything starts; what is written is read back; the controls."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_configs import FIELDS, header

from gmscale import config as configuration
from gmscale.config import MaskConfig, OutputConfig, TrainConfig
from gmscale.errors import UsageError
from gmscale.sweep import config, space
from gmscale.sweep.config import SweepConfig, no_mask, random_twin
from gmscale.sweep.space import apply, arm_of
from gmscale.trials import BASELINE, MASK, RANDOM

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted(ROOT.glob("configs/sweep/*.yaml"))
SPACE = {"mask.strength": {"uniform": [0.1, 1]}}


def flags(given: dict[str, Any]) -> list[str]:
    """Flags of the section, with a space unless it is given."""
    sweep = {"space": SPACE, **given}
    return [f"--sweep.{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in sweep.items()]


def refused(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        config.parse(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- parsing ----------------------------------------------------------------------------------------------------


def test_files_and_flags_hold_the_training_and_the_sweep(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("optim: {lr: 1}\nsweep: {space: {mask.kappa: [1, 2]}, trials: 2, workers: 3}\n")
    later = tmp_path / "later.yaml"
    later.write_text("sweep: {space: {mask.strength: [0.5, 1], optim.lr: {loguniform: [1e-3, 1e-1]}}}\n")
    base, sweep, _ = config.parse(
        ["--config", str(first), "--config", str(later), "--sweep.workers", "2", "--run.epochs", "4"]
    )
    assert (base.optim.lr, base.run.epochs, sweep.trials, sweep.workers) == (1.0, 4.0, 2, 2)
    assert sweep.space == {"mask.strength": [0.5, 1], "optim.lr": {"loguniform": [1e-3, 1e-1]}}
    assert sweep.domains == space.parse_all(sweep.space)


def test_the_space_may_be_a_flag() -> None:
    _, sweep, _ = config.parse(["--sweep.space", "{mask.strength: [0.25, 1]}", "--sweep.search", "grid"])
    assert list(space.grid(sweep.domains)) == [{"mask.strength": 0.25}, {"mask.strength": 1.0}]


def test_a_parser_may_have_further_flags() -> None:
    parser = config.build_parser()
    parser.add_argument("--plan", action="store_true", help="A flag of its own.")
    assert config.parse([*flags({}), "--plan"], parser)[2].plan
    assert not config.parse(flags({}), parser)[2].plan


def test_help_explains_every_field() -> None:
    explained = {action.dest: action.help for action in config.build_parser()._actions}
    for field in fields(SweepConfig):
        assert len((explained[f"sweep.{field.name}"] or "").split()) > 3, field.name
    assert "run.epochs" in explained


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sweeep: {trials: 1}", "has no field 'sweeep'; did you mean 'sweep'"),
        ("sweep: {trails: 1}", "section sweep has no field 'trails'; did you mean 'trials'"),
        ("sweep: 3", "section sweep holds 3; expected fields of sweep"),
        ("sweep: {trials: many}", "sweep.trials is 'many'; expected a whole number"),
        ("optim: {lrr: 1}", "section optim has no field 'lrr'; did you mean 'lr'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    assert said in refused("--config", str(path))


def test_training_has_no_section_sweep(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("sweep: {trials: 1}")
    with pytest.raises(UsageError, match="has no field 'sweep'"):
        configuration.parse(["--config", str(path)])


def test_an_unknown_flag_names_the_nearest() -> None:
    assert "unknown flag --sweep.trails; did you mean '--sweep.trials'" in refused("--sweep.trails", "3")


# ---- what cannot be ---------------------------------------------------------------------------------------------

TWO = {"mask.strength": [0.5, 1.0]}
LISTS = {"output.layers": [["ReLU"], ["stages"]]}
ASHA, PBT = {"scheduler": "asha"}, {"scheduler": "pbt"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"space": {}}, "sweep.space is empty; give it fields"),
        ({"dir": ""}, "sweep.dir is empty"),
        ({"search": "gird"}, "sweep.search is 'gird'; expected one of .*did you mean 'grid'"),
        ({"search": "grid"}, "mask.strength is a uniform range, and search grid needs lists"),
        ({"search": "grid", "space": TWO, "trials": 3}, "sweep.trials is 3, but a grid takes all points.*it has 2"),
        ({"space": TWO, "trials": 3}, "sweep.trials is 3, but sweep.space has only 2 points"),
        ({"space": LISTS, "search": "tpe"}, "output.layers holds lists or mappings, and search tpe takes numbers"),
        ({"objectives": []}, "sweep.objectives is empty"),
        ({"objectives": ["top11"]}, "sweep.objectives is 'top11'; .*did you mean 'top1'"),
        ({"objectives": ["top1", "top1"]}, "sweep.objectives holds 'top1' twice"),
        ({"objectives": ["ema_top1"]}, "ema_top1, but model.ema_decay is 0"),
        ({**ASHA, "objectives": ["top1", "loss"]}, "scheduler asha judges by one objective"),
        (
            {**ASHA, "objectives": ["pgd_top1"]},
            "pgd_top1, known only after the training; .*one of top1, top5, loss",
        ),
        ({**ASHA, "seeds": 2}, "sweep.seeds is 2, but scheduler asha tries each configuration once"),
        ({"search": "tpe", "seeds": 2}, "sweep.seeds is 2, but search tpe tries each configuration once"),
        ({**ASHA, "space": {"run.epochs": [1, 2]}}, "asha compares trials of equal length; take run.epochs out"),
        ({**ASHA, "grace_epochs": 9}, r"sweep.grace_epochs is 9.0; expected a number in \(0, 6\]"),
        ({**ASHA, "reduction_factor": 1}, r"sweep.reduction_factor is 1; expected a whole number in \[2"),
        ({**PBT, "search": "tpe"}, "sweep.search is tpe, but scheduler pbt draws its population itself"),
        ({**PBT, "trials": 1}, "sweep.trials is 1; expected at least 2"),
        ({**PBT, "perturb_epochs": 1.5}, "perturb_epochs is 1.5; expected a multiple of run.eval_every_epochs, 1"),
        ({**PBT, "perturb_epochs": 6}, "perturb_epochs is 6; expected less than run.epochs, 6"),
        ({**PBT, "space": {"optim.momentum": [0.8, 0.9]}}, "optim.momentum cannot change within a training"),
        ({"confirm_seeds": 1}, "sweep.confirm_seeds is 1, which gives no interval"),
        ({"no_mask_lr": [0.5, 0]}, r"sweep.no_mask_lr is 0.0; expected a number in \(0"),
        ({"no_mask_lr": [1, 1]}, "sweep.no_mask_lr holds 1.0 twice"),
        ({"workers": 2, "gpus_per_worker": 0.5}, "processes of one training cannot share a GPU"),
        ({"gpus_per_worker": 2}, r"sweep.gpus_per_worker is 2.0; expected a number in \[0, 1\]"),
        ({"prune": 1}, "sweep.prune is 1.0"),
        ({"eps": 4}, "sweep.eps is 4.0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(given: dict[str, Any], said: str) -> None:
    assert re.search(said, refused(*flags(given)))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--mask.enabled=false"], "needs a mask to begin with.*mask.enabled is false"),
        (["--mask.operator=random"], "needs a mask to begin with.*mask.operator random"),
        (["--run.resume=never"], "run.resume is 'never', which a sweep sets itself"),
        (["--run.arm=mine"], "run.arm is 'mine', which a sweep sets itself"),
        (["--parallel.backend=ddp"], "parallel.backend is 'ddp', but sweep.workers is 1"),
        (
            ["--parallel.backend=single", "--sweep.workers=2"],
            "parallel.backend is 'single', but sweep.workers is 2",
        ),
    ],
)
def test_a_base_that_cannot_be_is_one_line(argv: list[str], said: str) -> None:
    assert re.search(said, refused(*flags({}), *argv))


def test_secrets_are_refused_without_being_said() -> None:
    said = refused(*flags({}), "--data.source=https://me:pass@example.org/shards?token=abc")
    assert "https://example.org/shards was given with credentials" in said
    assert "pass@" not in said
    assert "abc" not in said


def test_averages_and_adaptive_searches_of_several_objectives_are_allowed() -> None:
    _, sweep, _ = config.parse([*flags({"objectives": ["ema_top1"]}), "--model.ema_decay=0.9"])
    assert sweep.evaluation() == ()
    for search in ("tpe", "nsga2"):
        config.parse(flags({"search": search, "objectives": ["top1", "loss"]}))
    config.parse(flags({"search": "nsga2"}))
    config.parse(flags(PBT))


def test_a_rate_that_follows_the_evaluations_is_not_perturbed() -> None:
    given = flags({**PBT, "space": {"optim.lr": {"loguniform": [0.01, 0.1]}, "mask.gate": ["hard", "soft"]}})
    config.parse([*given, "--sweep.trials=4"])
    assert "optim.lr cannot change within a training" in refused(*given, "--optim.sched=plateau")


@pytest.mark.parametrize(
    ("given", "trials"),
    [
        ({}, 16),
        ({"space": TWO}, 2),
        ({"space": TWO, "search": "grid"}, 2),
        ({"space": {**TWO, "mask.block": {"int": [1, 30]}}, "search": "grid"}, 60),
        ({"trials": 5}, 5),
    ],
)
def test_trials_left_out_are_16_and_for_a_grid_all_points(given: dict[str, Any], trials: int) -> None:
    _, sweep, _ = config.parse(flags(given))
    assert sweep.trials == trials


def test_what_is_measured_after_training_follows_the_objectives() -> None:
    sweep = SweepConfig(
        space=SPACE, objectives=["top1", "pgd_top1", "pruned_top1", "fgsm_top1"], prune=0.9, eps=0.1
    )
    asked = ("--prune", "0.9", "--attack", "fgsm,pgd", "--eps", "0.1", "--no_page")
    assert sweep.evaluation() == asked
    assert SweepConfig(space=SPACE, objectives=["top5", "best_top1"]).evaluation() == ()


# ---- there and back ---------------------------------------------------------------------------------------------


def test_a_saved_sweep_is_loaded_as_it_was(tmp_path: Path) -> None:
    given = {"space": {"optim.lr": {"loguniform": [1e-5, 1e-1]}, "mask.operator": ["log", "dog"]}, "trials": 7}
    base, sweep, _ = config.parse([*flags(given), "--mask.sigma=2", "--mask.operator=log", "--data.size=100"])
    config.save(tmp_path, base, sweep)
    assert config.load(tmp_path) == (base, sweep)
    assert configuration.load(tmp_path / "base.yaml") == base
    held = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert list(held["space"]) == ["optim.lr", "mask.operator"]  # the first of a grid is the slowest
    assert held["space"]["optim.lr"]["loguniform"] == [1e-5, 1e-1]
    assert held.keys() == {field.name for field in fields(SweepConfig)}


def test_a_folder_without_a_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no sweep: it has no base.yaml"):
        config.load(tmp_path)


def test_a_sweep_goes_on_with_its_settings_alone(tmp_path: Path) -> None:
    base, sweep, _ = config.parse(flags({"space": TWO}))
    config.save(tmp_path, base, sweep)
    config.check_same(tmp_path, base, replace(sweep, at_once=3, retries=0, dir="elsewhere"))
    with pytest.raises(UsageError, match=r"other settings: sweep.seed was 0 and is 1; choose another sweep.dir"):
        config.check_same(tmp_path, base, replace(sweep, seed=1))
    with pytest.raises(UsageError, match=r"other settings: optim.lr was 0.1 and is 0.2"):
        config.check_same(tmp_path, replace(base, optim=replace(base.optim, lr=0.2)), sweep)


# ---- controls ---------------------------------------------------------------------------------------------------


def test_the_control_without_a_mask_has_rates_of_its_own() -> None:
    base = replace(TrainConfig(), output=OutputConfig(enabled=True))
    settings = no_mask(base, 3)
    assert settings == {"mask.enabled": False, "output.enabled": False, "optim.lr": 0.3}  # not 0.30000000000000004
    assert arm_of(apply(base, settings)) == BASELINE
    exact = replace(base, optim=replace(base.optim, lr=0.123456789))
    assert no_mask(exact, 1)["optim.lr"] == exact.optim.lr
    assert no_mask(TrainConfig(), 2) == {"mask.enabled": False, "optim.lr": 0.2}


@pytest.mark.parametrize("operator", ["pool", "log", "dog", "licnn"])
@pytest.mark.parametrize("both", [False, True])
def test_a_random_twin_shuffles_what_the_mask_would_keep(operator: str, both: bool) -> None:
    base = TrainConfig(mask=MaskConfig(strength=0.3), output=OutputConfig(enabled=both))
    settings = {"mask.operator": operator, "optim.lr": 0.2}
    masked, twin = apply(base, settings), apply(base, random_twin(base, settings))
    assert (arm_of(masked), arm_of(twin)) == (MASK, RANDOM)
    assert twin.mask == replace(masked.mask, operator="random", random_like=operator)  # type: ignore[arg-type]
    if both:
        assert twin.output == replace(masked.output, operator="random", random_like="log")
    assert twin.optim == masked.optim
    assert settings == {"mask.operator": operator, "optim.lr": 0.2}


# ---- what is shipped --------------------------------------------------------------------------------------------


def test_files_are_shipped() -> None:
    assert {path.stem for path in CONFIGS} >= {"quickstart", "pbt", "pareto", "imagenet1k_resnet50"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_parses_and_says_what_it_is(path: Path) -> None:
    base, sweep, _ = config.parse(["--config", str(path)])
    assert sweep.space
    assert sweep.dir == f"runs/sweep-{path.stem.replace('_', '-')}"
    said = header(path)
    assert said.keys() >= {*FIELDS}
    assert "is ours" in said[""]
    assert f"gmscale sweep --config configs/sweep/{path.name}" in said["command"]
    batch = sweep.workers * base.data.batch_size_per_device * base.optim.grad_accum_steps
    assert f"global batch {batch}" in said["hardware"]


def test_sweeps_of_a_recipe_train_that_recipe() -> None:
    recipe = configuration.load(ROOT / "configs/imagenet1k_resnet50.yaml")
    assert config.parse(["--config", str(ROOT / "configs/sweep/imagenet1k_resnet50.yaml")])[0] == recipe
    quickstart = configuration.load(ROOT / "configs/quickstart.yaml")
    one_worker = replace(quickstart, data=replace(quickstart.data, batch_size_per_device=64))
    for name in ("quickstart", "pbt", "pareto"):
        base, _, _ = config.parse(["--config", str(ROOT / f"configs/sweep/{name}.yaml")])
        assert replace(base, run=one_worker.run) == one_worker
