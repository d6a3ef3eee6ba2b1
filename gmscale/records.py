"""What masks and probes report, as the values of a record in metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from gmscale.sites import MaskReport
from gmscale.sites.probe import Quality, QualityReport


def mask_values(reports: Mapping[str, MaskReport], step_ms: float) -> dict[str, float]:
    """Return what the masks did, those of layer outputs under names of their own."""
    values: dict[str, float | None] = {}
    for name, report in reports.items():
        if report.hook_ms is None:
            continue
        prefix = "" if name == "mask" else f"{name}_"
        values |= {
            f"{prefix}strength": report.strength,
            f"{prefix}kept_entries": report.kept_entries,
            f"{prefix}kept_energy": report.kept_energy,
            f"{prefix}hook_ms": report.hook_ms,
            f"{prefix}hook_share": report.hook_ms / step_ms,
            f"{prefix}wire_bytes": report.wire_bytes,
            f"{prefix}dense_bytes": report.dense_bytes,
        }
        if report.wire_bytes is not None and report.dense_bytes:
            values[f"{prefix}wire_share"] = report.wire_bytes / report.dense_bytes
    return {name: value for name, value in values.items() if value is not None}


def layer_values(reports: Mapping[str, MaskReport]) -> dict[str, dict[str, Any]]:
    """Return what was kept of each layer's gradient, and with consensus why layers travelled whole."""
    layers = {name: kept for report in reports.values() for name, kept in report.layers.items()}
    values: dict[str, dict[str, Any]] = {
        "kept_entries": {name: kept[0] for name, kept in layers.items()},
        "kept_energy": {name: kept[1] for name, kept in layers.items()},
    }
    whole = {name: why for report in reports.values() for name, why in report.dense_parameters.items()}
    return values | ({"travelled_whole": whole} if whole else {})


def quality_values(report: QualityReport) -> dict[str, Any]:
    """Return a measurement of gradient quality: all layers together, each layer, and the diagnostics apart."""
    values = {name: value for name, value in asdict(report.combined).items() if value is not None}
    values |= {"non_finite": report.non_finite, "cost_ms": report.cost_ms}
    for f in fields(Quality):
        values[f"layer_{f.name}"] = {name: getattr(layer, f.name) for name, layer in report.layers.items()}
    if (found := report.diagnostics) is not None:
        spreads = {"raw": found.raw, "masked": found.masked}
        diagnostic = {f"{of}_{name}": x for of, spread in spreads.items() for name, x in spread._asdict().items()}
        values["diagnostic"] = diagnostic | {"raw_gsnr": found.gsnr}
    return values
