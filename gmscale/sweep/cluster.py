"""python -m gmscale.sweep.cluster COMMAND ...: a Ray cluster on several machines, for one command.

Once a node, with the same arguments on all; launch/ray_cluster.sh takes the topology from the environment. The
command runs on the head, finds the cluster by RAY_ADDRESS, and takes it down with it. All nodes end with its
status: 75 where it was stopped on request and the same command goes on; 1 if the cluster is lost, 2 usage.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gmscale.errors import OneLineParser, RunError, UsageError, check_range
from gmscale.launch import network
from gmscale.launch.console import say
from gmscale.launch.topology import DEFAULT_PORT, Topology, topology_of
from gmscale.stopping import STOPPED, StopRequest

# From the one after that where all meet: what Ray calls them.
_HEAD_PORTS = ("port", "ray-client-server-port", "dashboard-port")
_PORTS = (
    *_HEAD_PORTS,
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
)
_SPACING = 10  # between the ports of two nodes of one machine


def main(argv: list[str]) -> int:
    """Be one node of the cluster until the command has ended; return the status of the job."""
    options = _parser().parse_args(argv)
    _check(options)
    with StopRequest() as stop:
        topology = topology_of(options, gpus=0)
        ports, own_token = _ports(topology, options.node_rank or 0), _own_token()
        from gmscale.launch.meeting import EndedError, Meeting  # with torch, which takes seconds
        from gmscale.sweep.ray_node import RayNode

        say(_describe(topology, ports))
        folder = Path(tempfile.mkdtemp(prefix=f"gmscale-ray-{os.getpid()}-"))  # short: sockets lie there
        meeting = node = None
        try:
            meeting = Meeting(topology, say, stop)
            meeting.agree(options.command)
            node = RayNode(topology, options, ports, own_token, meeting, stop, folder)
            return node.lead(options.command) if topology.is_head else node.follow()
        except EndedError as end:
            for line in end.lines:
                say(line)
            return end.status
        except KeyboardInterrupt:
            said = f"interrupted a second time on {topology.host}: killed"
            say(said)
            if meeting is not None:
                meeting.tell(STOPPED, [said])
            return STOPPED
        finally:
            if node is not None:
                node.take_down()
            if meeting is not None:
                meeting.leave()
            shutil.rmtree(folder, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="launch/ray_cluster.sh")
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--head", metavar="HOST[:PORT]")
    parser.add_argument("--node_rank", type=int)
    parser.add_argument("--run_id", default="gmscale")
    parser.add_argument("--join_timeout_s", type=float, default=600.0)
    parser.add_argument("--grace_s", type=float, default=170.0)
    parser.add_argument("--num_cpus", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--num_gpus", type=int)
    parser.add_argument("--dashboard", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    parser.set_defaults(nproc_per_node=1, max_restarts=0)  # which are of training alone
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError for what cannot work on any node."""
    if not options.command:
        raise UsageError("no command; expected launch/ray_cluster.sh gmscale sweep --config FILE")
    if shutil.which(options.command[0]) is None:
        raise UsageError(f"the command {options.command[0]!r} is not a program here; expected one such as gmscale")
    if importlib.util.find_spec("ray") is None:
        raise UsageError("ray is not installed here; pip install 'gmscale[sweep]', or set VENV")
    if options.dashboard and importlib.util.find_spec("aiohttp_cors") is None:
        raise UsageError("DASHBOARD=1 needs more of Ray than is installed here; pip install 'ray[default]'")
    check_range(options.num_cpus, "NUM_CPUS", 1)
    if options.num_gpus is not None:
        check_range(options.num_gpus, "NUM_GPUS", 0)


def _ports(topology: Topology, node_rank: int) -> dict[str, int]:
    """Return Ray's ports on this node. Raises UsageError if one is taken."""
    first = (topology.port or DEFAULT_PORT) + 1 + _SPACING * node_rank
    ports = {name: first + i for i, name in enumerate(_PORTS) if topology.is_head or name not in _HEAD_PORTS}
    for name, port in ports.items():
        trouble = network.can_listen(port)
        if trouble is not None:
            raise UsageError(f"port {port} ({name} of Ray): {trouble}; choose another MASTER_PORT")
    return ports


def _describe(topology: Topology, ports: Mapping[str, int]) -> str:
    t, numbers = topology, sorted(ports.values())
    head = "head here" if t.is_head else f"head {t.head}:{t.port}"
    return (
        f"Ray on {t.nodes} node{'s' if t.max_nodes > 1 else ''}, {head}; this is {t.host}, {t.route.address} on "
        f"{t.route.interface}, ports {numbers[0]} to {numbers[-1]}"
    )


def _own_token() -> str:
    """Return the token that the user has set, if any. Raises UsageError if its file cannot be read."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    try:
        return os.environ.get("RAY_AUTH_TOKEN", "") or (Path(path).read_text().strip() if path else "")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"RAY_AUTH_TOKEN_PATH {path} cannot be read: {error}; expected a token's file") from None


if __name__ == "__main__":
    try:
        ended = main(sys.argv[1:])
    except (UsageError, RunError) as error:
        print(f"gmscale: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    StopRequest.ignore_more()
    sys.exit(ended)
