"""gmscale doctor --launch: can the nodes train together? Stage by stage, each on all of them at once."""

import argparse
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from gmscale.doctor.equality import equality_findings, facts_of
from gmscale.doctor.finding import Finding, show
from gmscale.doctor.link import Transfer, link_finding
from gmscale.doctor.local import look_around, reach_head
from gmscale.doctor.nodes import Nodes, clock_findings, clocks
from gmscale.doctor.plan import Plan, plan_of
from gmscale.doctor.shards import look_at_data, shard_findings
from gmscale.doctor.shared import check_directory
from gmscale.errors import RunError
from gmscale.launch import network
from gmscale.tracking import plain_console

# All shards of a large set may have to be looked at for the first time.
_DATA_S = 1800.0


class _Report:
    """What this node found. The head shows all of it, the others what is not ok, with their name."""

    def __init__(self, plan: Plan, *, is_head: bool) -> None:
        self.findings: list[Finding] = []
        self.row: dict[str, Any] = {}
        self._is_head = is_head
        self._prefix = f"{plan.host}: " if plan.nnodes > 1 and not is_head else ""

    def add(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.findings.append(finding)
            if self._is_head or not finding.ok:
                show([finding], self._prefix)

    @property
    def failed(self) -> list[str]:
        return [finding.name for finding in self.findings if finding.failed]


def check_launch(options: argparse.Namespace) -> int:
    """Run all stages; return 0 if nothing failed on any node that came, else 1. Raises UsageError."""
    plan = plan_of(options)
    is_head = False
    with suppress(ValueError):  # a name that does not resolve is found and said below
        is_head = plan.is_head()
    report = _Report(plan, is_head=is_head)
    report.add(look_around(plan))
    if not is_head and not report.failed:
        report.add([reach_head(plan)])
    if any(name not in ("GPUs", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") for name in report.failed):
        return 1  # nobody can be met
    route = network.route_to(plan.head, plan.port)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", route.interface)  # as gmscale launch does
    try:
        nodes = Nodes(plan, is_head=is_head)
        report.add(nodes.roll_call())
        report.row = {"node": plan.host, "address": route.address, "interface": route.interface}
        if nodes.late:
            return 1
        if nodes.complete:
            _check_together(plan, nodes, report)
        return _conclude(nodes, report)
    except RunError as error:
        report.add(
            [Finding("nodes", False, str(error), "that node's own output says more, or its machine is down")]
        )
        return 1


def _check_together(plan: Plan, nodes: Nodes, report: _Report) -> None:
    facts = nodes.gather("facts", facts_of(plan))
    report.add(equality_findings(nodes, facts))
    gpus = facts[nodes.number]["GPUs"]
    report.row |= {"GPUs": gpus, "cores": facts[nodes.number]["cores"]}

    if len(nodes.hosts) > 1:
        measured = clocks(nodes)
        report.add(clock_findings(nodes, measured))
        ahead, error = measured[nodes.number]
        report.row["clock ms"] = f"{round(1e3 * ahead, 1) + 0.0:+.1f} +- {1e3 * error:.1f}" if nodes.number else "-"

    job = nodes.gather("job", secrets.token_hex(4))[0]
    findings, seen_s = check_directory(plan, nodes, job)
    report.add(findings)
    report.row["files seen ms"] = "-" if seen_s is None else f"{1e3 * seen_s:.0f}"

    if len(nodes.hosts) > 1:
        _all_reduce(plan, nodes, report, "gloo", [nodes.number], len(nodes.hosts))
    processes = min(min(fact["GPUs"], fact["--nproc_per_node"]) for fact in facts)
    size = processes * len(nodes.hosts)
    if size > 1:
        ranks = [nodes.number * processes + place for place in range(processes)]
        _all_reduce(plan, nodes, report, "nccl", ranks, size)

    if plan.config is not None:
        found = look_at_data(plan, plan.config, nodes.number, len(nodes.hosts))
        answers = nodes.gather("data", found, timeout_s=_DATA_S)
        report.add(shard_findings(plan, plan.config, nodes, answers))


def _all_reduce(plan: Plan, nodes: Nodes, report: _Report, backend: str, ranks: list[int], size: int) -> None:
    answer = Transfer(backend, (plan.head, plan.port), backend, ranks, size, plan.timeout_s).finish()
    answers = nodes.gather(f"{backend} all-reduce", answer, timeout_s=2 * plan.timeout_s + 90)
    finding = link_finding(backend, size, answers, nodes.hosts)
    if nodes.is_head or "error" in answer:
        report.add([finding])


def _conclude(nodes: Nodes, report: _Report) -> int:
    """Show all nodes on the head, last; return the exit status, the same everywhere."""
    told = {"row": report.row, "findings": [asdict(finding) for finding in report.findings]}
    answers = nodes.gather("findings", told)
    failed = [[f["name"] for f in answer["findings"] if not f["ok"] and not f["optional"]] for answer in answers]
    nodes.leave()
    if nodes.is_head and len(answers) > 1:
        _print_table([answer["row"] for answer in answers], failed)
    return int(any(failed) or not nodes.complete)


def _print_table(rows: list[dict[str, Any]], failed: list[list[str]]) -> None:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("node", "address", "interface") else "right")
    table.add_column("")
    for row, names in zip(rows, failed, strict=True):
        verdict = f"FAIL: {', '.join(dict.fromkeys(names))}" if names else "ok"
        table.add_row(*(str(row.get(heading, "-")) for heading in headings), verdict)
    plain_console().print(table)
