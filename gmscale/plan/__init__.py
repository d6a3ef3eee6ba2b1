"""gmscale plan: how long a step takes on several nodes, and how well it scales, before they are there.

A step measured on one node (given, taken from a run, or measured here on one device) and counted bytes, put into
the cost model of costs.py for each number of nodes and each way to reduce gradients. Nothing is trained.
"""

import json
from collections.abc import Sequence
from typing import Any

from gmscale import config as configuration
from gmscale import costs
from gmscale.data import order
from gmscale.plan.known import Known, Mode
from gmscale.plan.options import Options, add_options, options_of
from gmscale.plan.table import show

__all__ = ["main", "predict"]


def main(argv: Sequence[str]) -> int:
    """Plan and show; the exit status."""
    parser = configuration.build_parser("gmscale plan")
    add_options(parser)
    parser.description = __doc__
    config, given = configuration.parse(argv, "gmscale plan", parser)
    options = options_of(given, config)
    if options.run is not None:
        from gmscale.plan.from_run import known_from

        known = known_from(options.run, options)
    else:
        from gmscale.plan.rehearsed import known_here

        known = known_here(config, options)
    found = predict(known, options)
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def predict(known: Known, options: Options) -> dict[str, Any]:
    """Return one row for each mode and number of nodes, and what they take for granted."""
    return {
        "model": known.model,
        "measured": known.measured,
        "devices_measured": known.devices,
        "devices_per_node": options.cluster.devices_per_node,
        "link_gb_per_s": options.cluster.between.bytes_per_s / 1e9,
        "latency_us": options.cluster.between.latency_s * 1e6,
        "intra_gb_per_s": options.intra_gb_per_s,
        "samples": known.samples,
        "epochs": known.epochs,
        "modes": {mode.name: _mode(mode, known, options) for mode in known.modes},
        "notes": known.notes,
    }


def _mode(mode: Mode, known: Known, options: Options) -> dict[str, Any]:
    rows = [_row(mode, known, options.cluster, nodes) for nodes in sorted({1, *options.nodes})]
    for row in rows:
        row["efficiency"] = rows[0]["step_ms"] / row["step_ms"]
    return {
        "measured_step_ms": 1e3 * mode.step_s,
        "collectives": {name: vars(seen) for name, seen in mode.traffic.items()},
        "of_lateral_maps": vars(mode.awaited),
        "bytes_per_step": sum(seen.bytes for seen in mode.traffic.values()),
        "kept_entries": mode.kept,
        "nodes": [row for row in rows if row["nodes"] in options.nodes],
    }


def _row(mode: Mode, known: Known, cluster: costs.Cluster, nodes: int) -> dict[str, Any]:
    devices = nodes * cluster.devices_per_node
    backward_s = costs.BACKWARD_SHARE * mode.step_s / known.grad_accum_steps
    here, there = (
        costs.exposed_s(mode.traffic, n, cluster.ring(n), backward_s, mode.awaited)
        for n in (known.devices, devices)
    )
    step_s = mode.step_s + max(0.0, there - here)
    images = known.images_per_device * devices
    # an epoch needs a whole step
    steps = known.steps(order.steps_per_epoch(known.samples, images)) if known.samples >= images else None
    return {
        "nodes": nodes,
        "devices": devices,
        "step_ms": 1e3 * step_s,
        "exposed_ms": 1e3 * there,
        "global_batch": images,
        "images_per_s": images / step_s,
        "steps": steps,
        "hours": steps * step_s / 3600 if steps is not None else None,
    }
