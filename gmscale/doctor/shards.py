"""Whether every node can read a run's shards, the same ones, and whether there are enough for all workers."""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gmscale import data
from gmscale.config import TrainConfig
from gmscale.data.source import LocalDirectory
from gmscale.doctor.finding import Finding
from gmscale.doctor.nodes import Nodes
from gmscale.doctor.plan import Plan
from gmscale.errors import RunError, UsageError
from gmscale.parallel import cores

_LOOKED_AT = 512  # bytes: a tar's first header
_THREADS = 16


def look_at_data(plan: Plan, config: TrainConfig, number: int, nodes: int) -> dict[str, Any]:
    """Open the data as the first rank of node `number` will; return what the nodes compare, or {"error": ...}.

    Shards at an address are not fetched: of them only what _info.json says is looked at.
    """
    settings, world = config.data, nodes * plan.nproc_per_node
    found: dict[str, Any] = {"samples": 0, "shards": 0, "steps": 0, "fingerprint": ""}
    try:
        if "://" in settings.source:
            for name in (settings.train_split, settings.val_split):
                data.open_split(settings, name)
            split = data.open_split(settings, settings.train_split)
            samples = sum(split.lengths) if split.lengths else None
            return found | {"shards": len(split.names), "samples": samples, "remote": str(split.directory)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said below, for all ranks
            rank = number * plan.nproc_per_node
            # workers are started by the first batch, which nobody asks for
            loader = data.train_loader(
                settings, config.augment, config.run.seed, rank, world, config.optim.grad_accum_steps
            )
            data.val_loader(settings, rank, world)
        unreadable = [] if settings.source == "embedded" else _unreadable(config)
        if unreadable:
            more = f"; {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
            return {"error": f"{unreadable[0]}{more}"}
        split = loader.index.split if isinstance(loader, data.TrainLoader) else _split(config)
        return found | {
            "samples": loader.samples,
            "shards": len(split.names),
            "steps": loader.steps_per_epoch,
            "fingerprint": loader.fingerprint[:12],
        }
    except (UsageError, RunError) as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{error.filename}: {error.strerror}"}


def shard_findings(
    plan: Plan, config: TrainConfig, nodes: Nodes, answers: list[dict[str, Any]]
) -> Iterator[Finding]:
    """Yield what this node found, and how that compares with the head."""
    own, heads = answers[nodes.number], answers[0]
    if "error" in own:
        remedy = (
            "each node needs the same shards by the same path: mount or copy them, or correct the configuration"
        )
        yield Finding("data", False, own["error"], remedy)
        return
    if "remote" in own:
        yield Finding("data", True, f"{own['remote']}: {own['shards']} shards are listed, none was fetched")
    else:
        yield Finding("data", True, f"{own['shards']} shards, {own['samples']} samples, all shards can be read")
    if "error" not in heads and own != heads:
        detail = f"{_short(own)} here, {_short(heads)} on {nodes.hosts[0]}"
        yield Finding("same data", False, detail, "copy the shards and their _info.json anew from one place")
    elif nodes.is_head and not any("error" in answer for answer in answers):
        odd = [nodes.hosts[i] for i, answer in enumerate(answers) if answer != own]
        detail = f"other data on {', '.join(odd)}" if odd else f"{_short(own)} on {len(answers)} nodes"
        yield Finding("same data", not odd, detail, "copy the shards and their _info.json anew from one place")
    if nodes.is_head:
        yield from _division(plan, config, own, len(answers))


def _division(plan: Plan, config: TrainConfig, found: dict[str, Any], nodes: int) -> Iterator[Finding]:
    world, workers = nodes * plan.nproc_per_node, config.data.workers
    batch = config.data.batch_size_per_device * world * config.optim.grad_accum_steps
    readers = f"{world} ranks x {workers} workers"
    if found["steps"]:
        yield Finding("steps an epoch", True, f"{found['steps']}, of {batch} samples each")
    elif found["samples"] is not None:
        remedy = "lower data.batch_size_per_device or optim.grad_accum_steps, or take fewer ranks"
        detail = f"{found['samples'] // batch}, of {batch} samples each; there are {found['samples']}"
        yield Finding("steps an epoch", found["samples"] >= batch, detail, remedy)
    if config.data.access == "index":
        detail = f"{readers}, each reads any sample of {found['shards']} shards (data.access index)"
        yield Finding("shards for workers", True, detail)
    else:
        wanted = world * max(1, workers)
        remedy = (
            f"with data.access stream a worker reads its own shards: make at least {wanted} (gmscale shards build "
            f"--samples_per_shard), lower data.workers to {found['shards'] // world}, or take data.access index"
        )
        detail = f"{found['shards']} shards for {readers}"
        yield Finding("shards for workers", found["shards"] >= wanted, detail, remedy, optional=True)
    here = plan.nproc_per_node * max(1, workers)
    remedy = f"loaders take no more than the {cores()} cores of a node; lower data.workers, or ask for more cores"
    detail = f"{here} loader processes on each node, {cores()} cores"
    yield Finding("cores for workers", here <= cores(), detail, remedy, optional=True)


def _split(config: TrainConfig) -> data.Split:
    return data.open_split(config.data, config.data.train_split)


def _unreadable(config: TrainConfig) -> list[str]:
    """Return why shards of either split cannot be read, reading a little of each."""
    paths: list[Path] = []
    for name in (config.data.train_split, config.data.val_split):
        split = data.open_split(config.data, name)
        if isinstance(split.directory, LocalDirectory):
            paths += [split.directory.path / shard for shard in split.names if not shard.startswith("pipe:")]

    def trouble(path: Path) -> str:
        try:
            with path.open("rb") as file:
                return "" if os.read(file.fileno(), _LOOKED_AT) else f"{path} is empty"
        except OSError as error:
            return f"{path}: {error.strerror}"

    with ThreadPoolExecutor(_THREADS) as pool:
        return [said for said in pool.map(trouble, paths) if said]


def _short(found: dict[str, Any]) -> str:
    print_of = f", fingerprint {found['fingerprint']}" if found["fingerprint"] else ""
    return f"{found['samples']} samples in {found['shards']} shards{print_of}"
