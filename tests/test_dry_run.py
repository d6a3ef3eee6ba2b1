"""The dry run: it says what a real run then does, finds its mistakes, and leaves no trace."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from rich.console import Console

from gmscale import build, checkpoint, cli, costs, dry_run
from gmscale.config import TrainConfig
from gmscale.dry_run import Options, table
from gmscale.dry_run.made import MadeBatches, MadeValidation
from gmscale.errors import UsageError
from gmscale.parallel import World

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from ranks import run_ranks

LINK = costs.Link(1e9, 1e-5)


def options(**given: Any) -> Options:
    base: dict[str, Any] = {"samples": None, "classes": None, "val_samples": 0, "devices": None, "json": None}
    return Options(**(base | {"link": LINK} | given))


def rehearse(config: TrainConfig, world: World = tiny.ALONE, **given: Any) -> dict[str, Any]:
    try:
        return dry_run.dry_run(config, options(**given), world)
    finally:
        torch.use_deterministic_algorithms(False)  # of the whole process: other tests live here too


@pytest.fixture(scope="module")
def found(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dry run of what `finished_run` trained, elsewhere."""
    elsewhere = tmp_path_factory.mktemp("dry") / "run"
    found = rehearse(tiny.config(cache, elsewhere, **tiny.EVERYTHING), devices=3)
    assert not elsewhere.exists()
    return found


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- what it says is what the run does --------------------------------------------------------------------------


def test_it_counts_the_steps_that_the_run_takes(found: dict[str, Any], finished_run: Path) -> None:
    assert found["steps"]["total"] == json.loads((finished_run / "summary.json").read_text())["steps"]
    assert found["batch"] == {"global": 16, "ranks": 1, "per_device": 16, "grad_accum_steps": 1}


def test_it_names_what_the_mask_touches(found: dict[str, Any], finished_run: Path) -> None:
    touched = json.loads((finished_run / "touched.json").read_text())["mask"]
    assert found["masks"]["mask"]["touched"] == [t["name"] for t in touched["touched"]]
    assert found["masks"]["mask"]["passed"] == touched["passed"]
    assert found["masks"]["mask"]["entries"] == sum(t["entries"] for t in touched["touched"])
    assert 0 < found["masks"]["mask"]["kept_entries"] < 1
    assert 0 < found["masks"]["mask"]["hook_share"] < 1


def test_a_checkpoint_is_as_large_as_it_said(cache: Path, tmp_path: Path, finished_run: Path) -> None:
    said = rehearse(tiny.config(cache, tmp_path / "run", **tiny.EVERYTHING))["checkpoint"]["mb"]
    newest = checkpoint.latest(finished_run)
    assert newest is not None
    # headers of the files and state.json come on top: a larger share of a tiny checkpoint than of any real one
    size = sum(file.stat().st_size for file in newest.iterdir()) / 2**20
    assert said == pytest.approx(size, rel=0.15)
    assert said < size


def test_each_device_adds_what_its_mask_holds_back(found: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    one = rehearse(tiny.config(cache, tmp_path / "run", **tiny.EVERYTHING), devices=1)["checkpoint"]
    held = 4 * found["masks"]["mask"]["entries"] / 2**20
    assert found["checkpoint"]["mb"] - one["mb"] == pytest.approx(2 * held)


def test_memory_is_told_apart(found: dict[str, Any]) -> None:
    parts, whole = found["memory"]["parts_mb"], 4 * found["model"]["parameters"] / 2**20
    assert parts["gradients"] == pytest.approx(whole)
    assert parts["optimizer"] == pytest.approx(whole)  # momentum
    assert whole < parts["weights"] < 1.2 * whole  # and statistics
    assert parts["average"] == pytest.approx(parts["weights"])
    assert parts["error feedback"] == pytest.approx(4 * found["masks"]["mask"]["entries"] / 2**20)


def test_the_estimate_is_that_of_the_cost_model(found: dict[str, Any]) -> None:
    said = found["estimate"]
    # 100 images in global batches of 3 x 16; evaluated after each epoch and at the end, twice for the average
    assert (said["steps_per_epoch"], said["steps"]) == (2, 3)
    assert said["eval_images"] == 2 * 2 * tiny.VALIDATION_SIZE
    assert said["saves"] == 2
    measured = costs.Measured(
        devices=1,
        step_s=found["step_ms"] / 1e3,
        first_step_s=found["first_step_ms"] / 1e3,
        grad_accum_steps=1,
        traffic={name: costs.Traffic(**seen) for name, seen in found["expected_collectives"].items()},
        eval_images_per_s=found["eval_images_per_s"],
        save_s=found["checkpoint"]["copy_s"],
    )
    again = costs.estimate(measured, costs.Recipe(steps=3, eval_images=100, saves=2), 3, LINK)
    assert said["total_s"] == pytest.approx(again.total_s)


def test_a_mask_with_a_schedule_is_measured_where_it_is_strongest(cache: Path, tmp_path: Path) -> None:
    late = {"start": 0.5, "end": 0.9}
    found = rehearse(tiny.config(cache, tmp_path / "run", run={"epochs": 10.0}, mask=late, optim={"amp": "bf16"}))
    assert found["masks"]["mask"]["strength"] == tiny.config(cache, tmp_path, mask=late).mask.peak_strength


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"augment": {"mixup": 0.2, "cutmix": 1.0, "erase_prob": 1.0}, "optim": {"grad_accum_steps": 2}},
        {"data": {"decode": "fast"}},
    ],
)
def test_made_batches_are_like_the_loaders(cache: Path, tmp_path: Path, sections: tiny.Sections) -> None:
    config = tiny.config(cache, tmp_path / "run", **sections)
    loader, validation = build.loaders(config, tiny.ALONE)
    real, made = next(loader.epoch(0)), MadeBatches(config, 0, 10).step()
    assert len(real) == len(made)
    for a, b in zip(leaves(real), leaves(made), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    for a, b in zip(next(iter(validation)), next(iter(MadeValidation(config.data, 10))), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def leaves(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from leaves(part)


# ---- several ranks ----------------------------------------------------------------------------------------------


def rehearse_rank(rank: int, cache: Path, run_dir: Path, sections: tiny.Sections) -> dict[str, Any]:
    world = World(rank, rank, 2, torch.device("cpu"), "ddp", dist.group.WORLD)
    return rehearse(tiny.config(cache, run_dir, **sections), world)


def test_bytes_are_counted_where_they_are_handed_to_collectives(cache: Path, tmp_path: Path) -> None:
    sections: tiny.Sections = {
        "mask": {"agreement": "consensus"},
        "parallel": {"batch_norm": "reduce", "threads": 1},
    }
    first, second = run_ranks(rehearse_rank, 2, tmp_path, cache, tmp_path / "run", sections)
    mask = first["masks"]["mask"]
    counted = sum(seen["bytes"] for seen in first["collectives"].values())
    assert mask["wire_bytes"] <= counted < mask["dense_bytes"]
    assert mask["dense_bytes"] == 4 * first["model"]["trained"]
    assert first["batch"]["global"] == 32
    for name in ("step_ms", "first_step_ms", "eval_images_per_s", "checkpoint"):  # the slowest rank's, on both
        assert first[name] == second[name]
    assert not (tmp_path / "run").exists()


# ---- no trace, and the run's own mistakes -----------------------------------------------------------------------


def test_a_directory_that_holds_a_run_is_left_as_it_is(cache: Path, finished_run: Path) -> None:
    before = contents(finished_run)
    found = rehearse(tiny.config(cache, finished_run, **tiny.EVERYTHING))
    assert contents(finished_run) == before
    assert any("finished" in note for note in found["notes"])


def test_without_data_none_is_opened(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    found = rehearse(tiny.config(nowhere, tmp_path / "run"), samples=1000, classes=7, val_samples=50)
    assert not nowhere.exists()
    assert found["model"]["classes"] == 7
    assert found["steps"]["per_epoch"] == 1000 // 16
    assert found["estimate"]["eval_images"] == 50


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"mask": {"include": ["nothing.*"]}}, "nothing"),
        ({"model": {"name": "test_byobent"}}, "did you mean"),
        ({"data": {"batch_size_per_device": 512}}, "batch_size_per_device is too large"),
        ({"mask": {"enabled": False}, "run": {"probe_every": 5}}, "probe_every"),
        ({"data": {"batch_size_per_device": 15}, "augment": {"mixup": 0.1}}, "even number"),
    ],
)
def test_it_finds_the_mistakes_of_a_run(cache: Path, tmp_path: Path, sections: tiny.Sections, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        rehearse(tiny.config(cache, tmp_path / "run", **sections))


def test_devices_that_take_more_samples_than_there_are_are_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--devices is 8: one step would take 128 samples, .* has 100"):
        rehearse(tiny.config(cache, tmp_path / "run"), devices=8)


def test_it_refuses_the_directory_of_another_run(cache: Path, finished_run: Path) -> None:
    with pytest.raises(UsageError, match="other settings"):
        rehearse(tiny.config(cache, finished_run, optim={"lr": 3.0}))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--devices", "4"], "add --dry_run"),
        (["--dry_run", "--samples", "10"], "--classes go together"),
        (["--dry_run", "--devices", "0"], "--devices is 0"),
        (["--dry_run", "--val_samples", "5"], "goes with --samples"),
        (["--dry_run", "--link_gb_per_s", "0"], "--link_gb_per_s is 0"),
        (["--dry_run", "--json", "nowhere/x.json"], "--json nowhere/x.json"),
        (["--dryrun"], "did you mean '--dry_run'"),
    ],
)
def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *flags])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert said in error


# ---- the table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setattr(table, "plain_console", lambda: Console(width=width))
    table.print_found(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for word in ("global batch", "peak memory", "collectives", "hours on 3 devices"):
        assert any(word in line for line in lines)


def test_the_command_prints_and_writes_the_numbers(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = tiny.flags(cache, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *flags, "--dry_run", "--json", str(tmp_path / "found.json")])
    torch.use_deterministic_algorithms(False)
    assert ended.value.code == 0
    assert "test_byobnet" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["model"]["name"] == "test_byobnet"
