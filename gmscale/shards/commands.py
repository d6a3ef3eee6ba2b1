"""gmscale shards: build shards from images, prove that they are whole, say what they hold."""

import argparse
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gmscale.data.config import DataConfig
from gmscale.errors import OneLineParser, UsageError, check_range, nearest
from gmscale.shards.tables import show_contents, show_findings, show_summary

_HELP = """\
usage: gmscale shards WHAT ...

  build    write webdataset shards from a folder of images, or from other shards
  verify   find every fault of shards, at the level of headers and labels or (--full) of hashes and pixels
  info     what shards hold: samples, classes, sizes
  crop     new shards, in which each image is cut to what a trained model looks at

gmscale shards WHAT --help explains the options."""

_BUILD = """\
Write the images of one split as webdataset shards with timm's _info.json; run it once for each split.

SOURCE is a folder whose sub-directories are classes (SOURCE/CLASS/.../image.jpg), or one that holds such a folder
for each split (then SOURCE/SPLIT is taken), or images in any folder with --labels, or other shards: a directory
with _info.json or a pattern such as 'DIR/train-{0000..0063}.tar', whose samples keep their other members.

Images go in byte for byte unless --resize or --format asks for something else; what is encoded anew becomes RGB
and loses its metadata, and an EXIF orientation is not applied. Samples are shuffled over all shards. The bytes
depend on SOURCE and the options only, not on --workers or interruptions: after one, start the same command again.
Beside the shards lie _info.json, _sources-SPLIT.txt (where each key came from), _skipped-SPLIT.txt (what was left
out) and _build-SPLIT.jsonl (the options, and the shards that are complete)."""


def main(argv: list[str]) -> int:
    """Run one of the commands; return the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else 2
    if argv[0] not in _COMMANDS:
        expected = ", ".join(_COMMANDS)
        raise UsageError(f"gmscale shards: {argv[0]!r}; expected one of {expected}{nearest(argv[0], _COMMANDS)}")
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        return _COMMANDS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # in order: processes are ended, files that are not complete removed


def _build(argv: list[str]) -> int:
    from gmscale.progress import Meter
    from gmscale.shards.build import Options, build
    from gmscale.shards.processes import cores
    from gmscale.shards.recode import CHECKS, FORMATS, Recipe

    parser = OneLineParser(
        prog="gmscale shards build", description=_BUILD, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of images, directory of shards, or pattern of shards")
    add("out", metavar="OUT", type=Path, help="directory for the shards; several splits share it")
    add("--split", default=Options.split, help="name of the split (default: %(default)s)")
    add(
        "--samples_per_shard",
        type=int,
        default=Options.samples_per_shard,
        metavar="N",
        help="at most (default: %(default)s)",
    )
    add("--seed", type=int, default=Options.seed, help="of the shuffle (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=cores(),
        help="processes; 0 works in this one (default: the cores, %(default)s)",
    )
    add("--resize", type=int, metavar="PIXELS", help="shrink images whose shorter side is longer (Lanczos)")
    add("--format", choices=FORMATS, default=Recipe.format, help="of all images (default: %(default)s)")
    add(
        "--quality",
        type=int,
        default=Recipe.quality,
        help="of JPEG and WebP where encoded anew (default: %(default)s)",
    )
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names in order, one a line (default: those of the splits in OUT, else sorted by name)",
    )
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="rows FILE,CLASS (.csv, .tsv or .txt; also Kaggle's LOC_val_solution.csv of ImageNet); with "
        "known classes, CLASS may be a number from 0",
    )
    add(
        "--label",
        default=Options.label,
        help="where shards as SOURCE have their labels: an extension or json.FIELD (default: %(default)s)",
    )
    add(
        "--check",
        choices=CHECKS,
        default=Recipe.check,
        help="how images are proven: decoded, or by their header alone (default: %(default)s)",
    )
    add(
        "--on_bad",
        choices=("stop", "skip"),
        default=Options.on_bad,
        help="at an image that cannot be used (default: %(default)s)",
    )
    add("--name", help="what the names of shards begin with (default: OUT's name)")
    given = vars(parser.parse_args(argv))
    recipe = Recipe(**{field: given.pop(field) for field in ("check", "resize", "format", "quality")})
    options = Options(**given, recipe=recipe)
    try:
        with Meter(options.split) as meter:
            summary = build(options, meter.show)
    except (KeyboardInterrupt, SystemExit):
        print(f"gmscale shards build: stopped; the same command goes on with {options.out}", file=sys.stderr)
        raise
    show_summary(options, summary)
    return 0


def _verify(argv: list[str]) -> int:
    from gmscale.progress import Meter
    from gmscale.shards.check import Findings, verify
    from gmscale.shards.processes import cores
    from gmscale.shards.reshard import open_given

    parser = _shards_parser("verify", "Find every fault of shards. Exit status 1 if there is one.")
    add = parser.add_argument
    add("--full", action="store_true", help="compare each shard's SHA-256 and decode each image, too")
    add("--workers", type=int, default=cores(), help="processes (default: the cores, %(default)s)")
    add("--list", type=int, default=20, metavar="N", help="faults listed one by one (default: %(default)s)")
    given = parser.parse_args(argv)
    check_range(given.workers, "--workers", 0, whole=True)
    check_range(given.list, "--list", 0, whole=True)
    found: list[Findings] = []
    for split in open_given(given.shards, given.split, given.cache_dir):
        with Meter(split.name) as meter:
            found.append(
                verify(
                    split,
                    given.label,
                    full=given.full,
                    workers=given.workers,
                    listed=given.list,
                    progress=meter.show,
                )
            )
    if given.json:
        print(json.dumps([findings.as_dict() for findings in found], indent=1))
    else:
        show_findings(given.shards, found, given.full)
    return int(any(findings.faults for findings in found))


def _info(argv: list[str]) -> int:
    from gmscale.shards.contents import contents
    from gmscale.shards.reshard import open_given

    parser = _shards_parser("info", "Say what shards hold, without reading them.")
    given = parser.parse_args(argv)
    cache = Path(given.cache_dir)
    found = [
        contents(split, given.label, cache) for split in open_given(given.shards, given.split, given.cache_dir)
    ]
    if given.json:
        print(json.dumps([split.as_dict() for split in found], indent=1))
    else:
        show_contents(given.shards, found)
    return 0


def _shards_parser(command: str, description: str) -> OneLineParser:
    parser = OneLineParser(prog=f"gmscale shards {command}", description=description)
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="directory with _info.json, or a pattern: 'DIR/train-{0000..0063}.tar'")
    add("--split", help="one split of _info.json (default: all)")
    add("--label", default=DataConfig.label, help="data.label (default: %(default)s)")
    add("--cache_dir", default=DataConfig.cache_dir, help="data.cache_dir (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    return parser


_CROP = """\
Write a split of shards anew, each image cut to a square: where the saliency of a finished run's model for the
image's own class is highest in sum or, with --guide random, the control, at a random place with equal sizes. The
pixels are the original's, encoded as JPEG; the sample's .json says what was cut, and a box in it moves along.
Training on them needs a validation split beside them: gmscale shards build SOURCE OUT --split validation."""


def _crop(argv: list[str]) -> int:
    from gmscale.shards.crop import GUIDES, METHODS, Options, crop

    parser = OneLineParser(
        prog="gmscale shards crop", description=_CROP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="run directory with the model that says where to look")
    add("out", metavar="OUT", type=Path, help="directory for the shards")
    add("--source", metavar="DIR", help="directory of the shards to cut (default: the run's data.source)")
    add("--split", help="split to cut (default: the run's data.train_split)")
    add("--guide", default=Options.guide, help=f"{' or '.join(GUIDES)} (default: %(default)s)")
    add("--method", default=Options.method, help=f"of {', '.join(METHODS)} (default: %(default)s)")
    add("--scale", default="0.4,0.9", metavar="LOW,HIGH", help="area of a crop as a share (default: %(default)s)")
    add("--seed", type=int, default=Options.seed, help="of sizes and random places (default: %(default)s)")
    add("--checkpoint", default=Options.checkpoint, help="last, best or a step (default: %(default)s)")
    add("--weights", default=Options.weights, help="model, ema or auto (default: %(default)s)")
    add("--batch_size", type=int, default=Options.batch_size, metavar="B", help="default: %(default)s")
    given = vars(parser.parse_args(argv))
    try:
        low, high = (float(word) for word in given.pop("scale").split(","))
    except ValueError:
        raise UsageError("--scale expects two shares of an area, such as 0.4,0.9") from None
    options = Options(**given, scale=(low, high))
    try:
        samples, bad = crop(options)
    except (KeyboardInterrupt, SystemExit):
        print(f"gmscale shards crop: stopped; the same command goes on with {options.out}", file=sys.stderr)
        raise
    print(f"{samples:,} samples in {options.out}" + (f"; {bad} bad ones left out" if bad else ""))
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "build": _build,
    "verify": _verify,
    "info": _info,
    "crop": _crop,
}
