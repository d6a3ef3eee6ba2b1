"""Back-end deepspeed: a run is resumed bit for bit, agrees with DDP, and its checkpoint is a plain timm model."""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
import test_torchrun
import tiny
from ranks import run_ranks
from test_torchrun import Job
from uneven import check_shards, sgd, snapshot, uneven

from gmscale import data, evaluation
from gmscale.errors import UsageError
from gmscale.parallel import World, wrap

pytestmark = pytest.mark.slow

pytest.importorskip("deepspeed", reason='pip install "gmscale[deepspeed]"')

Sections = tiny.Sections
jobs = test_torchrun.jobs  # the fixture

SECTIONS: Sections = {
    "run": {"epochs": 1.0, "log_every": 2, "save_every_steps": 2},
    "model": {"drop_rate": 0.3},
    "data": {"batch_size_per_device": 5},
    "optim": {"lr": 0.05, "grad_accum_steps": 2, "clip_grad": 1.0},
}
VIT = {"name": "test_vit", "kwargs": {"img_size": 32}}


def with_changes(**changes: dict[str, Any]) -> Sections:
    return SECTIONS | {name: SECTIONS.get(name, {}) | section for name, section in changes.items()}


def stage(number: int, **changes: dict[str, Any]) -> Sections:
    return with_changes(parallel={"zero_stage": number, "overlap_comm": number != 2}, **changes)


ADAMW = {"opt": "adamw", "lr": 0.003}
CASES: dict[str, Sections] = {
    "stage 0": stage(0, model={"ema_decay": 0.8}),
    "stage 1": stage(1, model={"ema_decay": 0.8}),
    "stage 2": stage(2, optim=ADAMW),
    "stage 3": stage(3, optim=ADAMW),
    # DeepSpeed switches to autocast for the whole process: these come last
    "stage 3 fp16": stage(3, optim=ADAMW | {"amp": "fp16"}, model=VIT, run={"log_every": 1}),
    "stage 1 bf16": stage(1, optim=ADAMW | {"amp": "bf16"}),
    "stage 3 bf16": stage(3, optim={"amp": "bf16"}, model=VIT | {"grad_checkpointing": True}),
}


def train(
    rank: int, backend: str, cache: Path, folder: Path, cases: dict[str, Sections], stop_after: int | None = None
) -> list[bool]:
    """Train one rank of several runs, each asked to stop after some steps; return which of them finished."""
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    warnings.simplefilter("ignore")
    import deepspeed

    type(deepspeed.get_accelerator()).is_fp16_supported = lambda _: True  # slow fp16 is exact too
    return [
        tiny.train_rank(rank, 2, backend, cache, folder / name, sections, stop_after)
        for name, sections in cases.items()
    ]


def checkpointed(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def loaded(cache: Path, run_dir: Path, sections: Sections) -> torch.nn.Module:
    """The checkpoint's weights in a plain timm model."""
    config = tiny.config(cache, run_dir, **sections)
    model = timm.create_model(config.model.name, num_classes=10, **config.model.kwargs)
    model.load_state_dict(checkpointed(run_dir))
    return model


# -- resume -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_runs_are_resumed_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    undisturbed, folder, stores = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "stores"
    stores.mkdir()
    run = lambda *arguments: run_ranks(train, 2, stores, "deepspeed", cache, *arguments, timeout_s=200)  # noqa: E731
    assert run(undisturbed, CASES) == [[True] * len(CASES)] * 2
    assert run(folder, CASES, 3) == [[False] * len(CASES)] * 2
    assert run(folder, CASES) == [[True] * len(CASES)] * 2
    for name, sections in CASES.items():
        run_dir = folder / name
        found = tiny.tensors(run_dir)
        assert tiny.different(tiny.tensors(undisturbed / name), found) == [], name
        assert tiny.untimed(tiny.metrics(undisturbed / name)) == tiny.untimed(tiny.metrics(run_dir)), name
        norms = [r["grad_norm"] for r in tiny.metrics(run_dir) if r["phase"] == "train"]
        known = [norm for norm in norms if norm is not None]
        assert known, name
        assert all(norm > 0 for norm in known), name
        assert len(known) == len(norms) or "fp16" in name  # a step that overflows has no norm

        # the checkpoint is a plain timm model in float32, and that judges the images as the engine did
        model = loaded(cache, run_dir, sections)
        assert {t.dtype for n, t in checkpointed(run_dir).items() if "tracked" not in n} == {torch.float32}
        config = tiny.config(cache, run_dir, **sections)
        alone = evaluation.evaluate(model, data.val_loader(config.data, 0, 1), config.data, tiny.ALONE)
        last = [r for r in tiny.metrics(run_dir) if r["phase"] == "validation"][-1]
        assert last["count"] == tiny.VALIDATION_SIZE
        assert last["loss"] == pytest.approx(alone["loss"], rel=0.01 if "fp16" in name else 1e-6), name


@pytest.mark.slow
def test_torchrun_stops_and_goes_on(cache: Path, tmp_path: Path, jobs: list[Job]) -> None:
    sections = stage(3, run={"epochs": 3.0, "log_every": 3, "save_every_steps": 4})
    sections["parallel"] = sections["parallel"] | {"backend": "deepspeed"}
    run_dir = tmp_path / "run"
    argv = ["train", *tiny.flags(cache, run_dir, **sections)]
    jobs.append(Job(tmp_path / "log-1", *argv))
    jobs[-1].wait_for_step(run_dir, 3)
    os.kill(jobs[-1].pid, signal.SIGTERM)
    assert jobs[-1].wait(60) != 0
    assert f"stopped on request after step {tiny.checkpoint_steps(run_dir)[-1]} of 15" in jobs[-1].output
    jobs.append(Job(tmp_path / "log-2", *argv))
    assert jobs[-1].wait(150) == 0, jobs[-1].output
    assert "DeepSpeed" not in jobs[-1].output
    train = [r["step"] for r in tiny.metrics(run_dir) if r["phase"] == "train"]
    assert train == [3, 5, 6, 9, 10, 12, 15]  # every third, and the end of each epoch: each once


# -- shards of the weights -----------------------------------------------------------------------------------------
def shards_of(rank: int, cache: Path, run_dir: Path, frozen: bool) -> dict[str, Any]:
    """This rank's shards, and whether another model that loads them is the same one."""
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    config = tiny.config(cache, run_dir, parallel={"zero_stage": 3})
    world = World(rank, rank, 3, torch.device("cpu"), "deepspeed", dist.group.WORLD)
    torch.manual_seed(0)
    first, second = (wrap(uneven(frozen), sgd, config, world) for _ in range(2))
    first.backward(first.model(torch.rand(4, 3, 8, 8)).sum())
    first.step()
    shards = first.weight_shards()
    found = snapshot(first)
    second.load_weight_shards(shards)
    found["loaded"] = snapshot(second)["weights"]
    images = torch.rand(4, 3, 8, 8)
    found["logits"] = [w.eval_model(images).detach() for w in (first, second)]
    second.backward(second.model(images).sum())  # the masters are the loaded ones too
    first.backward(first.model(images).sum())
    first.step(), second.step()
    found["next"] = [dict(w.weights()) for w in (first, second)]
    return found


@pytest.mark.parametrize("frozen", [False, True])
def test_the_ranks_shards_make_up_the_weights(cache: Path, tmp_path: Path, frozen: bool) -> None:
    """Weights that three ranks cannot share equally, and with fewer entries than ranks."""
    found = run_ranks(shards_of, 3, tmp_path, cache, tmp_path, frozen)
    check_shards(found)
    assert tiny.different(*found[0]["next"]) == []


# -- beside DDP ---------------------------------------------------------------------------------------------------
def test_weights_are_those_of_ddp(cache: Path, tmp_path: Path) -> None:
    """Without a mask, and with dropout, batch norm, accumulation, momentum and clipping that bites."""
    plain = with_changes(mask={"enabled": False}, optim={"clip_grad": 0.05})
    bf16 = plain | {"optim": plain["optim"] | {"amp": "bf16"}}
    runs = {f"stage {n}": plain | {"parallel": {"zero_stage": n}} for n in range(4)}
    runs |= {f"stage {n} bf16": bf16 | {"parallel": {"zero_stage": n}} for n in (1, 3)}
    ddp = {"ddp": plain, "ddp bf16": bf16}
    assert run_ranks(train, 2, tmp_path, "ddp", cache, tmp_path, ddp) == [[True] * 2] * 2
    assert run_ranks(train, 2, tmp_path, "deepspeed", cache, tmp_path, runs, timeout_s=200) == [[True] * 6] * 2
    for name in runs:
        exact = "bf16" not in name
        reference = tmp_path / ("ddp" if exact else "ddp bf16")
        wanted, found = checkpointed(reference), checkpointed(tmp_path / name)
        assert all(found[n].shape == t.shape and found[n].dtype == t.dtype for n, t in wanted.items())
        say = lambda message, name=name: f"{name}: {message}"  # noqa: E731
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if exact else {"rtol": 1e-2, "atol": 5e-3}
        torch.testing.assert_close(found, wanted, **tolerance, msg=say)
        norms = [
            [r["grad_norm"] for r in tiny.metrics(d) if r["phase"] == "train"] for d in (reference, tmp_path / name)
        ]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4 if exact else 1e-2)


# -- what is refused ----------------------------------------------------------------------------------------------
def refusals(rank: int, cache: Path, folder: Path) -> dict[str, str]:
    attempts = {
        "clip": stage(1, optim={"clip_mode": "agc"}),
        "fp16 stage 0": stage(0, optim={"amp": "fp16"}),
        "fp16 norm": stage(1, optim={"amp": "fp16"}),
        "fp16 average": stage(1, optim={"amp": "fp16"}, model=VIT | {"ema_decay": 0.9}),
        "average": stage(3, model={"ema_decay": 0.9}),
        "lamb": stage(2, optim={"opt": "lamb"}),
        "site": stage(1, mask={"site": "ddp"}),
    }
    messages = {}
    for name, sections in attempts.items():
        with pytest.raises(UsageError) as caught:
            train(rank, "deepspeed", cache, folder, {name: sections})
        messages[name] = str(caught.value)
    return messages


def test_what_deepspeed_cannot_do_is_refused_in_a_line(cache: Path, tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    stores.mkdir()
    messages = run_ranks(refusals, 1, stores, cache, tmp_path)[0]
    assert "clips by norm only" in messages["clip"]
    assert "use stage 1, or bf16" in messages["fp16 stage 0"]
    assert "batch normalisation of test_byobnet" in messages["fp16 norm"]
    assert "float16" in messages["fp16 average"]
    assert "lower parallel.zero_stage" in messages["average"]
    assert "sgd or adamw" in messages["lamb"]
    assert "DistributedDataParallel" in messages["site"]
    assert not any("\n" in message for message in messages.values())
    assert [p for p in tmp_path.iterdir() if p != stores] == []
