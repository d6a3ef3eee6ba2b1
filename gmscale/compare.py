"""Three arms at equal seeds: no mask, the configured mask, and a random mask of the same density.

`gmscale compare` is the smallest comparison that can say anything: the same seeds give every arm the same
initial weights, sample order and augmentation, so differences are paired; the random arm shows what any mask of
that density does.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gmscale import parallel, report
from gmscale.config import TrainConfig
from gmscale.errors import UsageError, check_range
from gmscale.files import write_atomically
from gmscale.parallel import World
from gmscale.statistics import Summary
from gmscale.tracking import plain_console
from gmscale.train import train

BASELINE = "no mask"
ENOUGH_SEEDS = 5


def arms(config: TrainConfig) -> dict[str, TrainConfig]:
    """Return the arms by label. Raises UsageError if the configured mask cannot be one of them."""
    mask = config.mask
    for name in ("pause_after_epochs", "branch_from"):
        if getattr(config.run, name):
            raise UsageError(f"run.{name} is set, which belongs to one run; gmscale compare trains several")
    if not mask.enabled or mask.operator == "random":
        raise UsageError(
            f"gmscale compare needs a mask to compare with none and with a random one; "
            f"mask.enabled is {str(mask.enabled).lower()} and mask.operator {mask.operator!r}"
        )
    chosen = {
        BASELINE: replace(mask, enabled=False),
        f"{mask.operator} mask": mask,
        "random mask": replace(mask, operator="random", random_like=mask.operator),
    }
    return {label: replace(config, mask=m, run=replace(config.run, arm=label)) for label, m in chosen.items()}


def runs(config: TrainConfig, seeds: int) -> Iterator[TrainConfig]:
    """Yield every run, seed by seed, so that an interrupted comparison is still paired."""
    for seed in range(config.run.seed, config.run.seed + seeds):
        for label, arm in arms(config).items():
            folder = Path(config.run.dir) / re.sub(r"\W+", "-", label) / f"seed-{seed}"
            run = replace(arm.run, seed=seed, dir=str(folder))
            yield replace(arm, run=run, mask=replace(arm.mask, seed=arm.mask.seed + seed))


def compare(config: TrainConfig, seeds: int, world: World) -> bool:
    """Train all arms and seeds under `config.run.dir`, then show the table and write the report.

    Finished runs are not repeated, so the same command resumes. Returns False if it was asked to stop.
    """
    check_range(seeds, "--seeds", 1)
    console = plain_console()
    planned = list(runs(config, seeds))
    summaries = []
    for number, run in enumerate(planned, 1):
        if world.is_main:
            console.print(
                f"[{number}/{len(planned)}] {run.arm}, seed {run.run.seed}", markup=False, highlight=False
            )
        outcome = train(run, world, console)
        if outcome.summary is None:
            return False
        summaries.append(outcome.summary)
    if world.is_main:
        root = Path(config.run.dir)
        write_atomically(root / "comparison.json", json.dumps(summaries, indent=1))
        _show(root, seeds, config, console)
    parallel.barrier(world)
    return True


def _show(root: Path, seeds: int, config: TrainConfig, console: Console) -> None:
    found = report.arms(report.find_runs([str(root)]))
    table = Table(title=f"validation top1 (%) after {config.run.epochs:g} epochs, {seeds} paired seeds", box=SIMPLE)
    table.add_column("arm", no_wrap=True)
    for heading in ("mean ± std", f"minus {BASELINE}", "images/s", "hook ms", "of step", "kept", "energy"):
        table.add_column(heading, justify="right")
    for arm in found.arms:
        spread = arm.values["top1"]
        difference = "" if arm.difference is None or arm.difference.mean is None else f"{arm.difference.mean:+.1f}"
        table.add_row(arm.label, _mean_and_std(spread), difference, *_cost(arm))
    console.print(table)
    for arm in found.arms:
        if arm.verdict:
            console.print(f"  {arm.label}: {arm.verdict}", highlight=False, soft_wrap=True)
    for caveat in _caveats(config, seeds):
        console.print(f"  {caveat}", highlight=False, soft_wrap=True)
    page = report.write_report([str(root)])
    console.print(f"\nreport and pictures: {page}", highlight=False, soft_wrap=True)


def _mean_and_std(values: Summary) -> str:
    mean = "-" if values.mean is None else f"{values.mean:.1f}"
    return mean if values.std is None else f"{mean} ± {values.std:.1f}"


def _cost(arm: report.Arm) -> list[str]:
    cells = []
    for name, form in _COST_COLUMNS.items():
        summary = arm.values.get(name)
        cells.append("-" if summary is None or summary.mean is None else form.format(summary.mean))
    return cells


_COST_COLUMNS = {
    "images_per_s": "{:.0f}",
    "hook_ms": "{:.1f}",
    "hook_share": "{:.1%}",
    "kept_entries": "{:.0%}",
    "kept_energy": "{:.0%}",
}


def _caveats(config: TrainConfig, seeds: int) -> Iterator[str]:
    if config.data.source == "embedded":
        yield "Toy-sized: a tiny network on a small embedded data set. Nothing here carries over to ImageNet."
    yield "Uncontrolled: no arm's learning rate was tuned, which often explains more than a mask does."
    if seeds < ENOUGH_SEEDS:
        yield f"That is too few seeds for evidence; take at least {ENOUGH_SEEDS}."
