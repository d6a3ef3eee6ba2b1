"""Whole training loops to be compared, each run in fresh processes: `python -m gmscale.bench.loops TASK`.

All of them train the same timm model in channels_last memory on the same JPEGs, cropped and mirrored at random,
with cross-entropy, SGD with Nesterov momentum and a learning rate that falls as a cosine every step, on as many
processes. Each does what a user gets who takes it as it comes, from its imports to its files.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WARM_UP = 4  # steps that are no steady state: buckets settle, loader processes fill their queues


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one process of a loop is to do, and where it says how that went."""

    loop: str
    model: str
    image_size: int
    batch_size: int
    steps: int
    workers: int
    amp: str
    classes: int
    shards: str
    """Webdataset shards with the splits `train` and `validation`."""
    folders: str
    """The training images in a folder for each class."""
    directory: str
    """Where the run may write."""

    lr = 0.01
    momentum = 0.9
    weight_decay = 5e-4
    log_every = 10

    def write(self, path: Path) -> None:
        """Write the task for its processes."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Task":
        """Return the task that `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def answer(self, rank: int) -> Path:
        """Where a rank writes what it measured."""
        return Path(self.directory) / f"rank-{rank}.json"

    def arguments(self, decode: str) -> list[str]:
        """Return the command line of gmscale that does the task, decoding in one of its ways."""
        settings: dict[str, Any] = {
            "run.dir": f"{self.directory}/run",
            # one step more makes an epoch, so that rounding cannot take one away
            "run.epochs": self.steps / (self.steps + 1),
            "run.log_every": self.log_every,
            "run.deterministic": False,
            "model.name": self.model,
            "data.source": self.shards,
            "data.image_size": self.image_size,
            "data.batch_size_per_device": self.batch_size,
            "data.eval_batch_size_per_device": self.batch_size,
            "data.workers": self.workers,
            "data.decode": decode,
            "augment.crop_scale": [0.08, 1.0],
            "augment.crop_ratio": [3 / 4, 4 / 3],
            "augment.hflip": 0.5,
            "augment.color_jitter": 0.0,
            "optim.lr": self.lr,
            "optim.momentum": self.momentum,
            "optim.weight_decay": self.weight_decay,
            "optim.amp": self.amp,
            "mask.enabled": False,
        }
        return ["train", *(f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in settings.items())]
