"""gmscale launch COMMAND ...: start a command's ranks on this node, as every node of the job does.

Once a node, with the same arguments on all; launch/torchrun.sh takes the topology from the environment. The
processes are torchelastic's, as under torchrun. Exit status: 0 done, 1 failed, 2 usage, 75 stopped on request after
a checkpoint (the same command goes on).
"""

import argparse
import logging
import os
import shutil
import tempfile
from pathlib import Path

from gmscale.errors import OneLineParser, UsageError, check_choice
from gmscale.launch.console import say
from gmscale.launch.topology import Topology, add_options, set_environment, topology_of
from gmscale.stopping import STOPPED, StopRequest

_COMMANDS = ("train", "compare", "find", "evaluate")


def main(argv: list[str]) -> int:
    """Start the ranks, watch them, start them again where that helps; return the job's exit status."""
    parser = OneLineParser(
        prog="gmscale launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=f"{', '.join(_COMMANDS)}, with its own options")
    options = parser.parse_args(argv)
    if not options.command:
        raise UsageError("gmscale launch: no command; expected gmscale launch --nnodes N ... train --config FILE")
    check_choice(options.command[0], _COMMANDS, "gmscale launch: the command")

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # an address without a name is no news
    with StopRequest() as stop:
        import torch  # from here on it takes seconds

        topology = topology_of(options, torch.cuda.device_count())
        _check_command(options.command)
        set_environment(topology)
        return _launch(topology, options.command, stop)


def _launch(topology: Topology, command: list[str], stop: StopRequest) -> int:
    from gmscale.launch.agent import Agent
    from gmscale.launch.meeting import EndedError, Meeting

    _quieten()
    say(topology.describe())
    folder = Path(tempfile.mkdtemp(prefix="gmscale-launch-"))
    meeting = None
    try:
        meeting = Meeting(topology, say, stop)
        meeting.agree(command)
        status = Agent(topology, meeting, command, folder).supervise(stop)
        if status == STOPPED:
            say("stopped on request; the same command goes on")
        return status
    except EndedError as end:
        for line in end.lines:
            say(line)
        return end.status
    finally:
        if meeting is not None:
            meeting.leave()
        shutil.rmtree(folder, ignore_errors=True)


def _check_command(command: list[str]) -> None:
    """Find a user's mistakes once, before every rank does."""
    if command[0] == "train":
        from gmscale import config, dry_run

        parser = config.build_parser("gmscale train")
        dry_run.add_options(parser)
        config.parse(command[1:], "gmscale train", parser)


def _quieten() -> None:
    """Leave out what torchelastic logs of each exit and signal: the launcher says it in its own words."""
    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
