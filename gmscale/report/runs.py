"""Read run directories, finished or not."""

import functools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from gmscale.errors import UsageError

NO_MASK = "no mask"
MASKS: tuple[Literal["mask", "output"], ...] = ("mask", "output")  # of weight gradients, of layer outputs
_RECORDS = ("environment.json", "metrics.jsonl", "summary.json")
# The C loader is ten times faster, which a report on a thousand runs notices.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """What one run directory says. `summary` is None until the run has finished."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    touched: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    samples: list[dict[str, Any]]

    def setting(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key of the configuration, such as 'optim.lr'."""
        return self.settings.get(key, default)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration, flat: dotted key -> value."""
        return dict(_flatten(self.config))

    @property
    def seed(self) -> int:
        return int(self.settings["run.seed"])

    @property
    def masked(self) -> bool:
        weights = bool(self.setting("mask.enabled", self.setting("run.arm") != NO_MASK))
        return weights or bool(self.setting("output.enabled"))

    def has(self, mask: Literal["mask", "output"]) -> bool:
        """Whether the mask of weight gradients, or that of layer outputs, was on."""
        return self.masked and bool(self.setting(f"{mask}.enabled", mask == "mask"))

    @property
    def label(self) -> str:
        """The arm as its author named it, or a name made from the mask."""
        if arm := self.setting("run.arm"):
            return str(arm)
        # as TrainConfig.arm, which needs torch
        parts = []
        if self.has("mask"):
            consensus = self.setting("mask.agreement") == "consensus"
            strength = self.setting("mask.strength")
            strength = (1.0 if consensus else 0.5) if strength is None else float(strength)
            agreement = " consensus" if consensus else ""
            parts.append(f"{self.setting('mask.operator', 'mask')} {strength:g}{agreement}")
        if self.has("output"):
            parts.append(f"output {self.setting('output.operator')} {float(self.setting('output.strength')):g}")
        return " + ".join(parts) or NO_MASK

    @property
    def processes(self) -> list[int]:
        """The numbers of processes that the run had, one after another; the first decided its global batch."""
        now = self.environment.get("world_size")
        return [size for _, size in self.environment.get("world_sizes", [])] or ([] if now is None else [now])

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def last_step(self) -> int:
        steps = self.summary.get("steps") if self.summary else None
        return int(steps or max((line.get("step", 0) for line in self.metrics), default=0))

    def lines(self, phase: str) -> list[dict[str, Any]]:
        """The metrics of one phase, in the order written."""
        return [line for line in self.metrics if line.get("phase") == phase]

    def final(self, key: str) -> float | None:
        """A value of the summary, or for an unfinished run the latest validation's."""
        if self.summary is not None:
            return number(self.summary.get(key))
        validations = self.lines("validation")
        return number(validations[-1].get(key)) if validations else None


def number(value: Any) -> float | None:
    """`value` as a float, or None for what is not a number (a null, a missing field, a word)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def is_run(path: Path) -> bool:
    """Whether `path` holds a resolved configuration and at least one record of a run."""
    return (path / "config.yaml").is_file() and any((path / name).is_file() for name in _RECORDS)


def load_run(path: str | Path) -> Run:
    """Read one run directory.

    Missing records read as empty, and a torn last line of metrics.jsonl is dropped: the run may still be
    writing, or may have been killed. UsageError for what is no run directory and for unreadable files.
    """
    path = Path(path)
    if not path.is_dir():
        why = "it is a file" if path.exists() else "no such directory"
        raise UsageError(f"{path} is not a run directory: {why}")
    if not (path / "config.yaml").is_file():
        raise UsageError(f"{path} is not a run directory: config.yaml is missing")
    if not is_run(path):
        raise UsageError(f"{path} is not a run directory: it has none of {', '.join(_RECORDS)}")
    config = _read_config(path / "config.yaml")
    summary = _read_json(path / "summary.json", dict)
    return Run(
        path=path,
        config=config,
        environment=_read_json(path / "environment.json", dict) or {},
        touched=_read_json(path / "touched.json", dict) or {},
        metrics=_read_metrics(path / "metrics.jsonl"),
        summary=summary,
        samples=_read_json(path / "samples" / "samples.json", list) or [],
    )


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Load the runs at or below `paths`, each once, ordered by path.

    A path is a run directory or a directory with runs at any depth; UsageError where nothing is found.
    """
    found: dict[Path, Path] = {}
    for given in map(Path, paths):
        below = sorted(_run_directories(given))
        if not below:
            if given.is_dir() and not (given / "config.yaml").is_file():
                records = ", ".join(_RECORDS)
                raise UsageError(f"{given} holds no run: no directory with config.yaml and one of {records}")
            load_run(given)  # says what is missing
        for path in below:
            found.setdefault(path.resolve(), path)
    if not found:
        raise UsageError("no run directory was named; expected RUN [RUN ...]")
    return [load_run(path) for path in found.values()]


def _run_directories(root: Path) -> Iterable[Path]:
    for folder, children, _ in os.walk(root):
        if is_run(Path(folder)):
            children.clear()  # checkpoints and samples hold no further runs
            yield Path(folder)


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _YAML_LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    section = config.get("run") if isinstance(config, dict) else None
    seed = number(section.get("seed")) if isinstance(section, dict) else None
    if seed is None or not math.isfinite(seed):
        raise UsageError(f"{path} is not the configuration of a run: run.seed is missing or not a number")
    return dict(config)


def _read_json(path: Path, kind: type) -> Any:
    """The content of `path`, or None where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, kind):
        raise UsageError(f"{path} holds a {type(content).__name__}; expected a {kind.__name__}")
    return content


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    metrics = []
    for index, text in enumerate(lines):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            metrics.append(line)
        elif index < len(lines) - 1:
            raise UsageError(f"{path}, line {index + 1}: not a JSON object")
    return metrics
