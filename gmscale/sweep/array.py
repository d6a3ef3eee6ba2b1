"""A sweep without Ray: its trials as the lines of a file, for the jobs of a Slurm array, and what they come to."""

import shlex
from pathlib import Path

from gmscale import trials
from gmscale.config import TrainConfig
from gmscale.errors import UsageError
from gmscale.files import write_atomically
from gmscale.sweep import planning, work
from gmscale.sweep.config import SweepConfig


def check(sweep: SweepConfig) -> None:
    """Raise UsageError if what is tried, or goes on, depends on the results of other trials."""
    for field, value, needed in (
        ("search", sweep.search, ("grid", "random")),
        ("scheduler", sweep.scheduler, ("none",)),
    ):
        if value not in needed:
            raise UsageError(
                f"--plan: the jobs of an array know nothing of one another, and sweep.{field} is {value!r}; "
                f"expected {' or '.join(needed)}"
            )


def plan(folder: Path, base: TrainConfig, sweep: SweepConfig) -> int:
    """Write trials.txt, of which line n trains trial n, and show which are left and how to submit them."""
    check(sweep)
    planning.plan_confirmation(trials.Ledger(folder), base, sweep, trials.read(folder))
    records = trials.read(folder)
    arguments = [trials.command(folder.absolute(), record.trial)[2:] for record in records.values()]
    write_atomically(folder / "trials.txt", "".join(f"{shlex.join(words)}\n" for words in arguments))
    left = [number for number, record in records.items() if not record.ended]
    for number in left:
        print(shlex.join(trials.command(folder, records[number].trial, sweep.workers)))
    if left:
        print(f"# {len(left)} trials to train; one after another, or: ")
        print(f"# sbatch --array={_ranges(left)} slurm/array_sweep.sbatch {folder}")
    else:
        print(f"# nothing is left to train; gmscale report {folder}")
    return 0


def record(folder: Path, base: TrainConfig, sweep: SweepConfig, number: int) -> int:
    """Judge what the job of trial `number` left, and write it into the ledger."""
    records = trials.read(folder)
    if number not in records:
        raise UsageError(f"--record {number}: {folder} has trials 1 to {max(records)}")
    if not records[number].ended:
        work.record(folder, records[number], work.terms(sweep))
    return 0


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers as Slurm writes them: 1-3,7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
