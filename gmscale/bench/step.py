"""gmscale bench step: whole training steps of each variant, as ratios to plain DDP (see training.py)."""

import sys
from typing import Any

from gmscale.bench.options import add_training, chosen_variants, setting_of
from gmscale.bench.table import number, print_notes, print_table, write_json
from gmscale.bench.training import PLAIN, Setting, alone, duel
from gmscale.errors import OneLineParser, RunError, UsageError
from gmscale.parallel.local_ranks import run_ranks


def main(argv: list[str]) -> int:
    """Measure and show; status 1 if a variant failed."""
    parser = OneLineParser(prog="gmscale bench step", description=__doc__)
    add_training(parser, model="resnet18", image_size=64, batch_size=32, rounds=10, steps=1)
    parser.add_argument("--processes", type=int, default=2, help="processes, one a GPU where there are GPUs")
    options = parser.parse_args(argv)
    names, setting = chosen_variants(options), setting_of(options)
    if options.processes < 1:
        raise UsageError(f"--processes is {options.processes}; expected at least 1")
    result = measure(setting, names, options.processes)
    result["command"] = " ".join(("gmscale bench step", *argv))
    show(result)
    write_json(result, options.json)
    return int(any("failed" in row for row in result["variants"].values()))


def measure(setting: Setting, names: list[str], processes: int) -> dict[str, Any]:
    """Return the settings, the environment and one row a variant; one that fails says so in its row."""
    rows: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    for done, name in enumerate(names, 1):
        row = attempt(name, lambda name=name: _row(setting, name, processes))
        if name == PLAIN:
            plain = row
        if "ratio" in row:
            row["bytes_ratio"] = _ratio(row["bytes_per_step"], plain["bytes_per_step"])
            row["memory_ratio"] = row["peak_memory_mb"] / plain["peak_memory_mb"]
        rows[name] = row
        print(f"{done}/{len(names)} {name}: {progress(row)}", file=sys.stderr, flush=True)
    environment = plain.pop("environment")
    for row in rows.values():
        row.pop("environment", None)
    return {"environment": environment, **vars(setting), "variants": rows}


def _row(setting: Setting, name: str, processes: int) -> dict[str, Any]:
    return {**run_ranks(duel, processes, setting, name), **run_ranks(alone, processes, setting, name)}


def attempt(name: str, measured: Any) -> dict[str, Any]:
    """Return the row, or why there is none; without plain DDP there is nothing to compare with."""
    try:
        return measured()
    except UsageError as error:
        if name == PLAIN:
            raise
        return {"skipped": str(error)}
    except RunError as error:
        if name == PLAIN:
            raise
        return {"failed": str(error)}


def progress(row: dict[str, Any]) -> str:
    """Return a row in a few words."""
    for reason in ("skipped", "failed"):
        if reason in row:
            return f"{reason}: {row[reason]}"
    return f"{row['ratio']:.3f}"


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None  # one process hands nothing to collectives


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    described = result["environment"]
    title = (
        f"{result['model']}, {result['image_size']} px, batch {result['batch_size']} on each of "
        f"{described['world_size']} processes ({described['device']}), amp {result['amp']}, "
        f"torch {described['torch']}, {result['rounds']} rounds of {result['steps']} steps"
    )
    headings = ["variant", "step ms", "ratio", "quartiles", "hook ms", "of copy", "kept"]
    headings += ["MB", "ratio", "peak MB", "ratio"]
    rows = []
    for name, row in result["variants"].items():
        if "ratio" not in row:
            rows.append((name, *["-"] * (len(headings) - 1)))
            continue
        first, third = row["ratio_quartiles"]
        rows.append(
            (
                name,
                number(row["step_ms"], 1),
                number(row["ratio"], 3),
                f"{first:.3f}-{third:.3f}",
                number(row["hook_ms"], 1),
                number(row["share_of_copy"], 2),
                number(row.get("kept_entries"), 2),
                number(row["bytes_per_step"] / 1e6, 1),
                number(row["bytes_ratio"], 3),
                number(row["peak_memory_mb"], 0),
                number(row["memory_ratio"], 2),
            )
        )
    print_table(title, headings, rows)
    print_notes(result["variants"])
