"""What gmscale evaluate is given: a finished run, an exported folder, or a timm model's name; and its images."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from gmscale import data, models, parallel
from gmscale.config import ParallelConfig, TrainConfig
from gmscale.data import DataConfig, StreamValLoader, ValLoader
from gmscale.data.config import without_secrets
from gmscale.errors import UsageError, nearest
from gmscale.evaluation.described import by_folder, by_name, configured
from gmscale.evaluation.subject import spread
from gmscale.parallel import World
from gmscale.report import load_run
from gmscale.trained import load

# How gmscale evaluate calls what a run's configuration calls otherwise.
_FLAGS = {
    "model.pretrained: ": "",
    "model.name: ": "",
    "model.checkpoint": "--checkpoint",
    "data.source": "--source",
    "data.val_split": "--val_split",
    "data.image_size": "--image_size",
    "data.cache_dir": "--cache_dir",
    "data.eval_batch_size_per_device": "--batch_size",
}


@dataclass(frozen=True)
class Source:
    """Which weights of a model, and the images it is measured on; None leaves it to the run or the model."""

    checkpoint: str = "last"
    """last, best or a step of a run; of a timm model a file of weights, else its pretrained ones."""
    weights: str = "auto"
    """model, ema, or auto: the averaged ones if there are any."""
    limit: int | None = None
    batch_size: int | None = None
    cache_dir: str | None = None
    source: str | None = None
    """As data.source."""
    val_split: str | None = None
    image_size: int | None = None
    """Of a timm model or exported folder only: a run's model is measured at the size that it was trained for."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A model and the images that it is measured on."""

    name: str
    """As it was given."""
    model: nn.Module
    """On the CPU, float32, in evaluation mode; takes normalised images."""
    config: TrainConfig
    """Of the run; of other models what describes them and the images, and else the defaults."""
    loader: ValLoader | StreamValLoader
    limit: int | None
    """None where all images are measured."""
    classes: tuple[str, ...]
    """Names of the model's outputs; empty if nobody knows them."""
    about: dict[str, Any]
    """What all results of a scorecard have in common."""


def group_of(name: str) -> ParallelConfig:
    """Return how the ranks that measure `name` talk to each other: as its run's did, else by default.

    Raises UsageError for a run that has not finished, and for what is no model at all.
    """
    if not _is_run(name):
        return ParallelConfig()
    run = load_run(Path(name))
    if run.summary is None:
        raise UsageError(f"{name} has not finished (no summary.json); train it to its end first")
    return ParallelConfig(
        threads=run.setting("parallel.threads", ParallelConfig.threads),
        timeout_s=run.setting("parallel.timeout_s", ParallelConfig.timeout_s),
    )


def opened(name: str, source: Source, world: World) -> Opened:
    """Open a model and its images on every rank; a collective. Raises UsageError for what cannot be measured."""
    open_one = open_run if _is_run(name) else open_model
    # the first may put sharded weights together or fetch some, and the first of each node build the embedded set
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    for now in range(3):
        with parallel.together(world):
            if now == turn:
                found = open_one(name, source, world)
    return found


def _is_run(name: str) -> bool:
    """Whether `name` is a run directory, by its config.yaml. Raises UsageError if it is no model of any kind."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.yaml", "config.json")):
            raise UsageError(
                f"{name} is neither a run (it has no config.yaml) nor a folder of gmscale export --format hf (no "
                "config.json)"
            )
        return (path / "config.yaml").exists()
    if not timm.is_model(name.partition(".")[0]):
        raise UsageError(
            f"{name}: no such directory, and timm has no such model{nearest(name, timm.list_models())}"
        )
    return False


def open_run(name: str, source: Source, world: World) -> Opened:
    """Open a checkpoint of a finished run and this rank's share of its validation split."""
    if source.image_size is not None:
        raise UsageError(
            f"--image_size is for a timm model or an exported folder; {name} is a run, which has its own"
        )
    weights, run = source.weights, load_run(Path(name))
    if weights == "auto":
        weights = "ema" if run.setting("model.ema_decay", 0) else "model"
    trained = load(Path(name), source.checkpoint, weights)
    config = replace(trained.config, data=_section(trained.config.data, source))
    loader, limit = _images(config.data, source.limit, world)
    step, kind = f"step-{trained.step:08d}", "model_ema" if trained.averaged else "model"
    about = {
        "checkpoint": step,
        "step": trained.step,
        "weights": "ema" if trained.averaged else "model",
        "sha256": _file_digest(trained.run.path / "checkpoints" / step / f"{kind}.safetensors"),
        "settings": _settings(config.data, limit),
        "seed": config.run.seed,
    }
    if source.source or source.val_split:
        _check_classes(name, trained.outputs, trained.classes, loader)
    return Opened(name, trained.model, config, loader, limit, trained.classes, about)


def open_model(name: str, source: Source, world: World) -> Opened:
    """Open a timm model by name, with its pretrained weights or those of a file, or an exported folder.

    Images are prepared by the model's pretrained_cfg (`configured`). Raises UsageError for weights that are not the
    model's, classifier included, and for images of other classes than its.
    """
    if source.source is None:
        raise UsageError(f"{name} is no run, which would say where its images are; name them with --source")
    if Path(name).is_dir() and source.checkpoint != "last":
        raise UsageError(
            f"--checkpoint is for a run or a timm model's name; {name} is a folder with its own weights"
        )
    try:
        # last is the default, which is a run's
        file = None if source.checkpoint == "last" else Path(source.checkpoint)
        described = by_folder(Path(name)) if Path(name).is_dir() else by_name(name, file, source.weights)
        config = configured(described, source.source, source.image_size, source.weights)
        config = replace(config, data=_section(config.data, source))
        loader, limit = _images(config.data, source.limit, world)
        model = models.create(config, described.outputs)
        loaded = models.start_from(model, config, described.file)
    except UsageError as error:
        text = str(error)
        for key, flag in _FLAGS.items():
            text = text.replace(key, flag)
        raise UsageError(text) from None
    assert loaded is not None
    fresh = {key: why for key, why in loaded.fresh.items() if not key.endswith("num_batches_tracked")}
    if fresh:
        key, why = next(iter(fresh.items()))
        raise UsageError(f"{loaded.source} does not give {name} all of its weights: {key}: {why}")
    names = _check_classes(name, described.outputs, described.classes, loader)
    about = {
        "model": name,
        "checkpoint": described.file.name if described.file else loaded.source,
        "step": None,
        "weights": "ema" if source.weights == "ema" else "model",
        "sha256": _file_digest(described.file) if described.file else _digest(model),
        "settings": {**_settings(config.data, limit), "image_size": config.data.image_size},
        "seed": config.run.seed,
    }
    return Opened(name, model.eval(), config, loader, limit, names, about)


def _section(section: DataConfig, source: Source) -> DataConfig:
    """Return the settings of the images as asked for."""
    return replace(
        section,
        source=source.source or section.source,
        val_split=source.val_split or section.val_split,
        cache_dir=source.cache_dir or section.cache_dir,
        eval_batch_size_per_device=source.batch_size or section.eval_batch_size_per_device,
    )


def _images(section: DataConfig, limit: int | None, world: World) -> tuple[ValLoader | StreamValLoader, int | None]:
    """Return a rank's share of the split, or of `limit` images spread over it; None if that is all of them."""
    loader = data.val_loader(section, world.rank, world.size)
    if limit is None:
        return loader, None
    if isinstance(loader, StreamValLoader):
        raise UsageError("--limit needs data.access index; this run's is stream")
    if limit >= len(loader.index):
        return loader, None
    return ValLoader(spread(loader.index, limit), section, world.rank, world.size), limit


def _check_classes(
    name: str, outputs: int, classes: tuple[str, ...], loader: ValLoader | StreamValLoader
) -> tuple[str, ...]:
    """Return the names of the model's classes as far as it or the images know them; UsageError if they differ."""
    listed = loader.classes if isinstance(loader, StreamValLoader) else loader.index.split.classes
    if listed is None:
        if len(loader.classes) > outputs:
            raise UsageError(
                f"{name} has {outputs} classes, but the images at --source are also of class "
                f"{len(loader.classes) - 1}"
            )
        return classes
    if len(listed) != outputs:
        raise UsageError(f"{name} has {outputs} classes, the images at --source are of {len(listed)}")
    if set(listed) == set(classes) and tuple(listed) != classes:
        first = next(i for i, (own, other) in enumerate(zip(classes, listed, strict=True)) if own != other)
        raise UsageError(
            f"{name} has its classes in another order than --source: {first} is {classes[first]}, there "
            f"{listed[first]}"
        )
    return tuple(listed)


def _settings(section: DataConfig, limit: int | None) -> dict[str, Any]:
    return {"source": without_secrets(section.source), "val_split": section.val_split, "limit": limit}


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
