"""The options of a plan, and what is wrong with them in one line."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from gmscale.config import TrainConfig
from gmscale.costs import Cluster, Link
from gmscale.errors import UsageError, check_choice, check_range
from gmscale.plan.known import MODES, ONE_MODE


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a plan takes besides the configuration."""

    nodes: list[int]
    cluster: Cluster
    intra_gb_per_s: float | None
    step_s: float | None
    run: Path | None
    modes: list[str] | None
    """None: all that can be told."""
    kept: float | None
    data: tuple[int, int] | None
    """Training samples and classes of data that is not there."""
    json: Path | None


def add_options(parser: ArgumentParser) -> None:
    """Add the options to a parser of training configurations."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="Numbers of nodes."
    )
    group.add_argument("--devices_per_node", type=int, default=8, help="Devices of each node.")
    group.add_argument(
        "--link_gb_per_s", type=float, default=12.5,
        help="GB a second that a node can send to others, all its network cards together (12.5 is 100 Gbit/s).",
    )  # fmt: skip
    group.add_argument(
        "--latency_us", type=float, default=10.0, help="Microseconds until a message arrives at another node."
    )
    group.add_argument(
        "--intra_gb_per_s", type=float | None, default=None,
        help="GB a second that a device can send to the next one of its node; default: as much as is needed.",
    )  # fmt: skip
    group.add_argument(
        "--step_ms", type=float | None, default=None,
        help="Milliseconds of a step on one node with all its devices; default: one device is measured here.",
    )  # fmt: skip
    group.add_argument(
        "--from", type=str | None, default=None, metavar="RUN",
        help="Take the step, the bytes and the configuration of this run directory, whose processes are taken to "
        "have filled nodes of --devices_per_node; nothing is rehearsed.",
    )  # fmt: skip
    group.add_argument(
        "--modes", type=str, nargs="+", default=None, metavar="MODE",
        help=f"Ways to reduce gradients, of {', '.join(MODES)}; default all. Not for deepspeed and fsdp2, which "
        "have one each.",
    )  # fmt: skip
    group.add_argument(
        "--kept", type=float | None, default=None,
        help="Share of the masked entries that consensus keeps, where a run has told it; default: what it keeps of "
        "made-up images. Its bytes depend on it.",
    )  # fmt: skip
    group.add_argument(
        "--samples", type=int | None, default=None,
        help="Training samples, to plan a run whose data is not there: none is opened. Needs --classes.",
    )  # fmt: skip
    group.add_argument("--classes", type=int | None, default=None, help="Classes of such data.")
    group.add_argument("--json", type=str | None, default=None, help="Write the numbers to this file too.")


def options_of(given: Any, config: TrainConfig) -> Options:
    """Return the options; raise UsageError for what makes no sense."""
    run = getattr(given, "from")
    if "WORLD_SIZE" in os.environ:
        raise UsageError("gmscale plan starts its own processes: start it without a launcher")
    for nodes in given.nodes:
        check_range(nodes, "--nodes", 1, whole=True)
    check_range(given.devices_per_node, "--devices_per_node", 1)
    check_range(given.link_gb_per_s, "--link_gb_per_s", 0, open_low=True)
    check_range(given.latency_us, "--latency_us", 0)
    for name, most in (("intra_gb_per_s", math.inf), ("step_ms", math.inf), ("kept", 1)):
        if getattr(given, name) is not None:
            check_range(getattr(given, name), f"--{name}", 0, most, open_low=True)
    for name in ("samples", "classes"):
        if getattr(given, name) is not None:
            check_range(getattr(given, name), f"--{name}", 1)
    for mode in given.modes or ():
        check_choice(mode, MODES, "--modes")
    file = Path(given.json) if given.json is not None else None
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise UsageError(f"--json {file}: expected a file in a directory that can be written")
    _check_together(given, config)
    rate = math.inf if given.intra_gb_per_s is None else given.intra_gb_per_s * 1e9
    return Options(
        nodes=sorted(set(given.nodes)),
        cluster=Cluster(
            devices_per_node=given.devices_per_node,
            between=Link(given.link_gb_per_s * 1e9, given.latency_us / 1e6),
            inside=Link(rate, 0.0),
        ),
        intra_gb_per_s=given.intra_gb_per_s,
        step_s=None if given.step_ms is None else given.step_ms / 1e3,
        run=None if run is None else Path(run),
        modes=None if given.modes is None else list(dict.fromkeys(given.modes)),
        kept=given.kept,
        data=None if given.samples is None else (given.samples, given.classes),
        json=file,
    )


def _check_together(given: Any, config: TrainConfig) -> None:
    """Raise UsageError for options that contradict one another."""
    if given.kept is not None and given.modes and not any("consensus" in mode for mode in given.modes):
        raise UsageError("--kept is of consensus, which is not among --modes")
    if getattr(given, "from") is not None:
        if config != TrainConfig():
            raise UsageError("--from takes the configuration of its run; leave out --config and the fields of it")
        for name in ("step_ms", "samples", "classes"):
            if getattr(given, name) is not None:
                raise UsageError(f"--{name} is what --from takes from its run; give one of them")
        return
    if (given.samples is None) != (given.classes is None):
        raise UsageError("--samples and --classes go together: they stand for data that is not there")
    if config.parallel.backend in ONE_MODE:
        for name in ("modes", "kept"):
            if getattr(given, name) is not None:
                raise UsageError(f"--{name} is for ddp; parallel.backend {config.parallel.backend} has one mode")
