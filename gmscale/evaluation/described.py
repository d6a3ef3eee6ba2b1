"""A model that is no run: by timm's name, with weights of the hub or a file, or as a folder of gmscale export."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import get_arch_pretrained_cfgs

from gmscale import config as configuration
from gmscale.config import TrainConfig
from gmscale.errors import UsageError, nearest
from gmscale.models.weights import provenance, read_weights


@dataclass(frozen=True)
class Described:
    """A model as timm describes it."""

    architecture: str
    """With the tag of pretrained weights where `file` is None."""
    cfg: dict[str, Any]
    """timm's pretrained_cfg."""
    kwargs: dict[str, Any]
    file: Path | None
    outputs: int
    classes: tuple[str, ...]


def by_name(name: str, file: Path | None, weights: str) -> Described:
    """Return timm's description of a model, for its pretrained weights or those in a file.

    `weights` is model, ema or auto: which of the file's. Raises UsageError.
    """
    architecture, _, tag = name.partition(".")
    tags = [full.removeprefix(f"{architecture}.") for full in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise UsageError(
            f"timm has no weights {tag!r} of {architecture}{nearest(tag, tags)} ({', '.join(tags[:8])})"
        )
    found = timm.get_pretrained_cfg(name)
    if found is None:
        raise UsageError(f"timm does not describe {name}; expected a model that it has weights of")
    cfg = found.to_dict()
    outputs = int(cfg.get("num_classes") or 0)
    if file is not None:
        if not file.is_file():
            raise UsageError(f"--checkpoint {file}: no such file; expected weights of {name}")
        tensors, names = read_weights(file, weights), cfg.get("classifier")
        weight = tensors.get(f"{names[0] if isinstance(names, tuple | list) else names}.weight")
        outputs = outputs if weight is None else len(weight)
        told = provenance(file)
        cfg |= {key: values for key, values in (("mean", told.mean), ("std", told.std)) if len(values) == 3}
    if not outputs:
        raise UsageError(f"{name} has no classifier in these weights; expected a model that tells classes")
    subset = infer_imagenet_subset({**cfg, "num_classes": outputs})
    classes = tuple(ImageNetInfo(subset).label_names()) if subset else ()
    return Described(name, cfg, {}, file, outputs, classes)


def by_folder(folder: Path) -> Described:
    """Return what config.json of timm's hub format says, and the file of weights beside it. Raises UsageError."""
    path = folder / "config.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        architecture, cfg = told["architecture"], told.get("pretrained_cfg", told)
        outputs = int(told.get("num_classes") or cfg["num_classes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not timm's: {type(error).__name__}: {error}") from None
    if not timm.is_model(architecture):
        raise UsageError(f"{path}: timm has no model {architecture!r}{nearest(architecture, timm.list_models())}")
    found = [file for file in ("model.safetensors", "pytorch_model.bin") if (folder / file).is_file()]
    if not found:
        raise UsageError(f"{folder} has no weights; expected model.safetensors beside config.json")
    # what the images decide
    kwargs = {key: v for key, v in told.get("model_args", {}).items() if key not in ("in_chans", "img_size")}
    names = told.get("label_names")
    classes = tuple(map(str, names)) if isinstance(names, list) and len(names) == outputs else ()
    return Described(architecture, cfg, kwargs, folder / found[0], outputs, classes)


def configured(described: Described, source: str, image_size: int | None, weights: str) -> TrainConfig:
    """Return a configuration that makes the model, and its images from `source` as timm's validate.py does.

    That is by its pretrained_cfg: at test_input_size, where it has one, unless `image_size` is given.
    """
    cfg = resolve_data_config({}, pretrained_cfg=described.cfg, use_test_size=True)
    if cfg.get("crop_mode", "center") != "center":
        warnings.warn(
            f"timm prepares images of {described.architecture} with crop_mode {cfg['crop_mode']}; here their "
            "centre is cut out",
            stacklevel=2,
        )
    channels, _, size = cfg["input_size"]
    # of brightness there is one value, which three equal ones give
    mean, std = (
        [float(value) for value in (cfg[key] * 3 if channels == 1 else cfg[key])] for key in ("mean", "std")
    )
    section: dict[str, Any] = {
        "source": source,
        "image_size": image_size or size,
        "channels": channels,
        "mean": mean[:3],
        "std": std[:3],
        "crop_pct": float(cfg["crop_pct"]),
        "eval_interpolation": cfg["interpolation"],
    }
    return configuration.from_dict(
        {
            "model": {
                "name": described.architecture,
                "pretrained": described.file is None,
                "checkpoint": str(described.file or ""),
                "kwargs": described.kwargs,
                "channels_last": False,
            },
            "data": section,
            "finetune": {"weights": weights if described.file else "auto"},
        }
    )
