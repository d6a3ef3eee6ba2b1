"""Kill a random part of a training on two nodes at a random moment, many times: it has to end bitwise right.

    python tests/launch/kills.py --kills 20 --seed 0 [--on nodes|slurm|both] [--first N] [--json FILE]

As root, for the nodes are network namespaces. Not a test of every day: a kill takes half a minute, on Slurm more.
What is killed and when, anywhere from the start to the end of the run, is drawn from the seed. Then this program
does what a cluster manager does, no more: it starts again what ended with another status than 0. Exit status 1 if a
run ended wrong, or its ranks were started again too late; the files of such runs are kept.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
from managers import ByHand, OnSlurm, Training, birth, by_hand, end, on_slurm
from nodes import Launcher, step_of

from gmscale.errors import RunError

SECTIONS: tiny.Sections = {
    "run": {"epochs": 16.0, "log_every": 5, "save_every_steps": 4, "eval_every_epochs": 4.0},
    "model": {"ema_decay": 0.8, "drop_rate": 0.3},
    "data": {"batch_size_per_device": 8},
    "parallel": {"threads": 1, "timeout_s": 8},
}
STEPS = 96
TIMEOUT_S: float = SECTIONS["parallel"]["timeout_s"]
MOST_S = 15.0  # from the kill to the next start of the ranks on nodes, beyond that time-out
VICTIMS = {"nodes": ByHand.victims, "slurm": OnSlurm.victims}
CLUSTERS: dict[str, Callable[[Path, list[str]], AbstractContextManager[Training]]] = {
    "nodes": by_hand,
    "slurm": on_slurm,
}


@dataclass(frozen=True)
class Kill:
    """What is killed, how and when."""

    victim: str
    signal: signal.Signals
    share: float
    """The moment, as a share of an undisturbed run's duration."""


def draw(seed: int, number: int, victims: Sequence[str]) -> Kill:
    """Return the kill of trial `number`, from 1 on: always the same one. Every way comes once before any again."""
    ways = [(victim, way) for victim in victims for way in (signal.SIGTERM, signal.SIGKILL)]
    turn, place = divmod(number - 1, len(ways))
    random.Random(f"{seed}, ways, {turn}").shuffle(ways)
    return Kill(*ways[place], random.Random(f"{seed}, moment, {number}").random())


@dataclass
class Trial:
    """What became of one run."""

    number: int
    on: str
    victim: str = ""
    signal: str = ""
    after_s: float | None = None
    """From the start of the launchers to the kill; None if the run was over by then."""
    where: str = ""
    """What the run was at when the kill came."""
    end_s: float | None = None
    """From the kill until the manager saw that a launcher or a job had ended, if it did before the next start."""
    restart_s: float | None = None
    """From the kill until all ranks had been started again; None if they were not."""
    starts: int = 0
    """How often the ranks were started, the first time included."""
    statuses: list[str] = field(default_factory=list)
    duration_s: float = 0.0
    load: float = 0.0
    """Programs that wanted to run on this machine, over the last minute of the trial."""
    wrong: list[str] = field(default_factory=list)
    """What was not as in the undisturbed run."""

    @property
    def late(self) -> bool:
        """Whether the ranks were started again too late."""
        return self.on == "nodes" and (self.restart_s or 0) > TIMEOUT_S + MOST_S

    @property
    def line(self) -> str:
        """All of it in one line."""
        if self.after_s is None:
            what = f"{self.victim}: the run was over before" if self.victim else "no kill"
        else:
            again = "no start after it" if self.restart_s is None else f"next start after {self.restart_s:.1f} s"
            ended = "" if self.end_s is None else f", end of a launcher seen after {self.end_s:.1f} s"
            what = f"{self.victim}, {self.signal} at {self.after_s:.1f} s ({self.where}){ended}, {again}"
        verdict = f"WRONG: {'; '.join(self.wrong[:6])}" if self.wrong else "right" + ", but LATE" * self.late
        return (
            f"{self.number:3} {self.on}: {what}; {self.starts} starts, {self.duration_s:.0f} s, "
            f"load {self.load:.0f}, statuses {', '.join(self.statuses)}: {verdict}"
        )


# -- one trial -----------------------------------------------------------------------------------------------------


def run_trial(training: Training, run_dir: Path, trial: Trial, kill: Kill | None, duration_s: float) -> None:
    """Start the training, kill what `kill` names, wait for the end; what is seen goes into `trial`."""
    began = time.monotonic()
    if kill is not None:
        trial.victim, trial.signal = kill.victim, kill.signal.name
    killed_at = 0.0  # by the clock of processes' births; 0 is not yet
    seen: set[int] = set()
    training.start()
    while not training.tend():
        now = time.monotonic() - began
        if now > training.limit_s:
            trial.wrong.append(f"not over after {training.limit_s:.0f} s")
            break
        if kill is not None and trial.after_s is None and now >= kill.share * duration_s:
            pid = training.find(kill.victim)
            if pid is not None:
                trial.where = _where(run_dir, bool(seen))
                with suppress(ProcessLookupError):
                    os.kill(pid, kill.signal)
                    trial.after_s, killed_at = time.monotonic() - began, time.clock_gettime(time.CLOCK_BOOTTIME)
        ranks = training.ranks()
        births = [born for pid in ranks.values() if (born := birth(pid)) is not None]
        trial.starts += 0 in ranks and ranks[0] not in seen
        seen |= set(ranks.values())
        if trial.after_s is not None and trial.restart_s is None:
            if len(births) == 2 and min(births) >= killed_at:
                trial.restart_s = max(births) - killed_at
            elif trial.end_s is None and training.statuses:
                trial.end_s = time.monotonic() - began - trial.after_s
        time.sleep(0.05)
    trial.duration_s, trial.statuses, trial.load = time.monotonic() - began, training.statuses, os.getloadavg()[0]


def _where(run_dir: Path, begun: bool) -> str:
    """Return what the run is at, as its directory shows it."""
    if (run_dir / "summary.json").exists():
        return "finished"
    step = step_of(run_dir)
    if not step:
        return "before the first record" if begun else "no rank yet"
    writing = sorted(path.name for path in (run_dir / "checkpoints").glob(".step-*.tmp"))
    return f"step {step}" + (f", writing {writing[0][1:-4]}" if writing else "")


def differences(reference: Path, run_dir: Path) -> list[str]:
    """Return in what a run is not, bit for bit, what the reference is."""
    if not (run_dir / "summary.json").exists():
        return ["no summary.json"]
    steps = tiny.checkpoint_steps(run_dir)
    if not steps or steps[-1] != STEPS:
        return [f"checkpoints of the steps {steps}, not of {STEPS}"]
    found = tiny.different(tiny.tensors(reference), tiny.tensors(run_dir))
    right, ours = (tiny.untimed(tiny.metrics(path)) for path in (reference, run_dir))
    if ours != right:
        pairs = zip([*ours, {}], [*right, {}], strict=False)
        found.append("metrics.jsonl: " + next(f"{a}, not {b}" for a, b in pairs if a != b))
    return found


def left_over(training: Training, timeout_s: float = 5.0) -> list[str]:
    """Give what still lives a moment to end; return what does not."""
    deadline = time.monotonic() + timeout_s
    while (left := training.left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"still there: {name}" for name in left]


# -- many ----------------------------------------------------------------------------------------------------------


class Series:
    """Trials in `folder`, which lacks nothing but to exist; all compared with one undisturbed run on one host."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._cache = folder, folder / "data"
        self._reference = folder / "reference/run"
        self.duration_s: dict[str, float] = {}
        """How long an undisturbed run takes on each kind of cluster."""
        self.trials: list[Trial] = []

    def prepare(self) -> float:
        """Make the data and the reference; return how long that run took."""
        tiny.build(self._cache)
        self._reference.parent.mkdir()
        argv = tiny.flags(self._cache, self._reference, **SECTIONS)
        began = time.monotonic()
        launcher = Launcher(self._reference.parent / "log", ["--nproc_per_node", "2"], argv)
        try:
            if launcher.wait() != 0:
                raise RunError(f"the undisturbed run failed:\n{launcher.output}")
        finally:
            end(launcher)
        return time.monotonic() - began

    def run(self, on: str, number: int, kill: Kill | None, duration_s: float = 0.0) -> Trial:
        """Run a trial; its files stay if it does not go well."""
        trial = Trial(number, on)
        folder = self._folder / f"{on}-{number}"
        folder.mkdir()
        run_dir = folder / "run"
        with CLUSTERS[on](folder, tiny.flags(self._cache, run_dir, **SECTIONS)) as training:
            run_trial(training, run_dir, trial, kill, duration_s)
            if not trial.wrong:
                trial.wrong += differences(self._reference, run_dir) + left_over(training)
        self.trials.append(trial)
        if trial.wrong or trial.late:
            (folder / "trial.json").write_text(json.dumps(asdict(trial), indent=1))
        else:
            shutil.rmtree(folder)
        return trial


def summary(trials: Sequence[Trial]) -> str:
    """Return the numbers that count, in one line."""
    kills = [trial for trial in trials if trial.after_s is not None]
    right = [trial for trial in kills if not trial.wrong]
    longest = max((trial.restart_s or 0.0 for trial in kills), default=0.0)
    beyond = max(0.0, longest - TIMEOUT_S)
    return (
        f"{trials[0].on}: {len(right)} of {len(kills)} runs right after a kill; the ranks were started again at "
        f"most {longest:.1f} s after it, {beyond:.1f} s beyond the time-out of {TIMEOUT_S:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills on each kind of cluster (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="what, how and when is drawn from it (default 0)")
    parser.add_argument("--first", type=int, default=1, help="number of the first trial, to repeat one (default 1)")
    parser.add_argument("--on", choices=["nodes", "slurm", "both"], default="nodes")
    parser.add_argument("--json", type=Path, help="file for all that was recorded")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # then everything is cleaned up, as after Ctrl-C
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir="/tmp"))  # short: Slurm's sockets are in it
    series = Series(folder)

    def run(on: str, number: int, kill: Kill | None, duration_s: float = 0.0) -> Trial:
        trial = series.run(on, number, kill, duration_s)
        print(trial.line, flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(each) for each in series.trials], indent=1))
        return trial

    try:
        series.prepare()
        for on in CLUSTERS if options.on == "both" else [options.on]:
            undisturbed = run(on, 0, None)
            kills, number = 0, options.first
            while kills < options.kills and not undisturbed.wrong:
                trial = run(on, number, draw(options.seed, number, VICTIMS[on]), undisturbed.duration_s)
                kills, number = kills + (trial.after_s is not None), number + 1
            print(summary([trial for trial in series.trials if trial.on == on]), flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        bad = [trial for trial in series.trials if trial.wrong or trial.late]
        if bad:
            print(f"files of {', '.join(f'{t.on}-{t.number}' for t in bad)}: {folder}")
        else:
            shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
