"""Checkpoints: complete or absent, safetensors and JSON only, never a pickle.

checkpoints/step-00000120/
    model.safetensors       weights in timm's key names (timm.create_model(..., checkpoint_path=...) reads it)
    model_ema.safetensors   the averaged weights, if there are any
    optimizer.safetensors   tensors of the optimizer state
    rank-00000.safetensors  what only this rank has: mask state, random states, running sums
    state.json              everything that is not a tensor; written last
The directory is written under a temporary name, synced and renamed.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gmscale import parallel
from gmscale.errors import RunError, UsageError
from gmscale.files import sync, write_durably
from gmscale.parallel import World

FORMAT = 2
_NAME = re.compile(r"step-(\d{8})")
_TENSOR = "__tensor__"
_INT_KEY = "__key__"  # JSON object keys are strings; the optimizer's are integers


# -- files --------------------------------------------------------------------------------------------------------
def save(
    run_dir: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    ema: nn.Module | None,
    shared: Mapping[str, Any],
    per_rank: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    keep: int,
    world: World,
) -> Path:
    """Write the checkpoint of `step`, which must not exist, and remove all but the newest `keep`; on every rank.

    `weights`, `shared` and `optimizer` are taken from rank 0; `per_rank` is saved for each. They are trees of
    dicts, lists, tuples, numbers, strings and tensors.
    """
    folder = run_dir / "checkpoints"
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    with parallel.together(world), _explained_disk_errors(temporary):
        if world.is_main:
            for left_over in folder.glob(".step-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            temporary.mkdir(parents=True)
    with parallel.together(world), _explained_disk_errors(temporary):
        own: dict[str, Tensor] = {}
        own_tree = pack(per_rank, own)
        _save_tensors(own, temporary / f"rank-{world.rank:05d}.safetensors", json.dumps(own_tree))
        if world.is_main:
            _save_tensors(weights, temporary / "model.safetensors")
            if ema is not None:
                _save_tensors(ema.state_dict(), temporary / "model_ema.safetensors")
            tensors: dict[str, Tensor] = {}
            optimizer_tree = pack(optimizer, tensors)
            _save_tensors(tensors, temporary / "optimizer.safetensors")
            state = {
                "format": FORMAT,
                "step": step,
                "world_size": world.size,
                "optimizer": optimizer_tree,
                "shared": dict(shared),
            }
            write_durably(temporary / "state.json", json.dumps(state, indent=1))
    with parallel.together(world), _explained_disk_errors(final):
        if world.is_main:
            sync(temporary)
            temporary.rename(final)
            sync(folder)
            for old in checkpoints(run_dir)[:-keep]:
                _remove(old)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    names = sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)) if folder.is_dir() else []
    return [p for p in names if (p / "state.json").is_file()]


def latest(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if there is one."""
    return next(reversed(checkpoints(run_dir)), None)


def read(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint: step, world_size, shared."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if state.get("format") != FORMAT:
        raise UsageError(f"checkpoint {path} has format {state.get('format')}; this gmscale reads format {FORMAT}")
    return state


def load_weights(path: Path, load: Callable[[Mapping[str, Tensor]], Any], name: str = "model") -> None:
    """Hand the weights of a checkpoint (`model`, or the averaged `model_ema`) to `load`, a load_state_dict."""
    file = path / f"{name}.safetensors"
    tensors, _ = _load_tensors(file)
    try:
        load(tensors)
    except RuntimeError as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())[:300]}") from None


def optimizer_state(path: Path) -> Any:
    """Return the tree saved as `optimizer`."""
    tensors, _ = _load_tensors(path / "optimizer.safetensors")
    return unpack(read(path)["optimizer"], tensors)


def load_rank(path: Path, world: World) -> dict[str, Any]:
    """Return what this rank saved as `per_rank`, with tensors on its device."""
    tensors, tree = _load_tensors(path / f"rank-{world.rank:05d}.safetensors")
    return unpack(json.loads(tree), {k: t.to(world.device) for k, t in tensors.items()})


@contextmanager
def _explained_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"checkpoint {path} cannot be written: {error}; the one before it stands") from error


# -- random states ------------------------------------------------------------------------------------------------
def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global generators as a tree."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=True)
    assert isinstance(numpy, tuple)
    name, keys, position, has_gauss, cached = numpy
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `random_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


# -- trees of tensors <-> JSON and a flat dict --------------------------------------------------------------------
def pack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `tree` as JSON values, its tensors moved into `tensors` under numbered names."""
    if isinstance(tree, Tensor):
        key = f"t{len(tensors):06d}"
        tensors[key] = tree
        return {_TENSOR: key}
    if isinstance(tree, Mapping):
        return {f"{_INT_KEY}{k}" if isinstance(k, int) else k: pack(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [pack(v, tensors) for v in tree]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a checkpoint cannot hold {type(tree).__name__}")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `pack` was given (tuples come back as lists)."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {
            int(k.removeprefix(_INT_KEY)) if k.startswith(_INT_KEY) else k: unpack(v, tensors)
            for k, v in tree.items()
        }
    return [unpack(v, tensors) for v in tree] if isinstance(tree, list) else tree


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, tree: str = "") -> None:
    # contiguous copies: safetensors refuses views and tensors that share memory
    flat = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    save_file(flat, path, metadata={"format": "pt", "tree": tree})
    sync(path)


def _load_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        with safe_open(path, "pt") as file:
            tree = (file.metadata() or {}).get("tree", "")
        return load_file(path), tree
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UsageError:
    folder = path if path.is_dir() else path.parent
    return UsageError(
        f"checkpoint file {path} cannot be read ({error}); remove {folder} to resume from an older one"
    )


def _remove(path: Path) -> None:
    # renamed first: a checkpoint that is being removed must not look complete
    doomed = path.with_name(f".{path.name}.old")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
