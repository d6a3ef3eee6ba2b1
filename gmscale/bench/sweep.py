"""gmscale bench sweep: what a sweep costs beyond its trials, in time and memory, and how fast it reports.

Three parts. asha: a sweep by the command, then the same trials, each as far as it was trained, by their own
commands one after another. memory: what the driver holds after more and more trials that end at once. report: the
page of a sweep of many made-up trials.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gmscale import environment, trials
from gmscale.bench.table import write_json
from gmscale.config import TrainConfig
from gmscale.errors import OneLineParser, RunError, UsageError, check_range
from gmscale.stopping import StopRequest
from gmscale.sweep import config, planning, resources
from gmscale.sweep.config import SweepConfig
from gmscale.tracking import plain_console

_PARTS = ("asha", "memory", "report")
_ALONE = ("--sweep.no_mask_lr=[]", "--sweep.random_mask=false", "--sweep.confirm_seeds=0", "--sweep.scheduler=asha")


def main(argv: list[str]) -> int:
    """Measure and show; returns 0."""
    parser = OneLineParser(
        prog="gmscale bench sweep", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config", default="configs/sweep/quickstart.yaml", help="asha: file of a sweep")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="what to measure")
    parser.add_argument("--trials", type=int, default=8, help="asha: mask configurations")
    parser.add_argument("--rounds", type=int, default=1, help="asha: times that both take turns")
    parser.add_argument("--held", type=int, default=100, help="memory: trials")
    parser.add_argument("--reported", type=int, default=1000, help="report: trials")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file too")
    options = parser.parse_args(argv)
    for name in ("trials", "rounds", "reported"):
        check_range(getattr(options, name), f"--{name}", 1)
    check_range(options.held, "--held", 40)
    if not Path(options.config).is_file():
        raise UsageError(f"--config {options.config}: no such file; start from the checkout, or name one")
    result: dict[str, Any] = {"command": shlex.join(("gmscale bench sweep", *argv))}
    versions = {name: environment.package_version(name) for name in ("torch", "ray", "timm")}
    result["environment"] = versions | {"cores": resources.cores(), "commit": environment.commit()}
    console = plain_console()
    with tempfile.TemporaryDirectory(prefix="gmscale-bench-sweep-") as folder:
        for part in dict.fromkeys(options.parts):
            measured = {"asha": _asha, "memory": _memory, "report": _report}[part](options, Path(folder))
            result[part] = measured
            for name, value in measured.items():
                console.print(f"{part}: {name} {value}", markup=False, highlight=False, soft_wrap=True)
    write_json(result, options.json)
    return 0


# ---- the time beyond the trials' own ----------------------------------------------------------------------------


def _asha(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rounds = [_beside_by_hand(options, folder / f"round{number}") for number in range(options.rounds)]
    return {
        "sweep_s": [r[0] for r in rounds],
        "by_hand_s": [r[1] for r in rounds],
        "ratio": statistics.median(r[0] / r[1] for r in rounds),
        "states": rounds[-1][2],
    }


def _beside_by_hand(options: argparse.Namespace, folder: Path) -> Any:
    """Return the seconds of a sweep, of its trials by hand, and how the trials ended."""
    argv = ["sweep", "--config", options.config, f"--sweep.dir={folder / 'sweep'}"]
    swept = _seconds([*argv, f"--sweep.trials={options.trials}", *_ALONE])
    records = trials.read(folder / "sweep")
    by_hand = 0.0
    for record in records.values():
        # by hand nobody shares the machine out
        fields = {"run.dir": str(folder / "hand" / record.trial.name), "parallel.threads": resources.cores()}
        if record.state == "stopped":
            fields["run.pause_after_epochs"] = record.results[-1].epoch
        command = trials.command(folder / "sweep", record.trial, extra=fields)
        by_hand += _seconds(command[1:], stops=record.state == "stopped")
    return round(swept, 1), round(by_hand, 1), sorted(record.state for record in records.values())


def _seconds(argv: list[str], *, stops: bool = False) -> float:
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-m", "gmscale", *argv], capture_output=True, text=True)
    if found.returncode != (75 if stops else 0):
        raise RunError(f"gmscale {' '.join(argv[:3])} ended with status {found.returncode}: {found.stderr[-300:]}")
    return time.monotonic() - began


# ---- what the driver holds --------------------------------------------------------------------------------------


class _Watch:
    """In place of a display: the resident memory of this process by the number of trials that have ended."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def update(self, records: Mapping[int, trials.Record]) -> None:
        ended = sum(record.ended for record in records.values())
        self.seen.setdefault(ended, _resident_mb())


def _memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from gmscale.bench.instant import InstantTrial
    from gmscale.sweep.driver import Driver

    base, sweep = _made_up(folder / "held", options.held)
    watch = _Watch()
    with StopRequest() as stop:
        Driver(folder / "held", base, sweep, watch, stop, InstantTrial).run()
    counts = sorted(watch.seen)
    early, late = (next(n for n in counts if n >= share * options.held) for share in (0.25, 1.0))
    return {
        f"MB after {early} trials": round(watch.seen[early], 1),
        f"MB after {late} trials": round(watch.seen[late], 1),
        "kB a trial": round(1000 * (watch.seen[late] - watch.seen[early]) / (late - early), 1),
    }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# ---- the report -------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    where = folder / "reported"
    _made_up(where, options.reported)
    ledger = trials.Ledger(where)
    lines = ledger.path.read_text().splitlines()
    for number in range(1, options.reported + 1):
        for epoch in range(1, 11):
            values = {"top1": 50 + epoch + number % 17, "loss": 2.0 / epoch}
            lines.append(_event("result", number, step=epoch * 10, epoch=float(epoch), values=values))
        lines.append(_event("ended", number, state="finished", values=values, wall_s=10.0, error=""))
    ledger.path.write_text("\n".join(lines) + "\n")
    took = _seconds(["report", str(where)])
    size = (where / "report.html").stat().st_size / 1e6
    return {"trials": options.reported, "seconds": round(took, 1), "MB": round(size, 1)}


def _event(event: str, number: int, **fields: Any) -> str:
    return json.dumps({"event": event, "trial": number, "time": 0.0, **fields})


def _made_up(folder: Path, count: int) -> tuple[TrainConfig, SweepConfig]:
    """Write a sweep of so many mask configurations, and no controls, and return its settings."""
    folder.mkdir()
    space = {
        "mask.strength": {"uniform": [0.1, 1.0]},
        "mask.kappa": [0.5, 1.0, 2.0],
        "optim.lr": {"loguniform": [0.001, 0.1]},
    }
    sections = {
        "run": {"epochs": 10.0},
        "sweep": {
            "dir": str(folder), "space": space, "trials": count, "no_mask_lr": [], "random_mask": False,
            "confirm_seeds": 0,
        },
    }  # fmt: skip
    file = folder / "made_up.yaml"
    file.write_text(yaml.safe_dump(sections))
    base, sweep, _ = config.parse(["--config", str(file)])
    config.save(folder, base, sweep)
    trials.Ledger(folder).begin(planning.search(base, sweep))
    return base, sweep
