"""gmscale shards verify: every fault of every shard, where a training run would stop at the first."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gmscale.data.faults import Fault, ImageError, Reason, ShardError
from gmscale.data.images.decode import decode
from gmscale.data.source import Directory, Split
from gmscale.data.tars.scan import Scan, scan
from gmscale.data.tars.tar import Member, Tar, members
from gmscale.errors import RunError, UsageError
from gmscale.shards.items import split_name
from gmscale.shards.processes import spread

_REPORT_EVERY = 20  # images


class _Task(NamedTuple):
    """One shard, and what _info.json says of it."""

    directory: Directory
    number: int
    name: str
    label: str
    classes: int | None
    length: int | None
    size: int | None
    sha256: str | None
    full: bool
    listed: int


class _Report(NamedTuple):
    """What was found in one shard."""

    number: int
    samples: int
    bytes: int
    of_shard: tuple[Fault, ...]
    of_samples: Counter[Reason]
    first: tuple[Fault, ...]
    """The first few of the samples' faults."""


@dataclass
class Findings:
    """What was found in a split."""

    split: str
    shards: int
    bad_shards: int = 0
    samples: int = 0
    bytes: int = 0
    seconds: float = 0.0
    of_shards: Counter[str] = field(default_factory=Counter)
    """Faults by reason; a shard may have several."""
    of_samples: Counter[str] = field(default_factory=Counter)
    listed: list[Fault] = field(default_factory=list)
    """The first few faults, in the order of the shards."""

    @property
    def faults(self) -> int:
        """All faults."""
        return self.of_shards.total() + self.of_samples.total()

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        listed = [fault._asdict() for fault in self.listed]
        return vars(self) | {"faults": self.faults, "listed": listed}


def verify(
    split: Split,
    label: str = "cls",
    *,
    full: bool = False,
    workers: int = 0,
    listed: int = 20,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Look at every shard of `split`: headers, sizes, sample counts and labels, with `full` hashes and pixels too.

    Nothing is raised for a fault. `progress` hears images done and in all, as far as their number is known.
    """
    tasks = list(_tasks(split, label, full, listed))
    total = sum(split.lengths or ())
    findings = Findings(split.name, len(tasks))
    reports = []
    done = 0
    began = time.monotonic()
    with closing(spread(verify_shard, tasks, min(workers, len(tasks)))) as messages:
        for message in messages:
            if isinstance(message, _Report):
                reports.append(message)
                continue
            done += message
            progress(done, max(done, total))
    findings.seconds = time.monotonic() - began
    for report in sorted(reports):
        findings.samples += report.samples
        findings.bytes += report.bytes
        findings.bad_shards += bool(report.of_shard)
        findings.of_shards.update(fault.reason for fault in report.of_shard)
        findings.of_samples.update(report.of_samples)
        findings.listed += (*report.of_shard, *report.first)[: listed - len(findings.listed)]
    return findings


def _tasks(split: Split, label: str, full: bool, listed: int) -> Iterator[_Task]:
    def of(values: Sequence[Any] | None, number: int) -> Any:
        return values[number] if values else None

    for i, name in enumerate(split.names):
        yield _Task(
            directory=split.directory,
            number=i,
            name=name,
            label=label,
            classes=len(split.classes) if split.classes else None,
            length=of(split.lengths, i),
            size=of(split.sizes, i),
            sha256=of(split.sha256, i),
            full=full,
            listed=listed,
        )


def verify_shard(task: _Task) -> Iterator[int | _Report]:
    """Yield the number of images looked at since the last time, and in the end what was found."""
    faults: list[Fault] = []
    try:
        path = task.directory.fetch(task.name, size=task.size, sha256=task.sha256)
        size = path.stat().st_size
        if task.size is not None and size != task.size:
            reason: Reason = "truncated shard" if size < task.size else "wrong size"
            faults.append(_of_shard(task, reason, f"has {size} bytes, _info.json says {task.size}"))
        if task.full and task.sha256 and size == task.size and _sha256(path) != task.sha256:
            faults.append(_of_shard(task, "wrong hash", "differs from the SHA-256 in _info.json"))
        found = scan(path, task.name, task.name, task.label, task.classes)
    except ShardError as error:
        faults.append(error.fault)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        detail = "there is no such file" if missing else f"cannot be read: {error.strerror or error}"
        faults.append(_of_shard(task, "missing shard" if missing else "unreadable shard", detail))
    except (UsageError, RunError) as error:  # of a fetch from elsewhere
        faults.append(_of_shard(task, "unreadable shard", str(error)))
    else:
        if task.length is not None and task.length != len(found.rows):
            detail = f"holds {len(found.rows)} samples, _info.json says {task.length}"
            faults.append(_of_shard(task, "wrong sample count", detail))
        bad = list(found.faults)
        if task.full:
            yield from _decode_all(task, path, found, bad)
        else:
            yield len(found.rows)
        reasons = Counter(fault.reason for fault in bad)
        yield _Report(task.number, len(found.rows), size, tuple(faults), reasons, tuple(bad[: task.listed]))
        return
    yield task.length or 0
    yield _Report(task.number, 0, 0, tuple(faults), Counter(), ())


def _decode_all(task: _Task, path: Path, found: Scan, faults: list[Fault]) -> Iterator[int]:
    """Decode every image that the scan has not found bad; add to `faults`, and yield as verify_shard does."""
    usable = {int(row["offset"]) for row in found.rows if row["label"] >= 0}
    images = [member for member in members(path) if member.offset in usable]
    with Tar(path, task.name) as tar:
        for number, member in enumerate(images, 1):
            try:
                decode(tar.read(member))
            except ImageError as error:
                faults.append(Fault(task.name, _key(member), error.reason, f"{member.name!r}: {error}"))
            if number % _REPORT_EVERY == 0:
                yield _REPORT_EVERY
    yield len(found.rows) - len(images) // _REPORT_EVERY * _REPORT_EVERY


def _key(member: Member) -> str:
    named = split_name(member.name)
    return named[0] if named else member.name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_shard(task: _Task, reason: Reason, detail: str) -> Fault:
    return Fault(task.name, None, reason, detail)
