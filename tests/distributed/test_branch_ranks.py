"""Runs of two ranks that branch: with the residuals and the divided state of each rank, and with new settings."""

import math
import os
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
from ranks import run_ranks

from gmscale import checkpoint
from gmscale.errors import UsageError
from gmscale.parallel import PeerError

# Four steps; each rank has two micro-batches of five.
SECTIONS: tiny.Sections = {
    "run": {"epochs": 0.8, "log_every": 1, "save_every_steps": 1, "keep_checkpoints": 9},
    "model": {"drop_rate": 0.3},
    "data": {"batch_size_per_device": 5},
    "optim": {"lr": 0.05, "grad_accum_steps": 2},
}
DECAY = 5e-4
CHANGED = {"lr": 0.02, "weight_decay": 1.0}
ADAMW = {"opt": "adamw", "lr": 0.003}
CASES: dict[str, tuple[str, tiny.Sections]] = {
    "ddp": ("ddp", {"model": {"ema_decay": 0.8}}),
    "ddp consensus": ("ddp", {"mask": {"agreement": "consensus"}, "parallel": {"comm_hook": "bf16"}}),
    "ddp own statistics": ("ddp", {"parallel": {"batch_norm": "reduce"}}),
    "deepspeed stage 0": ("deepspeed", {"parallel": {"zero_stage": 0}}),
    "deepspeed stage 1": ("deepspeed", {"parallel": {"zero_stage": 1}}),
    "deepspeed stage 3": ("deepspeed", {"parallel": {"zero_stage": 3}, "optim": ADAMW}),
    "fsdp2": ("fsdp2", {"optim": ADAMW}),
    "fsdp2 shards": ("fsdp2", {"parallel": {"sharded_checkpoints": True}}),
}


def with_changes(sections: tiny.Sections, changes: tiny.Sections) -> tiny.Sections:
    return sections | {name: sections.get(name, {}) | section for name, section in changes.items()}


def train(rank: int, backend: str, cache: Path, folder: Path, sections: tiny.Sections) -> None:
    """Train one rank of a run and of two branches from its middle, one of them with other settings."""
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    warnings.simplefilter("ignore")
    same = with_changes(sections, {"run": {"branch_from": str(at_step(folder / "parent", 2))}})
    other = with_changes(same, {"optim": CHANGED})
    for name, asked in (("parent", sections), ("same", same), ("other", other)):
        assert tiny.train_rank(rank, 2, backend, cache, folder / name, asked)


def at_step(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    found = load_file(checkpoint.whole_weights(at_step(run_dir, step)))
    return {name: t.double() for name, t in found.items() if "running" not in name and t.is_floating_point()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_branch_goes_on_as_the_run_itself_or_as_its_settings_say(cache: Path, tmp_path: Path, name: str) -> None:
    backend, changes = CASES[name]
    if backend == "deepspeed":
        pytest.importorskip("deepspeed", reason='pip install "gmscale[deepspeed]"')
    stores, sections = tmp_path / "stores", with_changes(SECTIONS, changes)
    stores.mkdir()
    run_ranks(train, 2, stores, backend, cache, tmp_path, sections, timeout_s=240)
    parent, same, other = (tmp_path / name for name in ("parent", "same", "other"))

    found = tiny.tensors(parent)
    assert {f"rank-0000{rank}.safetensors" for rank in (0, 1)} <= {name.split("/")[0] for name in found}
    assert tiny.different(found, tiny.tensors(same)) == []
    assert tiny.untimed(tiny.metrics(same)) == [r for r in tiny.untimed(tiny.metrics(parent)) if r["step"] > 2]

    # The first step by hand: SGD (Nesterov's) and AdamW subtract rate * (what does not depend on them + decay * w).
    rate, new_rate = (0.5 * lr for lr in (sections["optim"]["lr"], CHANGED["lr"]))  # in the middle of the cosine
    factor = 1.0 if sections["optim"].get("opt") == "adamw" else 1.9
    start, end = weights(parent, 2), weights(parent, 3)

    def expected(decay: float) -> dict[str, Tensor]:
        more = {n: factor * (decay - DECAY) * (w if w.ndim > 1 else 0 * w) for n, w in start.items()}
        return {n: w - new_rate * ((w - end[n]) / rate + more[n]) for n, w in start.items()}

    def distance(decay: float) -> float:
        """How far the branch is from what it should be with such a decay, relative to its step."""
        took, right = weights(other, 3), expected(decay)
        error = sum(float((took[n] - right[n]).square().sum()) for n in start)
        return math.sqrt(error / sum(float((took[n] - start[n]).square().sum()) for n in start))

    assert distance(CHANGED["weight_decay"]) < 1e-3
    assert distance(DECAY) > 0.05


def refusal(rank: int, cache: Path, run_dir: Path, sections: tiny.Sections) -> str:
    with pytest.raises((UsageError, PeerError)) as caught:  # one rank says it for all
        tiny.train_rank(rank, 2, "ddp", cache, run_dir, sections)
    return str(caught.value)


@pytest.mark.slow
def test_a_branch_of_another_number_of_ranks_says_so_or_is_elastic(cache: Path, tmp_path: Path) -> None:
    parent, stores = tmp_path / "parent", tmp_path / "stores"
    stores.mkdir()
    tiny.train(tiny.config(cache, parent, **with_changes(SECTIONS, {"optim": {"grad_accum_steps": 4}})))
    origin = parent / "checkpoints/step-00000002"
    sections = with_changes(SECTIONS, {"run": {"branch_from": str(origin)}, "optim": {"grad_accum_steps": 4}})
    said = run_ranks(refusal, 2, stores, cache, tmp_path / "run", sections)
    assert said[0].startswith(f"run.branch_from {origin} was saved at world size 1, and this run has 2; start as")
    assert not (tmp_path / "run").exists()

    elastic = with_changes(sections, {"parallel": {"elastic": True}, "optim": {"lr": 0.02}})
    assert run_ranks(finish, 2, stores, cache, tmp_path / "run", elastic) == [True, True]
    found = tiny.metrics(tmp_path / "run")
    assert (found[0]["phase"], found[0]["step"], found[0]["world_size"]) == ("world", 3, 2)


def finish(rank: int, cache: Path, run_dir: Path, sections: tiny.Sections) -> bool:
    return tiny.train_rank(rank, 2, "ddp", cache, run_dir, sections)
