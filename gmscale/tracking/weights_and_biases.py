"""Weights & Biases, for runs that name a project of it; without one nothing here is imported."""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

from gmscale.config import TrainConfig
from gmscale.config.sections import plain
from gmscale.data.config import without_secrets
from gmscale.errors import UsageError
from gmscale.files import write_atomically


def check(config: TrainConfig) -> None:
    """Raise UsageError if the run asks for Weights & Biases, and it is not installed."""
    if not config.run.wandb_project:
        return
    try:
        import_module("wandb")
    except ImportError:
        raise UsageError(
            "run.wandb_project is set, but Weights & Biases is not installed: pip install wandb"
        ) from None


class WandbRun:
    """The run's twin at Weights & Biases: the same one after a resume, by the id in wandb.json."""

    def __init__(self, run_dir: Path, config: TrainConfig, warn: Callable[[str], None]) -> None:
        check(config)
        wandb = import_module("wandb")
        self._warn, self._failed = warn, False
        shown = replace(config, data=replace(config.data, source=without_secrets(config.data.source)))
        try:
            self._run = wandb.init(
                project=config.run.wandb_project,
                id=_identifier(run_dir, config.run.wandb_project),
                resume="allow",
                name=config.run.dir,
                dir=str(run_dir),
                config=plain(asdict(shown)),
                settings=wandb.Settings(console="off"),  # ours stays a terminal
            )
            # Ours, because a resumed run makes some steps again, which wandb's own count would refuse.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # of many kinds, and none of them ours
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UsageError(
                f"run.wandb_project {config.run.wandb_project!r}: Weights & Biases does not start ({reason}); "
                "run `wandb login`, or set WANDB_MODE=offline, or unset it"
            ) from None

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Log values by tag. What fails there does not end the training."""
        try:
            self._run.log({**scalars, "step": step})
        except Exception as error:
            self._say_once(error)

    def finish(self, *, failed: bool) -> None:
        """End the upload."""
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._say_once(error)

    def _say_once(self, error: Exception) -> None:
        if not self._failed:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._warn(f"Weights & Biases: {reason}; the run goes on, and its metrics.jsonl has everything")
        self._failed = True


def _identifier(run_dir: Path, project: str) -> str:
    """Return the id of the run in its project, a new one where the run directory knows none."""
    path = run_dir / "wandb.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["project"] == project:
            return str(saved["id"])
    except (FileNotFoundError, ValueError, KeyError):
        pass
    identifier = secrets.token_hex(4)
    write_atomically(path, json.dumps({"project": project, "id": identifier}))
    return identifier
