"""Configuration: files, flags and the API agree, and a mistake in any of them is named."""

import io
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gmscale import GradientMask
from gmscale.config import (
    OptimConfig,
    RunConfig,
    TrainConfig,
    build_parser,
    changed_on_resume,
    from_dict,
    load,
    parse,
)
from gmscale.errors import UsageError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# ---- precedence --------------------------------------------------------------------------------------------------


def test_flags_beat_later_files_beat_earlier_files_beat_defaults(tmp_path: Path) -> None:
    first = write(tmp_path / "first.yaml", "optim: {lr: 1, momentum: 0.1, weight_decay: 0.1}\nrun: {seed: 5}\n")
    later = write(tmp_path / "later.yaml", "optim: {lr: 2, momentum: 0.2}\n")
    config, _ = parse(["--config", first, "--optim.lr", "3", "--config", later, "--optim.lr", "3"])
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (3, 0.2, 0.1)
    assert config.run.seed == 5
    assert config.optim.opt == TrainConfig().optim.opt


def test_nothing_given_is_the_defaults() -> None:
    assert parse([])[0] == from_dict({}) == TrainConfig()


def test_an_empty_section_changes_nothing(tmp_path: Path) -> None:
    assert load(Path(write(tmp_path / "section.yaml", "run: {}\n"))) == TrainConfig()


# ---- unknown keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("optmi: {lr: 1}", "'optim'"),
        ("optim: {lrr: 1}", "'lr'"),
        ("mask: {sigm: 1}", "'sigma'"),
        ("data: {batchsize_per_device: 1}", "'batch_size_per_device'"),
        ("lr: 1", "run, model, finetune, data, augment, optim, mask, output, parallel"),
    ],
)
def test_an_unknown_key_in_a_file_or_mapping_names_the_nearest(tmp_path: Path, text: str, meant: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(UsageError, match=meant) as caught:
        parse(["--config", path])
    assert path in str(caught.value)
    with pytest.raises(UsageError, match=meant):
        from_dict(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["--optim.lrr", "1"], "'--optim.lr'"),
        (["--mask.sigm=1"], "'--mask.sigma'"),
        (["--run.epoch", "3"], "'--run.epochs'"),  # not an abbreviation: argparse would take it for one
        (["--print_config", "--mask.sigm", "1"], "'--mask.sigma'"),
        (["--run", "{epoch: 3}"], "'epochs'"),
        (["configs/quickstart.yaml"], "unexpected argument 'configs/quickstart.yaml'"),
    ],
)
def test_an_unknown_flag_names_the_nearest(argv: list[str], meant: str) -> None:
    with pytest.raises(UsageError, match=meant) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)


def test_an_unknown_keyword_of_the_mask_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'sigm'; did you mean 'sigma'\?"):
        GradientMask(sigm=1.0)  # type: ignore[call-arg]


# ---- wrong values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("run.epochs", "many", "a number"),
        ("run.epochs", "0", r"\(0, 100000\]"),
        ("run.log_every", "2.5", "a whole number"),
        ("run.log_every", "0", r"\[1, inf\)"),
        ("run.seed", "-1", r"\[0, "),
        ("run.deterministic", "perhaps", "true or false"),
        ("run.resume", "maybe", "auto, never"),
        ("run.dir", "", "path of the run directory"),
        ("run.keep_checkpoints", "0", r"\[1, "),
        ("model.drop_rate", "1.5", r"\[0, 1\]"),
        ("model.kwargs", "3", "a mapping"),
        ("data.size", "3", r"\[4, inf\)"),
        ("data.workers", "-1", r"\[0, inf\)"),
        ("augment.crop_scale", "3", "a list"),
        ("augment.crop_scale", "[0.5, 0.6, 0.7]", "2 elements"),
        ("augment.crop_scale", "[0.9, 0.1]", "the smaller number first"),
        ("optim.lr", "nan", "number"),
        ("optim.lr", "0", r"\(0, inf\)"),
        ("optim.amp", "bf61", "bf16"),
        ("optim.grad_accum_steps", "0", r"\[1, inf\)"),
        ("mask.strength", "2", r"\[0, 1\]"),
        ("mask.operator", "poool", "pool"),
        ("mask.sigma", "wide", "a number or null"),
        ("mask.kernel_size", "2.5", "a whole number or null"),
        ("mask.include", "head", "a list"),
        ("parallel.backend", "dpp", "ddp"),
        ("parallel.threads", "-1", r"\[0, inf\)"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_key(flag: str, value: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        parse([f"--{flag}={value}"])
    assert flag in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "<class" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("run", "epochs", "many"), ("optim", "lr", -1), ("mask", "strength", 2), ("data", "size", [1])],
)
def test_a_wrong_value_in_a_mapping_names_its_key(section: str, name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{section}.{name}"):
        from_dict({section: {name: value}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: [1, 2]", "section run"),
        ("# only a comment", "holds nothing; expected sections"),
        ("run:", "section run"),
        ("run: {arm: 1e-3}", "in quotes"),
        ("just text", "expected sections"),
        ("run: {epochs: 3", "not valid YAML"),
        ("run: {epochs: many}", "run.epochs"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        parse(["--config", write(tmp_path / "c.yaml", text)])
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "resnet.yaml", "")
    with pytest.raises(UsageError, match=r"resnte.yaml: No such file.*did you mean .*resnet.yaml"):
        parse(["--config", str(tmp_path / "resnte.yaml")])


# ---- there and back ----------------------------------------------------------------------------------------------

labels = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20) | st.sampled_from(
    ["no", "null", "1e5", "-1e-3", "1.e3", "1_0", "~", "a: b", "# x", "'", '"', "- 1", "{}", "[x", "0x1", "no mask"]
)


@settings(max_examples=15, deadline=None)
@given(
    arm=labels,
    epochs=st.floats(1e-9, 1e5),
    lr=st.floats(1e-30, 1e30),
    low=st.floats(0.01, 0.5),
    include=st.lists(labels, max_size=3),
    kwargs=st.dictionaries(st.sampled_from("abc"), st.integers() | st.booleans() | st.just("relu"), max_size=2),
    sigma=st.none() | st.floats(0.1, 100),
)
def test_yaml_of_a_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    arm: str,
    epochs: float,
    lr: float,
    low: float,
    include: list[str],
    kwargs: dict,
    sigma: float | None,
) -> None:
    config = TrainConfig()
    config = replace(
        config,
        run=replace(config.run, arm=arm, epochs=epochs, resume="never"),
        model=replace(config.model, kwargs=kwargs),
        augment=replace(config.augment, crop_scale=(low, 0.9)),
        optim=replace(config.optim, lr=lr),
        mask=replace(config.mask, operator="log", sigma=sigma, include=tuple(include), enabled=False),
    )
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(config.to_yaml())
    assert load(path) == config
    assert from_dict(yaml.safe_load(config.to_yaml())) == config
    assert changed_on_resume(yaml.safe_load(config.to_yaml()), config) == []


def test_print_config_can_be_read_again(tmp_path: Path) -> None:
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        parse(["--optim.lr", "0.25", "--mask.include", "[head*]", "--print_config"])
    assert not ended.value.code
    config = load(Path(write(tmp_path / "c.yaml", printed.getvalue())))
    assert config.optim.lr == 0.25
    assert config.mask.include == ("head*",)


# ---- what is shipped ---------------------------------------------------------------------------------------------


def test_help_explains_every_field() -> None:
    explained = {action.dest: action.help for action in build_parser("gmscale train")._actions}
    for section in fields(TrainConfig):
        for field in fields(getattr(TrainConfig(), section.name)):
            assert len((explained[f"{section.name}.{field.name}"] or "").split()) > 1, (
                f"{section.name}.{field.name}"
            )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_file_parses(path: Path) -> None:
    assert isinstance(load(path), TrainConfig)


def test_files_are_shipped() -> None:
    assert CONFIGS


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 0.2), ("sqrt", 0.1 * 2**0.5)])
def test_the_learning_rate_follows_the_global_batch(scaling: Literal["linear", "sqrt"], expected: float) -> None:
    optim = OptimConfig(lr=0.1, lr_batch_size=512, lr_scaling=scaling)
    assert optim.for_batch(1024).lr == pytest.approx(expected)
    assert optim.for_batch(512).lr == 0.1
    assert OptimConfig(lr=0.1).for_batch(1024).lr == 0.1
    assert optim.for_batch(1024).for_batch(1024).lr == pytest.approx(expected)  # scaled once


def test_a_run_of_before_a_field_existed_resumes_with_its_default() -> None:
    saved = yaml.safe_load(TrainConfig().to_yaml())
    del saved["optim"]["loss"], saved["finetune"]
    assert changed_on_resume(saved, TrainConfig()) == []
    now = TrainConfig(optim=OptimConfig(loss="bce"))
    assert changed_on_resume(saved, now) == [("optim.loss", "ce", "bce")]


def test_what_training_follows_may_not_change_on_resume() -> None:
    saved = yaml.safe_load(TrainConfig().to_yaml())
    often = RunConfig(eval_every_epochs=0.5)
    assert changed_on_resume(saved, TrainConfig(run=often)) == []
    saved["optim"]["sched"] = "plateau"
    followed = TrainConfig(run=often, optim=OptimConfig(sched="plateau"))
    assert changed_on_resume(saved, followed) == [("run.eval_every_epochs", 1.0, 0.5)]


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("optim", {"clip_mode": "agc"}, "optim.clip_mode is 'agc', but nothing is clipped"),
        ("optim", {"lr_scaling": "sqrt"}, "optim.lr_scaling is 'sqrt'"),
        ("model", {"ema_warmup": True}, "model.ema_warmup is true, but there is no average"),
        ("model", {"ema_decay": 1.0}, "model.ema_decay is 1"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(section: str, values: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        from_dict({section: values})
