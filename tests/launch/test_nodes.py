"""Two nodes and a cable: killed, cut, stopped or started wrongly, a run ends as an undisturbed one or says why."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from nodes import Launcher, Nodes, step_of, two_nodes, wait_for

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
from ranks import run_ranks

pytestmark = pytest.mark.slow

SECTIONS: tiny.Sections = {
    "run": {"epochs": 12.0, "log_every": 5, "save_every_steps": 3},
    "data": {"batch_size_per_device": 8},
    "parallel": {"threads": 1, "timeout_s": 8},
}
STEPS = 72
RESTART_S = 15.0  # what may pass between the failure, or the time-out that shows it, and the next start


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with two_nodes(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by two ranks on one host."""
    folder = tmp_path_factory.mktemp("undisturbed")
    launcher = Launcher(folder / "log", ["--nproc_per_node", "2"], tiny.flags(cache, folder / "run", **SECTIONS))
    assert launcher.wait() == 0, launcher.output
    return folder / "run"


def assert_same(undisturbed: Path, run_dir: Path) -> None:
    assert tiny.different(tiny.tensors(undisturbed), tiny.tensors(run_dir)) == []
    assert tiny.untimed(tiny.metrics(undisturbed)) == tiny.untimed(tiny.metrics(run_dir))


def both(nodes: Nodes, argv: list[str], *topology: str, nnodes: str = "2") -> list[Launcher]:
    return [nodes.launch(number, *topology, argv=argv, nnodes=nnodes) for number in (1, 2)]


def at_work(nodes: Nodes, cache: Path, run_dir: Path) -> list[Launcher]:
    """Both launchers, when their ranks have done 15 steps."""
    launchers = both(nodes, tiny.flags(cache, run_dir, **SECTIONS))
    wait_for("step 15", launchers, lambda: step_of(run_dir) >= 15)
    return launchers


def assert_ended(launchers: list[Launcher], status: int, timeout_s: float = 90) -> None:
    for launcher in launchers:
        assert launcher.wait(timeout_s) == status, "\n".join(x.output for x in launchers)


def test_a_killed_worker_costs_a_restart_and_no_bit(
    nodes: Nodes, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    launchers = at_work(nodes, cache, run_dir)
    os.kill(launchers[1].ranks()[1], signal.SIGKILL)
    took = wait_for("the second start", launchers, lambda: "start 2: 2 nodes" in launchers[0].output)
    assert took < RESTART_S
    assert_ended(launchers, 0)
    assert_same(undisturbed, run_dir)
    assert "rank 1 (host n2, process" in launchers[1].output
    assert "was killed by SIGKILL" in launchers[1].output


def test_a_cable_that_is_cut_and_restored_costs_a_restart_and_no_bit(
    nodes: Nodes, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    launchers = at_work(nodes, cache, run_dir)
    nodes.cable("down")
    # gloo gives up after parallel.timeout_s
    timeout_s = SECTIONS["parallel"]["timeout_s"]
    took = wait_for("word of it", launchers[:1], lambda: "start again" in launchers[0].output)
    assert took < timeout_s + RESTART_S
    nodes.cable("up")
    took = wait_for("the second start", launchers, lambda: "start 2: 2 nodes" in launchers[0].output)
    assert took < RESTART_S
    assert_ended(launchers, 0)
    assert_same(undisturbed, run_dir)


def test_a_stop_of_one_launcher_stops_all_after_a_checkpoint_and_the_same_commands_go_on(
    nodes: Nodes, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = tiny.flags(cache, run_dir, **SECTIONS)
    launchers = both(nodes, argv)
    wait_for("step 15", launchers, lambda: step_of(run_dir) >= 15)
    launchers[1].signal(signal.SIGTERM)
    assert_ended(launchers, 75, 30)
    assert f"stopped on request after step {tiny.checkpoint_steps(run_dir)[-1]} of {STEPS}" in launchers[0].output
    launchers = both(nodes, argv)
    assert_ended(launchers, 0)
    assert_same(undisturbed, run_dir)


def test_a_killed_launcher_leaves_no_process_and_can_be_started_again(
    nodes: Nodes, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = tiny.flags(cache, run_dir, **SECTIONS)
    launchers = both(nodes, argv)
    wait_for("step 15", launchers, lambda: step_of(run_dir) >= 15)
    (rank,) = launchers[1].ranks().values()
    launchers[1].signal(signal.SIGKILL)
    gone = time.monotonic() + 4
    while os.path.exists(f"/proc/{rank}") and time.monotonic() < gone:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{rank}")
    again = nodes.launch(2, argv=argv)
    assert_ended([launchers[0], again], 0)
    assert_same(undisturbed, run_dir)


def test_a_rank_that_hangs_is_named_and_the_job_goes_on_without_its_process(
    nodes: Nodes, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    launchers = at_work(nodes, cache, run_dir)
    os.kill(launchers[1].ranks()[1], signal.SIGSTOP)
    took = wait_for("the second start", launchers, lambda: "start 2: 2 nodes" in launchers[0].output)
    assert took < SECTIONS["parallel"]["timeout_s"] + RESTART_S
    assert_ended(launchers, 0)
    assert_same(undisturbed, run_dir)
    assert "gmscale launch: rank 1 (host n2, process" in launchers[0].output, launchers[0].output


def test_without_the_head_the_other_node_ends_and_says_so(nodes: Nodes, cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launchers = both(nodes, tiny.flags(cache, run_dir, **SECTIONS))
    wait_for("step 5", launchers, lambda: step_of(run_dir) >= 5)
    launchers[0].end()
    assert launchers[1].wait(20) == 1
    said = [line for line in launchers[1].output.splitlines() if line.startswith("gmscale launch: ")]
    assert said[-1].startswith("gmscale launch: the head 10.0.0.1 is gone"), launchers[1].output


def test_an_error_that_would_come_again_ends_all_launchers_at_once(
    nodes: Nodes, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("in the way")
    launchers = both(nodes, tiny.flags(cache, tmp_path / "run", **SECTIONS))
    assert_ended(launchers, 2, 40)
    assert sum("is not a directory" in launcher.output for launcher in launchers) >= 1
    assert not any("start again" in launcher.output for launcher in launchers)


def test_launchers_that_were_not_started_alike_say_so_before_any_rank_starts(
    nodes: Nodes, cache: Path, tmp_path: Path
) -> None:
    argv = tiny.flags(cache, tmp_path / "run", **SECTIONS)
    launchers = [nodes.launch(1, argv=argv), nodes.launch(2, argv=[*argv, "--optim.lr=0.1"])]
    assert_ended(launchers, 2, 40)
    for launcher in launchers:
        assert "n2 and the head n1 were not started alike: command is" in launcher.output
    assert not (tmp_path / "run").exists()


def test_a_node_gone_for_good_is_done_without_and_a_new_one_is_let_in(
    nodes: Nodes, cache: Path, tmp_path: Path
) -> None:
    """With one node, and then with both again, the run does what as many ranks do that are started by hand."""
    run_dir = tmp_path / "run"
    longer = {**SECTIONS["run"], "epochs": 40.0}  # than it takes to come back
    sections = {**SECTIONS, "run": longer, "parallel": {**SECTIONS["parallel"], "elastic": True}}
    argv = tiny.flags(cache, run_dir, **sections)
    launchers = both(nodes, argv, nnodes="1:2")
    wait_for("step 15", launchers, lambda: step_of(run_dir) >= 15)
    launchers[1].end()
    took = wait_for("a start without it", launchers[:1], lambda: ": 1 nodes, 1 ranks here" in launchers[0].output)
    assert took < RESTART_S
    wait_for("its steps", launchers[:1], lambda: step_of(run_dir) >= 33)
    again = nodes.launch(2, argv=argv, nnodes="1:2")
    assert_ended([launchers[0], again], 0)

    sizes = json.loads((run_dir / "summary.json").read_text())["world_sizes"]
    assert [size for _, size in sizes] == [2, 1, 2]
    by_hand = tmp_path / "by hand"
    for (_, size), until in zip(sizes, [*(step for step, _ in sizes[1:]), None], strict=True):
        start = max(tiny.checkpoint_steps(by_hand), default=0)
        stop_after = None if until is None else until - start
        stores = tmp_path / f"stores-{start}"
        stores.mkdir()
        run_ranks(tiny.train_rank, size, stores, size, "ddp", cache, by_hand, sections, stop_after)
    assert tiny.different(tiny.tensors(by_hand), tiny.tensors(run_dir)) == []


def test_a_launcher_that_comes_to_the_wrong_job_does_not_end_it(nodes: Nodes, cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = tiny.flags(cache, run_dir, **SECTIONS | {"run": {"epochs": 4.0, "log_every": 1}})
    right = nodes.launch(1, "--join_timeout_s", "60", argv=argv, nnodes="1:2")
    wait_for("step 2", [right], lambda: step_of(run_dir) >= 2)
    wrong = nodes.launch(2, argv=[*argv, "--optim.lr=0.1"], nnodes="1:2")
    assert wrong.wait(40) == 2
    assert "were not started alike" in wrong.output
    assert right.wait(60) == 0, right.output
