"""gmscale doctor: what works on this machine, and what to do about the rest.

With --launch: whether this node and the others of a job can train together. Run it on every node at about the same
time, as `srun gmscale doctor --launch` does; each says what fails there, the head shows all nodes at the end.
"""

import argparse
import os
from pathlib import Path

from gmscale.errors import OneLineParser


def main(argv: list[str]) -> int:
    """Print the findings; return 0 if everything that is not optional works, else 1."""
    parser = OneLineParser(
        prog="gmscale doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dir", default=".", help="directory in which runs will be written (default: this one)")
    add("--launch", action="store_true", help="check this node and the others of a job together")
    launch = parser.add_argument_group(
        "with --launch", "Where the environment has the variable in brackets, it is the default, as in launch/."
    )
    add = launch.add_argument
    add("--nnodes", metavar="N", help="nodes of the job (NNODES; 1)")
    add("--head", metavar="HOST[:PORT]", help="the node where all meet (MASTER_ADDR)")
    add("--port", metavar="N", help="port on which it listens (MASTER_PORT; 29400)")
    add("--node_rank", metavar="N", help="0 on the head; only where addresses do not tell (NODE_RANK)")
    add("--nproc_per_node", metavar="N", help="processes on each node (NPROC_PER_NODE; one a GPU, else 1)")
    add("--config", metavar="FILE", help="configuration of the run whose data is to be looked at")
    add("--timeout_s", type=float, metavar="S", help="how long nodes wait for one another (60)")
    options = parser.parse_args(argv)
    if options.launch:
        # torch says on its own, at length, what the findings say in a line; it reads this when it is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        from gmscale.doctor.launch import check_launch

        return check_launch(options)
    given = [action.dest for action in launch._group_actions if getattr(options, action.dest) is not None]
    if given:
        parser.error(f"--{given[0]} goes with --launch")

    from gmscale.doctor.finding import show
    from gmscale.doctor.machine import examine

    return 0 if show(examine(Path(options.dir))) else 1
