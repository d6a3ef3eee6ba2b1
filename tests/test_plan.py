"""gmscale plan: numbers of the cost model, bytes that were counted, and mistakes in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
from rich.console import Console

from gmscale import cli, costs, plan
from gmscale import config as configuration
from gmscale.plan import from_run, known, options, table
from gmscale.plan.known import Known, Mode
from gmscale.plan.options import Options

NETWORK = costs.Cluster(devices_per_node=4, between=costs.Link(1e9, 1e-3), inside=costs.Link(1e10, 0.0))


def opts(**given: Any) -> Options:
    base: dict[str, Any] = {
        "nodes": [1, 2, 8],
        "cluster": NETWORK,
        "intra_gb_per_s": 10.0,
        **dict.fromkeys(("step_s", "run", "modes", "kept", "data", "json")),
    }
    return Options(**(base | given))


def known_of(*modes: Mode, **given: Any) -> Known:
    base: dict[str, Any] = {
        "model": "m",
        "measured": "somewhere",
        "devices": 4,
        "images_per_device": 10,
        "grad_accum_steps": 1,
        "samples": 1000,
        "epochs": 2.0,
        "notes": [],
    }
    return Known(modes=list(modes), **(base | given))


PLAIN = Mode(
    name="plain", step_s=0.3, traffic={"allreduce": costs.Traffic(1, 1e8)}, awaited=costs.NOTHING, kept=None
)


# ---- the model --------------------------------------------------------------------------------------------------


def test_a_plan_worked_out_by_hand() -> None:
    one, two, eight = plan.predict(known_of(PLAIN), opts())["modes"]["plain"]["nodes"]
    # one bucket hides behind nothing. Inside a node: 2 x 3/4 x 0.1 GB at 10 GB/s, and part of the measured step
    assert one["step_ms"] == pytest.approx(300)
    assert one["exposed_ms"] == pytest.approx(15)
    # 8 devices on 2 nodes: 2 x 7/8 x 0.1 GB at 1 GB/s, and 2 x 7 hops of which a quarter cross with 1 ms
    assert two["exposed_ms"] == pytest.approx(175 + 3.5)
    assert two["step_ms"] == pytest.approx(300 + 178.5 - 15)
    assert two["efficiency"] == pytest.approx(300 / 463.5)
    assert two["images_per_s"] == pytest.approx(80 / 0.4635)
    assert (two["global_batch"], two["steps"]) == (80, 2 * 12)
    assert two["hours"] == pytest.approx(24 * 0.4635 / 3600)
    assert eight["exposed_ms"] == pytest.approx(2 * 31 / 32 * 100 + 2 * 31 * 0.25)


def test_efficiency_is_of_one_node_even_if_that_is_not_asked_for() -> None:
    (row,) = plan.predict(known_of(PLAIN), opts(nodes=[2]))["modes"]["plain"]["nodes"]
    assert row["efficiency"] == pytest.approx(300 / 463.5)


def test_a_step_of_all_the_samples_leaves_no_hours_to_tell() -> None:
    rows = plan.predict(known_of(PLAIN, samples=100), opts())["modes"]["plain"]["nodes"]
    assert [row["hours"] is None for row in rows] == [False, False, True]


def test_what_consensus_waits_for_always_shows() -> None:
    free = replace(PLAIN, name="free", traffic={"allreduce": costs.Traffic(8, 4e7)})
    held = replace(free, name="held", awaited=costs.Traffic(4, 1e7))
    found = plan.predict(known_of(free, held), opts(nodes=[2]))["modes"]
    # 40 MB in eight equal reductions: the last shows; or 10 MB of maps and the last of four of 7.5 MB
    ring, hops = 1.75e-9, 3.5e-3
    assert found["free"]["nodes"][0]["exposed_ms"] == pytest.approx(1e3 * (ring * 5e6 + hops))
    assert found["held"]["nodes"][0]["exposed_ms"] == pytest.approx(1e3 * (ring * (1e7 + 7.5e6) + 5 * hops))


# ---- modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", known.MODES)
def test_a_mode_changes_how_gradients_are_reduced_and_nothing_else(mode: str, tmp_path: Path) -> None:
    given = tiny.config(tmp_path, tmp_path, mask={"strength": 0.25, "kappa": 1.5}, parallel={"comm_hook": "fp16"})
    changed = known.config_of(mode, given)
    agreement, hook = known.MODES[mode]
    assert changed.mask.enabled == (agreement is not None)
    assert changed.parallel.comm_hook == hook
    if agreement is not None:
        assert changed.mask.agreement == agreement
        assert changed.mask.kappa == 1.5
        assert changed.mask.peak_strength == (0.25 if agreement == "local" else 1.0)
    back = replace(changed, mask=given.mask, parallel=given.parallel)
    assert back == given


def test_a_share_that_is_given_replaces_the_counted_one() -> None:
    mode = replace(
        PLAIN, kept=0.5, traffic={"allreduce": costs.Traffic(2, 1000.0), "broadcast": costs.Traffic(1, 7)}
    )
    changed = known.with_kept(mode, 0.25, 400, 2)
    assert changed.traffic == {"allreduce": costs.Traffic(2, 800.0), "broadcast": costs.Traffic(1, 7)}
    assert changed.kept == 0.25


# ---- measured here ----------------------------------------------------------------------------------------------


def bytes_of(found: dict[str, Any]) -> dict[str, float]:
    return {name: mode["collectives"]["allreduce"]["bytes"] for name, mode in found["modes"].items()}


def test_bytes_are_counted_between_processes_and_nothing_is_written(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run_dir = tmp_path / "plan.json", tmp_path / "run"
    flags = tiny.flags(cache, run_dir, parallel={"threads": 1, "batch_norm": "reduce"})
    given = ["--step_ms", "100", "--modes", "plain", "consensus+bf16", "--devices_per_node", "1"]
    assert plan.main([*flags, *given, "--nodes", "1", "4", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    counted, agreed = bytes_of(found), found["modes"]["consensus+bf16"]
    trained = sum(p.numel() for p in timm.create_model("test_byobnet", num_classes=10).parameters())
    assert counted["plain"] == 4 * trained
    assert 0.15 * counted["plain"] < counted["consensus+bf16"] < 0.5 * counted["plain"]
    assert agreed["of_lateral_maps"]["bytes"] < counted["consensus+bf16"] / 2
    assert 0 < agreed["kept_entries"] < 1
    for mode in found["modes"].values():
        assert mode["nodes"][0]["step_ms"] == 100  # the given one, on one device that talks to nobody
        assert mode["nodes"][1]["step_ms"] > 100
    assert not run_dir.exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "counted on made-up images" in said
    assert "the given step holds for every mode" in said


@pytest.mark.slow
def test_a_step_is_measured_where_none_is_given(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    flags = [*tiny.flags(cache, tmp_path / "run"), "--modes", "plain", "local", "--nodes", "1", "2"]
    assert plan.main([*flags, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["devices_measured"] == 1
    plain, local = (found["modes"][name]["measured_step_ms"] for name in ("plain", "local"))
    assert 0.2 < local / plain < 5  # a busy machine


@pytest.mark.slow
def test_fsdp2_has_one_mode_of_its_own(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    flags = tiny.flags(cache, tmp_path / "run", parallel={"backend": "fsdp2", "threads": 1})
    assert plan.main([*flags, "--step_ms", "50", "--nodes", "2", "--json", str(out)]) == 0
    ((name, mode),) = json.loads(out.read_text())["modes"].items()
    assert name == "fsdp2"
    assert {"allgather_base", "reduce_scatter_base"} & {n.removeprefix("_") for n in mode["collectives"]}


# ---- from a run -------------------------------------------------------------------------------------------------


def a_run(folder: Path, agreement: str = "local", **changed: Any) -> Path:
    """The records that a run of ddp leaves, with round numbers."""
    folder.mkdir()
    config = tiny.config(folder, folder, run={"epochs": 3.0}, mask={"agreement": agreement})
    (folder / "config.yaml").write_text(config.to_yaml())
    described = {"world_size": 4, "device": "GPU", "backend": "ddp", "world_sizes": [[0, 4]]}
    (folder / "environment.json").write_text(json.dumps(described | changed))
    touched = [{"name": "w", "entries": 2_000_000, "map": [500, 100]}]
    (folder / "touched.json").write_text(json.dumps({"mask": {"touched": touched}}))
    (folder / "data.json").write_text(json.dumps({"classes": ["a"], "training_samples": 6400}))
    record = {
        "phase": "train",
        "strength": 1.0,
        "step_ms": 200.0,
        "hook_ms": 10.0,
        "kept_entries": 0.5,
        "dense_bytes": 1e7,
    }
    record |= {"wire_bytes": 1e7 if agreement == "local" else 6.2e6}
    lines = [
        record | {"step_ms": 9000.0},
        {"phase": "validation", "top1": 1.0},
        record,
        record | {"step_ms": 210.0},
    ]
    lines.append(record | {"step_ms": 190.0})
    lines.append(record | {"strength": 0.0, "wire_bytes": 1e7, "step_ms": 100.0})  # switched off for the end
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_tells_its_step_and_its_bytes(tmp_path: Path) -> None:
    found = from_run.known_from(a_run(tmp_path / "run"), opts())
    assert (found.devices, found.images_per_device, found.samples, found.epochs) == (4, 16, 6400, 3.0)
    modes = {mode.name: mode for mode in found.modes}
    assert list(modes) == ["plain", "local", "local+bf16"]  # of consensus this run tells nothing
    assert modes["local"].step_s == pytest.approx(0.2)  # the median, without the first
    assert modes["plain"].step_s == pytest.approx(0.19)
    assert modes["local"].traffic == {"allreduce": costs.Traffic(1, 1e7)}
    assert modes["local+bf16"].traffic == {"allreduce": costs.Traffic(1, 5e6)}
    assert any("consensus is left out" in note for note in found.notes)


def test_with_a_share_a_run_tells_of_consensus_too(tmp_path: Path) -> None:
    found = from_run.known_from(a_run(tmp_path / "run"), opts(kept=0.5, modes=["consensus", "consensus+bf16"]))
    full, half = found.modes
    # 10 MB less half of 2 million entries, and 50,000 units of the maps
    assert full.traffic["allreduce"] == costs.Traffic(2, 1e7 - 4e6 + 2e5)
    assert full.awaited == costs.Traffic(1, 2e5)
    assert half.traffic["allreduce"].bytes == full.traffic["allreduce"].bytes / 2


def test_a_run_of_consensus_tells_what_it_sent(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", "consensus")
    sent = {mode.name: mode.traffic["allreduce"].bytes for mode in from_run.known_from(run, opts()).modes}
    assert sent == {"plain": 1e7, "local": 1e7, "local+bf16": 5e6, "consensus": 6.2e6, "consensus+bf16": 3.1e6}
    (other,) = from_run.known_from(run, opts(modes=["consensus"], kept=0.25)).modes
    assert other.traffic["allreduce"].bytes == 6.2e6 - 0.25 * 8e6


def test_the_command_plans_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert plan.main(["--from", str(run), "--devices_per_node", "4", "--nodes", "1", "2"]) == 0
    assert "4 x GPU" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def lose(run: Path, name: str) -> None:
    (run / name).unlink()


def forget_bytes(run: Path, name: str) -> None:
    (run / name).write_text('{"phase": "train", "step_ms": 212.5}\n')


def overwrite(run: Path, name: str) -> None:
    (run / name).write_text("}{")


@pytest.mark.parametrize(
    ("spoil", "name", "flags", "said"),
    [
        (lose, "config.yaml", [], "there is no config.yaml; expected a run directory"),
        (lose, "metrics.jsonl", [], "there is no metrics.jsonl"),
        (overwrite, "metrics.jsonl", [], "metrics.jsonl has lines that no run writes"),
        (overwrite, "environment.json", [], "environment.json is not JSON"),
        (forget_bytes, "metrics.jsonl", [], "--step_ms 212.5"),
        (None, "", ["--modes", "consensus"], "say with --kept"),
        (None, "", ["--devices_per_node", "3"], "--devices_per_node is 3, and the run"),
        (None, "", ["--optim.lr", "0.3"], "leave out --config"),
        (None, "", ["--step_ms", "3"], "--step_ms is what --from takes"),
    ],
)
def test_a_run_that_tells_too_little_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, name: str, flags: list[str], said: str
) -> None:
    run = a_run(tmp_path / "run")
    if spoil is not None:
        spoil(run, name)
    assert_refused(["--from", str(run), *flags], said, capsys)


def test_a_run_that_changed_its_processes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run", world_sizes=[[0, 4], [100, 2]])
    assert_refused(["--from", str(run)], "changed its number of processes", capsys)


# ---- mistakes ---------------------------------------------------------------------------------------------------


def assert_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *flags])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1), error
    assert said in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nodes", "0"], "--nodes is 0"),
        (["--nodes", "many"], "nodes"),
        (["--devices_per_node", "0"], "--devices_per_node is 0"),
        (["--link_gb_per_s", "0"], "--link_gb_per_s is 0"),
        (["--intra_gb_per_s", "-1"], "--intra_gb_per_s is -1"),
        (["--latency_us", "nan"], "latency_us is 'nan'"),
        (["--step_ms", "0"], "--step_ms is 0"),
        (["--kept", "1.5"], "--kept is 1.5"),
        (["--kept", "0.5", "--modes", "plain"], "not among --modes"),
        (["--modes", "concensus"], "did you mean 'consensus'"),
        (["--samples", "10"], "--classes go together"),
        (["--parallel.backend", "fsdp2", "--modes", "plain"], "--modes is for ddp"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json"),
        (["--from", "nowhere"], "--from nowhere: there is no config.yaml"),
        (["--node", "3"], "did you mean '--nodes'"),
    ],
)
def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert_refused(flags, said, capsys)


def test_under_a_launcher_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused([], "starts its own processes", capsys)


def test_what_is_not_given_has_a_default() -> None:
    parser = configuration.build_parser("gmscale plan")
    options.add_options(parser)
    config, given = configuration.parse([], "gmscale plan", parser)
    found = options.options_of(given, config)
    assert found.nodes == [1, 2, 4, 8, 16]
    assert found.cluster.between == costs.Link(12.5e9, 1e-5)


# ---- the table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setattr(table, "plain_console", lambda: Console(width=width))
    modes = [replace(PLAIN, name=name) for name in known.MODES]
    table.show(plan.predict(known_of(*modes, samples=5), opts()))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for word in ("consensus+bf16", "1 GB/s", "scales", "last one always shows"):
        assert any(word in line for line in lines), word
