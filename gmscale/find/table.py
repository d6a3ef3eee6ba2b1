"""What the search for a batch size found, as a table with flags to copy."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from gmscale.config import TrainConfig
from gmscale.tracking import plain_console

_LINEAR = ("sgd", "sgdp", "sgdw", "momentum", "nesterov")
_ADAPTIVE = ("adam", "lamb", "adan")


def show_sizes(trials: Sequence[Mapping[str, Any]], config: TrainConfig, *, free: bool) -> None:
    """Print the sizes, and the flags of the largest and the fastest that fits."""
    fitting = [trial for trial in trials if not trial["refused"]]
    largest = max(fitting, key=lambda t: t["batch_size"])
    fastest = max(fitting, key=lambda t: t["images_per_s"])
    console = plain_console()
    table = Table(title=f"batch sizes of {config.model.name}, {config.data.image_size} px", box=SIMPLE)
    for heading in ("batch size", "accumulated", "memory a rank", "images/s"):
        table.add_column(heading, justify="right")
    table.add_column(overflow="fold")
    for trial in trials:
        words = [trial["refused"] and f"does not fit: {trial['refused']}"]
        words += ["largest" if trial is largest else "", "fastest" if trial is fastest else ""]
        words += ["configured" if trial["batch_size"] == config.data.batch_size_per_device else ""]
        table.add_row(
            str(trial["batch_size"]),
            str(trial["grad_accum_steps"]),
            f"{trial['peak_mb']:.0f} MiB" if trial["peak_mb"] else "-",
            "-" if trial["refused"] else f"{trial['images_per_s']:.0f}",
            ", ".join(word for word in words if word),
        )
    console.print(table, highlight=False, markup=False)
    for word, trial in (("largest", largest), ("fastest", fastest)):
        console.print(f"{word}: {flags(trial, config, free=free)}", highlight=False, markup=False, soft_wrap=True)
    for note in _notes(fitting, config, free=free):
        console.print(f"* {note}", highlight=False, markup=False)


def flags(trial: Mapping[str, Any], config: TrainConfig, *, free: bool) -> str:
    """Return the flags to copy."""
    found = (
        f"--data.batch_size_per_device {trial['batch_size']} --optim.grad_accum_steps {trial['grad_accum_steps']}"
    )
    lr = scaled_lr(config, _images(trial) / _configured(config)) if free else None
    return found if lr is None else f"{found} --optim.lr {lr:.3g}"


def scaled_lr(config: TrainConfig, ratio: float) -> float | None:
    """Return the learning rate that a usual rule gives for a global batch `ratio` times as large, or None.

    Linear for SGD (https://arxiv.org/abs/1706.02677), square root for Adam's kin (https://arxiv.org/abs/2205.10287).
    """
    name = config.optim.opt.lower()
    if name in _LINEAR:
        return config.optim.lr * ratio
    return config.optim.lr * ratio**0.5 if any(kin in name for kin in _ADAPTIVE) else None


def _images(trial: Mapping[str, Any]) -> int:
    return int(trial["batch_size"] * trial["grad_accum_steps"])


def _configured(config: TrainConfig) -> int:
    return config.data.batch_size_per_device * config.optim.grad_accum_steps


def _notes(fitting: Sequence[Mapping[str, Any]], config: TrainConfig, *, free: bool) -> list[str]:
    notes = ["nothing is applied: copy the flags, or write them into the configuration"]
    if free:
        rule = {
            True: "optim.lr follows the global batch: linearly for SGD (Goyal et al., arXiv 1706.02677), by its "
            "square root for Adam's kin (Malladi et al., arXiv 2205.10287); a suggestion, not a law",
            False: f"the global batch changes, and no common rule says how optim.lr of {config.optim.opt} follows",
        }
        notes.append(rule[scaled_lr(config, 1.0) is not None])
    if any(trial["normalises_batches"] for trial in fitting) and config.parallel.batch_norm != "sync":
        notes.append("batch normalisation takes its statistics from one micro-batch: results depend on its size")
    if config.augment.mixes and config.augment.mix_mode == "batch":
        notes.append("augment.mix_mode batch draws once a micro-batch: results depend on its size")
    return notes
