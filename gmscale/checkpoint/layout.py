"""What a checkpoint directory holds, and reading it: safetensors and JSON only, never a pickle.

checkpoints/step-00000120/
    model.safetensors       weights in timm's key names (timm.create_model(..., checkpoint_path=...) reads it)
    model_ema.safetensors   the averaged weights, if there are any
    optimizer.safetensors   the optimizer state
    rank-00000.safetensors  what only this rank has: mask state, random states, running sums
    state.json              step, top1, and what a run has besides tensors; written last
The directory is written under a temporary name, synced and renamed.

With parallel.sharded_checkpoints each rank writes its own part of the weights, and nobody holds them all:
    weights-00001-of-00004.safetensors  flat parts of the weights in timm's key names, with their places
Then model.safetensors is made from them when somebody asks for it (`weights_file`), and in the last checkpoint when
the run has finished.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gmscale.checkpoint.shards import whole_weights
from gmscale.checkpoint.tensors import damaged, read_tensors
from gmscale.checkpoint.tree import unpack
from gmscale.errors import RunError, UsageError
from gmscale.parallel import World

FORMAT = 3
_NAME = re.compile(r"step-(\d{8})")


def rank_name(rank: int) -> str:
    """Return the name of the file of what only this rank has."""
    return f"rank-{rank:05d}.safetensors"


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    names = sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)) if folder.is_dir() else []
    return [p for p in names if (p / "state.json").is_file()]


def latest(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if there is one."""
    return next(reversed(checkpoints(run_dir)), None)


def best(run_dir: Path) -> Path | None:
    """Return the checkpoint with the best validation top1, the newest of equals; the newest if none has one."""
    found = checkpoints(run_dir)
    scored = [(read(p)["top1"], p) for p in found]
    return max((pair for pair in scored if pair[0] is not None), default=(None, latest(run_dir)))[1]


def weights_file(path: Path, weights: str = "auto") -> Path:
    """Return the file of weights at `path`: a file itself, a checkpoint, or a run directory (its best checkpoint).

    `weights` chooses among a checkpoint's own (model) and averaged (ema) ones; auto prefers the averaged. Sharded
    weights are put together first. Raises UsageError where there are none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UsageError(f"{path}: no such file or run directory")
    folder = path if (path / "state.json").is_file() else best(path)
    if folder is None:
        raise UsageError(f"{path} holds no complete checkpoint")
    averaged = folder / "model_ema.safetensors"
    if weights == "ema" and not averaged.is_file():
        raise UsageError(f"{folder} holds no averaged weights (its run had model.ema_decay 0)")
    return averaged if weights != "model" and averaged.is_file() else whole_weights(folder)


def read(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint: step, world_size, top1, sharded, shared."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None
    if state.get("format") != FORMAT:
        raise UsageError(f"checkpoint {path} has format {state.get('format')}; this gmscale reads format {FORMAT}")
    return state


def load_weights(path: Path, load: Callable[[Mapping[str, Tensor]], Any], name: str = "model") -> None:
    """Hand the weights of a checkpoint (`model`, or the averaged `model_ema`) to `load`, a load_state_dict."""
    file = path / f"{name}.safetensors"
    tensors, _ = read_tensors(file)
    with must_fit(file):
        load(tensors)


@contextmanager
def must_fit(path: Path) -> Iterator[None]:
    """Context of loading weights from `path` into a model: if they do not fit, that is a UsageError."""
    try:
        yield
    except RunError:  # of another rank
        raise
    except RuntimeError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())[:300]}") from None


def optimizer_state(path: Path) -> Any:
    """Return the tree saved as `optimizer`."""
    tensors, tree = read_tensors(path / "optimizer.safetensors")
    return unpack(json.loads(tree), tensors)


def load_rank(path: Path, world: World, rank: int | None = None) -> dict[str, Any]:
    """Return what this rank, or another `rank`, saved as `per_rank`, with tensors on this one's device."""
    tensors, tree = read_tensors(path / rank_name(world.rank if rank is None else rank))
    return unpack(json.loads(tree), {k: t.to(world.device) for k, t in tensors.items()})
