"""A sweep without Ray: its trials as the lines of a file, for the jobs of a Slurm array, and what they come to."""

import shlex
from pathlib import Path

from gmscale import trials
from gmscale.config import TrainConfig
from gmscale.errors import UsageError
from gmscale.files import write_atomically
from gmscale.sweep import planning, work
from gmscale.sweep.config import SweepConfig


def _needs_a_driver(sweep: SweepConfig) -> str:
    """Return what of the sweep depends on the results of other trials, of which an array's jobs know nothing."""
    if sweep.search in planning.ADAPTIVE:
        return f"search {sweep.search} makes the others from results"
    return "" if sweep.scheduler == "none" else f"scheduler {sweep.scheduler} decides which go on"


def plan(folder: Path, base: TrainConfig, sweep: SweepConfig) -> int:
    """Show which trials are left; write trials.txt, of which line n trains trial n, and show how to submit them."""
    planning.plan_confirmation(trials.Ledger(folder), base, sweep, trials.read(folder))
    records = trials.read(folder)
    left = [number for number, record in records.items() if not record.ended]
    for number in left:
        print(shlex.join(trials.command(folder, records[number].trial, sweep.workers)))
    if why := _needs_a_driver(sweep):
        print(f"# {len(left)} trials planned; {why}: gmscale sweep --resume {shlex.quote(str(folder))}")
        return 0
    extra = {"parallel.threads": sweep.cpus_per_worker}
    arguments = [trials.command(folder.absolute(), record.trial, extra=extra)[2:] for record in records.values()]
    write_atomically(folder / "trials.txt", "".join(f"{shlex.join(words)}\n" for words in arguments))
    if left:
        each = f"NPROC_PER_NODE={sweep.workers} " if sweep.workers > 1 else ""
        print(f"# {len(left)} trials to train; one after another, or:")
        print(f"# {each}sbatch --array={_ranges(left)} slurm/array_sweep.sbatch {shlex.quote(str(folder))}")
    else:
        print(f"# nothing is left to train; gmscale report {shlex.quote(str(folder))}")
    return 0


def record(folder: Path, sweep: SweepConfig, number: int) -> int:
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
