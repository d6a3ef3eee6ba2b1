"""gmscale COMMAND: parse, call, turn errors into one line and an exit status.

Exit status: 0 done, 1 the run failed, 2 usage, 75 stopped on request after a checkpoint (start it again).
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

from gmscale import __version__
from gmscale.errors import OneLineParser, RunError, UsageError, nearest
from gmscale.job import in_world
from gmscale.stopping import STOPPED, StopRequest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"gmscale {__version__}")
        sys.exit(0)
    command = _COMMANDS.get(argv[0])
    if command is None:
        _fail(UsageError(f"unknown command {argv[0]!r}{nearest(argv[0], _COMMANDS)} (see gmscale --help)"))
    try:
        with StopRequest() if _can_stop(argv) else nullcontext():
            status = command(argv[1:])
    except (UsageError, RunError) as error:
        _fail(error)
    if status == STOPPED:
        StopRequest.ignore_more()
    sys.exit(status)


def _train(argv: list[str]) -> int:
    from gmscale import config as configuration
    from gmscale import dry_run
    from gmscale.train import train

    parser = configuration.build_parser("gmscale train")
    dry_run.add_options(parser)
    parsed, rest = configuration.parse(argv, "gmscale train", parser)
    options = dry_run.options_of(rest)
    if options is not None:
        return in_world(parsed.parallel, lambda world: dry_run.show(parsed, options, world))
    return in_world(parsed.parallel, lambda world: _status(train(parsed, world).summary is not None))


def _compare(argv: list[str]) -> int:
    from gmscale import config as configuration
    from gmscale.compare import compare

    parser = configuration.build_parser("gmscale compare")
    parser.add_argument("--seeds", type=int, default=5, help="Paired seeds of every arm, from run.seed on.")
    parsed, rest = configuration.parse(argv, "gmscale compare", parser)
    return in_world(parsed.parallel, lambda world: _status(compare(parsed, rest.seeds, world)))


def _evaluate(argv: list[str]) -> int:
    from gmscale.evaluation.command import main as evaluate

    return evaluate(argv, in_world)


def _report(argv: list[str]) -> int:
    from gmscale.report import write_report

    parser = OneLineParser(prog="gmscale report", description="Write one self-contained HTML page about runs.")
    parser.add_argument("runs", nargs="+", help="Run directories, or directories that hold some.")
    parser.add_argument("--out", help="The page; default report.html in the common parent directory.")
    arguments = parser.parse_args(argv)
    print(write_report(arguments.runs, arguments.out))
    return 0


def _bench(argv: list[str]) -> int:
    from gmscale.bench import main as bench

    return bench(argv)


def _launch(argv: list[str]) -> int:
    from gmscale.launch import main as launch

    return launch(argv)


def _sweep(argv: list[str]) -> int:
    from gmscale.sweep import main as sweep

    return sweep(argv)


def _find(argv: list[str]) -> int:
    from gmscale.find import main as find

    return find(argv, in_world)


def _plan(argv: list[str]) -> int:
    from gmscale.plan import main as plan

    return plan(argv)


def _verify(argv: list[str]) -> int:
    from gmscale.verify import main as verify

    return verify(argv)


def _shards(argv: list[str]) -> int:
    from gmscale.shards.commands import main as shards

    return shards(argv)


def _export(argv: list[str]) -> int:
    from gmscale.export import main as export

    return export(argv)


def _doctor(argv: list[str]) -> int:
    from gmscale.doctor import main as doctor

    return doctor(argv)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "compare": _compare,
    "sweep": _sweep,
    "evaluate": _evaluate,
    "launch": _launch,
    "report": _report,
    "bench": _bench,
    "find": _find,
    "plan": _plan,
    "verify": _verify,
    "shards": _shards,
    "export": _export,
    "doctor": _doctor,
}
_HELP = """\
usage: gmscale COMMAND ...

  train     train one run                        gmscale train --config configs/quickstart.yaml
  compare   no mask, the mask and a random mask of equal density, at equal seeds
  sweep     many trials over any settings, with controls and a winner confirmed on fresh seeds
  evaluate  the scorecard of trained models: accuracy, pruned, attacked, corrupted, where they look
  launch    start training on this node of several, as launch/torchrun.sh and slurm/ do
  report    write one HTML page about runs       gmscale report runs/quickstart
  find      the batch size that fits and is fastest; a range test of the learning rate
  plan      step time and scaling on several nodes, from a step on one and counted bytes
  bench     cost of the mask, ratios side by side in one run
  verify    which differences between ways to run one training are rounding, which required
  shards    build webdataset shards from images, prove them, say what they hold
  export    a run's weights for timm, ONNX or the Hugging Face hub, with a model card
  doctor    what works on this machine, and what to do about the rest

gmscale COMMAND --help explains every field. On several processes: torchrun --nproc_per_node N -m gmscale ...
Exit status: 0 done, 1 the run failed, 2 usage, 75 stopped on request after a checkpoint."""


def _can_stop(argv: list[str]) -> bool:
    """Return whether the command looks for requests to stop: it then listens from its first moment on."""
    return argv[0] in ("train", "compare", "sweep") and not {"--dry_run", "--help", "-h", "--print_config"} & set(
        argv
    )


def _status(finished: bool) -> int:
    return 0 if finished else STOPPED


def _fail(error: Exception) -> NoReturn:
    # Before the process group exists every local rank finds the same mistake; one of them says so.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"gmscale: error: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, UsageError) else 1)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"gmscale: warning: {message}", file=sys.stderr)
