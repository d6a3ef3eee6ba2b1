"""Print what the sweeps of the study found, as the tables of README.md.

python configs/study/tables.py runs/study/embedded-weights ...
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gmscale import trials
from gmscale.errors import OneLineParser, UsageError
from gmscale.statistics import Paired, equivalence, holm, paired_difference, significant, summary
from gmscale.sweep import config
from gmscale.trials import BASELINE, RANDOM, Record, confirmation
from gmscale.trials.findings import Configuration, configurations, words

MARGIN = 0.5  # points of accuracy
_HIDDEN = ("optim.lr", "mask.enabled", "output.enabled", "mask.random_like", "output.random_like")


def main(folders: Sequence[str]) -> None:
    """Print the tables of each sweep; Holm's correction covers the arms of one table."""
    for folder in map(Path, folders):
        base, sweep = config.load(folder)
        records = trials.read(folder)
        ended = [record for record in records.values() if record.ended]
        wrong = [record for record in ended if record.state != "finished"]
        hours = sum(record.wall_s for record in ended) / 3600
        print(
            f"\n## {folder.name}\n\n{len(ended)} trials, {hours:.2f} hours of training; {len(wrong)} not finished"
        )
        rows = _arms(configurations(records, "search"), base.optim.lr)
        for objective in sweep.objectives:
            _print_search(rows, objective)
        _print_bytes(folder, records)
        for objective, table in confirmation.confirmed(records, sweep.objectives).items():
            print(f"\n{confirmation.winner(records, objective, asdict(sweep), table).sentence}\n")
            within = f"within {MARGIN:g} points?" if objective == "top1" else ""
            print(f"| {objective} on fresh seeds | mean | minus no mask | {within} |\n|---|---|---|---|")
            against = {id(c.configuration): c.paired for c in table.to_reference}
            for one in table.configurations:
                paired = against.get(id(one))
                cells = [one.name, _mean(one, objective), _interval(paired) if paired else ""]
                cells.append(equivalence(paired, MARGIN) if paired and within else "")
                print(f"| {' | '.join(cells)} |")
            for comparison in table.to_twin:
                label = comparison.configuration.label
                print(f"| mask minus its random twin ({label}) | | {_interval(comparison.paired)} | |")


def _arms(found: Sequence[Configuration], base_lr: float) -> dict[str, dict[float, Configuration]]:
    """Return {arm in words: {learning rate: configuration}}, no mask first; the others have the base's."""
    rows: defaultdict[str, dict[float, Configuration]] = defaultdict(dict)
    for one in sorted(found, key=lambda c: c.arm != BASELINE):
        shown = {k: v for k, v in one.settings.items() if k not in _HIDDEN and not k.endswith(".operator")}
        name = f"{one.arm}{': ' if shown else ''}{words(shown)}"
        rows[name][float(one.settings.get("optim.lr", base_lr))] = one
    return rows


def _print_search(rows: dict[str, dict[float, Configuration]], objective: str) -> None:
    """Print means over seeds, and the best learning rate of each arm against the best without a mask."""
    best = {name: max(row.values(), key=lambda c: c.score(objective) or -math.inf) for name, row in rows.items()}
    reference = best.pop(BASELINE)
    paired = {name: _paired(one, reference, objective) for name, one in best.items()}
    adjusted = dict(zip(paired, holm([1.0 if p.p is None else p.p for p in paired.values()]), strict=True))
    rates = sorted({rate for row in rows.values() for rate in row})
    heads = [objective, *(f"lr {rate:g}" for rate in rates), "best minus best without a mask", "Holm p"]
    heads.append("minus best of its random twin")
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, row in rows.items():
        if name not in paired:
            shown = ["", "", ""]
        else:
            mark = "**" if significant(paired[name], adjusted[name]) else ""
            twin = best.get(f"random {name}")
            to_twin = _interval(_paired(best[name], twin, objective)) if twin else ""
            shown = [f"{mark}{_interval(paired[name])}{mark}", f"{adjusted[name]:.2g}", to_twin]
        cells = [_mean(row[rate], objective) if rate in row else "" for rate in rates]
        print(f"| {' | '.join([name, *cells, *shown])} |")


def _paired(one: Configuration, other: Configuration, objective: str) -> Paired:
    mine, theirs = one.by_seed(objective), other.by_seed(objective)
    seeds = sorted(mine.keys() & theirs.keys())
    return paired_difference([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def _mean(one: Configuration, objective: str) -> str:
    found = summary(list(one.by_seed(objective).values()))
    return "" if found.mean is None else f"{found.mean:.1f} ± {found.std or 0:.1f}"


def _interval(paired: Paired) -> str:
    if paired.mean is None or paired.low is None or paired.high is None:
        return "" if paired.mean is None else f"{paired.mean:+.2f}"
    return f"{paired.mean:+.2f} ({paired.low:+.2f} to {paired.high:+.2f})"


def _print_bytes(folder: Path, records: dict[int, Record]) -> None:
    """Print which share of a dense all-reduce's bytes travelled, where the runs say it."""
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for record in records.values():
        path = trials.run_dir(folder, record.trial) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = [line["wire_bytes"] / line["dense_bytes"] for line in lines if line.get("dense_bytes")]
        if found:
            name = "random mask" if record.trial.arm == RANDOM else words(record.trial.settings)
            shares[name].append(100 * statistics.fmean(found))
    if shares:
        print("\n| bytes on the wire | of a dense all-reduce's |\n|---|---|")
        for name, share in shares.items():
            print(f"| {name} | {statistics.fmean(share):.1f} % ({min(share):.1f} to {max(share):.1f}) |")


if __name__ == "__main__":
    parser = OneLineParser(description="Print what the sweeps of the study found.")
    parser.add_argument("sweep", nargs="+", help="folder of a sweep")
    try:
        main(parser.parse_args().sweep)
    except UsageError as error:
        print(f"tables.py: error: {error}", file=sys.stderr)
        sys.exit(2)
