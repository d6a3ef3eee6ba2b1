"""What has to be the same on all nodes: versions, settings, devices."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import gmscale
from gmscale.doctor.finding import Finding
from gmscale.doctor.nodes import Nodes
from gmscale.doctor.plan import Plan
from gmscale.environment import PACKAGES, commit, package_version
from gmscale.parallel import cores

_VERSIONS = ("gmscale", "python", *PACKAGES, "triton", "deepspeed", "CUDA", "NCCL")
_SETTINGS = ("--nproc_per_node", "--config", "GPUs")
# Nodes that differ in these train together, only not equally fast.
_SPEED = ("GPU kind", "cores", "OMP_NUM_THREADS")


def facts_of(plan: Plan) -> dict[str, Any]:
    """Return what the nodes compare, of this one."""
    kinds = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    source = commit()
    config = json.dumps(asdict(plan.config), sort_keys=True, default=str).encode() if plan.config else b""
    return {
        "gmscale": f"{gmscale.__version__}{f', commit {source[:12]}' if source else ''}, files {_files()}",
        "python": platform.python_version(),
        **{name: package_version(name) or "missing" for name in (*PACKAGES, "triton", "deepspeed")},
        "CUDA": torch.version.cuda or "none",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none",
        "--nproc_per_node": plan.nproc_per_node,
        "--config": f"content {hashlib.sha256(config).hexdigest()[:12]}" if config else "none",
        "GPUs": torch.cuda.device_count(),
        "GPU kind": ", ".join(kinds) or "none",
        "cores": cores(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def equality_findings(nodes: Nodes, facts: list[dict[str, Any]]) -> Iterator[Finding]:
    """Yield what differs between this node and the head; the head says it of all nodes."""
    yield from _compared(
        nodes, facts, "versions", _VERSIONS, "use one environment on all nodes, or install it alike"
    )
    yield from _compared(nodes, facts, "settings", _SETTINGS, "give all nodes the same options and devices")
    remedy = "the slowest node sets the pace; ask for equal nodes, and equal cores on each"
    yield from _compared(nodes, facts, "hardware", _SPEED, remedy, optional=True)


def _compared(
    nodes: Nodes,
    facts: list[dict[str, Any]],
    title: str,
    names: tuple[str, ...],
    remedy: str,
    *,
    optional: bool = False,
) -> Iterator[Finding]:
    others = nodes.others if nodes.is_head else [nodes.number]
    heads, differs = facts[0], False
    for name in names:
        odd = [f"{facts[i][name]} on {nodes.hosts[i]}" for i in others if facts[i][name] != heads[name]]
        if odd:
            differs = True
            yield Finding(name, False, f"{heads[name]} on {nodes.hosts[0]}, {', '.join(odd)}", remedy, optional)
    if not differs:
        equal = f"equal on {len(facts)} nodes: " if len(facts) > 1 else ""
        yield Finding(title, True, equal + _shown(heads, names))


def _shown(facts: dict[str, Any], names: tuple[str, ...]) -> str:
    shown = [f"{name} {facts[name]}" for name in names if facts[name] not in ("none", "missing", 0)]
    return "; ".join(shown[:4]) + (f"; {len(shown) - 4} more" if len(shown) > 4 else "")


def _files() -> str:
    """Return a few digits that tell apart two states of this package's sources, also outside a checkout."""
    folder = Path(gmscale.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]
