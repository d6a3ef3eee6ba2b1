"""The command line of gmscale export."""

import re
import sys

from gmscale.errors import OneLineParser, UsageError
from gmscale.export import hub
from gmscale.export.exporting import FORMATS, export

_DESCRIPTION = "Write a run's weights in a form that others load; every file is proved by loading it again."
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def main(argv: list[str]) -> int:
    """Export one run and print the path written; notes go to standard error."""
    parser = OneLineParser(prog="gmscale export", description=_DESCRIPTION)
    add = parser.add_argument
    add("run", help="Run directory, finished or not.")
    add(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="safetensors: one file with timm's key names. onnx: one file, compared with PyTorch's output. "
        "hf: a folder in timm's hub format with a model card.",
    )
    add("--out", help="Directory of the file, or for hf the folder itself; default RUN/export, RUN/export/NAME.")
    add("--checkpoint", default="best", help="best (by validation top1), last, or a step.")
    add(
        "--weights",
        choices=("auto", "model", "ema"),
        default="auto",
        help="The plain weights (model), the averaged (ema), or the averaged if there are any (auto).",
    )
    add("--overwrite", action="store_true", help="Replace files that are there already and differ.")
    add("--push", metavar="OWNER/NAME", help="hf: upload to this model repository, made if missing.")
    add("--private", action="store_true", help="--push: make a new repository private.")
    options = parser.parse_args(argv)
    if options.push is None and options.private:
        raise UsageError("--private says how --push makes a repository; add --push OWNER/NAME")
    if options.push is not None:
        if options.format != "hf":
            raise UsageError(f"--push uploads a folder of --format hf; --format is {options.format}")
        if not _REPOSITORY.fullmatch(options.push):
            raise UsageError(f"--push is {options.push!r}; expected OWNER/NAME, such as me/resnet50-mask")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    path = export(
        options.run,
        options.format,
        out=options.out,
        checkpoint=options.checkpoint,
        weights=options.weights,
        overwrite=options.overwrite,
        say=say,
    )
    print(path, flush=True)
    if options.push is not None:
        say(f"pushed to {hub.push(path, options.push, private=options.private)}")
    return 0
