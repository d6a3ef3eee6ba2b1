"""A finding: one thing that was looked at, and what to do when it is not as it should be."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from gmscale.tracking import plain_console


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` says what to do when it is not `ok`.

    What is `optional` spoils nothing when it is not ok.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    optional: bool = False

    @property
    def failed(self) -> bool:
        return not self.ok and not self.optional


def show(findings: Iterable[Finding], prefix: str = "") -> bool:
    """Print findings as they come, each line after `prefix`; return whether none has failed."""
    console = plain_console()
    healthy = True
    for finding in findings:
        mark = "ok  " if finding.ok else ("-   " if finding.optional else "FAIL")
        lines = [f"{prefix}{mark} {finding.name:<22} {finding.detail}"]
        if not finding.ok:
            lines.append(f"{prefix}     {'':<22} -> {finding.remedy}")
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        healthy = healthy and not finding.failed
        sys.stdout.flush()
    return healthy
