"""A plan as a table for people, with all that it takes for granted."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from gmscale.dry_run.table import duration, mb
from gmscale.tracking import plain_console


def show(found: Mapping[str, Any]) -> None:
    """Print a row for each mode and number of nodes, then the assumptions."""
    console = plain_console()
    title = f"{found['model']}: a step on nodes of {found['devices_per_node']}; measured: {found['measured']}"
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("mode", "nodes", "MB", "step", "waits", "images/s", "scales", "training"):
        table.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=True)
    for name, mode in found["modes"].items():
        for row in mode["nodes"]:
            table.add_row(
                name,
                str(row["nodes"]),
                mb(mode["bytes_per_step"]).removesuffix(" MB"),
                duration(row["step_ms"] / 1e3),
                duration(row["exposed_ms"] / 1e3),
                f"{row['images_per_s']:.0f}",
                f"{row['efficiency']:.3f}",
                "-" if row["hours"] is None else duration(3600 * row["hours"]),
            )
        table.add_section()
    console.print(table, highlight=False, markup=False)
    for line in (*_words(found), *found["notes"], *_assumptions(found)):
        console.print(f"* {line}", highlight=False, markup=False)


def _words(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "MB: what a step hands to collectives, counted; waits: communication beside which nothing is computed; "
        "scales: a step on one node / this step; training: the steps of the recipe, no evaluation"
    )


def _assumptions(found: Mapping[str, Any]) -> Iterator[str]:
    inside = found["intra_gb_per_s"]
    yield (
        f"network: a node sends {found['link_gb_per_s']:g} GB/s with all its cards together, a message takes "
        f"{found['latency_us']:g} us to the next node, and no switch is a bottleneck"
    )
    yield (
        "inside a node links are as fast as is needed (--intra_gb_per_s)"
        if inside is None
        else f"inside a node a device sends {inside:g} GB/s to the next one, without latency"
    )
    yield (
        "rings through all n devices that enter each node once, one or several: an all-reduce of b bytes takes "
        "2 (n - 1) / n b / rate of the slowest link + 2 (n - 1) latency of a mean hop, a gather or reduce-scatter "
        "half of it; where NCCL takes trees, latency grows more slowly"
    )
    yield (
        "reductions hide behind the backward pass of the last micro-batch (two thirds of its time) and take "
        "nothing from it, from when the first of equal buckets is ready; the last one always shows, and so do "
        "broadcasts and gathered weights, which fsdp2 and ZeRO 3 can hide in part"
    )
    if any(mode["of_lateral_maps"]["calls"] for mode in found["modes"].values()):
        yield "consensus: the backward pass waits for each bucket's lateral maps, so these always show"
    yield "each device trains on as many images a step whatever their number, so the global batch grows with them"
    yield "checked by `gmscale bench plan` for two to four processes only (gmscale/bench/README.md)"
