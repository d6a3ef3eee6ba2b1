"""The run directory: what is in it, whether a run may go on there, and its first files."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from gmscale import checkpoint, environment, launched
from gmscale.config import TrainConfig, changed_on_resume
from gmscale.data.config import without_secrets
from gmscale.elastic import History
from gmscale.errors import UsageError, nearest
from gmscale.files import write_atomically
from gmscale.models import Loaded
from gmscale.parallel import World
from gmscale.sites import Attachment


def finished(run_dir: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Return the summary of the finished run in `run_dir`, or None if there is work to do.

    Raises UsageError, having written nothing, if the directory cannot be written or holds another run.
    """
    _check_writable(run_dir)
    if config.run.resume == "never" and (run_dir / "config.yaml").exists():
        raise UsageError(f"run.dir {run_dir} holds a run and run.resume is 'never'; choose another directory")
    saved, summary = run_dir / "config.yaml", run_dir / "summary.json"
    if not saved.exists():
        if summary.exists():
            raise UsageError(
                f"run.dir {run_dir} holds a summary.json without config.yaml; choose another directory"
            )
        return None
    _refuse_changes(yaml.safe_load(saved.read_text()), config, run_dir)
    return json.loads(summary.read_text()) if summary.exists() else None


def begin(
    run_dir: Path,
    config: TrainConfig,
    world: World,
    attachments: Mapping[str, Attachment],
    loaded: Loaded | None,
    identity: Mapping[str, Any],
    *,
    anew: bool,
) -> None:
    """Write config.yaml, environment.json and touched.json, and started_from.json about starting weights.

    A run that begins `anew`, without a checkpoint of its own, drops what an earlier start of it has logged.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if anew:
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        write_atomically(run_dir / "config.yaml", _to_keep(config).to_yaml())
        found = environment.describe(world) | {name: identity[name] for name in ("world_sizes", "branched_from")}
        write_atomically(run_dir / "environment.json", json.dumps(found, indent=1))
        write_touched(run_dir, attachments)
        if loaded is not None:
            write_atomically(run_dir / "started_from.json", json.dumps(asdict(loaded), indent=1))
    except OSError as error:
        raise UsageError(f"run.dir {run_dir} cannot be written: {error.strerror}") from None


def write_touched(run_dir: Path, attachments: Mapping[str, Attachment]) -> None:
    """Write touched.json; again after the first step, from which on the shapes of layer outputs are known."""
    if attachments:
        described = {name: attachment.describe() for name, attachment in attachments.items()}
        write_atomically(run_dir / "touched.json", json.dumps(described, indent=1))


def write_data(run_dir: Path, classes: Sequence[str], training_samples: int) -> None:
    """Write data.json: what an exported model and its card have to know of the data."""
    facts = {"classes": list(classes), "training_samples": training_samples}
    write_atomically(run_dir / "data.json", json.dumps(facts, indent=1))


def origin(config: TrainConfig, world: World) -> Path | None:
    """Return the checkpoint of another run at which run.branch_from lets this one begin; None if it names none.

    Raises UsageError where there is none, and for one of another number of processes unless parallel.elastic is on.
    """
    if not config.run.branch_from:
        return None
    path = Path(config.run.branch_from)
    found = _newest(path)
    if found is None:
        others = [str(p) for p in path.parent.glob("*") if _newest(p) is not None]
        raise UsageError(
            f"run.branch_from {path} is neither a complete checkpoint nor a run directory that holds one"
            f"{nearest(str(path), others)}"
        )
    before = checkpoint.read(found)["world_size"]
    if before != world.size and not config.parallel.elastic:
        raise UsageError(
            f"run.branch_from {found} was saved at world size {before}, and this run has {world.size}; start as "
            "many processes, or (single and ddp) set parallel.elastic true"
        )
    return found


def _newest(path: Path) -> Path | None:
    """Return the complete checkpoint at `path`: itself, or a run directory's newest."""
    return path if (path / "state.json").is_file() else checkpoint.latest(path)


def branched_from(newest: Path | None, origin: Path | None) -> dict[str, Any] | None:
    """Return {"run", "step"} of where a run with its `newest` checkpoint branched from, or now does at `origin`."""
    if newest is not None:
        found: dict[str, Any] | None = checkpoint.read(newest)["shared"]["identity"].get("branched_from")
        return found
    if origin is None:
        return None
    return {"run": str(origin.parent.parent), "step": checkpoint.read(origin)["step"]}


def world_sizes(run_dir: Path, newest: Path | None, config: TrainConfig, world: World) -> History:
    """Return the numbers of processes that the run in `run_dir` had, `newest` being the checkpoint it goes on from.

    Without one the run begins with the processes of `world`. With parallel.elastic the global batch is that of all
    nodes even when some are still to come.
    """
    if newest is not None:
        state = checkpoint.read(newest)
        return _history(state["shared"]["identity"], state["world_size"])
    described = run_dir / "environment.json"
    if config.parallel.elastic and described.exists():
        try:
            found = json.loads(described.read_text())
            return _history(found, found["world_size"])
        except (OSError, ValueError, KeyError):
            raise UsageError(
                f"{described} does not say with how many processes the run began; choose another run.dir"
            ) from None
    return [(0, launched.most_ranks(world.size) if config.parallel.elastic else world.size)]


def _history(found: dict[str, Any], only: int) -> History:
    return [(step, size) for step, size in found.get("world_sizes", [(0, only)])]


def identity(
    config: TrainConfig,
    history: History,
    data: str,
    attachments: Mapping[str, Attachment],
    parent: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint records of its run, `data` being the loader's fingerprint.

    `check_identity` compares it, but for the processes, which `elastic.divide` judges, and the `parent` it branched
    from.
    """
    return {
        "config": asdict(_to_keep(config)),
        "world_sizes": history,
        "branched_from": parent,
        "data": data,
        "touched": {name: [t.name for t in a.touched] for name, a in attachments.items()},
    }


def check_identity(path: Path, now: dict[str, Any], config: TrainConfig, *, branches: bool = False) -> None:
    """Raise UsageError unless the checkpoint at `path` belongs to the run that `now` describes.

    Or, with `branches`, to one that it may branch from.
    """
    saved = checkpoint.read(path)["shared"]["identity"]
    _refuse_changes(saved["config"], config, path, branches=branches)
    instead = "run.branch_from" if branches else "run.dir"
    if saved["data"] != now["data"]:
        raise UsageError(f"{path} was trained on other shards than data.source now holds; restore them, or choose "
                         f"another {instead}")  # fmt: skip
    if saved["touched"] != now["touched"]:
        raise UsageError(f"{path}: its mask touched other parameters than this one; choose another {instead}")


def check_branch(origin: Path, now: dict[str, Any], config: TrainConfig, total_steps: int) -> None:
    """Raise UsageError unless the run that `now` describes may begin at the checkpoint `origin` of another."""
    check_identity(origin, now, config, branches=True)
    if checkpoint.read(origin)["step"] >= total_steps:
        raise UsageError(
            f"run.branch_from {origin} is the end of its run, with no step left to train; choose an earlier one"
        )


def _to_keep(config: TrainConfig) -> TrainConfig:
    """Return the configuration as it is written down: other people read run directories."""
    return replace(config, data=replace(config.data, source=without_secrets(config.data.source)))


def _refuse_changes(saved: dict[str, Any], config: TrainConfig, where: Path, *, branches: bool = False) -> None:
    changes = changed_on_resume(saved, config, branches=branches)
    if changes:
        listed = "; ".join(
            f"{name} was {_shown(before)} and is {_shown(value)}" for name, before, value in changes[:3]
        )
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        instead = "a run that branches from it keeps them" if branches else "choose another run.dir, or remove it"
        raise UsageError(f"{where} belongs to a run with other settings: {listed}{more}; {instead}")


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)


def _check_writable(run_dir: Path) -> None:
    existing = next(p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UsageError(f"run.dir {run_dir}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"run.dir {run_dir} cannot be written: no permission to write in {existing}")
