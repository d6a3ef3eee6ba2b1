"""Every recipe in configs/ says where it comes from, and really starts: two steps under torchrun, shrunk by flags.

Shrunk are the data, the model (to the tiny sibling of its family), batches and lengths. Everything else of the
recipe runs as it stands: optimizer, schedule, loss, augmentation, averaging, freezing, mask and back-end.
"""

import json
import math
import re
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import warm
import yaml
from safetensors.torch import save_file

from gmscale import config as configuration
from gmscale.config import TrainConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
FIELDS = ("command", "hardware", "hours", "expected")
SIBLINGS = {
    "resnet": "test_resnet",
    "convnext": "test_convnext",
    "efficientnet": "test_efficientnet",
    "deit": "test_vit",
    "vit": "test_vit",
    "test": "test_byobnet",
}

load = once(configuration.load)
by_name = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def header(path: Path) -> dict[str, str]:
    """The fields of the comments that a file opens with; what stands before them under ''."""
    found, field = {"": ""}, ""
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        named = re.fullmatch(r"# (\w+):\s+(.+)", line)
        field = named[1] if named else field
        found[field] = f"{found.get(field, '')} {named[2] if named else line[1:].strip()}".strip()
    return found


@by_name
def test_a_recipe_opens_with_its_command_hardware_hours_and_expected_metric(path: Path) -> None:
    said = header(path)
    assert said.keys() >= {*FIELDS}
    assert "reproduces" in said[""] or "is ours" in said[""] or "usual" in said[""]
    assert said["command"].startswith("torchrun ")
    assert f"-m gmscale train --config configs/{path.name}" in said["command"]
    if "not yet run" in said["expected"]:
        assert re.search(r"[Bb]y others", said["expected"])
        assert re.search(r"\d\d\.\d", said["expected"])
        assert re.search(r"arXiv \d{4}\.\d{5}|github\.com/|the same page", said["expected"])


@by_name
def test_the_global_batch_is_that_of_the_command(path: Path) -> None:
    said, config = header(path), load(path)
    processes = math.prod(int(n) for n in re.findall(r"--n(?:nodes|proc_per_node) (\d+)", said["command"]))
    batch = processes * config.data.batch_size_per_device * config.optim.grad_accum_steps
    assert f"global batch {batch}" in said["hardware"]


def test_every_back_end_and_the_named_kinds_of_recipe_are_there() -> None:
    loaded = [load(path) for path in CONFIGS]
    assert {(c.parallel.backend, c.parallel.zero_stage) for c in loaded if c.parallel.backend == "deepspeed"} == {
        ("deepspeed", stage) for stage in (1, 2, 3)
    }
    assert any(c.parallel.backend == "fsdp2" for c in loaded)
    assert {c.data.image_size for c in loaded} >= {32, 64, 160, 224, 384}
    assert any(c.finetune.linear_probe for c in loaded)


# ---- started ----------------------------------------------------------------------------------------------------


def shrunk(recipe: TrainConfig, cache: Path, folder: Path) -> tiny.Sections:
    """What changes for a run of two steps of two ranks."""
    sibling = SIBLINGS[re.match("[a-z]+", recipe.model.name)[0]]  # type: ignore[index]
    accumulate = recipe.optim.grad_accum_steps
    batch = 4 if accumulate > 1 else 8
    epoch = 1 / (tiny.SIZE // (2 * batch * accumulate))  # a step, in epochs
    sections: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "epochs": 2 * epoch},
        "model": {"name": sibling},
        "finetune": {},
        "optim": {"warmup_epochs": epoch} if recipe.optim.warmup_epochs > 0 else {},
        "data": {
            "source": "embedded",
            "size": tiny.SIZE,
            "cache_dir": str(cache),
            "image_size": tiny.IMAGE_SIZE,
            "batch_size_per_device": batch,
            "workers": 0,
        },
        "parallel": {"threads": 1},
    }
    if recipe.finetune.unfreeze_epoch > 0:
        sections["finetune"]["unfreeze_epoch"] = epoch
    if recipe.model.pretrained:  # weights of other classes and image size, as the hub's are
        weights = folder / "pretrained.safetensors"
        save_file(timm.create_model(sibling, num_classes=21).state_dict(), weights)
        sections["model"] |= {"pretrained": False, "checkpoint": str(weights)}
    return sections


@pytest.mark.slow
@by_name
def test_a_recipe_trains_two_steps_under_torchrun(path: Path, cache: Path, tmp_path: Path) -> None:
    recipe = load(path)
    if recipe.parallel.backend == "deepspeed":
        pytest.importorskip("deepspeed", reason='pip install "gmscale[deepspeed]"')
    changes = shrunk(recipe, cache, tmp_path)
    flags = [
        f"--{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for section, values in changes.items()
        for name, value in values.items()
    ]
    command = [*warm.TORCHRUN, "-m", "gmscale", "train", "--config", str(path), *flags]
    output = warm.run(tmp_path / "log", command, tmp_path)

    run_dir = tmp_path / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 2
    assert (summary["ema_top1"] is not None) == (recipe.model.ema_decay > 0)
    assert ("started from" in output) == recipe.model.pretrained
    assert tiny.checkpoint_steps(run_dir)[-1] == 2
    last = [record for record in tiny.metrics(run_dir) if record["phase"] == "train"][-1]
    assert last["skipped_steps"] == 0
    assert math.isfinite(last["loss"])
    assert 0 < last["kept_entries"] < 1
    # nothing but what is shrunk differs from the recipe
    expected = yaml.safe_load(recipe.to_yaml())
    for section, values in changes.items():
        expected[section] |= values
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == expected
