"""What people see of a sweep while it runs."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from gmscale.sweep.display import Display, short_settings
from gmscale.trials import BASELINE, MASK, RANDOM, Arm, Record, Result, State, Trial

SETTINGS = {"mask.sigma": 1.23456, "mask.strength": 0.5, "optim.lr": 0.05, "mask.operator": "dog"}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def record(
    number: int, arm: Arm = MASK, state: State = "planned", top1: float | None = None, **more: Any
) -> Record:
    settings = SETTINGS if arm == MASK else {"mask.enabled": False, "optim.lr": 0.1}
    values = {} if top1 is None else {"top1": top1, "loss": 100 - top1}
    return Record(Trial(number, "search", arm, settings, 0), state, values=values, **more)


def running(number: int, arm: Arm = MASK, epoch: float = 3.0, top1: float = 40.0) -> Record:
    return record(number, arm, "running", results=[Result(18, epoch, {"top1": top1, "loss": 1.0})])


def some() -> dict[int, Record]:
    records = [
        record(1, BASELINE, "finished", 55.125, wall_s=120.0),
        record(2, MASK, "finished", 57.0, wall_s=120.0),
        record(3, MASK, "finished", 56.0, wall_s=120.0),
        record(4, RANDOM, "stopped", 90.0, wall_s=60.0),
        record(5, MASK, "diverged", wall_s=80.0, failures=["the loss is not finite"]),
        running(6),
        running(7, RANDOM, 1.5),
        record(8, MASK, "running"),
        *(record(n) for n in range(9, 13)),
    ]
    return {r.trial.number: r for r in records}


def view(
    width: int, terminal: bool, clock: Clock, objective: str = "top1", height: int = 40
) -> tuple[Display, Any]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=terminal, color_system=None)
    return Display(console, 6.0, objective, 12, clock), out


def table(display: Display, width: int) -> str:
    """The table as text."""
    console = Console(file=io.StringIO(), width=width, height=40, force_terminal=False)
    with console.capture() as captured:
        console.print(display._table())
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def words(line: str) -> str:
    return " ".join(line.split())


def test_the_table_fits_a_wide_terminal() -> None:
    clock = Clock()
    display, _ = view(120, True, clock)
    with display:
        clock.now += 125
        display.update(some())
        shown = table(display, 120)
    lines = shown.splitlines()
    assert lines[0].split() == ["trial", "arm", "settings", "epoch", "top1"]
    assert words(lines[1]) == "0006 mask sigma 1.23, strength 0.5, lr 0.05, operator dog 3.0/6 40.00"
    assert words(lines[2]) == "0007 random mask lr 0.1 1.5/6 40.00"
    assert lines[3].split()[-1] == "0.0/6"  # not evaluated yet
    assert "best trial of each arm so far:" in lines[5]
    assert [line.split()[0] for line in lines[6:8]] == ["0002", "0001"]
    assert words(lines[7]) == "0001 no mask lr 0.1 55.12"
    assert len(lines) == 10  # the stopped trial was not trained to its end: it is nobody's best
    # 100 s a trial; of 7 trials to end three quarters of one are done; 3 at once
    assert lines[9] == (
        "5 of 12 trials ended (3 finished, 1 stopped, 1 diverged), 3 running, 4 to come; elapsed 2:05, ETA 3:28"
    )


def test_the_table_fits_a_narrow_terminal() -> None:
    display, _ = view(80, True, Clock())
    with display:
        display.update(some())
        lines = table(display, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].endswith("3.0/6  40.00")
    assert "sigma 1.23, strength 0.5, lr 0.05" in lines[1]
    assert "…" in lines[1]  # the settings give way, nothing else
    assert lines[2].startswith("0007   random mask")


def test_a_small_terminal_shows_some_of_many_trials() -> None:
    display, out = view(80, True, Clock(), height=20)
    with display:
        display.update({n: running(n) for n in range(1, 101)})
    assert "and 92 more that run" in out.getvalue()
    assert "12 of 12" not in out.getvalue()
    assert "0 of 100 trials ended, 100 running, 0 to come" in out.getvalue()  # more than it was told of


def test_a_loss_is_better_when_it_is_lower() -> None:
    display, _ = view(120, True, Clock(), "loss")
    with display:
        display.update(some())
        assert "43.0000" in table(display, 120)
        assert "44.0000" not in table(display, 120)


def test_without_a_terminal_there_is_a_line_for_each_end_and_one_each_half_minute() -> None:
    clock, records = Clock(), some()
    display, out = view(80, False, clock)
    with display:
        display.update(records)
        assert out.getvalue().count("\n") == 1  # what had ended before is not told again
        records[6] = record(6, MASK, "finished", 58.0, wall_s=100.0)
        records[7] = record(7, RANDOM, "failed", wall_s=10.0, failures=["first", "no [memory]"])
        display.update(records)
        assert out.getvalue().count("\n") == 1  # too soon
        clock.now += 1
        display.update(records)
        display.update(records)
        clock.now += 1
        display.update(records)
        lines = out.getvalue().splitlines()
        assert lines[1:] == [
            "trial 0006 (mask, sigma 1.23, strength 0.5, lr 0.05, operator dog) finished: top1 58.00 "
            "(best of its arm so far)",
            "trial 0007 (random mask, lr 0.1) failed: no [memory]",
        ]
        clock.now += 29
        display.update(records)
        assert out.getvalue().splitlines()[3].startswith("7 of 12 trials ended (4 finished, ")
        records[8] = record(8, MASK, "finished", 10.0, wall_s=100.0)
        display.update(records)
    assert "trial 0008" in out.getvalue()  # the last word is not lost to haste
    assert out.getvalue().splitlines()[-1].startswith("8 of 12 trials ended (5 finished, ")


def test_on_a_terminal_only_trouble_is_told_above_the_table() -> None:
    clock, records = Clock(), some()
    display, out = view(120, True, clock)
    with display:
        display.update(records)
        clock.now += 1
        records[6] = record(6, MASK, "finished", 58.0)
        records[8] = record(8, MASK, "diverged", failures=["gradients were not finite"])
        display.update(records)
    assert "trial 0006" not in out.getvalue()
    assert out.getvalue().count("trial 0008 (mask, ") == 1


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, "as base.yaml"),
        ({"mask.enabled": False}, "as base.yaml"),
        ({"mask.strength": 0.25, "output.strength": 1.0}, "mask.strength 0.25, output.strength 1"),
        (
            {"model.name": "vit", "optim.betas": [0.9, 0.99], "optim.lr": 1e-5},
            "name vit, betas [0.9, 0.99], lr 1e-05",
        ),
    ],
)
def test_settings_are_short(settings: dict[str, Any], shown: str) -> None:
    assert short_settings(Trial(1, "search", MASK, settings, 0)) == shown


def test_an_eta_needs_a_trial_that_has_ended() -> None:
    display, out = view(120, False, Clock())
    with display:
        display.update({1: running(1)})
    assert "ETA unknown" in out.getvalue()


def test_a_thousand_trials_cost_little() -> None:
    clock = Clock()
    display, _ = view(120, True, clock)
    records = {n: record(n, MASK, "finished", 50.0, wall_s=1.0) for n in range(1, 1001)}
    records |= {n: running(n) for n in range(1001, 1005)}
    with display:
        display.update(records)
        for n in range(1, 1001):
            records[n] = None  # type: ignore[assignment]  # it would fail, were it looked at again
        began = time.perf_counter()
        for _ in range(20):
            clock.now += 1
            display.update(records)
        assert (time.perf_counter() - began) / 20 < 0.1  # measured: 0.004
