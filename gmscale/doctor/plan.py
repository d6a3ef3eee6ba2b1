"""What `gmscale doctor --launch` was asked: the options, for which the environment of launch/ has the defaults."""

import argparse
import ipaddress
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gmscale import config as configuration
from gmscale.config import TrainConfig
from gmscale.errors import UsageError
from gmscale.launch import network
from gmscale.launch.topology import DEFAULT_PORT

_VARIABLES = {
    "nnodes": "NNODES",
    "head": "MASTER_ADDR",
    "port": "MASTER_PORT",
    "node_rank": "NODE_RANK",
    "nproc_per_node": "NPROC_PER_NODE",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job that does not run yet, seen from one of its nodes."""

    nnodes: int
    head: str
    port: int
    node_rank: int | None
    """0 is the head, whatever its address; None lets the address tell."""
    nproc_per_node: int
    directory: Path
    config: TrainConfig | None
    timeout_s: float
    expected: tuple[str, ...] = ()
    """Names of the job's nodes, where Slurm knows them."""

    @property
    def host(self) -> str:
        """Name of this node."""
        return socket.gethostname()

    @property
    def on_one_machine(self) -> bool:
        """Whether the head was given as this very machine: its nodes are processes, as in tests."""
        return self.head == "localhost" or self.head.startswith("127.")

    def is_head(self) -> bool:
        """Whether this node is the head. Raises UsageError if the head's name does not resolve."""
        return self.node_rank == 0 if self.node_rank is not None else network.is_here(self.head)


def plan_of(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Plan:
    """Return what was asked for; raise UsageError for what makes no sense."""
    given, names = {}, {}
    for option, variable in _VARIABLES.items():
        value = getattr(options, option)
        given[option] = value if value is not None else environ.get(variable) or None
        names[option] = f"--{option}" if value is not None or given[option] is None else variable
    expected = _slurm_nodes(environ) if given["nnodes"] is None or given["head"] is None else ()
    nnodes = _nodes(given["nnodes"], names["nnodes"]) if given["nnodes"] is not None else max(1, len(expected))
    head = given["head"] or (expected[0] if expected and nnodes > 1 else None)
    if head is None and nnodes > 1:
        raise UsageError(f"there are {nnodes} nodes ({names['nnodes']}); name the one where all meet: --head HOST")
    host, own_port = _head(head or "localhost", names["head"])
    port: str = options.port or own_port or given["port"] or str(DEFAULT_PORT)
    rank = given["node_rank"]
    gpus = torch.cuda.device_count()
    timeout_s = 60.0 if options.timeout_s is None else options.timeout_s
    if not timeout_s > 0:
        raise UsageError(f"--timeout_s is {timeout_s:g}; expected more than 0")
    return Plan(
        nnodes=nnodes,
        head=host,
        port=_whole(port, names["port"], 1, 65535),
        node_rank=None if rank is None else _whole(rank, names["node_rank"], 0),
        nproc_per_node=_whole(given["nproc_per_node"] or str(max(1, gpus)), names["nproc_per_node"], 1),
        directory=Path(options.dir).absolute(),
        config=configuration.load(Path(options.config)) if options.config else None,
        timeout_s=timeout_s,
        expected=expected if len(expected) == nnodes else (),
    )


def _nodes(given: str, name: str) -> int:
    """Return the largest number of nodes of N or least:most."""
    least, _, most = given.partition(":")
    return _whole(most or least, name, 1)


def _head(given: str, name: str) -> tuple[str, str | None]:
    """Return host and port of HOST, HOST:PORT, [IPV6]:PORT or a bare IPv6 address."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(given)), None
    match = re.fullmatch(r"\[(.+)\](?::(\d+))?|([^:\[\]]+)(?::(\d+))?", given)
    if match is None:
        raise UsageError(f"{name} is {given!r}; expected HOST, HOST:PORT or [IPV6]:PORT")
    return match[1] or match[3], match[2] or match[4]


def _whole(given: str, name: str, least: int, most: int = 1 << 20) -> int:
    if not re.fullmatch(r"\d{1,7}", given) or not least <= int(given) <= most:
        top = f" to {most}" if most < 1 << 20 else " or more"
        raise UsageError(f"{name} is {given!r}; expected a whole number, {least}{top}")
    return int(given)


def _slurm_nodes(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the nodes on which srun started this process and its likes; none without srun."""
    packed = environ.get("SLURM_STEP_NODELIST")
    if not packed or shutil.which("scontrol") is None:
        return ()
    found = subprocess.run(["scontrol", "show", "hostnames", packed], capture_output=True, text=True)
    return tuple(found.stdout.split()) if found.returncode == 0 else ()
