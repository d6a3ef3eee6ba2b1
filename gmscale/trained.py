"""What a run trained: the model of one of its checkpoints, and what the run says of it."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gmscale import checkpoint, models
from gmscale import config as configuration
from gmscale.config import TrainConfig
from gmscale.errors import UsageError, check_choice
from gmscale.report import Run, load_run


@dataclass(frozen=True)
class Trained:
    """A model on the CPU, in float32 and in evaluation mode, with the run it is of."""

    run: Run
    config: TrainConfig
    model: nn.Module
    step: int
    averaged: bool
    """Whether these are the averaged weights."""
    classes: tuple[str, ...]
    """Names of the outputs; empty if the run does not know them."""
    training_samples: int | None
    outputs: int
    started_from: dict[str, Any]
    """What the starting weights gave, as in started_from.json; empty if they were random."""

    @property
    def name(self) -> str:
        """A file name that says which weights these are."""
        return f"{self.architecture}-step{self.step}{'-ema' if self.averaged else ''}"

    @property
    def architecture(self) -> str:
        """timm's name of the model, without the tag of pretrained weights."""
        return self.config.model.name.split(".")[0]

    @property
    def description(self) -> dict[str, Any]:
        """What timm says of the architecture: default image size, names of the classifier and first layer, ..."""
        description: Any = self.model.pretrained_cfg
        return dict(description)

    @property
    def words(self) -> str:
        """Which weights these are, and their validation top1, for people."""
        found = self.validation(self.averaged)
        score = f"top1 {found['top1']:.2f} %" if found else "not evaluated"
        return f"{'averaged' if self.averaged else 'plain'} weights of step {self.step}, {score}"

    def validation(self, averaged: bool) -> dict[str, Any] | None:
        """Return the validation record of the plain or averaged weights at this checkpoint's step."""
        return next((line for line in self.validations(averaged) if line["step"] == self.step), None)

    def validations(self, averaged: bool) -> list[dict[str, Any]]:
        """Return all validation records of the plain or averaged weights that hold a top1."""
        lines = self.run.lines("validation_ema" if averaged else "validation")
        return [line for line in lines if line.get("top1") is not None]


def load(run_dir: Path, which: str, weights: str) -> Trained:
    """Return the model of a checkpoint (best, last or a step) of a run; UsageError where there is none.

    `weights` is model, ema or auto, which is the averaged weights if there are any.
    """
    check_choice(weights, ("auto", "model", "ema"), "weights")
    run = load_run(run_dir)
    try:
        config = configuration.from_dict(run.config)
    except UsageError as error:
        raise UsageError(f"{run_dir / 'config.yaml'}: {error}") from None
    folder = _checkpoint(run_dir, which)
    file = checkpoint.weights_file(folder, weights)  # puts sharded ones together
    averaged = file.stem == "model_ema"
    facts = _json(run_dir / "data.json")
    classes = tuple(facts.get("classes", ()))
    tensors: dict[str, Tensor] = {}
    checkpoint.load_weights(folder, tensors.update, file.stem)
    outputs = len(classes) or _outputs(config, tensors, folder)
    # what only training needs is left out; plain memory order, as files have it
    plain = replace(config.model, grad_checkpointing=False, drop_rate=0.0, drop_path_rate=0.0, channels_last=False)
    model = models.create(replace(config, model=plain), outputs).to(torch.float32)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(f"{folder} does not fit its config.yaml: {' '.join(str(error).split())[:300]}") from None
    step = checkpoint.read(folder)["step"]
    trained = Trained(
        run=run,
        config=config,
        model=model.eval(),
        step=step,
        averaged=averaged,
        classes=classes,
        training_samples=facts.get("training_samples"),
        outputs=outputs,
        started_from=_json(run_dir / "started_from.json"),
    )
    if weights == "auto" and averaged:
        _warn_of_better(trained)
    return trained


def _checkpoint(run_dir: Path, which: str) -> Path:
    found = {int(path.name.removeprefix("step-")): path for path in checkpoint.checkpoints(run_dir)}
    if not found:
        raise UsageError(f"{run_dir} holds no complete checkpoint yet; train it further")
    if which == "last":
        return found[max(found)]
    if which == "best":
        best = checkpoint.best(run_dir)
        assert best is not None
        return best
    steps = ", ".join(map(str, found))
    if not which.isdecimal():
        raise UsageError(f"--checkpoint is {which!r}; expected best, last or a step ({run_dir} has {steps})")
    if int(which) not in found:
        raise UsageError(f"{run_dir} has no checkpoint of step {which}; it has {steps}")
    return found[int(which)]


def _json(path: Path) -> dict[str, Any]:
    """Return what a file of the run holds; nothing if the run is from before it was written."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None


def _outputs(config: TrainConfig, tensors: dict[str, Tensor], folder: Path) -> int:
    """Return the number of outputs by the classifier's weights."""
    described = timm.get_pretrained_cfg(config.model.name)
    named = described.classifier if described is not None else None
    classifier = named[0] if isinstance(named, tuple | list) else named
    weight = tensors.get(f"{classifier}.weight")
    if weight is None:
        raise UsageError(f"{folder}: the number of classes is unknown, since its run has no data.json")
    return len(weight)


def _warn_of_better(trained: Trained) -> None:
    mine, plain = trained.validation(True), trained.validation(False)
    if mine and plain and plain["top1"] > mine["top1"]:
        warnings.warn(
            f"the averaged weights have top1 {mine['top1']:.2f} %, the plain ones {plain['top1']:.2f} %; "
            "--weights model takes those",
            stacklevel=3,
        )
