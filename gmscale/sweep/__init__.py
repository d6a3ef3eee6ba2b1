"""gmscale sweep: many trials of one training, with controls, by Ray Tune or as the jobs of an array.

A sweep lives in a folder: base.yaml (what all trials share), sweep.yaml, the ledger trials.jsonl, trials/ with a
run directory for each, logs/ and report.html. Exit status: 0 done, 1 failed, 2 usage, 75 stopped on request (the
same command goes on, or --resume DIR, wherever the folder lies by then).
"""

import argparse
import importlib.util
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gmscale import trials
from gmscale.errors import OneLineParser, UsageError
from gmscale.stopping import STOPPED, StopRequest
from gmscale.trials.ledger import driving

if TYPE_CHECKING:
    from gmscale.config import TrainConfig
    from gmscale.sweep.config import SweepConfig

# What is imported above comes with every actor of Ray: neither torch nor matplotlib.


def main(argv: list[str]) -> int:
    """Begin a sweep, or go on with one; return the exit status."""
    from gmscale.sweep import array, config

    if not any(word == "--resume" or word.startswith("--resume=") for word in argv):
        parser = config.build_parser()
        parser.add_argument("--plan", action="store_true", help="Show the trials, and train none; an array can.")
        base, sweep, rest = config.parse(argv, parser)
        folder = Path(sweep.dir)
        if not rest.plan:
            _check_can_run(sweep)
        with driving(folder):
            base = _begin(folder, _from_anywhere(base), sweep)
            return array.plan(folder, base, sweep) if rest.plan else _run(folder, base, sweep)

    options = _resume_parser().parse_args(argv)
    folder = Path(options.resume)
    base, sweep = config.load(folder)
    trials.read(folder)
    if options.record is not None:
        return array.record(folder, sweep, options.record)
    if not options.plan:
        _check_can_run(sweep)
    with driving(folder):
        return array.plan(folder, base, sweep) if options.plan else _run(folder, base, sweep)


def _resume_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="gmscale sweep", description="Go on with a sweep, wherever its folder lies now.")
    parser.add_argument("--resume", required=True, metavar="DIR", help="folder of the sweep")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="write what is left to train, for the jobs of an array")
    what.add_argument("--record", type=int, metavar="N", help="write into the ledger how trial N ended in its job")
    return parser


def _check_can_run(sweep: "SweepConfig") -> None:
    """Raise UsageError, before anything is written, if Ray is missing or no trial fits on this machine."""
    from gmscale.sweep.resources import check_this_machine

    for name in ("ray", "optuna"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f'gmscale sweep needs {name}; pip install "gmscale[sweep]" (--plan does without)')
    if sweep.dashboard and importlib.util.find_spec("aiohttp_cors") is None:
        raise UsageError('sweep.dashboard needs more of Ray than is installed here; pip install "ray[default]"')
    check_this_machine(sweep)


def _from_anywhere(base: "TrainConfig") -> "TrainConfig":
    """Return the configuration with its data where they are seen from here: it may go on from elsewhere."""
    source = os.path.abspath(base.data.source) if Path(base.data.source).is_dir() else base.data.source
    data = replace(base.data, source=source, cache_dir=os.path.abspath(base.data.cache_dir))
    return replace(base, data=data)


def _begin(folder: Path, base: "TrainConfig", sweep: "SweepConfig") -> "TrainConfig":
    """Write a new sweep's folder, unless the same command goes on; return the configuration that trials share."""
    from gmscale.sweep import config, planning

    if (folder / "trials.jsonl").exists():
        config.check_same(folder, base, sweep)
        return base
    planned = planning.search(base, sweep)
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        config.save(folder, base, sweep)
        trials.Ledger(folder).begin(planned)
    except OSError as error:
        raise UsageError(f"sweep.dir {folder} cannot be written: {error.strerror}") from None
    return base


def _run(folder: Path, base: "TrainConfig", sweep: "SweepConfig") -> int:
    """Train what is left with Ray, then write the report and say what it says first."""
    from gmscale import report
    from gmscale.sweep import planning
    from gmscale.sweep.display import Display
    from gmscale.sweep.driver import Driver
    from gmscale.tracking import plain_console
    from gmscale.trials import confirmation

    console = plain_console()
    total = planning.expected(sweep, trials.read(folder))
    try:
        with StopRequest() as stop, Display(console, base.run.epochs, sweep.objectives[0], total) as display:
            finished = Driver(folder, base, sweep, display, stop).run()
    except KeyboardInterrupt:
        said = f"interrupted; gmscale sweep --resume {folder} goes on from the last checkpoints"
        console.print(said, highlight=False, soft_wrap=True)
        return 128 + signal.SIGINT
    page = report.write_report([str(folder)])
    records = trials.read(folder)
    tables = confirmation.confirmed(records, sweep.objectives)
    for objective in sweep.objectives:
        found = confirmation.winner(records, objective, asdict(sweep), tables.get(objective))
        console.print(found.sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    if not finished:
        console.print(
            f"stopped on request; gmscale sweep --resume {folder} goes on", highlight=False, soft_wrap=True
        )
    return 0 if finished else STOPPED
