"""An index on the disk: a table of all samples, and a small JSON file about the shards that it was made from.

The table is named by its content and only ever mapped, so the processes of a machine share one copy of it. The JSON
file names the table and is written last. What does not fit together, or leads out of a shard, is no index.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmscale.data.faults import Fault
from gmscale.data.tars.scan import MOST_CLASSES, ROW
from gmscale.files import write_atomically

# Raise it whenever a scan would find something else in the same shards.
_FORMAT = 1
_LARGEST_JSON = 256 << 20
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class Stored:
    """What scans found in the shards `names`; `lengths`, `bytes` and `mtime_ns` have an entry for each of them."""

    label: str
    classes: int | None
    """How many classes the labels were checked against."""
    names: tuple[str, ...]
    lengths: tuple[int, ...]
    bytes: tuple[int, ...]
    mtime_ns: tuple[int, ...]
    faults: tuple[Fault, ...]
    fingerprint: str
    rows: NDArray[np.void]
    """Of dtype scan.ROW, in the order of the shards."""
    table: Path | None = None
    """The file that `rows` is mapped from."""


def fingerprint(names: tuple[str, ...], lengths: tuple[int, ...], rows: NDArray[np.void]) -> str:
    """Return the SHA-256 of the shards' names and their layout: equal where order and labels are equal."""
    digest = hashlib.sha256(json.dumps(names).encode())
    digest.update(np.array(lengths, dtype="<i8").tobytes())
    for field in ("offset", "size", "label"):
        for first in range(0, len(rows), _CHUNK):
            digest.update(rows[field][first : first + _CHUNK].astype("<i8").tobytes())
    return digest.hexdigest()


def save(stored: Stored, folder: Path, stem: str) -> Stored:
    """Write STEM.json and STEM-HASH.npy, remove older tables, and return the index mapped from there. OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, stored.rows, allow_pickle=False)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    table = folder / f"{stem}-{digest[:12]}.npy"
    # Another process may have it mapped already.
    if not (table.is_file() and _sha256(table) == digest):
        write_atomically(table, content)
    body = {
        "label": stored.label,
        "classes": stored.classes,
        "names": stored.names,
        "lengths": stored.lengths,
        "bytes": stored.bytes,
        "mtime_ns": stored.mtime_ns,
        "faults": stored.faults,
        "fingerprint": stored.fingerprint,
        "table": table.name,
        "sha256": digest,
    }
    document = {"format": _FORMAT, "check": _check(body), "index": body}
    write_atomically(folder / f"{stem}.json", json.dumps(document) + "\n")
    for path in folder.glob(f"{stem}-*.npy"):
        if _is_table(path.name, stem) and path != table:
            with suppress(OSError):
                path.unlink()
    return replace(stored, rows=open_table(table), table=table)


def load(fetch: Callable[[str], Path], stem: str) -> Stored | None:
    """Read an index back through a directory's `fetch`; None if there is none, or none that can be trusted."""
    try:
        with fetch(f"{stem}.json").open("rb") as file:
            if os.fstat(file.fileno()).st_size > _LARGEST_JSON:
                return None
            document: Any = json.loads(file.read())
        body = document["index"]
        if document["format"] != _FORMAT or document["check"] != _check(body) or not _is_table(body["table"], stem):
            return None
        table = fetch(body["table"])
        if _sha256(table) != body["sha256"]:
            return None
        stored = Stored(
            label=body["label"],
            classes=body["classes"],
            names=tuple(body["names"]),
            lengths=tuple(body["lengths"]),
            bytes=tuple(body["bytes"]),
            mtime_ns=tuple(body["mtime_ns"]),
            faults=tuple(Fault(*fault) for fault in body["faults"]),
            fingerprint=body["fingerprint"],
            rows=open_table(table),
            table=table,
        )
        return stored if _fits(stored) else None
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        return None


def open_table(path: Path) -> NDArray[np.void]:
    """Map a table into memory, unchecked."""
    rows: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    return rows


def _fits(stored: Stored) -> bool:
    """Whether every row lies in its shard and has a class or a fault, and each shard has a sample to use."""
    rows, lengths, faults = stored.rows, stored.lengths, stored.faults
    if rows.dtype != ROW or rows.shape != (sum(lengths),) or min(lengths) < 1:
        return False
    if not len(stored.names) == len(lengths) == len(stored.bytes) == len(stored.mtime_ns):
        return False
    if np.count_nonzero(rows["label"] < 0) != len(faults) or not {fault.shard for fault in faults} <= {
        *stored.names
    }:
        return False
    classes = MOST_CLASSES if stored.classes is None else stored.classes
    ends = np.cumsum((0, *lengths))
    for (first, last), length in zip(pairwise(ends), stored.bytes, strict=True):
        part = rows[first:last]
        if part["offset"].min() < 0 or part["size"].min() < 0 or (part["offset"] + part["size"]).max() > length:
            return False
        if part["label"].min() < -1 or not 0 <= part["label"].max() < classes:
            return False
    return True


def _is_table(name: str, stem: str) -> bool:
    return re.fullmatch(re.escape(stem) + r"-[0-9a-f]{12}\.npy", name) is not None


def _check(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
