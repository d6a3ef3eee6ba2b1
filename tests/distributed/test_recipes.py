"""What a recipe changes about the back-ends: torch.compile, batch norm over ranks, unfreezing."""

import copy
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
from ranks import run_ranks
from stepping import NO_MASK, Run, world_of

from gmscale import build
from gmscale.errors import UsageError
from gmscale.parallel import World, set_batch_norm

pytestmark = pytest.mark.slow

MASKED: tiny.Sections = {"mask": {"error_feedback": True, "strength": 1.0}}
DROPPING = {"name": "test_byobnet", "drop_rate": 0.3}
ONE_MB = {"bucket_cap_mb": 1.0}  # two buckets


def with_model(sections: tiny.Sections, **model: Any) -> tiny.Sections:
    return sections | {"model": DROPPING | sections.get("model", {}) | model}


# -- torch.compile ------------------------------------------------------------------------------------------------
def steps(rank: int, size: int, backend: str, cache: Path, folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    """Train three steps of each case; return all that they changed."""
    found = {}
    for name, sections in cases.items():
        torch.compiler.reset()
        run = Run(tiny.config(cache, folder, **sections), world_of(rank, size, backend))
        for i in range(3):
            run.step(i)
            if i == 1:  # an evaluation in between
                evaluated = run.state.wrapped.eval_model.eval()
                logits = evaluated(torch.rand(5, 3, 32, 32)).detach()
        found[name] = run.everything() | {"logits": logits}
    return found


def assert_equal(found: dict[str, dict[str, Tensor]], exact: list[str], close: list[str]) -> None:
    for name in exact:
        assert tiny.different(found["plain"], found[name]) == [], name
    for name in close:
        assert found["plain"].keys() == found[name].keys()
        torch.testing.assert_close(found[name], found["plain"], rtol=1e-3, atol=1e-5)


def test_one_process_trains_the_same_when_compiled(cache: Path, tmp_path: Path) -> None:
    output = {"output": {"enabled": True, "start": 0.0, "end": 1.0}}
    base = MASKED | output
    cases = {"plain": with_model(base)} | {n: with_model(base, compile=n) for n in ("eager", "aot_eager")}
    found = steps(0, 1, "single", cache, tmp_path, cases)
    assert_equal(found, ["eager"], ["aot_eager"])
    assert any(name.startswith(".masks.mask.residuals") for name in found["eager"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_ranks_train_the_same_when_compiled(cache: Path, tmp_path: Path, backend: str) -> None:
    base = MASKED | {"parallel": ONE_MB}
    cases = {"plain": with_model(base)} | {n: with_model(base, compile=n) for n in ("eager", "aot_eager")}
    for found in run_ranks(steps, 2, tmp_path, 2, backend, cache, tmp_path, cases, timeout_s=200):
        assert_equal(found, ["eager"], ["aot_eager"])


@pytest.mark.slow
def test_deepspeed_trains_the_same_when_compiled(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    for stage in (0, 2):
        base = MASKED | {"parallel": {"zero_stage": stage}}
        cases = {"plain": with_model(base), "eager": with_model(base, compile="eager")}
        for found in run_ranks(steps, 2, tmp_path, 2, "deepspeed", cache, tmp_path, cases, timeout_s=200):
            assert_equal(found, ["eager"], [])


@pytest.mark.slow
def test_inductor_trains_the_same_within_rounding(cache: Path, tmp_path: Path) -> None:
    plain = with_model(NO_MASK, drop_rate=0.0)
    found = steps(
        0, 1, "single", cache, tmp_path, {"plain": plain, "inductor": with_model(plain, compile="inductor")}
    )
    torch.testing.assert_close(found["inductor"], found["plain"], rtol=2e-2, atol=2e-3)


def test_a_compiled_run_resumes_bit_for_bit(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an average of the weights, which copies the compiled model."""
    sections = {**tiny.EVERYTHING, "model": tiny.EVERYTHING["model"] | {"compile": "eager"}}
    tiny.train(tiny.config(cache, tmp_path / "undisturbed", **sections))
    config = tiny.config(cache, tmp_path / "run", **sections)
    with monkeypatch.context() as patch:
        tiny.after_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert tiny.train(config).summary is None
    assert tiny.train(config).summary is not None
    assert tiny.different(tiny.tensors(tmp_path / "undisturbed"), tiny.tensors(tmp_path / "run")) == []
    # the numbers of an evaluation are those of the plain model
    plain = {**sections, "model": tiny.EVERYTHING["model"]}
    tiny.train(tiny.config(cache, tmp_path / "plain", **plain))
    assert tiny.untimed(tiny.metrics(tmp_path / "plain")) == tiny.untimed(tiny.metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"compile": "indctor"}}, "did you mean 'inductor'"),
        ({"model": {"compile": "eager", "compile_mode": "max-autotune"}}, "belongs to inductor"),
        ({"model": {"compile_mode": "max-autotune"}}, "model.compile is not set"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_a_line(
    cache: Path, tmp_path: Path, sections: tiny.Sections, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Run(tiny.config(cache, tmp_path, **sections), tiny.ALONE)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inductor_needs_a_compiler(cache: Path, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    # not by monkeypatch, which leaves the setting deleted
    without = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        Run(tiny.config(cache, tmp_path, model={"compile": "inductor"}), tiny.ALONE)


# -- batch norm ---------------------------------------------------------------------------------------------------
def statistics(run: Run) -> dict[str, Tensor]:
    buffers = run.state.wrapped.bare.named_buffers()
    return {name: buffer.clone() for name, buffer in buffers if name.endswith(("running_mean", "running_var"))}


def own_statistics(rank: int, cache: Path, folder: Path) -> dict[str, Any]:
    """The statistics of two steps, those after averaging, and those of a run that went on from the first step."""
    config = tiny.config(cache, folder, **NO_MASK, parallel={"batch_norm": "reduce"})
    world = world_of(rank, 2, "ddp")
    run = Run(config, world)
    run.step(0)
    saved = copy.deepcopy(
        (run.state.wrapped.weights(), run.state.wrapped.optimizer_state(), run.state.wrapped.rank_state())
    )
    shared = [saved[:2]]
    dist.broadcast_object_list(shared)
    run.step(1)
    own = statistics(run)
    run.state.wrapped.average_statistics()
    resumed = Run(config, world, step=1, resumes=True)
    resumed.state.wrapped.load_weights(shared[0][0])
    resumed.state.wrapped.load_optimizer_state(shared[0][1], saved[2])
    resumed.step(1)
    return {"own": own, "mean": statistics(run), "resumed": statistics(resumed)}


def test_each_rank_has_its_own_statistics_until_they_are_averaged(cache: Path, tmp_path: Path) -> None:
    first, second = run_ranks(own_statistics, 2, tmp_path, cache, tmp_path)
    assert len(tiny.different(first["own"], second["own"])) == len(first["own"]) > 0
    assert tiny.different(first["mean"], second["mean"]) == []
    for name, mean in first["mean"].items():
        torch.testing.assert_close(mean, (first["own"][name] + second["own"][name]) / 2)
    for rank in (first, second):
        assert tiny.different(rank["own"], rank["resumed"]) == []


@pytest.mark.slow
def test_a_run_with_averaged_statistics_resumes_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    sections = {"run": {"epochs": 1.5, "log_every": 5}, "parallel": {"batch_norm": "reduce"}}
    undisturbed, run_dir, stores = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "stores"
    stores.mkdir()
    assert run_ranks(tiny.train_rank, 2, stores, 2, "ddp", cache, undisturbed, sections) == [True] * 2
    assert run_ranks(tiny.train_rank, 2, stores, 2, "ddp", cache, run_dir, sections, 2) == [False] * 2
    assert run_ranks(tiny.train_rank, 2, stores, 2, "ddp", cache, run_dir, sections) == [True] * 2
    assert tiny.different(tiny.tensors(undisturbed), tiny.tensors(run_dir)) == []


def world_like(backend: str, device: str = "cpu") -> World:
    return World(0, 0, 2, torch.device(device), backend)


def test_batch_norm_says_what_it_needs(cache: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    sync, reduce = (tiny.config(cache, tmp_path, parallel={"batch_norm": n}).parallel for n in ("sync", "reduce"))
    with pytest.raises(UsageError, match="needs GPUs"):
        set_batch_norm(model, sync, world_like("ddp"))
    for backend in ("fsdp2", "deepspeed"):
        with pytest.raises(UsageError, match=rf"'reduce' needs parallel.backend ddp; {backend}"):
            set_batch_norm(model, reduce, world_like(backend))
    with pytest.warns(UserWarning, match="no batch normalisation"):
        set_batch_norm(nn.Linear(2, 2), reduce, world_like("ddp"))
    names, weight = list(model.state_dict()), model[1].weight
    synchronised = set_batch_norm(model, sync, world_like("ddp", "cuda"))
    assert isinstance(synchronised[1], nn.SyncBatchNorm)
    assert list(synchronised.state_dict()) == names
    assert synchronised[1].weight is weight


# -- unfreezing ---------------------------------------------------------------------------------------------------
def count_reductions() -> list[int]:
    """Return a list that grows by the bytes of each bucket that is reduced in this process from now on."""
    counted, real = [], default_hooks._allreduce_fut

    def reduce(group: Any, tensor: Tensor) -> Any:
        counted.append(tensor.nbytes)
        return real(group, tensor)

    default_hooks._allreduce_fut = reduce
    return counted


def masks_of(run: Run) -> dict[str, Any]:
    return copy.deepcopy({name: mask.state_dict() for name, mask in run.state.attachments.items()})


KEPT: list[nn.Module] = []
"""Old DDP models, kept alive: they must reduce nothing more."""


def let_train(run: Run, names: str, trains: bool) -> None:
    """Change what trains as `build.unfreeze` does, but in both directions."""
    for parameter in run.state.wrapped.bare.get_submodule(names).parameters():
        parameter.requires_grad_(trains)
    held = masks_of(run)
    KEPT.append(run.state.wrapped.model)
    for mask in run.state.attachments.values():
        mask.detach()
    run.state.wrapped.refit()
    run.state.attachment, run.state.output_attachment = build._attach(run.state.wrapped, run.config, run.world)
    run.state.attachment.load_state_dict(held["mask"])


def unfrozen(rank: int, size: int, cache: Path, folder: Path, compile_: str) -> dict[str, Any]:
    """Unfreeze after one step and go on; beside it a run that starts there, with what the first one had."""
    sections = with_model(MASKED | {"parallel": ONE_MB}, compile=compile_)
    config, world = tiny.config(cache, folder, **sections), world_of(rank, size, "ddp")
    run = Run(config, world)
    let_train(run, "stages.0", False)
    run.step(0)
    assert all(p.grad is None for p in run.state.wrapped.bare.get_submodule("stages.0").parameters())
    let_train(run, "stages.0", True)
    wrapped = run.state.wrapped
    saved = copy.deepcopy((wrapped.weights(), wrapped.optimizer_state(), wrapped.rank_state(), masks_of(run)))

    counted = count_reductions()
    run.step(1)
    reduced = sum(counted)
    resumed = Run(config, world)
    resumed.state.wrapped.load_weights(saved[0])
    resumed.state.wrapped.load_optimizer_state(saved[1], saved[2])
    resumed.state.attachment.load_state_dict(saved[3]["mask"])
    resumed.step(1)
    run.step(2)
    resumed.step(2)
    gradients = sum(p.numel() * p.element_size() for p in wrapped.bare.parameters())
    return {"run": run.everything(), "resumed": resumed.everything(), "bytes": (reduced, gradients)}


@pytest.mark.parametrize("compile_", ["", "eager"])
def test_a_refitted_run_is_one_that_started_so(cache: Path, tmp_path: Path, compile_: str) -> None:
    """Three ranks: sums that depend on the order of their buckets."""
    for found in run_ranks(unfrozen, 3, tmp_path, 3, cache, tmp_path, compile_, timeout_s=120):
        assert tiny.different(found["run"], found["resumed"]) == []
        assert found["bytes"][0] == found["bytes"][1]  # each gradient is reduced once
