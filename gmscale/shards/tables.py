"""What the commands about shards print."""

import sys
from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gmscale.shards.build import Options, Summary
from gmscale.shards.check import Findings
from gmscale.shards.contents import Contents

_SHOWN = 5  # names of classes


def show_summary(options: Options, summary: Summary) -> None:
    """Print what a build came to."""
    if summary.ignored:
        _line(f"passed over: {_counts(summary.ignored)}")
    if summary.unused:
        names = ", ".join(summary.unused[:_SHOWN]) + (", ..." if len(summary.unused) > _SHOWN else "")
        _line(f"classes without an image: {len(summary.unused)} of {summary.classes} ({names})")
    if summary.skipped:
        _line(f"left out: {_counts(summary.skipped)} (see {options.out / f'_skipped-{options.split}.txt'})")
    rate = f"{summary.images / max(summary.seconds, 1e-9):,.0f} images/s" if summary.images else "nothing to do"
    kept = f" ({summary.kept} of them complete before)" if summary.kept else ""
    _line(
        f"{options.out}: {options.split} has {summary.samples:,} samples of {summary.classes:,} classes in "
        f"{summary.shards:,} shards{kept}, {_size(summary.bytes)}; {rate}"
    )


def show_findings(shards: str, found: Sequence[Findings], full: bool) -> None:
    """Print one row a split, how many faults there are of each reason, and the first of them."""
    table = _table(shards, ("split", "shards", "samples", "bytes", "bad shards", "bad samples", "images/s"))
    for split in found:
        rate = f"{split.samples / split.seconds:,.0f}" if split.seconds and split.samples else "-"
        bad = (f"{split.bad_shards:,}", f"{split.of_samples.total():,}")
        table.add_row(split.split, f"{split.shards:,}", f"{split.samples:,}", _size(split.bytes), *bad, rate)
    console = _console()
    console.print(table)
    for split in found:
        if split.faults:
            _line(f"{split.split}: {_counts(split.of_shards + split.of_samples)}")
        for fault in split.listed:
            key = f"{fault.key}: " if fault.key is not None else ""
            _line(f"  {fault.shard}: {key}{fault.reason}: {fault.detail}")
        if len(split.listed) < split.faults:
            _line(f"  and {split.faults - len(split.listed):,} more (--list shows more of them)")
    if not any(split.faults for split in found):
        looked = (
            "hashes and all pixels too" if full else "headers, sizes and labels; --full reads images and hashes"
        )
        _line(f"no fault ({looked})")


def show_contents(shards: str, found: Sequence[Contents]) -> None:
    """Print one column a split."""
    table = _table(shards, ("", *(split.split for split in found)))
    rows = (
        ("shards", [f"{s.shards:,}" for s in found]),
        ("samples", [_number(s.samples) for s in found]),
        ("samples of the shortest shard", [_number(s.shortest_shard) for s in found]),
        ("samples of the longest shard", [_number(s.longest_shard) for s in found]),
        ("bytes", [_size(s.bytes) for s in found]),
        ("bytes a sample", [_size(s.bytes / s.samples) if s.bytes and s.samples else "-" for s in found]),
        ("classes", [_number(s.classes) for s in found]),
        ("samples of a class: fewest", [_number(s.per_class[0]) if s.per_class else "-" for s in found]),
        ("samples of a class: median", [f"{s.per_class[1]:,g}" if s.per_class else "-" for s in found]),
        ("samples of a class: most", [_number(s.per_class[2]) if s.per_class else "-" for s in found]),
        ("samples that cannot be used", [_number(s.bad_samples) for s in found]),
        ("SHA-256 of the shards", ["known" if s.hashes else "-" for s in found]),
        ("index", [s.index for s in found]),
    )
    for name, cells in rows:
        table.add_row(name, *cells)
    _console().print(table)
    for split in found:
        if split.fault:
            _line(f"{split.split}: {split.fault}")
    if any(split.index != "fits" and not split.fault for split in found):
        _line("A dash: not known without an index, which gmscale train makes.")


def _size(count: float | None) -> str:
    """Return a number of bytes as people read it."""
    if count is None:
        return "-"
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counter.most_common())


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    return table


def _line(text: str) -> None:
    # File names may hold bytes that are no text.
    print(text.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8"))


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=120)
