"""The options of a dry run, and what is wrong with them in one line."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from gmscale import costs
from gmscale.errors import UsageError, check_range

_DEFAULTS: dict[str, Any] = {
    "samples": None,
    "classes": None,
    "val_samples": 0,
    "devices": None,
    "link_gb_per_s": 12.5,
    "latency_us": 10.0,
    "json": None,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What --dry_run takes besides the configuration."""

    samples: int | None
    classes: int | None
    val_samples: int
    devices: int | None
    link: costs.Link
    json: Path | None


def add_options(parser: ArgumentParser) -> None:
    """Add the options to a parser of training configurations."""
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="Build everything, train a few masked steps on made data, print memory, times, bytes and the hours "
        "that the recipe will take, and write nothing into the run directory.",
    )
    group.add_argument(
        "--samples", type=int | None, default=None,
        help="dry run: training samples, to plan a run whose data is not there: none is opened. Needs --classes.",
    )  # fmt: skip
    group.add_argument("--classes", type=int | None, default=None, help="dry run: classes of such data.")
    group.add_argument(
        "--val_samples", type=int, default=0,
        help="dry run: validation samples of such data; with 0 the estimate leaves evaluation out.",
    )  # fmt: skip
    group.add_argument(
        "--devices", type=int | None, default=None,
        help="dry run: devices to estimate the hours for, each with the same batch; default those of this start.",
    )  # fmt: skip
    group.add_argument(
        "--link_gb_per_s", type=float, default=12.5,
        help="dry run: GB a second that a device can send to the next one (12.5 is a network of 100 Gbit/s).",
    )  # fmt: skip
    group.add_argument(
        "--latency_us",
        type=float,
        default=10.0,
        help="dry run: microseconds until a message arrives at the next one.",
    )
    group.add_argument("--json", type=str | None, default=None, help="dry run: write the numbers to this file too.")


def options_of(given: Any) -> Options | None:
    """Return the options of a dry run, or None if none is asked for; raise UsageError for what makes no sense."""
    values = {name: getattr(given, name) for name in _DEFAULTS}
    if not given.dry_run:
        for name, value in values.items():
            if value != _DEFAULTS[name]:
                raise UsageError(f"--{name} is an option of dry runs; add --dry_run")
        return None
    for name in ("samples", "classes", "devices"):
        if values[name] is not None:
            check_range(values[name], f"--{name}", 1)
    check_range(values["val_samples"], "--val_samples", 0)
    check_range(values["link_gb_per_s"], "--link_gb_per_s", 0, open_low=True)
    check_range(values["latency_us"], "--latency_us", 0)
    if (values["samples"] is None) != (values["classes"] is None):
        raise UsageError("--samples and --classes go together: they stand for data that is not there")
    if values["val_samples"] and values["samples"] is None:
        raise UsageError("--val_samples goes with --samples and --classes; without them the data is opened")
    file = Path(values["json"]) if values["json"] is not None else None
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise UsageError(f"--json {file}: expected a file in a directory that can be written")
    link = costs.Link(values.pop("link_gb_per_s") * 1e9, values.pop("latency_us") / 1e6)
    del values["json"]
    return Options(**values, link=link, json=file)
