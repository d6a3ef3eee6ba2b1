"""Learning rates are those of timm's own loop, whatever step is asked for first."""

import json
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import create_scheduler_v2
from torch import nn

from gmscale.config import OptimConfig
from gmscale.errors import UsageError
from gmscale.models import Schedule, schedule

EPOCHS, STEPS = 10, 7  # steps in an epoch
NEEDED: dict[str, dict[str, Any]] = {
    "step": {"decay_epochs": 3},
    "multistep": {"decay_milestones": [1, 4, 6]},
    "poly": {"decay_rate": 1.0},
    "rsqrt": {"stable_timescale": 2},
}
PURE = ["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"]


def new_optimizer(lr: float = 0.1) -> torch.optim.Optimizer:
    groups = [{"params": nn.Linear(2, 2).parameters(), "lr_scale": scale} for scale in (1, 0.5)]
    return torch.optim.SGD(groups, lr=lr)


def settings_of(name: str, on: str, **others: Any) -> OptimConfig:
    kwargs = NEEDED.get(name, {}) | others.pop("sched_kwargs", {})
    return OptimConfig(sched=name, sched_on=on, sched_kwargs=kwargs, **others)  # type: ignore[arg-type]


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def made(config: OptimConfig, epochs: float = EPOCHS) -> tuple[Schedule, torch.optim.Optimizer]:
    optimizer = new_optimizer(config.lr)
    scheduler = schedule(optimizer, config, epochs, STEPS)
    assert scheduler is not None
    return scheduler, optimizer


def ours(config: OptimConfig, epochs: float = EPOCHS) -> list[list[float]]:
    """Every step's rates of one run."""
    scheduler, optimizer = made(config, epochs)
    found = []
    for step in range(round(epochs * STEPS)):
        scheduler.before(step)
        found.append(rates(optimizer))
    return found


def timms(config: OptimConfig, num_epochs: float, top1: Any = None) -> list[list[float]]:
    """Every step's rates in timm's train.py, with a validation of `top1(epoch)` after each epoch."""
    optimizer = new_optimizer(config.lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            config.sched,
            num_epochs,  # type: ignore[arg-type]
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=config.warmup_lr,
            cooldown_epochs=config.cooldown_epochs,  # type: ignore[arg-type]
            min_lr=config.min_lr,
            step_on_epochs=config.sched_on == "epoch",
            updates_per_epoch=STEPS,
            **config.sched_kwargs,
        )
    found = []
    for epoch in range(EPOCHS):
        for update in range(STEPS):
            found.append(rates(optimizer))
            scheduler.step_update(epoch * STEPS + update + 1)
        scheduler.step(epoch + 1, top1(epoch) if top1 else None)
    return found


# ---- the functions of the step -------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["step", "epoch"])
@pytest.mark.parametrize("name", PURE)
def test_rates_are_those_of_timms_loop(name: str, on: str) -> None:
    noise = {"noise": [0.3, 0.8], "noise_std": 0.3, "noise_seed": 5}
    for others in ({}, {"warmup_epochs": 3}, {"sched_kwargs": noise, "warmup_epochs": 1.5}):
        config = settings_of(name, on, **others)
        assert ours(config) == timms(config, EPOCHS)
        assert len({tuple(pair) for pair in ours(config)}) > 1 or (name == "constant" and not others)


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly", "wsd", "rsqrt"])
def test_a_schedule_ends_before_the_cooldown_epochs(name: str) -> None:
    config = settings_of(name, "step", cooldown_epochs=2, min_lr=0.01)
    found = ours(config)
    assert found == timms(config, EPOCHS - 2)
    assert [pair == [0.01, 0.005] for pair in found] == [False] * 8 * STEPS + [True] * 2 * STEPS


@pytest.mark.parametrize("on", ["step", "epoch"])
@pytest.mark.parametrize("name", ["cosine", "tanh", "poly"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_all_cycles_fit_in_the_run(name: str, on: str, factor: float) -> None:
    cycles = {"cycle_limit": 2, "cycle_mul": factor, "cycle_decay": 0.9}
    config = settings_of(name, on, cooldown_epochs=1, sched_kwargs=cycles)
    found = ours(config)
    assert found == timms(config, (EPOCHS - 1) / (1 + factor))
    restarts = sum(later > before for before, later in pairwise(found))
    assert restarts == 1
    assert found[-1] == [0, 0]


@pytest.mark.parametrize("name", PURE)
def test_a_warmup_prefix_comes_before_a_shorter_schedule(name: str) -> None:
    config = settings_of(name, "step", warmup_epochs=4, sched_kwargs={"warmup_prefix": True})
    assert ours(config) == timms(config, EPOCHS - 4)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PURE),
    st.sampled_from(["step", "epoch"]),
    st.floats(0.5, 6.5),
    st.floats(0, 0.4),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_rate_depends_on_the_step_alone(
    name: str, on: str, epochs: float, warmup: float, noisy: bool, random: Any
) -> None:
    noise = {"noise": 0.2} if noisy else {}
    decay = {"decay_epochs": 0.5} if name == "wsd" else {}  # a share of the run
    config = settings_of(name, on, warmup_epochs=warmup, sched_kwargs=decay | noise)
    try:
        expected = ours(config, epochs)
    except UsageError:
        assert name in ("wsd", "rsqrt")  # no step of this short run would be left for the decay
        return
    scheduler, optimizer = made(config, epochs)
    for step in random.sample(range(len(expected)), len(expected)):
        scheduler.before(step)
        assert rates(optimizer) == expected[step]
    assert scheduler.state_dict() == {}


def test_none_leaves_each_layer_its_own_rate() -> None:
    optimizer = new_optimizer()
    assert schedule(optimizer, OptimConfig(lr=0.1, sched="none"), EPOCHS, STEPS) is None
    assert rates(optimizer) == [0.1, 0.05]


# ---- plateau -------------------------------------------------------------------------------------------------

PLATEAU = {"patience_epochs": 1, "decay_rate": 0.5}


def top1(epoch: int) -> float:
    return [10, 20, 20, 20, 20, 30, 29, 28, 27, 26][epoch]


def followed(
    config: OptimConfig, evaluations: int, resume_at: frozenset[int] = frozenset()
) -> tuple[list[list[float]], dict[str, Any]]:
    """Rates of a run that evaluates so often in each epoch, and is resumed before some steps."""
    scheduler, optimizer = made(config)
    found = []
    for step in range(EPOCHS * STEPS):
        if step in resume_at:
            state = json.loads(json.dumps(scheduler.state_dict(), allow_nan=False))
            scheduler, optimizer = made(config)
            scheduler.load_state_dict(state)
        scheduler.before(step)
        found.append(rates(optimizer))
        if (step + 1) % STEPS in {STEPS * i // evaluations % STEPS for i in range(evaluations)}:
            scheduler.observe(step + 1, top1(step // STEPS) if (step + 1) % STEPS == 0 else 0.0)
    return found, scheduler.state_dict()


@pytest.mark.parametrize("others", [{}, {"warmup_epochs": 2}, {"min_lr": 0.06, "warmup_epochs": 1}])
def test_plateau_follows_evaluations_as_in_timms_loop(others: dict[str, Any]) -> None:
    noise = {"noise": 0.4, "noise_std": 0.2}
    for kwargs in (PLATEAU, PLATEAU | noise):
        config = settings_of("plateau", "epoch", sched_kwargs=kwargs, **others)
        expected = timms(config, EPOCHS, top1)
        assert len({tuple(pair) for pair in expected}) > 2
        assert followed(config, 1)[0] == expected


def test_plateau_counts_one_evaluation_of_each_epoch() -> None:
    config = settings_of("plateau", "epoch", sched_kwargs=PLATEAU)
    assert followed(config, 3) == followed(config, 1)


@settings(max_examples=15, deadline=None)
@given(st.frozensets(st.integers(0, EPOCHS * STEPS - 1), max_size=5), st.sampled_from([{}, {"noise": 0.2}]))
def test_plateau_goes_on_exactly_after_a_resume(at: frozenset[int], noise: dict[str, float]) -> None:
    config = settings_of("plateau", "step", warmup_epochs=2, sched_kwargs=PLATEAU | noise)
    assert followed(config, 2, at) == followed(config, 2)


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sched": "cosin"}, r"optim\.sched is 'cosin'.*did you mean 'cosine'"),
        ({"sched_kwargs": {"cycle_limits": 2}}, r"has no field 'cycle_limits'; did you mean 'cycle_limit'"),
        ({"sched_kwargs": {"decay_milestones": [3]}}, r"sched_kwargs of cosine has no field 'decay_milestones'"),
        ({"sched_kwargs": {"num_epochs": 3}}, r"sets 'num_epochs'; set run\.epochs instead"),
        ({"sched_kwargs": {"min_lr": 3}}, r"sets 'min_lr'; set optim\.min_lr instead"),
        ({"sched_kwargs": {"noise_std": 1}}, r"sets 'noise_std', which changes nothing without 'noise'"),
        ({"sched_kwargs": {"cycle_mul": 2}}, r"sets 'cycle_mul', which changes nothing without 'cycle_limit'"),
        ({"sched_kwargs": {"cycle_limit": 1.5}}, r"cycle_limit is 1\.5; expected a whole number"),
        ({"sched_kwargs": {"k_decay": "big"}}, r"optim\.sched cosine with optim\.sched_kwargs .*big"),
        ({"sched": "multistep"}, r"multistep needs optim\.sched_kwargs\.decay_milestones"),
        ({"sched": "multistep", "sched_kwargs": {"decay_milestones": [6, 3]}}, r"expected epochs in rising order"),
        ({"sched": "step"}, r"step needs optim\.sched_kwargs\.decay_epochs"),
        ({"sched": "wsd", "sched_kwargs": {"decay_epochs": 30}}, r"optim\.sched wsd .*decay"),
        ({"sched": "wsd", "sched_kwargs": {"decay_fn": "steep"}}, r"optim\.sched wsd .*steep"),
        ({"sched": "wsd", "warmup_epochs": 10}, r"warmup_epochs is 10; expected less than run\.epochs 10"),
        ({"sched": "rsqrt"}, r"optim\.sched rsqrt .*stable_timescale"),
        ({"sched": "constant", "min_lr": 0.1}, r"min_lr is 0\.1, but optim\.sched constant does not use it"),
        (
            {"sched": "step", "sched_kwargs": {"decay_epochs": 1}, "cooldown_epochs": 1},
            r"cooldown_epochs is 1, but",
        ),
        ({"sched": "none", "warmup_epochs": 1}, r"warmup_epochs is 1, but optim\.sched none does not use it"),
        ({"cooldown_epochs": 10}, r"cooldown_epochs is 10; expected less than run\.epochs 10"),
        ({"warmup_epochs": 11}, r"warmup_epochs is 11; expected at most run\.epochs 10"),
        ({"warmup_epochs": 9, "cooldown_epochs": 2}, r"at most run\.epochs without optim\.cooldown_epochs, 8"),
    ],
)
def test_a_setting_that_fits_no_schedule_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        schedule(new_optimizer(), OptimConfig(**given), EPOCHS, STEPS)
    assert "\n" not in str(error.value)
