"""A run that pauses, and one that begins at another's checkpoint: exactly as the other goes on, or as asked."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file
from torch import Tensor

from gmscale import checkpoint
from gmscale.config import TrainConfig
from gmscale.data import embedded
from gmscale.errors import UsageError

STEPS = 9  # 1.5 epochs of 6
BRANCHED = 4  # between two log lines and two evaluations
LR, DECAY, MOMENTUM = 0.05, 5e-4, 0.9

# Plain momentum, so that a step can be done by hand, and every checkpoint stays.
PARENT: tiny.Sections = tiny.EVERYTHING | {
    "run": tiny.EVERYTHING["run"] | {"save_every_steps": 1, "keep_checkpoints": STEPS},
    "optim": {"opt": "momentum", "lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM},
}


def with_changes(sections: tiny.Sections, changes: tiny.Sections) -> tiny.Sections:
    return sections | {name: sections.get(name, {}) | section for name, section in changes.items()}


def at_step(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def after(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Records of metrics.jsonl after `step`, without times."""
    return [record for record in tiny.untimed(tiny.metrics(run_dir)) if record["step"] > step]


def branch(cache: Path, run_dir: Path, origin: Path, **changes: dict[str, Any]) -> TrainConfig:
    sections = with_changes(with_changes(PARENT, {"run": {"branch_from": str(origin)}}), changes)
    return tiny.config(cache, run_dir, **sections)


@pytest.fixture(scope="module")
def parent(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Look, do not touch."""
    run_dir = tmp_path_factory.mktemp("branch") / "parent"
    tiny.train(tiny.config(cache, run_dir, **PARENT))
    return run_dir


# ---- pausing -----------------------------------------------------------------------------------------------------


def test_a_run_that_pauses_ends_as_an_undisturbed_one(parent: Path, cache: Path, tmp_path: Path) -> None:
    def train(pause: float) -> dict[str, Any] | None:
        sections = with_changes(PARENT, {"run": {"save_every_steps": 4, "pause_after_epochs": pause}})
        return tiny.train(tiny.config(cache, tmp_path, **sections)).summary

    # between two checkpoints; the same once more; after an evaluation; less than was done
    for pause, step in ((0.8, 5), (0.8, 5), (1.0, 6), (0.8, 6)):
        assert train(pause) is None
        assert tiny.checkpoint_steps(tmp_path)[-1] == step
        assert tiny.untimed(tiny.metrics(tmp_path)) == [r for r in after(parent, 0) if r["step"] <= step]
        assert not (tmp_path / "summary.json").exists()
    assert train(2.0) is not None  # later than the end
    assert tiny.different(tiny.tensors(parent), tiny.tensors(tmp_path)) == []
    assert after(tmp_path, 0) == after(parent, 0)


def test_a_pause_has_the_status_of_a_stop_on_request(cache: Path, tmp_path: Path) -> None:
    flags = [*tiny.flags(cache, tmp_path / "run", run={"epochs": 0.5}), "--run.pause_after_epochs=0.2"]
    done = subprocess.run([sys.executable, "-m", "gmscale", "train", *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "")
    assert "paused, as run.pause_after_epochs asks, after step 1 of 3; the same command without it" in done.stdout
    assert tiny.checkpoint_steps(tmp_path / "run") == [1]


# ---- a branch with the same settings -----------------------------------------------------------------------------

VARIANTS: dict[str, tiny.Sections] = {
    "momentum": {},
    # counts its steps in the optimizer's groups
    "adan": {"optim": {"opt": "adan", "lr": 0.002, "clip_grad": 1.0}},
    "lookahead-layer-decay": {
        "model": {"name": "test_vit", "kwargs": {"img_size": 32}},
        "optim": {"opt": "lookahead_adamw", "lr": 0.002, "layer_decay": 0.7, "sched_on": "epoch"},
        "mask": {"operator": "random", "strength": 1.0, "warmup": 0.2, "end": 0.9},
    },
    "plateau": {
        "run": {"eval_every_epochs": 0.34, "epochs": 2.0},
        "optim": {"sched": "plateau", "sched_kwargs": {"patience_epochs": 0, "decay_rate": 0.5}},
    },
    "constant-output": {"optim": {"sched": "none"}, "output": {"enabled": True, "start": 0.0, "end": 1.0}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_branch_with_the_same_settings_is_the_run_itself(
    parent: Path, cache: Path, tmp_path: Path, name: str
) -> None:
    variant, branched = VARIANTS[name], 8 if name == "plateau" else BRANCHED
    undisturbed = parent
    if variant:
        undisturbed = tmp_path / "parent"
        tiny.train(tiny.config(cache, undisturbed, **with_changes(PARENT, variant)))
    run_dir = tmp_path / "branch"
    summary = tiny.train(branch(cache, run_dir, at_step(undisturbed, branched), **variant)).summary
    assert tiny.different(tiny.tensors(undisturbed), tiny.tensors(run_dir)) == []
    assert after(run_dir, 0) == after(undisturbed, branched)

    expected = json.loads((undisturbed / "summary.json").read_text())
    origin = {"run": str(undisturbed), "step": branched}
    assert summary is not None
    assert (summary["branched_from"], expected["branched_from"]) == (origin, None)
    assert json.loads((run_dir / "environment.json").read_text())["branched_from"] == origin
    assert {k: summary[k] for k in ("top1", "loss", "ema_top1", "best_top1", "steps", "skipped_steps")} == {
        k: expected[k] for k in ("top1", "loss", "ema_top1", "best_top1", "steps", "skipped_steps")
    }


def test_a_branch_resumes_from_its_own_checkpoints(parent: Path, cache: Path, tmp_path: Path) -> None:
    origin, run_dir = tmp_path / "origin", tmp_path / "branch"
    shutil.copytree(at_step(parent, 2), at_step(origin, 2))
    shutil.copytree(at_step(parent, BRANCHED), at_step(origin, BRANCHED))  # of a run directory it is the newest
    assert tiny.train(branch(cache, run_dir, origin, run={"pause_after_epochs": 1.2})).summary is None
    assert tiny.checkpoint_steps(run_dir) == [5, 6, 7]
    shutil.rmtree(origin)
    summary = tiny.train(branch(cache, run_dir, tmp_path / "moved")).summary
    assert summary is not None
    assert summary["branched_from"] == {"run": str(origin), "step": BRANCHED}
    assert tiny.different(tiny.tensors(parent), tiny.tensors(run_dir)) == []
    assert after(run_dir, 0) == after(parent, BRANCHED)


def test_a_branch_killed_before_its_first_checkpoint_begins_again(
    parent: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it had logged from an earlier place is gone, should it now begin at a later one."""

    def fail() -> None:
        raise MemoryError

    rarely = {"save_every_steps": 6, "keep_best": 0}
    with monkeypatch.context() as patch:
        tiny.after_step(4, fail, patch)
        with pytest.raises(MemoryError):
            tiny.train(branch(cache, tmp_path, at_step(parent, 2), run=rarely | {"log_every": 1}))
    assert [r["step"] for r in tiny.metrics(tmp_path)] == [3, 4, 5]
    assert tiny.checkpoint_steps(tmp_path) == []
    tiny.train(branch(cache, tmp_path, at_step(parent, 7), run=rarely))
    assert tiny.different(tiny.tensors(parent), tiny.tensors(tmp_path)) == []
    assert after(tmp_path, 0) == after(parent, 7)


# ---- a branch with settings of its own ---------------------------------------------------------------------------


def weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    found = load_file(at_step(run_dir, step) / "model.safetensors")
    return {name: t.double() for name, t in found.items() if "running" not in name and t.is_floating_point()}


def rate(step: int, lr: float) -> float:
    """The cosine schedule, by hand, for the step that comes after `step` others."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def next_weights(parent: Path, lr: float, decay: float, more: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights after the step that follows the branch, by hand.

    The parent's gradient of that step is what its own weights say of it; `more` is added to it.
    """
    before, start, end = (weights(parent, BRANCHED + i) for i in (-1, 0, 1))
    found = {}
    for name, w in start.items():
        own = DECAY if w.ndim > 1 else 0.0
        momentum = MOMENTUM * (before[name] - w) / rate(BRANCHED - 1, LR)
        gradient = (w - end[name]) / rate(BRANCHED, LR) - momentum - own * w + (more or {}).get(name, 0.0)
        found[name] = w - rate(BRANCHED, lr) * (momentum + gradient + (decay if w.ndim > 1 else 0.0) * w)
    return found


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far weights are from those expected, relative to the way from the start."""
    error = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return math.sqrt(error / sum(float((expected[name] - start[name]).square().sum()) for name in expected))


@pytest.mark.parametrize(("lr", "decay"), [(LR, DECAY), (0.02, DECAY), (LR, 0.3), (0.02, 0.3)])
def test_a_branch_steps_with_its_own_rate_and_decay(
    parent: Path, cache: Path, tmp_path: Path, lr: float, decay: float
) -> None:
    once = {"pause_after_epochs": 5 / 6}
    tiny.train(
        branch(cache, tmp_path, at_step(parent, BRANCHED), run=once, optim={"lr": lr, "weight_decay": decay})
    )
    start, found = weights(parent, BRANCHED), weights(tmp_path, BRANCHED + 1)
    assert distance(found, next_weights(parent, lr, decay), start) < 1e-3
    for other in {(LR, DECAY), (0.02, DECAY), (LR, 0.3), (0.02, 0.3)} - {(lr, decay)}:
        assert distance(found, next_weights(parent, *other), start) > 0.01

    groups = checkpoint.optimizer_state(at_step(tmp_path, BRANCHED + 1))["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, decay]
    assert [group["initial_lr"] for group in groups] == [lr, lr]
    assert [group["lr"] for group in groups] == pytest.approx([rate(BRANCHED, lr)] * 2)
    assert [record["lr"] for record in after(tmp_path, 0)] == pytest.approx([rate(BRANCHED, lr)])


def test_every_layer_and_a_rate_without_a_schedule_follow_the_settings(cache: Path, tmp_path: Path) -> None:
    sections = with_changes(
        PARENT,
        {
            "run": {"pause_after_epochs": 0.2},
            "model": {"name": "test_vit", "kwargs": {"img_size": 32}},
            "optim": {"opt": "adamw", "sched": "none", "layer_decay": 0.5, "lr": 0.001},
        },
    )
    tiny.train(tiny.config(cache, tmp_path / "parent", **sections))
    changes = {"run": {"branch_from": str(tmp_path / "parent"), "pause_after_epochs": 0.4}, "optim": {"lr": 0.004}}
    tiny.train(tiny.config(cache, tmp_path / "run", **with_changes(sections, changes)))
    before, now = (
        checkpoint.optimizer_state(at_step(tmp_path / name, step))["optimizer"]["param_groups"]
        for name, step in (("parent", 1), ("run", 2))
    )
    assert len({group["lr"] for group in before}) > 2
    assert [group["lr"] for group in now] == pytest.approx([4 * group["lr"] for group in before])


def test_a_branch_without_strength_sends_what_its_parent_held_back(
    parent: Path, cache: Path, tmp_path: Path
) -> None:
    once = {"pause_after_epochs": 5 / 6}
    tiny.train(branch(cache, tmp_path, at_step(parent, BRANCHED), run=once, mask={"strength": 0.0}))
    # the parent sent the same sum but for what it then held back
    held = checkpoint.load_rank(at_step(parent, BRANCHED + 1), tiny.ALONE)["masks"]["mask"]["residuals"]
    start, found = weights(parent, BRANCHED), weights(tmp_path, BRANCHED + 1)
    assert distance(found, next_weights(parent, LR, DECAY, held), start) < 1e-3
    assert distance(found, next_weights(parent, LR, DECAY), start) > 0.1
    assert checkpoint.load_rank(at_step(tmp_path, BRANCHED + 1), tiny.ALONE)["masks"]["mask"]["residuals"] == {}


def test_what_may_differ_may(parent: Path, cache: Path, tmp_path: Path) -> None:
    summary = tiny.train(
        branch(
            cache,
            tmp_path,
            at_step(parent, BRANCHED),
            run={"arm": "other", "keep_checkpoints": 1, "log_every": 2},
            model={"drop_rate": 0.1},
            augment={"mixup": 0.2, "hflip": 0.5},
            optim={"label_smoothing": 0.1, "clip_grad": 1.0, "min_lr": 1e-4},
            mask={"operator": "dog", "sigma": 0.8, "ratio": 2.0, "strength": 0.25, "norm": "l1", "end": 0.8},
        )
    ).summary
    assert summary is not None
    assert math.isfinite(summary["loss"])
    assert tiny.different(tiny.tensors(parent), tiny.tensors(tmp_path))
    (strength,) = {
        record["strength"] for record in after(tmp_path, 0) if record["step"] == 6 and "strength" in record
    }
    assert strength == 0.25


# ---- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"name": "test_resnet"}}, r"model\.name was 'test_byobnet' and is 'test_resnet'"),
        ({"model": {"ema_decay": 0.0}}, r"model\.ema_decay was 0\.8 and is 0\.0"),
        ({"run": {"epochs": 2.0}}, r"run\.epochs was 1\.5 and is 2\.0"),
        ({"run": {"seed": 1}}, r"run\.seed was 0 and is 1"),
        ({"data": {"batch_size_per_device": 8}}, r"data\.batch_size_per_device was 16 and is 8"),
        ({"augment": {"repeats": 2}}, r"augment\.repeats was 1 and is 2"),
        ({"optim": {"opt": "adamw"}}, r"optim\.opt was 'momentum' and is 'adamw'"),
        ({"optim": {"momentum": 0.8}}, r"optim\.momentum was 0\.9 and is 0\.8"),
        ({"mask": {"enabled": False}}, r"mask\.enabled was True and is False"),
        ({"mask": {"error_feedback": False}}, r"mask\.error_feedback was True and is False"),
        ({"mask": {"exclude": ["head*"]}}, r"mask\.exclude was \[\] and is \['head\*'\]"),
        ({"output": {"enabled": True}}, r"output\.enabled was False and is True"),
    ],
)
def test_what_may_not_differ_is_named(
    parent: Path, cache: Path, tmp_path: Path, changes: tiny.Sections, said: str
) -> None:
    with pytest.raises(UsageError, match=f"{said}; a run that branches from it keeps them") as caught:
        tiny.train(branch(cache, tmp_path / "run", at_step(parent, BRANCHED), **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_rates_of_a_plateau_may_not_differ(cache: Path, tmp_path: Path) -> None:
    plateau = {"optim": {"sched": "plateau"}, "run": {"pause_after_epochs": 0.2}}
    tiny.train(tiny.config(cache, tmp_path / "parent", **with_changes(PARENT, plateau)))
    changes = with_changes(plateau, {"optim": {"lr": 0.01}})
    with pytest.raises(UsageError, match=r"optim\.lr was 0\.05 and is 0\.01"):
        tiny.train(branch(cache, tmp_path / "run", tmp_path / "parent", **changes))


def test_a_place_that_holds_no_checkpoint_is_refused(parent: Path, cache: Path, tmp_path: Path) -> None:
    origin = tmp_path / "parent"
    for step in (2, BRANCHED):
        shutil.copytree(at_step(parent, step), at_step(origin, step))
    (at_step(origin, BRANCHED) / "state.json").unlink()  # as a crash may leave it
    whole = f"; did you mean '{at_step(origin, 2)}'"
    for place, hint in (
        (at_step(origin, BRANCHED), whole),
        (at_step(origin, 3), whole),
        (tmp_path / "parnet", f"; did you mean '{origin}'"),
        (at_step(origin, 2) / "model.safetensors", ""),
    ):
        with pytest.raises(UsageError) as caught:
            tiny.train(branch(cache, tmp_path / "run", place))
        said = f"run.branch_from {place} is neither a complete checkpoint nor a run directory that holds one"
        assert str(caught.value).startswith(said + hint)
    with pytest.raises(UsageError, match=r"run\.branch_from .*is the end of its run, with no step left"):
        tiny.train(branch(cache, tmp_path / "run", parent))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", ["", "checkpoints/step-00000004"])
def test_a_run_does_not_branch_from_itself(cache: Path, tmp_path: Path, inside: str) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(UsageError, match=r"run\.branch_from .* is of run\.dir itself; choose another run\.dir"):
        branch(cache, run_dir, run_dir / inside)


def test_a_branch_on_other_shards_is_refused(parent: Path, cache: Path, tmp_path: Path) -> None:
    embedded.build(tmp_path / "shards", tiny.SIZE, tiny.IMAGE_SIZE, seed=1)
    section = {"source": str(tmp_path / "shards")}
    with pytest.raises(UsageError, match=r"other shards than data\.source .*another run\.branch_from"):
        tiny.train(branch(cache, tmp_path / "run", at_step(parent, BRANCHED), data=section))
