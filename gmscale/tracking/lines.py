"""The lines that people read: what a record says, in the words and the width of a terminal."""

from collections.abc import Mapping
from typing import Any, NamedTuple

_SPIKE = 3.0  # times the mean loss; a micro-batch above it is shown, which the mean would hide


class _Part(NamedTuple):
    """A piece of a line: its usual form, one for narrow terminals, and whether the narrowest go without it."""

    usual: str
    short: str
    spare: bool = False


def train_line(record: Mapping[str, Any], arm: str, epochs: float, eta: str, width: int | None = None) -> str:
    """Return the text of a `train` record, in short forms if it would not fit in `width` columns.

    In short forms two numbers after `kept` are the shares of entries and of energy. Warnings are never left out.
    """
    parts = [_Part(f"{arm:<14}", arm, spare=True)]
    parts.append(_Part(f"epoch {record['epoch']:.2f}/{epochs:g}", f"{record['epoch']:.2f}/{epochs:g}"))
    parts.append(_same(f"loss {_loss(record)}"))
    parts.append(_Part(f"top1 {_number(record['top1'], 1)} %", f"top1 {_number(record['top1'], 1)}%"))
    images = _number(record["images_per_s"], 0 if record["images_per_s"] >= 100 else 1)
    parts.append(_Part(f"{images} images/s", f"{images}/s"))
    parts.append(_of_step("data", record["data_ms"], record["data_ms"] / record["step_ms"]))
    for name, label in (("hook", "hook"), ("output_hook", "output hook")):
        if record.get(f"{name}_ms") is not None:
            parts.append(_of_step(label, record[f"{name}_ms"], record[f"{name}_share"]))
    if record.get("memory_mb") is not None:
        memory = record["memory_mb"]
        text = f"{memory / 1024:.1f} GiB" if memory >= 1024 else f"{memory:.0f} MiB"
        parts.append(_Part(text, text.replace(" ", ""), spare=True))
    for prefix, label in (("", "kept"), ("output_", "output kept")):
        if record.get(f"{prefix}kept_entries") is not None:
            entries, energy = (100 * record[f"{prefix}kept_{what}"] for what in ("entries", "energy"))
            usual = f"{label} {entries:.0f} % of entries, {energy:.0f} % energy"
            parts.append(_Part(usual, f"{label} {entries:.0f}/{energy:.0f}%", spare=True))
    if record.get("bad_samples"):
        parts.append(_Part(f"{record['bad_samples']} bad samples replaced", f"{record['bad_samples']} bad"))
    if record.get("skipped_steps"):
        parts.append(_Part(f"{record['skipped_steps']} steps skipped", f"{record['skipped_steps']} skipped"))
    parts.append(_same(f"ETA {eta}"))
    return _fitted(parts, width)


def validation_line(record: Mapping[str, Any], arm: str, epochs: float) -> str:
    """Return the text of a `validation` or `validation_ema` record."""
    return (
        f"{arm:<14}  epoch {record['epoch']:.2f}/{epochs:g}  {record['phase']}: loss {_number(record['loss'])}  "
        f"top1 {_number(record['top1'], 1)} %  top5 {_number(record['top5'], 1)} %  ({record['count']} images)"
    )


def skipped_line(record: Mapping[str, Any], arm: str) -> str:
    """Return the text of a `skipped` record."""
    row = f", {record['in_a_row']} in a row" if record["in_a_row"] > 1 else ""
    return f"{arm:<14}  step {record['step']} skipped: gradients not finite ({record['cause']}){row}"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def _same(text: str) -> _Part:
    return _Part(text, text)


def _of_step(label: str, ms: float, share: float) -> _Part:
    return _Part(f"{label} {ms:.1f} ms ({100 * share:.1f} % of step)", f"{label} {ms:.0f}ms {100 * share:.0f}%")


def _loss(record: Mapping[str, Any]) -> str:
    """Return the mean loss, and the largest of a micro-batch where it is a spike."""
    mean, largest = record["loss"], record.get("loss_max", 0.0)
    spike = mean is not None and (largest is None or largest > _SPIKE * mean)
    return f"{_number(mean)} (max {_number(largest)})" if spike else _number(mean)


def _fitted(parts: list[_Part], width: int | None) -> str:
    """Return the parts in the longest forms that fit; the first spare ones go first."""
    line = "  ".join(part.usual for part in parts)
    if width is None or len(line) <= width:
        return line
    while True:
        line = "  ".join(part.short for part in parts)
        spare = [part for part in parts if part.spare]
        if len(line) <= width or not spare:
            return line
        parts.remove(spare[0])


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
