"""The finders: which sizes are tried, what is suggested, and that nobody is left behind."""

import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gmscale import cli
from gmscale.find import batch_size, lr
from gmscale.find.batch_size import Search, Trial
from gmscale.find.curve import Curve, rates, suggestions
from gmscale.find.memory import available_mb
from gmscale.find.search import divisors, largest_fitting, predicted, round_sizes
from gmscale.find.table import flags, scaled_lr
from gmscale.parallel import World
from gmscale.parallel.local_ranks import MemoryRunOutError, run_ranks

# ---- which sizes ------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.booleans())
def test_sizes_at_the_same_global_batch_divide_it(number: int, even: bool) -> None:
    found = divisors(number, even=even)
    assert found == [d for d in range(1, number + 1) if number % d == 0 and not (even and d % 2)]


@given(st.integers(1, 5000))
def test_free_sizes_rise_by_a_quarter_at_most(most: int) -> None:
    sizes = round_sizes(most)
    assert all(a < b <= max(a + 1, 1.25 * a) for a, b in itertools.pairwise(sizes))
    assert sizes[-1] <= most < max(sizes[-1] + 1, 1.25 * sizes[-1]) + 1


@given(st.lists(st.integers(1, 10**5), min_size=1, unique=True).map(sorted), st.integers(1, 10**5), st.data())
def test_the_largest_size_that_fits_is_found_with_few_trials(
    sizes: list[int], start: int, data: st.DataObject
) -> None:
    limit = data.draw(st.integers(0, 10**5 + 1))
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_fitting(sizes, start, fits) == max((s for s in sizes if s <= limit), default=None)
    assert len(tried) == len(set(tried))
    assert len(tried) <= 2 + math.log2(10**5) + math.ceil(math.log2(len(sizes) + 1))


@given(st.floats(0, 1e4), st.floats(0, 100), st.lists(st.integers(1, 512), min_size=2, unique=True))
def test_memory_that_grows_in_a_line_is_predicted(fixed: float, each: float, sizes: list[int]) -> None:
    measured = [(size, fixed + each * size) for size in sizes[:-1]]
    guess = predicted(measured, sizes[-1])
    assert guess is None if len(measured) < 2 else guess == pytest.approx(fixed + each * sizes[-1])


# ---- trials -----------------------------------------------------------------------------------------------------


def search(config: Any, monkeypatch: pytest.MonkeyPatch, *, limit: int, budget_mb: float | None) -> Search:
    """A search whose processes need 100 MiB and 10 more an image, and are killed beyond `limit` images."""
    made = Search(config, 10, 1, 1, 0.9, free=False)
    made._budget_mb = budget_mb

    def run(function: Any, processes: int, trial: Any, *_: Any, parallel: Any) -> dict[str, Any]:
        size = trial.data.batch_size_per_device
        assert size * trial.optim.grad_accum_steps == 96  # the global batch stays
        if size > limit:
            raise MemoryRunOutError("rank 0 was killed (out of memory?)")
        return {"peak_mb": 100.0 + 10 * size, "images_per_s": 1.0, "step_ms": 1.0, "normalises_batches": True}

    monkeypatch.setattr(batch_size, "run_ranks", run)
    return made


def test_sizes_are_doubled_until_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(tmp_path, tmp_path, data={"batch_size_per_device": 48}, optim={"grad_accum_steps": 2})
    trials = search(config, monkeypatch, limit=40, budget_mb=None).run(divisors(96))
    assert [(t.batch_size, t.grad_accum_steps, bool(t.refused)) for t in trials] == [
        (8, 12, False),
        (16, 6, False),
        (32, 3, False),
        (48, 2, True),
    ]


def test_a_cpu_is_not_asked_for_memory_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(tmp_path, tmp_path, data={"batch_size_per_device": 96})
    trials = search(config, monkeypatch, limit=10**6, budget_mb=400).run(divisors(96))
    assert {t.batch_size: t.refused for t in trials} == {8: "", 16: "", 24: "", 32: "420 MiB predicted"}


def test_free_memory_is_a_plausible_number() -> None:
    assert 1 < available_mb() < 2**30


def kills_itself(world: World) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def wants_all_memory(world: World) -> dict[str, Any]:
    return {"sum": float(torch.empty(2**46, dtype=torch.float64).sum())}


@pytest.mark.parametrize("function", [kills_itself, wants_all_memory])
def test_a_process_that_runs_out_of_memory_is_no_other_failure(function: Any) -> None:
    with pytest.raises(MemoryRunOutError, match="memory"):
        run_ranks(function, 1)


def test_processes_of_a_trial_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        "import os, time, pathlib\n"
        "from gmscale.parallel.local_ranks import run_ranks\n"
        "def sleeps(world, path):\n"
        "    pathlib.Path(path).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        f"if __name__ == '__main__': run_ranks(sleeps, 1, {str(tmp_path / 'pid')!r})\n"
    )
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")])
    try:
        await_(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        child = int((tmp_path / "pid").read_text())
    finally:
        parent.kill()
        parent.wait()
    await_(lambda: not is_running(child))


def await_(condition: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# ---- what is printed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "factor"), [("sgd", 4.0), ("momentum", 4.0), ("adamw", 2.0), ("lamb", 2.0), ("lion", None)]
)
def test_the_learning_rate_follows_a_free_batch_by_the_usual_rules(
    tmp_path: Path, optimizer: str, factor: float | None
) -> None:
    config = tiny.config(tmp_path, tmp_path, optim={"opt": optimizer, "lr": 0.5})
    assert scaled_lr(config, 4.0) == (None if factor is None else 0.5 * factor)


def test_the_flags_are_those_of_train(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, tmp_path)
    trial = vars(Trial(batch_size=8, grad_accum_steps=2))
    assert flags(trial, config, free=False) == "--data.batch_size_per_device 8 --optim.grad_accum_steps 2"
    assert flags(vars(Trial(batch_size=64, grad_accum_steps=1)), config, free=True).endswith("--optim.lr 0.2")


def test_the_command_tries_sizes_in_processes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tiny.flags(tmp_path / "no data", tmp_path / "run", data={"batch_size_per_device": 16})
    assert call("batch_size", *given, "--classes", "10", "--steps", "1", "--processes", "2") == 0
    shown = capsys.readouterr().out
    assert "largest: --data.batch_size_per_device 16 --optim.grad_accum_steps 1" in shown
    assert "batch normalisation takes its statistics from one micro-batch" in shown
    assert not (tmp_path / "no data").exists()
    assert not (tmp_path / "run").exists()


def call(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["find", *argv])
    torch.use_deterministic_algorithms(False)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["batchsize"], "did you mean 'batch_size'"),
        (["batch_size", "--memory_share", "2"], "--memory_share is 2.0; expected a number in (0, 1]"),
        (["batch_size", "--classes", "0"], "--classes is 0"),
        (
            ["batch_size", "--augment.mixup", "1", "--data.batch_size_per_device", "5", "--classes", "3"],
            "mix pairs",
        ),
        (["batch_size", "--optim.lrr", "1"], "did you mean '--optim.lr'"),
        (["lr", "--from", "0.1", "--to", "0.01"], "--to is 0.01; expected a number in (0.1, inf)"),
        (["lr", "--steps", "3"], "--steps is 3"),
        (["lr", "--out", __file__], "is not a directory"),
    ],
)
def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert call(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_under_a_launcher_it_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("batch_size", "--classes", "10") == 2
    assert "start it without a launcher" in capsys.readouterr().err


# ---- the range test ---------------------------------------------------------------------------------------------


@given(st.floats(1e-9, 1e-3), st.floats(1.1, 1e9), st.integers(10, 300))
def test_rates_rise_by_one_factor_from_end_to_end(low: float, factor: float, steps: int) -> None:
    tested = rates(low, low * factor, steps)
    assert (tested[0], tested[-1]) == (low, pytest.approx(low * factor))
    ratios = [b / a for a, b in itertools.pairwise(tested)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def drawn(losses: list[float], tested: list[float]) -> Curve:
    curve = Curve()
    for rate, loss in zip(tested, losses, strict=True):
        curve.add(rate, loss)
        if curve.diverged:
            break
    return curve


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=50))
def test_smoothing_is_a_weighted_mean_of_the_past(losses: list[float]) -> None:
    curve = drawn([losses[0], *losses], rates(1e-6, 1, len(losses) + 1))
    for i, point in enumerate(curve.points):
        past = [p.loss for p in curve.points[: i + 1]]
        weights = [0.9 ** (i - j) for j in range(i + 1)]
        expected = sum(w * x for w, x in zip(weights, past, strict=True)) / sum(weights)
        assert point.smoothed == pytest.approx(expected)


def test_it_suggests_where_the_loss_falls_and_a_tenth_of_where_it_ends() -> None:
    tested = rates(1e-6, 10, 200)
    # falls around 1e-3, is smallest near 0.1, and explodes from there
    losses = [1 + 1 / (1 + (x / 1e-3) ** 2) + (x / 0.3) ** 4 for x in tested]
    curve = drawn(losses, tested)
    assert curve.diverged
    steepest, tenth = suggestions(curve.points)
    assert 0.5e-3 < steepest.lr < 4e-3
    assert 0.005 < tenth.lr < 0.03


def test_noise_suggests_nothing() -> None:
    tested = rates(1e-6, 1, 100)
    curve = drawn([2.3 + 0.02 * math.sin(7.3 * i * i) for i in range(100)], tested)
    assert suggestions(curve.points) == []


def test_a_loss_that_is_no_number_ends_the_test() -> None:
    curve = drawn([2.0, 1.0, float("nan"), 1.0], rates(1e-3, 1, 4))
    assert curve.diverged
    assert len(curve.points) == 3


def test_the_command_trains_at_rising_rates_and_draws_the_curve(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[set[float]] = []
    real = lr.train_step

    def step(state: Any, *rest: Any) -> Any:
        used.append({group["lr"] for group in state.wrapped.optimizer.param_groups})
        return real(state, *rest)

    monkeypatch.setattr(lr, "train_step", step)
    out = tmp_path / "out"
    given = tiny.flags(cache, tmp_path / "run", data={"batch_size_per_device": 16})
    assert call("lr", *given, "--from", "1e-4", "--to", "0.1", "--steps", "10", "--out", str(out)) == 0
    found = json.loads((out / "lr_find.json").read_text())
    assert [p["lr"] for p in found["points"]] == pytest.approx(rates(1e-4, 0.1, 10))  # through two epochs
    assert used == [{p["lr"]} for p in found["points"]]
    assert Image.open(io.BytesIO((out / "lr_find.png").read_bytes())).size == (840, 504)
    assert "nothing is applied" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
