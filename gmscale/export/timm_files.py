"""Weights and configuration as plain timm reads them: a safetensors file, and a folder in its hub format."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from torch import nn

from gmscale.errors import RunError
from gmscale.trained import Trained

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FILES = (WEIGHTS, CONFIG, CARD)


def arguments(trained: Trained) -> dict[str, Any]:
    """Return what timm.create_model needs besides the name to make this model."""
    data, description = trained.config.data, trained.description
    return {
        "num_classes": trained.outputs,
        **({"in_chans": data.channels} if data.channels != description["input_size"][0] else {}),
        **({"img_size": data.image_size} if description.get("fixed_input_size") else {}),
        **trained.config.model.kwargs,
    }


def preprocessing(trained: Trained) -> dict[str, Any]:
    """Return how validation images are prepared, in timm's words."""
    data = trained.config.data
    mean, std = data.statistics
    return {
        "input_size": [data.channels, data.image_size, data.image_size],
        "interpolation": data.eval_interpolation,
        "crop_pct": data.crop_pct,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
    }


def write_weights(trained: Trained, path: Path) -> None:
    """Write the weights under timm's key names."""
    # copies of their own: safetensors refuses tensors that share memory
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in trained.model.state_dict().items()}
    # save_file would let nobody but the owner read it
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def write_config(trained: Trained, folder: Path) -> None:
    """Write config.json of timm's hub format."""
    description, given = trained.description, arguments(trained)
    outputs = given.pop("num_classes")
    # what timm needs to change the classifier, the channels or the image size of these weights
    kept = ("fixed_input_size", "first_conv", "classifier")
    config: dict[str, Any] = {
        "architecture": trained.architecture,
        "num_classes": outputs,
        "num_features": trained.model.num_features,
    }
    if trained.classes:
        config["label_names"] = list(trained.classes)
    if given:
        config["model_args"] = given
    config["pretrained_cfg"] = {
        "custom_load": False,
        **preprocessing(trained),
        **{name: description[name] for name in kept if description.get(name) is not None},
        "num_classes": outputs,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def check_file(trained: Trained, path: Path) -> None:
    """Raise RunError unless plain timm makes the same model with the file."""
    _made(trained, path, trained.config.model.name, **arguments(trained), checkpoint_path=path)


def check_folder(trained: Trained, folder: Path) -> None:
    """Raise RunError unless plain timm makes the same model, for the same images, from the folder."""
    made = _made(trained, folder, f"local-dir:{folder}", pretrained=True)
    found = timm.data.resolve_model_data_config(made)
    wanted = preprocessing(trained)
    wrong = [name for name, value in wanted.items() if _plain(found[name]) != _plain(value)]
    if wrong:
        name = wrong[0]
        raise RunError(f"timm reads {name} {found[name]} from the exported {CONFIG}; expected {wanted[name]}")


def _made(trained: Trained, path: Path, name: str, **arguments: Any) -> nn.Module:
    """Return what timm makes of an export; RunError unless it is the same model."""
    try:
        made = timm.create_model(name, **arguments)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"timm does not load the exported {path.name}: {reason}") from error
    mine, theirs = trained.model.state_dict(), made.state_dict()
    differ = [key for key in mine if key not in theirs or not mine[key].equal(theirs[key])]
    differ += [key for key in theirs if key not in mine]
    if differ:
        raise RunError(
            f"timm does not make the same model of {path.name}: {len(differ)} tensors differ, first {differ[0]}"
        )
    return made


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
