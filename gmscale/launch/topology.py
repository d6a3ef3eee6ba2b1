"""Which processes run where: read from the options, refused before any of them starts if it cannot work."""

import argparse
import os
import re
import socket
from dataclasses import dataclass

from gmscale.errors import UsageError, check_range
from gmscale.launch import network

DEFAULT_PORT = 29400  # torchrun's


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The nodes of a job, and this one among them."""

    min_nodes: int
    max_nodes: int
    nproc_per_node: int
    head: str
    port: int
    """Where the head listens; 0 is any port, for a job of one node."""
    run_id: str
    is_head: bool
    route: network.Route
    """The address and interface of this node that lead to the head."""
    max_restarts: int
    join_timeout_s: float
    grace_s: float
    """How long ranks that were asked to stop may take to save."""

    @property
    def nodes(self) -> str:
        """Their number as it was given: 4, or 2:4."""
        return f"{self.min_nodes}" if self.min_nodes == self.max_nodes else f"{self.min_nodes}:{self.max_nodes}"

    @property
    def host(self) -> str:
        """The name of this node."""
        return socket.gethostname()

    def describe(self) -> str:
        """Return it in one line."""
        threads = os.environ.get("OMP_NUM_THREADS", "")
        return (
            f"{self.nodes} node{'s' if self.max_nodes > 1 else ''} x {self.nproc_per_node} processes, "
            f"{'head here' if self.is_head else f'head {self.head}:{self.port}'}, run id {self.run_id}; "
            f"this is {self.host}, {self.route.address} on {os.environ.get('GLOO_SOCKET_IFNAME')}, "
            f"OMP_NUM_THREADS {threads}; at most {self.max_restarts} restarts in a row"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a topology."""
    parser.add_argument("--nnodes", default="1", help="nodes of the job, or least:most, such as 1:2 (default 1)")
    parser.add_argument("--nproc_per_node", type=int, help="processes on each node; default one a GPU, else 1")
    parser.add_argument(
        "--head", metavar="HOST[:PORT]",
        help=f"the node where all meet; needed for more than one (port {DEFAULT_PORT} unless given)",
    )  # fmt: skip
    parser.add_argument(
        "--node_rank", type=int,
        help="0 on the head; only where addresses do not tell, as for several nodes on one machine",
    )  # fmt: skip
    parser.add_argument("--run_id", default="gmscale", help="name of this start, the same on all nodes")
    parser.add_argument(
        "--max_restarts", type=int, default=3, help="restarts in a row without progress (default 3)"
    )
    parser.add_argument(
        "--join_timeout_s", type=float, default=600.0,
        help="how long nodes wait for one another, also for one that comes back (default 600)",
    )  # fmt: skip
    parser.add_argument(
        "--grace_s", type=float, default=120.0,
        help="how long ranks that were asked to stop may take until they are killed (default 120)",
    )  # fmt: skip


def topology_of(options: argparse.Namespace, gpus: int) -> Topology:
    """Return what the options describe; raise UsageError for what cannot work, on a machine with so many GPUs."""
    least, most = _nodes(options.nnodes)
    processes = options.nproc_per_node if options.nproc_per_node is not None else max(1, gpus)
    check_range(processes, "--nproc_per_node", 1)
    check_range(options.max_restarts, "--max_restarts", 0)
    check_range(options.join_timeout_s, "--join_timeout_s", 0, open_low=True)
    check_range(options.grace_s, "--grace_s", 0, open_low=True)
    if not re.fullmatch(r"[\w.\-]+", options.run_id):
        raise UsageError(f"--run_id is {options.run_id!r}; expected letters, digits, '.', '-' and '_'")
    if 0 < gpus < processes:
        raise UsageError(
            f"--nproc_per_node is {processes}, and {socket.gethostname()} has {gpus} visible GPUs; start at most "
            "one process a GPU, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    if options.head is None:
        if most > 1:
            raise UsageError(
                f"--nnodes is {options.nnodes}, and --head (MASTER_ADDR) is not given; name the node where all meet"
            )
        if options.node_rank:
            raise UsageError(f"--node_rank is {options.node_rank}, and --nnodes is 1; expected 0")
    head, port = _head(options.head) if options.head is not None else ("localhost", 0)
    is_here = network.is_here(head)
    is_head = is_here if options.node_rank is None else options.node_rank == 0
    if is_head and not is_here:
        raise UsageError(
            f"--node_rank is 0, and --head {head} is not this machine ({socket.gethostname()}: "
            f"{', '.join(a for found in network.interfaces().values() for a in found)})"
        )
    if most == 1 and not is_head:
        raise UsageError(f"--head {head} is not this machine, and --nnodes is 1; start it there, or set --nnodes")
    route = network.route_to(head, port or DEFAULT_PORT)
    # localhost and 127.0.0.1 are meant as they stand: several nodes on one machine, for tests
    if most > 1 and network.is_loopback(route.address) and head != "localhost" and not head.startswith("127."):
        raise UsageError(
            f"--head {head} resolves to {route.address} on {socket.gethostname()}, which other nodes cannot reach; "
            "give the address that they know it by, or remove that line of /etc/hosts"
        )
    if is_head and port:
        trouble = network.can_listen(port)
        if trouble is not None:
            raise UsageError(
                f"--head {head}:{port}: {trouble}; choose another port, or set --node_rank if the head is another "
                "launcher on this machine"
            )
    return Topology(
        min_nodes=least,
        max_nodes=most,
        nproc_per_node=processes,
        head=head,
        port=port,
        run_id=options.run_id,
        is_head=is_head,
        route=route,
        max_restarts=options.max_restarts,
        join_timeout_s=options.join_timeout_s,
        grace_s=options.grace_s,
    )


def set_environment(topology: Topology) -> None:
    """Set what the ranks inherit, wherever the user has not."""
    # NCCL finds its own way, over several interfaces if there are; gloo would go by the host's name.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", topology.route.interface)
    # For libraries beside torch, which gets its share of the cores from parallel.threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Each start of the ranks meets in a store of its own: one shared over restarts keeps a replaced node out.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def _nodes(given: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", given)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(f"--nnodes is {given!r}; expected a number of nodes such as 4, or least:most such as 2:4")
    return least, most


def _head(given: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[?([0-9a-fA-F:]+:[0-9a-fA-F:]*)\](?::(\d+))?|([^:\s]+)(?::(\d+))?", given)
    if match is None:
        raise UsageError(f"--head is {given!r}; expected HOST, HOST:PORT, or [IPV6]:PORT")
    host, port = match[1] or match[3], int(match[2] or match[4] or DEFAULT_PORT)
    check_range(port, "--head: the port", 1, 65535)
    return host, port
