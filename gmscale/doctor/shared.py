"""Whether the nodes share the directory for runs: what one writes, renames or appends to, the others see soon."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gmscale.doctor.finding import Finding
from gmscale.doctor.nodes import Nodes
from gmscale.doctor.plan import Plan

_SOON_S = 15.0
_SLOW_S = 5.0
_POLL_S = 0.02
_LEAST_FREE = 2 * 2**30
_CONTENT = 1 << 16  # bytes: more than a page, so that half a file would show


def check_directory(plan: Plan, nodes: Nodes, job: str) -> tuple[list[Finding], float | None]:
    """Write where all nodes look and look for what they wrote; return the slowest sight of a file, in seconds.

    `job` is a word that all nodes know and no earlier job used.
    """
    folder = plan.directory / f".gmscale-doctor-{job}"
    try:
        found = _check(plan, nodes, folder)
    finally:
        for path in (_temporary(folder, nodes.number), _own(folder, nodes.number), _log(folder, nodes.number)):
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            folder.rmdir()  # where nobody else has a file in it
    nodes.gather("removed", True)
    with suppress(OSError):
        folder.rmdir()
    return found


def _check(plan: Plan, nodes: Nodes, folder: Path) -> tuple[list[Finding], float | None]:
    directory, number = plan.directory, nodes.number
    trouble = ""
    try:
        folder.mkdir(exist_ok=True)
        temporary = _temporary(folder, number)
        with temporary.open("wb") as file:
            file.write(_content(number))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, _own(folder, number))
        _log(folder, number).write_bytes(b"one\n")
        free = shutil.disk_usage(directory).free
    except OSError as error:
        trouble = f"{directory}: {error.strerror}"
    wrote = nodes.gather("written", not trouble)
    findings, slowest = [], None
    if trouble:
        remedy = "give a directory that exists and can be written on every node (--dir; later --run.dir)"
        findings.append(Finding("directory", False, trouble, remedy))
    else:
        remedy = "free some space: checkpoints go there"
        detail = f"{directory}: {free / 2**30:.0f} GiB free"
        findings.append(Finding("directory", free > _LEAST_FREE, detail, remedy))
    writers = [other for other in nodes.others if wrote[other]]
    if not trouble and writers:
        files, slowest = _looked(nodes, writers, lambda other: _holds(_own(folder, other), _content(other)))
        findings.append(_shared("files of others", plan, files, slowest))
        for other in writers:  # as who follows a log: caches of file sizes are filled before it grows
            _holds(_log(folder, other), b"one\n")
    nodes.gather("read", True)
    if not trouble:
        with suppress(OSError), _log(folder, number).open("ab") as file:
            file.write(b"two\n")
    nodes.gather("appended", True)
    if not trouble and writers and slowest is not None:
        logs, after = _looked(nodes, writers, lambda other: _holds(_log(folder, other), b"one\ntwo\n"))
        findings.append(_shared("appended lines", plan, logs, after))
    nodes.gather("followed", True)  # before anything is removed
    return findings, slowest


def _looked(nodes: Nodes, writers: list[int], seen: Callable[[int], bool]) -> tuple[list[str], float | None]:
    """Wait until all that was written is seen; return whose was not, and how long the others' took."""
    began, waiting, slowest = time.monotonic(), set(writers), None
    while waiting and time.monotonic() - began < _SOON_S:
        for number in sorted(waiting):
            if seen(number):
                waiting.discard(number)
                slowest = time.monotonic() - began
        if waiting:
            time.sleep(_POLL_S)
    return [nodes.hosts[number] for number in sorted(waiting)], slowest


def _shared(name: str, plan: Plan, unseen: list[str], slowest: float | None) -> Finding:
    if unseen:
        detail = f"{plan.directory}: nothing of {', '.join(unseen)} after {_SOON_S:.0f} s"
        remedy = (
            "the directory is not shared, or shows changes too late: take one on a file system that all nodes "
            "mount (NFS, Lustre), by the same path, or a lower attribute cache time (NFS: actimeo=3)"
        )
        return Finding(name, False, detail, remedy)
    assert slowest is not None
    remedy = (
        f"each look at what another node wrote takes that long; for NFS, mount with actimeo={_SLOW_S:.0f} or less"
    )
    return Finding(name, slowest <= _SLOW_S, f"seen after {1e3 * slowest:.0f} ms", remedy, optional=True)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _content(number: int) -> bytes:
    return f"{number:08d}".encode() * (_CONTENT // 8)


def _temporary(folder: Path, number: int) -> Path:
    return folder / f"temporary-{number}"


def _own(folder: Path, number: int) -> Path:
    return folder / f"file-{number}"


def _log(folder: Path, number: int) -> Path:
    return folder / f"log-{number}"
