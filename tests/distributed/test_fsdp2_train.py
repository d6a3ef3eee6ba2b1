"""Back-end fsdp2: a run is resumed bit for bit, agrees with DDP, and its checkpoint is a plain timm model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
from ranks import run_ranks
from uneven import check_shards, sgd, snapshot, uneven

from gmscale import data, evaluation
from gmscale.errors import UsageError
from gmscale.parallel import World, wrap

pytest.importorskip("torch.distributed.fsdp", reason="torch without FSDP2")
from gmscale.parallel.fsdp2 import blocks

pytestmark = pytest.mark.slow

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"epochs": 1.5, "log_every": 5, "save_every_steps": 2},
    "model": {"drop_rate": 0.3},
    "data": {"batch_size_per_device": 5},
    "optim": {"lr": 0.05, "grad_accum_steps": 2, "clip_grad": 1.0},
}
ADAM_BF16: dict[str, dict[str, Any]] = SECTIONS | {
    "model": {"name": "test_resnet", "grad_checkpointing": True},
    "optim": {"opt": "adamw", "lr": 0.003, "amp": "bf16", "grad_accum_steps": 2},
    "parallel": {"reshard_after_forward": False},
}


def checkpointed(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


# -- resume -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("sections", [SECTIONS, ADAM_BF16], ids=["sgd", "adamw bf16 checkpointing"])
def test_three_ranks_resume_bit_for_bit(cache: Path, tmp_path: Path, sections: dict) -> None:
    """Three ranks: shards of unequal size, and sums that depend on their order."""
    undisturbed, run_dir, stores = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "stores"
    stores.mkdir()
    tiny.build(cache)
    assert run_ranks(tiny.train_rank, 3, stores, 3, "fsdp2", cache, undisturbed, sections) == [True] * 3
    assert run_ranks(tiny.train_rank, 3, stores, 3, "fsdp2", cache, run_dir, sections, 3) == [False] * 3
    assert tiny.checkpoint_steps(run_dir) == [2, 3]
    assert run_ranks(tiny.train_rank, 3, stores, 3, "fsdp2", cache, run_dir, sections) == [True] * 3
    found = tiny.tensors(run_dir)
    assert tiny.different(tiny.tensors(undisturbed), found) == []
    assert tiny.untimed(tiny.metrics(undisturbed)) == tiny.untimed(tiny.metrics(run_dir))
    records = [r for r in tiny.metrics(run_dir) if "count" in r]
    assert {r["count"] for r in records} == {tiny.VALIDATION_SIZE}

    # the checkpoint is a plain timm model, and that judges the images as the sharded one did
    config = tiny.config(cache, run_dir, **sections)
    model = timm.create_model(config.model.name, num_classes=10)
    model.load_state_dict(checkpointed(run_dir))
    assert {t.dtype for n, t in model.state_dict().items() if "tracked" not in n} == {torch.float32}
    alone = evaluation.evaluate(model, data.val_loader(config.data, 0, 1), config.data, tiny.ALONE)
    exact = config.optim.amp == "none"
    assert records[-1]["loss"] == pytest.approx(alone["loss"], rel=1e-6 if exact else 0.01)
    assert records[-1]["top1"] == pytest.approx(alone["top1"], abs=0 if exact else 4)  # bf16 may turn one image


# -- shards of the weights -----------------------------------------------------------------------------------------
def shards_of(rank: int, cache: Path, run_dir: Path) -> dict[str, Any]:
    """This rank's shards, and whether another model that loads them is the same one."""
    config = tiny.config(cache, run_dir)
    world = World(rank, rank, 3, torch.device("cpu"), "fsdp2", dist.group.WORLD)
    torch.manual_seed(0)
    first, second = (wrap(uneven(), sgd, config, world) for _ in range(2))
    first.backward(first.model(torch.rand(4, 3, 8, 8)).sum())  # the root's weights stay gathered
    first.step()
    shards = first.weight_shards()
    found = snapshot(first)
    second.load_weight_shards(shards)
    found["loaded"] = snapshot(second)["weights"]
    images = torch.rand(4, 3, 8, 8)
    found["logits"] = [w.eval_model(images).detach() for w in (first, second)]
    broken = dict(shards) | {"1.weight": shards["1.weight"]._replace(offset=1 + rank)}
    with pytest.raises(RuntimeError, match=f"{1 + rank} on of 1.weight" if rank == 0 else "rank 0 failed"):
        second.load_weight_shards(broken)
    return found


def test_the_ranks_shards_make_up_the_weights(cache: Path, tmp_path: Path) -> None:
    """Rows that three ranks cannot share equally, and fewer rows than ranks."""
    check_shards(run_ranks(shards_of, 3, tmp_path, cache, tmp_path))


# -- beside DDP ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "clip",
    [
        {"clip_mode": "norm", "clip_grad": 0.5},
        {"clip_mode": "value", "clip_grad": 0.003},
        {"clip_mode": "norm", "clip_grad": 0.5, "amp": "bf16"},
    ],
    ids=["norm", "value", "bf16"],
)
def test_weights_are_those_of_ddp(cache: Path, tmp_path: Path, clip: dict) -> None:
    """Without a mask; with dropout, batch norm, accumulation, momentum and clipping that bites."""
    tiny.build(cache)
    optim = SECTIONS["optim"] | clip
    sections = SECTIONS | {"optim": optim, "mask": {"enabled": False}}
    for backend in ("ddp", "fsdp2"):
        assert all(run_ranks(tiny.train_rank, 2, tmp_path, 2, backend, cache, tmp_path / backend, sections))
    ddp, fsdp2 = checkpointed(tmp_path / "ddp"), checkpointed(tmp_path / "fsdp2")
    assert ddp.keys() == fsdp2.keys()
    assert all(ddp[n].shape == t.shape and ddp[n].dtype == t.dtype for n, t in fsdp2.items())
    if "amp" not in clip:
        torch.testing.assert_close(fsdp2, ddp, rtol=1e-4, atol=1e-6)
    else:  # one value rounded the other way changes all later ones a little; training moves them by about 0.1
        trained = [n for n in ddp if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        assert sum(float((ddp[n] - fsdp2[n]).square().sum()) for n in trained) ** 0.5 < 0.003


# -- the command, what is refused, what is a block ----------------------------------------------------------------
def test_torchrun_trains(cache: Path, tmp_path: Path) -> None:
    tiny.build(cache)
    flags = tiny.flags(cache, tmp_path / "run", run={"epochs": 0.4}, parallel={"threads": 1, "backend": "fsdp2"})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = subprocess.run([*launcher, "-m", "gmscale", "train", *flags], capture_output=True, text=True, timeout=120)
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    touched = json.loads((tmp_path / "run" / "touched.json").read_text())
    assert "each micro-batch" in json.dumps(touched)


def refusals(rank: int, cache: Path, run_dir: Path) -> list[str]:
    messages = []
    for sections in (
        {"optim": {"amp": "fp16"}},
        {"optim": {"clip_mode": "agc", "clip_grad": 0.1}},
        {"model": {"ema_decay": 0.9}},
    ):
        with pytest.raises(UsageError) as caught:
            tiny.train_rank(rank, 1, "fsdp2", cache, run_dir, sections)
        messages.append(str(caught.value))
    assert not run_dir.exists()
    return messages


def test_refusals_say_what_to_do(cache: Path, tmp_path: Path) -> None:
    tiny.build(cache)
    fp16, agc, ema = run_ranks(refusals, 1, tmp_path, cache, tmp_path / "run")[0]
    assert "use bf16" in fp16
    assert "use norm or value" in agc
    assert "parallel.backend ddp" in ema


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_vit", [f"blocks.{i}" for i in range(6)]),
        ("test_resnet", [f"layer{i}.0" for i in (1, 2, 3, 4)]),
        ("test_byobnet", [f"stages.{i}.0" for i in range(4)]),
        ("test_convnext", ["stages.0.blocks.0", *[f"stages.{i}.blocks.{k}" for i in (1, 2) for k in (0, 1)]]),
        ("regnetx_002", ["stem", "s1", "s2", "s3", "s4"]),
        ("vgg11", []),
    ],
)
def test_blocks_are_the_innermost_repeated_parts_of_a_timm_model(name: str, expected: list[str]) -> None:
    model = timm.create_model(name)
    names = {module: path for path, module in model.named_modules()}
    assert [names[block] for block in blocks(model)][: max(1, len(expected))] == expected
