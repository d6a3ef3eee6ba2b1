"""Whose fault it was, read from the heartbeats: pure functions of records."""

import signal
from collections.abc import Mapping, Sequence

from gmscale.heartbeat import Record, period_s

SILENT = 3  # heartbeats later than another rank's last one, and a rank hangs or is gone
_MOST = 4  # lines about single ranks


def of_exits(exits: Mapping[int, int], records: Sequence[Record], size: int, now: float) -> list[str]:
    """Return lines about the ranks that ended with the statuses `exits`, the cause first.

    `records` are those of one start of `size` ranks; negative statuses are signals.
    """
    by_rank = {record.rank: record for record in records}
    causes = [rank for rank, status in exits.items() if _is_own(status, by_rank.get(rank))]
    late = of_records(records, size, now) if all(exits[rank] == -signal.SIGABRT for rank in causes) else []
    if causes and late:  # NCCL's watchdog aborts a rank that waits for another
        return _cut(late + [_ended(rank, exits[rank], by_rank.get(rank)) for rank in sorted(causes)])
    told = [r for r in records if r.rank not in exits and r.status not in (None, 0) and not r.by_peer]
    if causes or told:
        lines = [_ended(rank, exits[rank], by_rank.get(rank)) for rank in sorted(causes)]
        lines += [_ended(record.rank, record.status or 1, record) for record in told]
        return _cut(lines)
    found = of_records(records, size, now)
    if found:
        return found
    return _cut([_ended(rank, status, by_rank.get(rank)) for rank, status in sorted(exits.items())])


def of_records(records: Sequence[Record], size: int, now: float) -> list[str]:
    """Return lines about the ranks that others waited for: silent ones, missing ones, those that are behind."""
    if not records:
        return []
    newest = max(record.seen for record in records)
    missing = sorted(set(range(size)) - {record.rank for record in records})
    waiting = [record for record in records if record.status is None or record.by_peer]
    silent = [r for r in waiting if r.status is None and newest - r.seen > SILENT * period_s(size)]
    lines = [f"rank {rank} never said a word: it did not start, or its node is gone" for rank in missing]
    lines += [
        f"{_name(r)} gave no sign of life for {now - r.seen:.0f} s, last in {r.where}: it hangs, or is gone"
        for r in silent
    ]
    if lines or not waiting:
        return _cut(lines)
    places = {record.rank: (record.step or 0, record.place) for record in waiting}
    least, most = min(places.values()), max(places.values())
    if least == most:
        lines = [f"all ranks were in {waiting[0].where}: the network between them broke, or one hangs there"]
        quiet = min(waiting, key=lambda record: record.seen)
        if newest - quiet.seen > period_s(size):  # too soon to say that it hangs
            lines.append(f"{_name(quiet)} was heard last {now - quiet.seen:.0f} s ago, the longest of all")
        return lines
    behind = [record for record in waiting if places[record.rank] == least]
    ahead = next(record for record in waiting if places[record.rank] == most)
    return _cut(
        [
            f"{_name(r)} is behind: {now - r.since:.0f} s in {r.where}, while rank {ahead.rank} is in {ahead.where}"
            for r in behind
        ]
    )


def describe_status(status: int) -> str:
    """Return an exit status in words; negative ones are signals."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " (out of memory? the kernel's log says so)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _is_own(status: int, record: Record | None) -> bool:
    """Return whether a rank ended by a cause of its own, not because of another rank."""
    if record is not None and record.status is not None:
        return not record.by_peer
    return status < 0 and -status not in (signal.SIGTERM, signal.SIGINT)


def _ended(rank: int, status: int, record: Record | None) -> str:
    if record is None:
        return f"rank {rank} {describe_status(status)} before it said a word"
    error = f": {record.error}" if record.error else ""
    return f"{_name(record)} {describe_status(status)} in {record.where}{error}"


def _name(record: Record) -> str:
    return f"rank {record.rank} (host {record.host}, process {record.pid})"


def _cut(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST
    return [*lines[:_MOST], f"and {more} more ranks"] if more > 1 else lines
