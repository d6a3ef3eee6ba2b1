"""What is measured of a trained model, one result after another, each kept at once in the scorecard."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gmscale import scorecards
from gmscale.data import DataConfig, StreamValLoader, ValLoader
from gmscale.errors import UsageError
from gmscale.evaluation.accuracy import evaluate
from gmscale.evaluation.attacks import Attack, robust_top1
from gmscale.evaluation.pruning import pruned
from gmscale.files import write_atomically
from gmscale.parallel import World


@dataclass(frozen=True)
class Accuracy:
    """Top1, top5 and loss of the model as it is."""


@dataclass(frozen=True)
class Pruning:
    """Top1 after global magnitude pruning."""

    sparsity: float


Measurement = Accuracy | Pruning | Attack
_SECTIONS = {Pruning: "pruning", Attack: "attacks"}


def measure(
    what: Measurement,
    model: nn.Module,
    loader: ValLoader | StreamValLoader,
    config: DataConfig,
    world: World,
    *,
    seed: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, float]:
    """Return what one measurement finds, in percent but for the loss; a collective. `model` is left as it is.

    `seed` is that of what attacks draw; `on_batch` hears, during attacks, of how many images this rank has done.
    """
    if isinstance(what, Attack):
        return {"top1": robust_top1(model, loader, config, world, what, seed=seed, on_batch=on_batch)}
    if isinstance(what, Pruning):
        sparse, measured = pruned(model, what.sparsity)
        return {"measured": measured, "top1": evaluate(sparse, loader, config, world)["top1"]}
    return evaluate(model, loader, config, world)


class Scorecard:
    """The scorecard at `path`. All its results are of one model and one set of images, which `about` describes."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Take up the results at `path`. Raises UsageError if they are of another model or other images."""
        self._path = path
        self.content = scorecards.read(path)
        if self.content:
            different = [key for key, now in _flat(about).items() if _flat(self.content).get(key) != now]
            if different == ["sha256"]:
                self.content = {}  # of weights that are no more: the run was trained again in this directory
            elif different:
                key = next(key for key in different if key != "sha256")
                was, now = (_flat(values).get(key) for values in (self.content, about))
                raise UsageError(
                    f"{path} holds results of {key} {_shown(was)}, these would be of {_shown(now)}; name another "
                    "file with --out, or remove it"
                )
        if not self.content:
            self.content = {**about, "samples": None, "accuracy": {}, "pruning": [], "attacks": []}

    def has(self, what: Measurement) -> bool:
        """Whether the result is there."""
        if isinstance(what, Accuracy):
            return bool(self.content["accuracy"])
        asked = asdict(what)
        return any(asked.items() <= entry.items() for entry in self.content[_SECTIONS[type(what)]])

    def add(self, what: Measurement, found: Mapping[str, float]) -> None:
        """Keep what `measure` returned; the file is complete at any moment."""
        if isinstance(what, Accuracy):
            self.content["samples"] = found["count"]
            self.content["accuracy"] = {
                name: found[name] if math.isfinite(found[name]) else None for name in ("top1", "top5", "loss")
            }
        else:
            entries = self.content[_SECTIONS[type(what)]]
            entries.append({**asdict(what), **found})
            entries.sort(key=lambda entry: [entry[name] for name in asdict(what)])
        write_atomically(self._path, json.dumps(self.content, indent=1, allow_nan=False))


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key != "settings"} | about.get("settings", {})


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
