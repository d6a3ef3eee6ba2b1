"""metrics.jsonl: one JSON object a line, cut back to the checkpoint that a run resumes from."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gmscale.errors import RunError
from gmscale.files import write_atomically


def finite(value: Any) -> Any:
    """Return a value without NaN and infinities, which JSON does not have: null says that there was no number."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line_of(record: Mapping[str, Any]) -> bytes:
    """Return the line of a record without NaN and infinities."""
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; lines that a crash or a full disk spoiled are left out."""
    yield from (record for record, _ in _lines(path) if record is not None)


def cut_back(path: Path, step: int) -> None:
    """Drop the records after `step`, which the resumed run makes again, and lines that are no records."""
    if not path.exists():
        return
    lines = list(_lines(path))
    kept = [line for record, line in lines if record is not None and record["step"] <= step]
    try:
        if kept == [line for _, line in lines[: len(kept)]]:
            os.truncate(path, sum(map(len, kept)))  # needs no room on the disk
        else:
            write_atomically(path, b"".join(kept))
    except OSError as error:
        raise RunError(f"{path} cannot be cut back to step {step}: {error.strerror}") from None


def _lines(path: Path) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """Yield every line as it stands with its record, None for a line that holds no whole one."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            whole = isinstance(record, dict) and isinstance(record.get("step"), int) and line.endswith(b"\n")
            yield (record if whole else None), line
