"""Reading weights that others wrote: safetensors, or PyTorch files without running the code in them."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gmscale.errors import UsageError

# Where training scripts keep weights in the dictionary that they save, those preferred first.
_AVERAGED = ("state_dict_ema", "model_ema")
_PLAIN = ("state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")  # of DDP and of torch.compile


class Provenance(NamedTuple):
    """What weights were trained with, as far as it is known."""

    architecture: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_weights(file: Path, weights: str = "auto") -> dict[str, Any]:
    """Return the tensors of a .safetensors, .pth, .pt, .bin or .tar file by name, as its author named them.

    Of a training checkpoint that holds several sets of weights, `weights` takes the plain (model) or the averaged
    ones (ema); auto prefers the averaged. Where it holds no known set, everything in it is returned. Nothing is
    executed. Raises UsageError for a file that cannot be read.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        try:
            return _without_wrappers(load_file(file))
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from None
    if file.suffix in (".npz", ".npy"):
        raise UsageError(f"{file}: NumPy weights are not read; take timm's conversion of them (model.pretrained)")
    content = _read_pickle(file)
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{file} holds a {type(content).__name__}; expected a dictionary of tensors (a state_dict)"
        )
    keys = {"auto": _AVERAGED + _PLAIN, "ema": _AVERAGED, "model": _PLAIN}[weights]
    chosen = next((content[key] for key in keys if isinstance(content.get(key), Mapping)), None)
    if chosen is None:
        if weights == "ema":
            raise UsageError(f"{file} holds no averaged weights; expected one of {', '.join(_AVERAGED)} in it")
        chosen = content
    return _without_wrappers(chosen)


def _read_pickle(file: Path) -> Any:
    try:
        # timm's checkpoints hold their arguments
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about details of pickles that end in an error or in none
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"({asked[1]}) " if asked else ""
        raise UsageError(
            f"{file} asks for code {what}to be run when it is read, and is refused; save its state_dict alone, "
            "best as safetensors"
        ) from None
    except Exception as error:  # torch raises what the damage leads to
        raise _unreadable(file, error) from None


def _without_wrappers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights without the prefixes that wrappers around the model put before its names."""
    return {_bare(name): value for name, value in weights.items()}


def _bare(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _unreadable(file: Path, error: Exception) -> UsageError:
    return UsageError(f"{file} cannot be read as weights: {' '.join(str(error).split())[:200]}")


def provenance(file: Path) -> Provenance:
    """Return what is said beside a file: by the checkpoint of a run that it is in, or in a hub folder."""
    for name, path_to in (("state.json", ("shared", "identity", "config")), ("config.json", ())):
        try:
            told: Any = json.loads(file.with_name(name).read_text())
            for key in path_to:
                told = told[key]
            if path_to:
                return Provenance(told["model"]["name"], tuple(told["data"]["mean"]), tuple(told["data"]["std"]))
            cfg = told.get("pretrained_cfg", told)
            return Provenance(told["architecture"], tuple(cfg["mean"]), tuple(cfg["std"]))
        except (OSError, ValueError, KeyError, TypeError):  # not there, or somebody else's
            continue
    return Provenance("", (), ())
