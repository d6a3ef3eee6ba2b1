"""The options that the benchmarks of training steps share, refused in one line before anything starts."""

import argparse

import timm
import torch

from gmscale.bench.training import PLAIN, VARIANTS, Setting, create
from gmscale.errors import UsageError, nearest


def add_training(
    parser: argparse.ArgumentParser, *, model: str, image_size: int, batch_size: int, rounds: int, steps: int
) -> None:
    """Add the options of what is trained, with these defaults."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--model", default=model, help="timm model")
    parser.add_argument("--image_size", type=int, default=image_size, help="side of the made-up images, in pixels")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="images a process and step")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="torch.autocast around the forward")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns that a variant and plain DDP take")
    parser.add_argument("--steps", type=int, default=steps, help="steps of a turn")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help=f"of: {', '.join(VARIANTS)}"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to this file too")


def chosen_variants(options: argparse.Namespace) -> list[str]:
    """Return the variants in the order asked for, plain DDP first; raise UsageError for an unknown one."""
    for name in options.variants:
        if name not in VARIANTS:
            raise UsageError(
                f"--variants: unknown {name!r}{nearest(name, VARIANTS)} (there are {', '.join(VARIANTS)})"
            )
    return list(dict.fromkeys((PLAIN, *options.variants)))


def setting_of(options: argparse.Namespace) -> Setting:
    """Return what is to be trained; raise UsageError unless the model exists and takes such images."""
    check_model(options.model, "--model")
    for name in ("image_size", "batch_size", "rounds", "steps"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}; expected at least 1")
    setting = Setting(**{name: getattr(options, name) for name in Setting.__dataclass_fields__})
    try:
        with torch.no_grad():
            create(setting).eval()(torch.zeros(1, 3, setting.image_size, setting.image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--image_size {setting.image_size}: {setting.model} cannot take such images: {reason}"
        ) from error
    return setting


def check_model(name: str, option: str) -> None:
    """Raise UsageError unless timm has the model."""
    if not timm.is_model(name):
        raise UsageError(f"{option}: timm has no model {name!r}{nearest(name, timm.list_models())}")
