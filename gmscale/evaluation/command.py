"""The command line of gmscale evaluate: a run's model, measured after training."""

import argparse
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.table import Table

from gmscale import data, parallel, scorecards
from gmscale.config import ParallelConfig, TrainConfig
from gmscale.data import StreamValLoader, ValLoader
from gmscale.data.config import without_secrets
from gmscale.errors import OneLineParser, UsageError, check_choice, check_range
from gmscale.evaluation.accuracy import Accuracy
from gmscale.evaluation.attacks import ATTACKS, NORMS, Attack
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.pruning import Pruning
from gmscale.evaluation.scorecard import Scorecard, entry_of
from gmscale.evaluation.subject import Subject, spread
from gmscale.parallel import World
from gmscale.progress import Meter
from gmscale.report import load_run
from gmscale.tracking import plain_console
from gmscale.trained import Trained, load

_DESCRIPTION = """\
Measure a finished run's model on its validation split: accuracy, accuracy after pruning its smallest weights, and
under attack. Results go to RUN/scorecard.json; those that are there already are not measured again. Without --prune
and --attack both are measured, at 0.5,0.8,0.9 and with fgsm,pgd; with one of them only that."""
_PRUNE, _ATTACK = "0.5,0.8,0.9", "fgsm,pgd"
_HONESTY = "White-box attacks alone do not prove robustness; see README."

InWorld = Callable[[Any, Callable[[Any], int]], int]


@dataclass(frozen=True)
class _Request:
    """What was asked for."""

    run_dir: Path
    checkpoint: str
    weights: str
    measurements: Sequence[Measurement]
    limit: int | None
    batch_size: int | None
    cache_dir: str | None
    out: Path


def main(argv: list[str], in_world: InWorld) -> int:
    """Measure a run and show its scorecard; `in_world` runs a function in the process group."""
    request = _request(argv)
    run = load_run(request.run_dir)
    if run.summary is None:
        raise UsageError(f"{request.run_dir} has not finished (no summary.json); train it to its end first")
    if request.weights == "auto":
        request = replace(request, weights="ema" if run.setting("model.ema_decay", 0) else "model")
    # every rank has the whole model, however it was trained
    group = ParallelConfig(
        threads=run.setting("parallel.threads", ParallelConfig.threads),
        timeout_s=run.setting("parallel.timeout_s", ParallelConfig.timeout_s),
    )
    return in_world(group, lambda world: _evaluate(request, world))


def _request(argv: list[str]) -> _Request:
    parser = OneLineParser(
        prog="gmscale evaluate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", help="Run directory of a finished run.")
    add("--prune", metavar="SHARES", help="Shares of the weights to remove, such as 0.5,0.8,0.9.")
    add("--attack", metavar="NAMES", help="fgsm, pgd or both, such as fgsm,pgd.")
    add("--eps", default="4/255", help="Radius of attacks on pixels in [0, 1]; default 4/255.")
    add("--norm", default="linf", help="Norm of that radius: linf (default) or l2.")
    add("--steps", type=int, default=10, help="pgd: steps, each of 2.5 eps / steps; default 10.")
    add("--restarts", type=int, default=1, help="pgd: random starts, all of which must fail; default 1.")
    add("--limit", type=int, metavar="N", help="Take N images, evenly spread over the split.")
    add("--checkpoint", default="last", help="last (default), best (by validation top1), or a step.")
    add("--weights", default="auto", help="model, ema, or auto (default): the averaged ones if there are any.")
    add("--batch_size", type=int, metavar="B", help="Images of a batch; default data.eval_batch_size_per_device.")
    add("--cache_dir", help="Another data.cache_dir than the run's.")
    add("--out", type=Path, metavar="FILE", help=f"Another file than RUN/{scorecards.NAME}.")
    options = parser.parse_args(argv)
    for name in ("limit", "batch_size"):
        if getattr(options, name) is not None:
            check_range(getattr(options, name), f"--{name}", 1, whole=True)
    check_choice(options.weights, ("auto", "model", "ema"), "--weights")
    out = options.out or Path(options.run) / scorecards.NAME
    if options.out and not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {out.parent}")
    return _Request(
        run_dir=Path(options.run),
        checkpoint=options.checkpoint,
        weights=options.weights,
        measurements=_measurements(options),
        limit=options.limit,
        batch_size=options.batch_size,
        cache_dir=options.cache_dir,
        out=out,
    )


def _measurements(options: argparse.Namespace) -> list[Measurement]:
    if options.prune is None and options.attack is None:
        options.prune, options.attack = _PRUNE, _ATTACK
    shares = [_number(word, "--prune") for word in (options.prune or "").split(",") if options.prune is not None]
    names = [word.strip() for word in (options.attack or "").split(",") if options.attack is not None]
    check_choice(options.norm, NORMS, "--norm")
    eps = _number(options.eps, "--eps")
    attacks = []
    for name in names:
        check_choice(name, ATTACKS, "--attack")
        # checked for fgsm too, which does without them
        asked = Attack(attack="pgd", norm=options.norm, eps=eps, steps=options.steps, restarts=options.restarts)
        attacks.append(asked if name == "pgd" else replace(asked, attack=name, steps=1, restarts=1))
    return list(dict.fromkeys([Accuracy(), *map(Pruning, shares), *attacks]))


def _number(word: str, name: str) -> float:
    try:
        return float(Fraction(word.strip()))
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{name} is {word!r}; expected a number such as 0.8 or 4/255") from None


def _evaluate(request: _Request, world: World) -> int:
    trained, config, loader, limit = _open(request, world)
    torch.set_float32_matmul_precision(config.run.matmul_precision)
    model = trained.model.requires_grad_(False).to(world.device)
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
    subject = Subject(model, config, loader, world, trained.classes)
    card, missing = None, list(request.measurements)
    with parallel.together(world):
        if world.is_main:
            card = Scorecard(request.out, _about(trained, limit))
            missing = [what for what in missing if not card.has(what)]
    missing = parallel.of_all_ranks(missing, world)[0]
    console = plain_console()
    for number, what in enumerate(missing, 1):
        world.heartbeat.at("evaluation")
        if card is not None:
            console.print(f"[{number}/{len(missing)}] {what.words}", markup=False, highlight=False)
        with _progress(what, world) as progress:
            found = what.measure(replace(subject, progress=progress))
        with parallel.together(world):
            if card is not None:
                card.add(what, found)
    if card is not None:
        lines: list[str | Table] = [f"{request.run_dir}: {_which(card.content)}"]
        lines += _tables(card.content, request.measurements)
        lines += [*([_HONESTY] if card.content.get("attacks") else []), str(request.out)]
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


class _Opened(NamedTuple):
    """What is measured; `limit` is None where all images are."""

    trained: Trained
    config: TrainConfig
    loader: ValLoader | StreamValLoader
    limit: int | None


def _open(request: _Request, world: World) -> _Opened:
    """Return the model and the images; a collective."""

    def open_both() -> _Opened:
        trained = load(request.run_dir, request.checkpoint, request.weights)
        section = trained.config.data
        section = replace(
            section,
            cache_dir=request.cache_dir or section.cache_dir,
            eval_batch_size_per_device=request.batch_size or section.eval_batch_size_per_device,
        )
        config = replace(trained.config, data=section)
        loader = data.val_loader(section, world.rank, world.size)
        if request.limit is None:
            return _Opened(trained, config, loader, None)
        if isinstance(loader, StreamValLoader):
            raise UsageError("--limit needs data.access index; this run's is stream")
        if request.limit >= len(loader.index):
            return _Opened(trained, config, loader, None)
        part = spread(loader.index, request.limit)
        return _Opened(trained, config, ValLoader(part, section, world.rank, world.size), request.limit)

    # the first may put sharded weights together, and the first of each node build the embedded set
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    for now in range(3):
        with parallel.together(world):
            if now == turn:
                opened = open_both()
    return opened


def _about(trained: Trained, limit: int | None) -> dict[str, Any]:
    """Return what all results of a scorecard have in common."""
    config, name = trained.config, f"step-{trained.step:08d}"
    weights = "model_ema" if trained.averaged else "model"
    with open(trained.run.path / "checkpoints" / name / f"{weights}.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "checkpoint": name,
        "step": trained.step,
        "weights": "ema" if trained.averaged else "model",
        "sha256": digest,
        "settings": {
            "source": without_secrets(config.data.source),
            "val_split": config.data.val_split,
            "limit": limit,
        },
        "seed": config.run.seed,
    }


@contextmanager
def _progress(what: Measurement, world: World) -> Iterator[Callable[[int, int], None]]:
    """Show, on the main rank, how far a measurement is; the others' shares are as large."""
    if not world.is_main:
        yield lambda done, total: None
        return
    with Meter(what.words) as meter:
        yield meter.show


def _tables(card: Mapping[str, Any], measurements: Sequence[Measurement]) -> Iterator[Table]:
    """Yield one table a section of what was asked for."""
    by_section: defaultdict[str, list[Measurement]] = defaultdict(list)
    for what in measurements:
        by_section[what.section].append(what)
    for section, asked in by_section.items():
        table = Table(box=SIMPLE)
        table.add_column(section, no_wrap=True)
        for heading, _ in asked[0].shown.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for what in asked:
            found = entry_of(card, what)
            assert found is not None
            values = [(found.get(name), form) for name, (_, form) in what.shown.items()]
            table.add_row(what.words, *("-" if value is None else format(value, form) for value, form in values))
        yield table


def _which(card: Mapping[str, Any]) -> str:
    averaged = "averaged" if card["weights"] == "ema" else "plain"
    return f"{averaged} weights of step {card['step']}, {card['samples']} images"
