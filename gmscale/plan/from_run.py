"""What a plan needs, read from the records of a run; nothing is trained."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from gmscale import config as configuration
from gmscale.config import TrainConfig
from gmscale.costs import NOTHING, Traffic, buckets
from gmscale.errors import UsageError
from gmscale.plan.known import MODES, Known, Mode
from gmscale.plan.options import Options


def known_from(run_dir: Path, options: Options) -> Known:
    """Return what the run's records say; UsageError for a directory without them, or without what a plan needs."""
    config = configuration.load(_file(run_dir, "config.yaml"))
    environment = _json(run_dir, "environment.json")
    records = _training_records(run_dir)
    masked = [record for record in records if "dense_bytes" in record]
    if len(environment.get("world_sizes", [])) > 1:
        raise UsageError(
            f"--from {run_dir}: the run changed its number of processes; which steps are of which is not known"
        )
    if not masked:
        raise UsageError(
            f"--from {run_dir}: the run records no bytes (only ddp with a mask does); plan from its configuration "
            f"and its step: --config {run_dir / 'config.yaml'} --step_ms {_median(records, 'step_ms'):.4g}"
        )
    world_size = environment["world_size"]
    _check_fills_nodes(run_dir, world_size, options)
    touched = _json(run_dir, "touched.json")["mask"]["touched"]
    strongest = max(record["strength"] for record in masked)  # before and after, the mask may be off
    run = _Run(config, [record for record in masked if record["strength"] == strongest], touched)
    names = options.modes or [name for name in MODES if run.tells(name, options.kept)]
    for name in names:
        if not run.tells(name, options.kept):
            raise UsageError(
                f"--modes {name}: the run in {run_dir} did not try consensus; say with --kept what share of the "
                "masked entries it keeps"
            )
    notes = ["the wait for data is part of the run's steps", "batch-norm statistics are not in a run's bytes"]
    if options.modes is None and len(names) < len(MODES):
        notes.append("consensus is left out: the run did not try it; --kept 0.45 would say what it keeps")
    elif any("consensus" in name for name in names):
        notes.append(run.where_kept_is_from(options.kept))
    notes.append("a mask of either agreement computes as long as the run's own")
    return Known(
        model=config.model.name,
        measured=f"{world_size} x {environment['device']}, {run_dir}",
        devices=world_size,
        images_per_device=config.data.batch_size_per_device * config.optim.grad_accum_steps,
        grad_accum_steps=config.optim.grad_accum_steps,
        samples=_json(run_dir, "data.json")["training_samples"],
        epochs=config.run.epochs,
        modes=[run.mode(name, options.kept) for name in names],
        notes=notes,
    )


class _Run:
    """A run of ddp with a mask: its medians, and what other modes would have handed to collectives."""

    def __init__(
        self, config: TrainConfig, records: list[dict[str, Any]], touched: list[Mapping[str, Any]]
    ) -> None:
        self._config = config
        self._step_s = _median(records, "step_ms") / 1e3
        self._hook_s = _median(records, "hook_ms") / 1e3
        self._dense, self._wire = _median(records, "dense_bytes"), _median(records, "wire_bytes")
        self._kept = _median(records, "kept_entries")
        self._entries = sum(t["entries"] for t in touched)
        self._map_units = sum(prod(t["map"]) for t in touched)
        self._agreed = config.mask.agreement == "consensus"

    def tells(self, name: str, kept: float | None) -> bool:
        """Whether the bytes of this mode are known."""
        return "consensus" not in name or self._agreed or kept is not None

    def where_kept_is_from(self, kept: float | None) -> str:
        """Return a note."""
        if kept is not None:
            return f"consensus keeps {100 * kept:.0f} % of the masked entries, as given by --kept"
        return f"consensus keeps {100 * self._kept:.0f} % of the masked entries, as in the run"

    def mode(self, name: str, kept: float | None) -> Mode:
        """Return what is known of a mode."""
        agreement, hook = MODES[name]
        calls = buckets(self._dense, self._config.parallel.bucket_cap_mb * 2**20)
        narrower = 1.0 if hook == "allreduce" else 0.5
        awaited, nbytes = NOTHING, self._dense
        if agreement == "consensus":
            awaited = Traffic(calls, 4 * self._map_units * narrower)
            nbytes = self._consensus_bytes(kept)
        return Mode(
            name=name,
            # the run's own mask is in its steps
            step_s=self._step_s if agreement is not None else self._step_s - self._hook_s,
            traffic={"allreduce": Traffic(calls + awaited.calls, nbytes * narrower)},
            awaited=awaited,
            kept=(kept or self._kept) if agreement == "consensus" else None,
        )

    def _consensus_bytes(self, kept: float | None) -> float:
        """Return the bytes of consensus without compression: those of the run, or worked out from the share."""
        if self._agreed:
            own = self._wire * (1 if self._config.parallel.comm_hook == "allreduce" else 2)
            return own if kept is None else own + 4 * (kept - self._kept) * self._entries
        assert kept is not None
        return self._dense - 4 * (1 - kept) * self._entries + 4 * self._map_units


def _training_records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of training, without the first, whose steps warm up."""
    path = _file(run_dir, "metrics.jsonl")
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records = [record for record in records if record["phase"] == "train" and record["step_ms"] > 0]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--from {run_dir}: metrics.jsonl has lines that no run writes") from None
    if not records:
        raise UsageError(f"--from {run_dir}: metrics.jsonl has no record of training yet")
    return records[1:] or records


def _median(records: list[dict[str, Any]], key: str) -> float:
    return median(record[key] for record in records)


def _check_fills_nodes(run_dir: Path, world_size: int, options: Options) -> None:
    per_node = options.cluster.devices_per_node
    if world_size > per_node and world_size % per_node != 0:
        raise UsageError(
            f"--devices_per_node is {per_node}, and the run in {run_dir} had {world_size} processes; expected a "
            "divisor of them, or more"
        )


def _file(run_dir: Path, name: str) -> Path:
    path = run_dir / name
    if not path.is_file():
        raise UsageError(f"--from {run_dir}: there is no {name}; expected a run directory of gmscale train")
    return path


def _json(run_dir: Path, name: str) -> Any:
    path = _file(run_dir, name)
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UsageError(f"--from {run_dir}: {name} is not JSON") from None
