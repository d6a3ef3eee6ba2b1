"""The command line: for a mistake one line and status 2, and nothing written."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from gmscale import cli
from gmscale.data.config import without_secrets
from gmscale.errors import RunError

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gmscale(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the command line in this process; return (status, stdout, stderr)."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main replaces it

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        status = ended.value.code
        return status if isinstance(status, int) else 0, *capsys.readouterr()

    return call


@pytest.fixture
def shards(cache: Path, tmp_path: Path) -> Path:
    """A copy of the shards, to be damaged."""
    return shutil.copytree(tiny.build(cache), tmp_path / "shards")


def assert_refused(answer: tuple[int, str, str], said: str) -> None:
    status, out, err = answer
    assert (status, out) == (2, "")
    assert err.startswith("gmscale: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert said in err


# ---- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "did you mean 'train'"),
        (["--foo"], "unknown command '--foo'"),
        (["report"], "required: runs"),
        (["report", "nowhere"], "nowhere"),
        (["train", "--optim.lrr", "1"], "did you mean '--optim.lr'"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["train", "--config"], "expected one argument"),
        (["compare", "--sedes", "3"], "did you mean '--seeds'"),
        (["compare", "--seeds", "two"], "seeds is 'two'; expected a whole number"),
    ],
)
def test_a_wrong_command_line_is_one_line(gmscale: Call, argv: list[str], said: str) -> None:
    assert_refused(gmscale(*argv), said)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("run.epochs", "0", "run.epochs is 0"),
        ("run.seed", "-1", "run.seed is -1"),
        ("model.name", "resnet5", "did you mean 'resnet50'"),
        ("model.name", "inception_v3", "cannot take images of data.image_size 32"),
        ("model.kwargs", '{"wdith": 2}', "wdith"),
        ("model.checkpoint", "weights.pth", "no such file or run directory"),
        ("model.checkpoint", "nowhere.safetensors", "no such file"),
        ("optim.opt", "sdg", "did you mean 'sgd'"),
        ("optim.opt_kwargs", '{"lrr": 2}', "lrr"),
        ("optim.sched", "cosin", "did you mean 'cosine'"),
        ("optim.warmup_epochs", "2", "optim.warmup_epochs is 2; expected at most run.epochs 1"),
        ("mask.strength", "1.5", "mask.strength is 1.5"),
        ("mask.include", '["nothing*"]', "mask.include nothing* matches no parameter"),
        ("mask.exclude", '["*"]', "the mask touches nothing"),
        ("mask.site", "ddp", "needs a model wrapped in torch's DistributedDataParallel"),
        ("parallel.backend", "ddp", "start with torchrun"),
        ("data.source", "nowhere", "nowhere is not a directory"),
        ("data.train_split", "trian", "did you mean 'train'"),
        ("data.batch_size_per_device", "1000", "the training split has 100"),
        ("augment.auto_augment", "rnad", "'rnad'"),
    ],
)
def test_a_wrong_setting_is_one_line_and_writes_nothing(
    gmscale: Call, cache: Path, tmp_path: Path, flag: str, value: str, said: str
) -> None:
    run_dir = tmp_path / "run"
    assert_refused(gmscale("train", *tiny.flags(cache, run_dir), f"--{flag}={value}"), said)
    assert not run_dir.exists()


def test_a_wrong_key_in_a_file_names_the_file(gmscale: Call, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("mask: {sigm: 1}")
    assert_refused(gmscale("train", "--config", str(path)), f"{path}: section mask has no field 'sigm'")


def _empty_directory(shards: Path) -> str:
    for file in shards.iterdir():
        file.unlink()
    return "_info.json is missing"


def _missing_shard(shards: Path) -> str:
    (shards / "gmscale-train-0000.tar").unlink()
    return "gmscale-train-0000.tar: there is no such file"


def _empty_shard(shards: Path) -> str:
    (shards / "gmscale-train-0000.tar").write_bytes(b"")
    return "gmscale-train-0000.tar: 0 bytes"


def _truncated_shard(shards: Path) -> str:
    path = shards / "gmscale-validation-0000.tar"
    path.write_bytes(path.read_bytes()[:9000])
    return "gmscale-validation-0000.tar: ends at byte 9216, after '0000002.cls', without the two blocks of zeros"


@pytest.mark.parametrize("damage", [_empty_directory, _missing_shard, _empty_shard, _truncated_shard])
def test_damaged_shards_are_one_line(
    gmscale: Call, cache: Path, shards: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    said = damage(shards)
    flags = tiny.flags(cache, tmp_path / "run", data={"source": str(shards)})
    assert_refused(gmscale("train", *flags), said)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_below_a_file_is_refused(gmscale: Call, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file" / "run", tmp_path / "file"):
        assert_refused(gmscale("train", *tiny.flags(cache, run_dir)), f"{tmp_path / 'file'} is not a directory")


def test_a_directory_of_another_run_is_refused(gmscale: Call, cache: Path, finished_run: Path) -> None:
    flags = tiny.flags(cache, finished_run, **tiny.EVERYTHING)
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    assert_refused(gmscale("train", *flags, "--optim.lr=0.01"), "optim.lr was 0.05 and is 0.01")
    assert_refused(gmscale("train", *flags, "--run.resume=never"), "holds a run")
    assert {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")} == before


def test_a_run_that_has_only_begun_is_not_overwritten_by_another(
    gmscale: Call, cache: Path, finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text((finished_run / "config.yaml").read_text())
    flags = tiny.flags(cache, tmp_path, **tiny.EVERYTHING)
    assert_refused(gmscale("train", *flags, "--optim.lr=0.01"), "optim.lr was 0.05 and is 0.01")
    (tmp_path / "config.yaml").rename(tmp_path / "summary.json")
    assert_refused(gmscale("train", *flags), "summary.json without config.yaml")


def test_a_damaged_checkpoint_is_one_line(gmscale: Call, cache: Path, finished_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    (run_dir / "summary.json").unlink()
    newest = max((run_dir / "checkpoints").iterdir())
    (newest / "optimizer.safetensors").write_bytes(b"")
    flags = tiny.flags(cache, run_dir, **tiny.EVERYTHING)
    answer = gmscale("train", *flags)
    assert_refused(answer, f"{newest}/optimizer.safetensors cannot be read")
    assert f"remove {newest} to resume from an older one" in answer[2]
    shutil.rmtree(newest)
    status, out, _ = gmscale("train", *flags)
    assert status == 0
    assert "top1" in out


# ---- what works -------------------------------------------------------------------------------------------------


def test_train_says_what_it_does(gmscale: Call, cache: Path, tmp_path: Path) -> None:
    flags = tiny.flags(cache, tmp_path / "run", run={"epochs": 0.5})
    status, out, err = gmscale("train", *flags)
    assert (status, err) == (0, "")
    train, validation = out.splitlines()[-2:]
    for words in ("pool 0.5", "epoch 0.50/0.5", "loss", "top1", "images/s", "hook", "% of step", "kept", "ETA"):
        assert words in train
    assert "validation: loss" in validation
    assert "(25 images)" in validation
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
    status, out, err = gmscale("train", *flags)
    assert (status, err) == (0, "")
    assert "finished already" in out


def test_help_and_version_and_the_resolved_configuration(gmscale: Call) -> None:
    status, out, _ = gmscale("--help")
    assert status == 0
    assert all(command in out for command in ("train", "compare", "report", "bench", "doctor", "75"))
    assert gmscale()[0] == 2
    assert gmscale("--version")[1].startswith("gmscale ")
    for command in ("train", "compare"):
        status, out, _ = gmscale(command, "--help")
        assert status == 0
        assert "--mask.sigma" in out
    status, out, _ = gmscale("train", "--mask.sigma=2", "--mask.operator=log", "--print_config")
    assert status == 0
    assert "  sigma: 2.0\n" in out


def test_a_failed_run_has_status_1_and_a_bug_shows_its_traceback(
    gmscale: Call, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_with(error: Exception) -> tuple[int, str, str]:
        def fail() -> None:
            raise error

        with monkeypatch.context() as patch:
            tiny.after_step(1, fail, patch)
            return gmscale("train", *tiny.flags(cache, tmp_path / type(error).__name__))

    assert fail_with(RunError("the disk is gone"))[::2] == (1, "gmscale: error: the disk is gone\n")
    status, _, err = fail_with(ZeroDivisionError("a bug"))
    assert status == 1
    assert "Traceback" in err
    assert "a bug" in err


def test_a_warning_is_one_line(gmscale: Call, cache: Path, tmp_path: Path) -> None:
    flags = tiny.flags(cache, tmp_path / "run", run={"epochs": 0.17}, mask={"sigma": 2.0})
    status, _, err = gmscale("train", *flags)
    assert status == 0
    assert err.startswith("gmscale: warning: mask.sigma has no effect with operator 'pool'")
    assert err.count("\n") == 1, err
    assert "gmscale.cli" in sys.modules


def test_secrets_of_an_address_are_not_written_down() -> None:
    said = "gmscale train --data.source 'https://me:pass@host/shards?token=abc' --run.dir runs/x"
    assert without_secrets(said) == "gmscale train --data.source 'https://host/shards' --run.dir runs/x"
    assert without_secrets("s3://bucket/shards") == "s3://bucket/shards"
    assert without_secrets("runs/what?") == "runs/what?"
