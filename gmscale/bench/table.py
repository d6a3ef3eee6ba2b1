"""What a benchmark shows: a table with notes below it, and a JSON file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from gmscale.bench.training import VARIANTS
from gmscale.errors import RunError
from gmscale.tracking import plain_console


def number(value: float | None, digits: int) -> str:
    """Return a number for a cell, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a title; the first column is text, the others are numbers."""
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    plain_console().print(table)


def print_notes(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what has to be known about the variants that were measured, and why others were not."""
    for name, row in rows.items():
        reason = row.get("skipped") or row.get("failed")
        note = f"not measured: {reason}" if reason else VARIANTS[name].note
        if note:
            plain_console().print(f"{name}: {note}", highlight=False, markup=False, soft_wrap=True)


def write_json(result: Mapping[str, Any], path: str | None) -> None:
    """Write the result if a file was asked for."""
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--json {path}: {error.strerror}") from error
