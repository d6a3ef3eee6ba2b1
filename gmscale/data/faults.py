"""What can be wrong with shards and their samples, in one vocabulary for every part that finds it."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from gmscale.errors import RunError, UsageError

Reason = Literal[
    # of a whole shard
    "missing shard",
    "unreadable shard",
    "empty shard",
    "not a tar",
    "compressed shard",
    "damaged header",
    "truncated shard",
    "oversized header",
    "sparse member",
    "wrong sample count",
    "wrong size",
    "wrong hash",
    # of one sample
    "no label",
    "bad label",
    "no image",
    "two images",
    "empty image",
    "interleaved sample",
    "unsafe name",
    "corrupt image",
    "oversized image",
]

# A bad sample is replaced by the next one in its shard, at most so many further on.
MOST_SUBSTITUTES = 32


class Fault(NamedTuple):
    """Something wrong with a shard, or with the sample `key` in it."""

    shard: str
    key: str | None
    """None where the whole shard is affected."""
    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.detail}"


class ShardError(UsageError):
    """A shard that must not be used at all."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class ImageError(ValueError):
    """Bytes that do not decode to an image."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


class SampleError(RunError):
    """A sample that cannot be used, where it was asked for: replaced in training, fatal in evaluation."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def summary(faults: Iterable[Fault]) -> str:
    """Return how many faults of which reason, such as '3 no label, 1 corrupt image'."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(f.reason for f in faults).most_common())


def check_bad_share(faults: Sequence[Fault], samples: int, share: float, where: str) -> None:
    """Raise UsageError if more than `share` of a split's samples are bad; `where` names the split's setting."""
    if len(faults) > share * samples:
        allowed = "evaluation takes none" if share == 0 else f"data.max_bad_share allows {share:g}"
        raise UsageError(
            f"{where}: {len(faults)} of {samples} samples cannot be used ({summary(faults)}), {allowed}; "
            f"the first: {faults[0]}"
        )


class FaultLog:
    """A rank's bad training samples: each written down once, and those of an epoch counted against the limit."""

    def __init__(self, path: Path, known: Sequence[Fault], samples: int, share: float) -> None:
        """`known` faults were found when the `samples` of the split were indexed; `share` of those may be bad."""
        self.known = known
        self.found = 0
        """Bad samples that this rank has met since the epoch began, besides those known."""
        self._path, self._samples, self._share = path, samples, share
        self._epoch: int | None = None
        self._written: set[tuple[str, str | None]] = set()
        if path.exists():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]  # the last may be torn
            path.write_text("".join(f"{line}\n" for line in whole))
            self._written = {(r["shard"], r["key"]) for r in map(json.loads, whole)}

    def write(self, faults: Iterable[Fault]) -> None:
        """Append what is not in the file yet."""
        new = [fault for fault in faults if (fault.shard, fault.key) not in self._written]
        if new:
            with self._path.open("a") as file:
                file.writelines(json.dumps(fault._asdict()) + "\n" for fault in new)
            self._written.update((fault.shard, fault.key) for fault in new)

    def add(self, faults: Sequence[Fault], epoch: int) -> None:
        """Count and write the faults of a batch. Raises RunError where this rank's alone pass the limit."""
        if epoch != self._epoch:
            self._epoch, self.found = epoch, 0
        if faults:
            self.found += len(faults)
            self.write(faults)
            self.check(self.found, faults[-1])

    def check(self, found: int, last: Fault | None = None) -> None:
        """Raise RunError if the known faults and `found` more, over all ranks, are too many."""
        bad = len(self.known) + found
        if bad > self._share * self._samples:
            latest = f"{last}; " if last else ""
            raise RunError(
                f"{latest}{bad} of {self._samples} training samples cannot be used, data.max_bad_share allows "
                f"{self._share:g} (listed in {self._path})"
            )
