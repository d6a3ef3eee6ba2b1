"""The options of gmscale evaluate: which models, and what is measured of them."""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from gmscale import scorecards
from gmscale.errors import OneLineParser, UsageError, check_choice, check_range
from gmscale.evaluation.accuracy import Accuracy
from gmscale.evaluation.attacks import ATTACKS, NORMS, Attack
from gmscale.evaluation.corruptions import FAMILIES, GROUPS, CorruptedFolder, Corruption
from gmscale.evaluation.measurement import Measurement
from gmscale.evaluation.opening import Source
from gmscale.evaluation.pruning import HOW, Pruning
from gmscale.evaluation.quality import CONFIGURED, OPERATORS, GradientQuality
from gmscale.evaluation.saliency.maps import METHODS
from gmscale.evaluation.saliency.measurement import Saliency
from gmscale.evaluation.shifts import FolderAccuracy, RealLabels

_DESCRIPTION = """\
Measure models after their training and write one page about them: accuracy and calibration, after pruning, under
attack, on corrupted images, where saliency maps look, and what the mask does to the gradients. With options of some
of these sections only those are measured, without any all of them. Results go to scorecard.json in each run, at
once; those that are there already are not measured again. With --baseline, or with several runs, the page compares:
paired over seeds, with intervals."""

# What is measured without further options. Attacks that cost more than the rest together take part of the images.
_WHOLE_PRUNING = (
    ("0.5,0.7,0.8,0.9,0.95", "global,layer", "0"),
    ("2:4", "global", "0"),
    ("0.25,0.5", "structured", "0"),
    ("0.9,2:4", "global", "40"),
    ("0.5", "structured", "40"),
)
_ATTACK = "fgsm,pgd"
_COSTLY_ATTACKS = ("apgd-ce", "apgd-dlr", "square", "transfer")
_EPS, _STEPS, _RESTARTS, _QUERIES = "4/255", 10, 1, 200
_COSTLY_STEPS, _COSTLY_IMAGES = 20, 250
_CORRUPTED_IMAGES, _GALLERY = 300, 6
_PAIRS, _RANKS = 8, 4
SALIENCY_IMAGES = 64

# Options that say how something is measured, by the one that asks for it; None where the user says nothing.
_HOW: Mapping[str, Mapping[str, Any]] = {
    "prune": {"prune_how": "global", "finetune": "0"},
    "attack": {
        "eps": _EPS,
        "norm": "linf",
        "steps": _STEPS,
        "restarts": _RESTARTS,
        "queries": _QUERIES,
        "attack_images": None,
    },
    "corrupt": {"corrupt_images": None},
    "saliency": {"saliency_images": SALIENCY_IMAGES, "boxes": None},
    "quality": {"pairs": _PAIRS, "quality_ranks": _RANKS, "quality_batch_size": None},
}

# Options that choose what is measured; without any of them everything is.
_CHOOSE = ("real", "folder", "prune", "attack", "corrupt", "corrupt_folder", "saliency", "quality")


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    models: tuple[str, ...]
    baselines: tuple[str, ...]
    source: Source
    measurements: tuple[Measurement, ...]
    everything: bool
    """Whether no section was chosen: then what a model cannot be measured on is left out."""
    gallery: int
    """Images with overlays of saliency maps; 0 for none."""
    boxes: str | None
    out: Path | None
    """Of the one scorecard, if not at its home."""
    page: Path | None
    """None for no page."""


def parse(argv: Sequence[str]) -> Request:
    """Return what `argv` asks for. Raises UsageError in one line."""
    options = _parser().parse_args(argv)
    everything = all(getattr(options, name) in (None, []) for name in _CHOOSE)
    _fill_in(options, everything)
    for name in (
        "limit",
        "batch_size",
        "image_size",
        "steps",
        "restarts",
        "queries",
        "attack_images",
        "corrupt_images",
        "saliency_images",
        "pairs",
    ):
        if getattr(options, name) is not None:
            check_range(getattr(options, name), f"--{name}", 1, whole=True)
    check_range(options.gallery, "--gallery", 0, whole=True)
    check_choice(options.weights, ("auto", "model", "ema"), "--weights")
    models, baselines = _different(options.model), _different(options.baseline)
    places = set(map(_place, models))
    if both := [name for name in baselines if _place(name) in places]:
        raise UsageError(f"{both[0]} is given as a model and as its own --baseline; expected different runs")
    if options.out:
        if options.out.is_dir():
            raise UsageError(f"--out {options.out} is a directory; expected a file")
        if len(models) > 1 or baselines:
            raise UsageError(
                "--out is for one model; several have their scorecards in their runs (--page names the page)"
            )
        if not options.out.absolute().parent.is_dir():
            raise UsageError(f"--out {options.out}: there is no directory {options.out.parent}")
    page = None if options.no_page else options.page or _page(models, baselines, options.out)
    if page is not None and page.is_dir():
        raise UsageError(f"--page {page} is a directory; expected a file")
    if page is not None and page.absolute() in {
        (options.out or home(name) / scorecards.NAME).absolute() for name in models
    }:
        raise UsageError(f"{page} would be both the scorecard and the page; name another with --out or --page")
    measurements = tuple(dict.fromkeys([Accuracy(), *(_whole(options) if everything else _chosen(options))]))
    source = {name: getattr(options, name) for name in Source.__dataclass_fields__}
    return Request(
        models=models,
        baselines=baselines,
        source=Source(**source),
        measurements=measurements,
        everything=everything,
        gallery=0 if options.out else options.gallery,
        boxes=options.boxes,
        out=options.out,
        page=page,
    )


def _fill_in(options: argparse.Namespace, everything: bool) -> None:
    """Set what the user did not to its default. Raises UsageError for an option that would have no effect."""
    if options.norm == "l2" and options.eps is None:
        raise UsageError(f"--norm l2 needs --eps, such as 0.5; {_EPS} is a radius for linf")
    for asking, defaults in _HOW.items():
        # of everything, pruning is a list of its own
        asked = getattr(options, asking) is not None or (everything and asking != "prune")
        for name, default in defaults.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
            elif not asked:
                raise UsageError(f"--{name} says how --{asking} is measured, which is not asked for")


def _different(names: Sequence[str]) -> tuple[str, ...]:
    """Return the models, each once however it is spelled."""
    found: dict[Path | str, str] = {}
    for name in names:
        found.setdefault(_place(name), name)
    return tuple(found.values())


def _place(name: str) -> Path | str:
    """Return what is the same for all spellings of a model."""
    return Path(name).resolve() if Path(name).is_dir() else name


def home(name: str) -> Path:
    """Return where the scorecard of a model is by default: in its run or folder, else in evaluations/NAME."""
    return Path(name) if Path(name).is_dir() else Path("evaluations") / name


def _page(models: Sequence[str], baselines: Sequence[str], out: Path | None) -> Path:
    """Return where the page is by default: beside the one scorecard, or above them all."""
    if len(models) + len(baselines) == 1:
        return (out or home(models[0]) / scorecards.NAME).with_suffix(".html")
    homes = [home(name).absolute() for name in (*models, *baselines)]
    return Path(os.path.commonpath(homes)) / "scorecards.html"


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="gmscale evaluate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "model",
        nargs="+",
        help="Run directory of a finished run, a folder of gmscale export --format hf, or a timm model's name.",
    )
    add("--baseline", nargs="+", default=[], metavar="RUN", help="Runs without a mask to compare with.")
    add(
        "--checkpoint",
        default="last",
        help="last (default), best (by validation top1), a step, or, with a model's name, a file of weights.",
    )
    add("--weights", default="auto", help="model, ema, or auto (default): the averaged ones if there are any.")
    add("--out", type=Path, metavar="FILE", help=f"Another file than RUN/{scorecards.NAME}.")
    add("--no_page", action="store_true", help="Write no page.")
    add("--page", type=Path, metavar="FILE", help="Another file than scorecard.html beside the scorecard.")

    add = parser.add_argument_group("images").add_argument
    add("--limit", type=int, metavar="N", help="Take N images, evenly spread over the split, for everything.")
    add("--batch_size", type=int, metavar="B", help="Images of a batch; default data.eval_batch_size_per_device.")
    add("--cache_dir", help="Another data.cache_dir than the run's.")
    add("--source", metavar="DIR", help="Other shards than the run's, as data.source.")
    add("--val_split", metavar="NAME", help="Another split than the run's, as data.val_split.")
    add("--image_size", type=int, metavar="S", help="Side of the images, for a model that is no run.")
    add("--real", metavar="FILE", help="ImageNet's reassessed labels (ReaL), real.json.")
    add(
        "--folder",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="A folder of class folders, such as ImageNet-A, -R or -V2; may be repeated.",
    )

    add = parser.add_argument_group("pruning").add_argument
    add(
        "--prune",
        metavar="SHARES",
        help="Shares of the weights to remove, such as 0.5,0.8, or 2:4 for two of four.",
    )
    add("--prune_how", metavar="HOW", help=f"Of {', '.join(HOW)}; several are tried one by one; default global.")
    add(
        "--finetune",
        metavar="STEPS",
        help="Steps of fine-tuning after pruning, such as 0,100; default 0.",
    )

    add = parser.add_argument_group("attacks").add_argument
    add("--attack", metavar="NAMES", help=f"Of {', '.join(ATTACKS)}.")
    add(
        "--eps",
        metavar="RADII",
        help=f"Radii on pixels in [0, 1], such as 2/255,4/255; default {_EPS}.",
    )
    add("--norm", help="Norm of these radii: linf (default) or l2.")
    add("--steps", type=int, help=f"pgd, transfer, apgd: steps; default {_STEPS}.")
    add(
        "--restarts",
        type=int,
        help="pgd, apgd: random starts, all of which must fail; default 1.",
    )
    add("--queries", type=int, help=f"square: queries of an image; default {_QUERIES}.")
    add("--attack_images", type=int, metavar="N", help="Attack N images, evenly spread; default all.")

    add = parser.add_argument_group("corruptions").add_argument
    add(
        "--corrupt",
        metavar="NAMES",
        help=f"Families of ImageNet-C, or {', '.join(GROUPS)}, or all; five severities.",
    )
    add("--corrupt_folder", type=Path, metavar="DIR", help="ImageNet-C itself: DIR/FAMILY/SEVERITY/CLASS/*.")
    add("--corrupt_images", type=int, metavar="N", help="Corrupt N images, evenly spread; default all.")

    add = parser.add_argument_group("saliency").add_argument
    add("--saliency", metavar="METHODS", help=f"Of {', '.join(METHODS)}, or all.")
    add("--saliency_images", type=int, metavar="N", help=f"Default {SALIENCY_IMAGES}.")
    add(
        "--boxes", metavar="PATH", help="Objects' boxes: a folder of PASCAL XML, or JSON; default: the shards' own."
    )
    add("--gallery", type=int, default=_GALLERY, metavar="N", help=f"Images with overlays; default {_GALLERY}.")

    add = parser.add_argument_group("gradient quality").add_argument
    add("--quality", metavar="OPERATORS", help=f"Of {', '.join(OPERATORS)}: what the mask does to gradients.")
    add("--pairs", type=int, metavar="N", help=f"Pairs of independent batches; default {_PAIRS}.")
    add("--quality_ranks", type=int, metavar="R", help=f"Gradients of a batch, each masked; default {_RANKS}.")
    add("--quality_batch_size", type=int, metavar="B", help="Images of one; default data.batch_size_per_device.")
    return parser


def _chosen(options: argparse.Namespace) -> Iterator[Measurement]:
    """Yield what the options of the sections ask for."""
    if options.real is not None:
        yield RealLabels(path=options.real)
    names = {RealLabels.name} if options.real is not None else set()
    for word in options.folder:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--folder is {word!r}; expected NAME=DIR, such as imagenet-a=folder")
        if name in names:
            raise UsageError(f"--folder {name} is given twice; expected a name of its own for each folder")
        names.add(name)
        yield FolderAccuracy(name=name, path=path)
    if options.prune is not None:
        yield from _prunings(options.prune, options.prune_how, options.finetune)
    if options.attack is not None:
        for name in _words(options.attack):
            check_choice(name, ATTACKS, "--attack")
            if name == "transfer" and not options.baseline:
                raise UsageError("--attack transfer needs --baseline RUN: images are made on the baselines' models")
            yield from _attacks(options, name, options.steps, options.attack_images)
    if options.corrupt is not None:
        yield from (Corruption(family=name, images=options.corrupt_images) for name in _families(options.corrupt))
    if options.corrupt_folder is not None:
        yield from CorruptedFolder.all_in(options.corrupt_folder)
    if options.saliency is not None:
        yield from _maps(options, options.saliency)
    if options.quality is not None:
        for name in _words(options.quality):
            check_choice(name, OPERATORS, "--quality")
            yield _quality(options, name)


def _whole(options: argparse.Namespace) -> Iterator[Measurement]:
    """Yield everything, within minutes: what costs most takes part of the images."""
    for shares, how, steps in _WHOLE_PRUNING:
        yield from _prunings(shares, how, steps)
    for name in _words(_ATTACK):
        yield from _attacks(options, name, options.steps, options.attack_images)
    for name in _COSTLY_ATTACKS:
        steps = max(options.steps, _COSTLY_STEPS)
        yield from _attacks(options, name, steps, options.attack_images or _COSTLY_IMAGES)
    images = options.corrupt_images or _CORRUPTED_IMAGES
    yield from (Corruption(family=name, images=images) for name in FAMILIES)
    yield from _maps(options, "all")
    yield _quality(options, CONFIGURED)


def _prunings(shares: str, hows: str, steps: str) -> Iterator[Pruning]:
    for how in _words(hows):
        check_choice(how, HOW, "--prune_how")
    for word in _words(steps):
        if not word.isdecimal():
            raise UsageError(f"--finetune is {word!r}; expected a number of steps such as 100")
        for how in _words(hows):
            for share in _words(shares):
                yield Pruning.parse(share, how, int(word))


def _attacks(options: argparse.Namespace, name: str, steps: int, images: int | None) -> Iterator[Attack]:
    check_choice(options.norm, NORMS, "--norm")
    for word in _words(options.eps):
        eps = _number(word, "--eps")
        # checked for fgsm too, which does without them
        asked = Attack(
            attack="pgd", norm=options.norm, eps=eps, steps=steps, restarts=options.restarts, images=images
        )
        if name == "fgsm":
            yield Attack(attack=name, norm=options.norm, eps=eps, images=images)
        elif name == "square":
            yield Attack(attack=name, norm=options.norm, eps=eps, steps=options.queries, images=images)
        else:
            yield Attack(**{**asked.__dict__, "attack": name})


def _maps(options: argparse.Namespace, names: str) -> Iterator[Saliency]:
    for name in METHODS if names == "all" else _words(names):
        check_choice(name, METHODS, "--saliency")
        yield Saliency(method=name, images=options.saliency_images, boxes=options.boxes)


def _families(names: str) -> Iterator[str]:
    for name in _words(names):
        if name == "all":
            yield from FAMILIES
        elif name in GROUPS:
            yield from GROUPS[name]
        else:
            yield name


def _quality(options: argparse.Namespace, operator: str) -> GradientQuality:
    ranks, batch_size = options.quality_ranks, options.quality_batch_size
    return GradientQuality(operator=operator, pairs=options.pairs, ranks=ranks, batch_size=batch_size)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _number(word: str, name: str) -> float:
    try:
        return float(Fraction(word.strip()))
    except (ValueError, ArithmeticError):
        raise UsageError(f"{name} is {word!r}; expected a number such as 0.8 or 4/255") from None
