"""Who may import whom, read from the syntax trees: imports point one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gmscale"

# The parts of the package: a module, or a whole sub-package.
PARTS = sorted({p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")})
PARTS.remove("__init__")

# Everybody may use the words of an error, the version, and files that are complete or absent.
FREE = {"errors", "files", "__init__"}

# What a part may import at most, besides FREE; a part that is not named here is judged by the other rules alone.
ONLY = {
    "errors": set(),
    "files": set(),
    "masking": set(),
    "sites": {"masking"},
    "data": set(),
    "statistics": set(),
    "report": {"corruption_error", "robustness", "scorecards", "statistics", "trials"},
    "trials": {"statistics"},
    "config": {"data", "masking"},
    "launched": set(),
    "heartbeat": {"launched"},
    "stopping": set(),
    "diagnosis": {"heartbeat"},
    "ownership": {"heartbeat", "launched"},
    "doctor": {"config", "data", "environment", "launch", "parallel", "tracking"},
    "job": {"diagnosis", "heartbeat", "launched", "parallel"},
    "launch": {"config", "diagnosis", "dry_run", "heartbeat", "launched", "stopping"},
    "parallel": {"config", "heartbeat", "launched"},
    "models": {"config"},
    "checkpoint": {"parallel"},
    "losses": {"config"},
    "elastic": {"checkpoint", "config", "parallel"},
    "training_state": {"checkpoint", "elastic", "models", "parallel", "sites"},
    "build": {"checkpoint", "config", "data", "models", "parallel", "sites", "training_state"},
    "step": {"config", "data", "losses", "parallel", "training_state"},
    "profiling": {"parallel"},
    "tracking": {"config", "data"},
    "evaluation": {
        "corruption_error",
        "config",
        "data",
        "losses",
        "masking",
        "models",
        "parallel",
        "progress",
        "report",
        "robustness",
        "scorecards",
        "sites",
        "statistics",
        "tracking",
        "trained",
    },
    "trained": {"checkpoint", "config", "models", "report"},
    "progress": set(),
    "scorecards": {"corruption_error"},
    "corruption_error": set(),
    "robustness": {"scorecards"},
    "sweep": {
        "checkpoint",
        "config",
        "data",
        "diagnosis",
        "heartbeat",
        "launch",
        "report",
        "scorecards",
        "stopping",
        "tracking",
        "trials",
    },
    "records": {"sites"},
    "bench": {
        "config",
        "costs",
        "data",
        "environment",
        "evaluation",
        "masking",
        "parallel",
        "sites",
        "stopping",
        "sweep",
        "tracking",
        "traffic",
        "trials",
    },
    "shards": {"data", "evaluation", "progress", "trained"},
    "traffic": set(),
    "costs": set(),
    "dry_run": {
        "build",
        "checkpoint",
        "config",
        "costs",
        "data",
        "elastic",
        "environment",
        "evaluation",
        "masking",
        "parallel",
        "rundir",
        "sites",
        "step",
        "tracking",
        "traffic",
        "training_state",
    },
    "find": {"build", "config", "data", "dry_run", "parallel", "step", "tracking"},
    "export": {"checkpoint", "config", "data", "models", "report", "trained"},
    "verify": {"config", "data", "masking", "models", "parallel", "sites", "tracking"},
}
MAY_IMPORT_TRAIN = {"cli", "compare"}


def modules(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py")) if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(part: str) -> set[str]:
    """Other parts of gmscale that this one imports; `__init__` for a name of the package itself."""
    found = set()
    for path in modules(part):
        names = set(imports(path))
        for name in names:
            if name.startswith("gmscale."):
                first = name.split(".")[1]
                found.add(first if first in PARTS else "__init__")
    return found - {part}


@pytest.mark.parametrize("part", sorted(ONLY))
def test_a_part_imports_only_what_it_may(part: str) -> None:
    assert parts_imported(part) <= ONLY[part] | FREE


@pytest.mark.parametrize("part", PARTS)
def test_only_those_that_start_runs_import_train(part: str) -> None:
    if part not in MAY_IMPORT_TRAIN:
        assert "train" not in parts_imported(part)


def test_imports_have_no_circle() -> None:
    order: list[str] = []

    def visit(part: str, path: tuple[str, ...]) -> None:
        assert part not in path, f"circle: {' -> '.join((*path, part))}"
        if part not in order:
            for other in sorted(parts_imported(part) & set(PARTS)):
                visit(other, (*path, part))
            order.append(part)

    for part in PARTS:
        visit(part, ())


def test_the_mask_knows_nothing_of_processes() -> None:
    for path in modules("masking"):
        assert not [name for name in imports(path) if name.startswith("torch.distributed")], path


def test_nothing_is_called_utils() -> None:
    assert not [path for path in PACKAGE.rglob("*") if path.stem in ("util", "utils", "helpers", "misc", "common")]


@pytest.mark.parametrize("heavy", ["torch", "timm"])
def test_reports_statistics_and_help_do_without_torch(heavy: str) -> None:
    code = (
        "import sys, gmscale, gmscale.cli, gmscale.report, gmscale.statistics\n"
        f"assert {heavy!r} not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=60)


def test_what_ray_loads_with_every_trial_is_small() -> None:
    code = (
        "import sys, gmscale.sweep.actor\n"
        "loaded = [name for name in ('torch', 'matplotlib', 'timm', 'optuna') if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=120)
