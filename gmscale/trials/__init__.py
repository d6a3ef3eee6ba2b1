"""The trials of a sweep and the ledger that is the truth about them. Imports no torch and no Ray."""

from gmscale.trials.ledger import Branch, Follower, Ledger, Record, Result, State, read
from gmscale.trials.lineage import branch_point, commands, schedule
from gmscale.trials.trial import BASELINE, MASK, RANDOM, Arm, Stage, Trial, as_flags, command, run_dir

__all__ = [
    "BASELINE",
    "MASK",
    "RANDOM",
    "Arm",
    "Branch",
    "Follower",
    "Ledger",
    "Record",
    "Result",
    "Stage",
    "State",
    "Trial",
    "as_flags",
    "branch_point",
    "command",
    "commands",
    "read",
    "run_dir",
    "schedule",
]
