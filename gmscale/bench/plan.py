"""gmscale bench plan: the step that gmscale plan's model predicts, beside the one that is measured.

Processes, each in a network namespace of its own (link.py), all on a bridge; tc's token bucket limits what each
sends. In each round the processes do a step that nobody else takes part in, each its own DDP model with the same
mask, all at the same time, and a step together. From the first and the counted bytes the model (costs.py) says how
long the second takes. What it has to know of the link is measured before: all-reduces of two sizes between the
fewest processes, so that both the ring's growth with more of them and the overlap are predicted, not fitted.
"""

import statistics
import sys
import time
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmscale import costs, environment, parallel
from gmscale.bench.link import UNLIMITED, Link, bits_per_s, limit, veth_link
from gmscale.bench.options import add_training, chosen_variants, setting_of
from gmscale.bench.step import attempt
from gmscale.bench.table import number, print_notes, print_table, write_json
from gmscale.bench.training import PLAIN, VARIANTS, WARM_UP, Setting, Subject, Variant, made_up_batch, quartiles
from gmscale.errors import OneLineParser, RunError, check_range
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks
from gmscale.tracking import plain_console
from gmscale.traffic import counted

_PORT = "29400"  # the namespaces are new: nobody else listens there
_SIZES = 2**16, 2**23  # bytes of the all-reduces that the link is measured with
_REPEATED = 7
_COUNTED = 3  # steps
_MODES = (PLAIN, "bf16 hook", "pool, error feedback", "consensus", "consensus + bf16")
_MOST_PROCESSES = 16


def main(argv: list[str]) -> int:
    """Measure and show; status 1 if a variant failed or this machine does not allow it."""
    parser = OneLineParser(prog="gmscale bench plan", description=__doc__)
    add_training(parser, model="resnet18", image_size=64, batch_size=32, rounds=5, steps=1)
    parser.set_defaults(variants=list(_MODES))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 3, 4], metavar="N", help="how many")
    parser.add_argument(
        "--rates", nargs="+", default=["100mbit", "300mbit", "1gbit"], metavar="RATE",
        help=f"what tc lets each process send, as tc writes it, or {UNLIMITED}",
    )  # fmt: skip
    options = parser.parse_args(argv)
    names, setting = chosen_variants(options), setting_of(options)
    for rate in options.rates:
        bits_per_s(rate)
    for processes in options.processes:
        check_range(processes, "--processes", 2, _MOST_PROCESSES)
    processes = sorted(set(options.processes))
    with veth_link(processes[-1], "bench plan") as link:
        result = measure(setting, names, processes, options.rates, link)
    result["command"] = " ".join(("gmscale bench plan", *argv))
    show(result)
    write_json(result, options.json)
    return int(any("failed" in row for row in result["variants"].values()))


def measure(
    setting: Setting, names: list[str], processes: list[int], rates: list[str], link: Link
) -> dict[str, Any]:
    """Return the settings, what the link does, and for each variant rows by number of processes and rate."""
    reduced = {n: _in_namespaces(all_reduces, link.first(n), rates) for n in processes}
    links = {n: {rate: link_of(seen["rates"][rate], n) for rate in rates} for n, seen in reduced.items()}
    rows: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(names, 1):
        rows[name] = row = attempt(name, lambda name=name: _row(setting, name, processes, rates, link, links))
        said = row.get("skipped") or row.get("failed")
        said = said or ", ".join(
            f"{of['error']:+.0%}" for rates_ in row["processes"].values() for of in rates_.values()
        )
        print(f"{done}/{len(names)} {name}: {said}", file=sys.stderr, flush=True)
    return {
        "environment": reduced[processes[0]]["environment"],
        **vars(setting),
        "link": {
            rate: {
                "mbit_per_s": 8e-6 * found.bytes_per_s,
                "latency_us": 1e6 * found.latency_s,
                "ring": {n: _ring_check(reduced[n]["rates"][rate], n, found) for n in processes},
            }
            for rate, found in links[processes[0]].items()
        },
        "variants": rows,
    }


def link_of(seconds: dict[int, float], processes: int) -> costs.Link:
    """Return the link over which a ring of all-reduces takes these seconds, by their bytes: two sizes."""
    (small, small_s), (large, large_s) = sorted(seconds.items())
    others = processes - 1
    if large_s <= small_s:
        raise RunError(
            f"this machine is too busy to measure a link: {large} bytes took {1e3 * large_s:.1f} ms, and {small} "
            f"{1e3 * small_s:.1f}"
        )
    bytes_per_s = 2 * others / processes * (large - small) / (large_s - small_s)
    latency_s = small_s / (2 * others) - small / processes / bytes_per_s
    return costs.Link(bytes_per_s, max(0.0, latency_s))


def _ring_check(seconds: dict[int, float], processes: int, link: costs.Link) -> dict[str, float]:
    size = max(seconds)
    predicted = costs.ring_all_reduce_s(size, processes, link)
    return {"measured_ms": 1e3 * seconds[size], "error": predicted / seconds[size] - 1}


def _row(
    setting: Setting,
    name: str,
    processes: list[int],
    rates: list[str],
    link: Link,
    links: dict[int, dict[str, costs.Link]],
) -> dict[str, Any]:
    """Return what was predicted over the link between the fewest processes, and over the one between as many."""
    found = {n: _in_namespaces(steps_over, link.first(n), setting, name, rates) for n in processes}
    return {
        "processes": {
            n: {
                rate: {
                    **seen,
                    **_predicted(seen, n, links[processes[0]][rate]),
                    "error_own_link": _predicted(seen, n, links[n][rate])["error"],
                }
                for rate, seen in found[n].items()
            }
            for n in processes
        }
    }


def _predicted(found: dict[str, Any], processes: int, link: costs.Link) -> dict[str, Any]:
    """Return what the model says from the steps alone, round by round, beside the steps together."""
    traffic = {name: costs.Traffic(*seen) for name, seen in found["traffic"].items()}
    awaited = costs.Traffic(*found["awaited"])
    predicted, behind_nothing = [], []
    for alone_s, _ in found["rounds"]:
        hides_s = costs.BACKWARD_SHARE * alone_s
        predicted.append(alone_s + costs.exposed_s(traffic, processes, link, hides_s, awaited))
        behind_nothing.append(alone_s + costs.exposed_s(traffic, processes, link, 0.0, awaited))
    together = [together_s for _, together_s in found["rounds"]]
    errors = [said / measured - 1 for said, measured in zip(predicted, together, strict=True)]
    return {
        "alone_ms": 1e3 * statistics.median(alone_s for alone_s, _ in found["rounds"]),
        "predicted_ms": 1e3 * statistics.median(predicted),
        "behind_nothing_ms": 1e3 * statistics.median(behind_nothing),
        "measured_ms": 1e3 * statistics.median(together),
        "error": statistics.median(errors),
        "error_quartiles": quartiles(errors),
    }


def _in_namespaces(function: Any, link: Link, *args: Any) -> dict[str, Any]:
    environ = [
        {
            "MASTER_ADDR": link.addresses[0],
            "MASTER_PORT": _PORT,
            "GLOO_SOCKET_IFNAME": own,
            "CUDA_VISIBLE_DEVICES": "",  # NCCL would find its way around the link
        }
        for own in link.interfaces
    ]
    return run_ranks(function, len(environ), link.interfaces, *args, namespaces=link.namespaces, environ=environ)


def all_reduces(world: World, interfaces: tuple[str, ...], rates: list[str]) -> dict[str, Any]:
    """Return the median seconds of an all-reduce by rate and by bytes."""
    own, seconds = interfaces[world.rank], {}
    for rate in rates:
        limit(own, rate)
        seconds[rate] = {
            size: statistics.median(
                _seconds(world, lambda size=size: dist.all_reduce(torch.zeros(size // 4))) for _ in range(_REPEATED)
            )
            for size in _SIZES
        }
    limit(own, UNLIMITED)
    return {"rates": seconds, "environment": environment.describe(world)}


def steps_over(
    world: World, interfaces: tuple[str, ...], setting: Setting, name: str, rates: list[str]
) -> dict[str, Any]:
    """Return by rate and round the seconds of a step, each rank alone and all together, and what a step sends."""
    own, variant = interfaces[world.rank], VARIANTS[name]
    own_group, _ = dist.new_subgroups(1)
    alone = Subject(variant, setting, world, own_group)
    together = Subject(variant, setting, world)
    batch = made_up_batch(setting, world)

    def seconds(subject: Subject) -> float:
        def steps() -> None:
            for _ in range(setting.steps):
                subject.step(*batch)

        return _seconds(world, steps) / setting.steps

    for _ in range(WARM_UP):
        alone.step(*batch)
        together.step(*batch)
    rows = {}
    for rate in rates:
        limit(own, rate)
        taken = []
        for done in range(setting.rounds):
            order = (alone, together) if done % 2 == 0 else (together, alone)
            took = {subject: seconds(subject) for subject in order}
            taken.append((took[alone], took[together]))
        limit(own, UNLIMITED)  # counting takes no time that matters
        rows[rate] = {"rounds": taken, **_sent(together, variant, batch)}
    return rows


def _sent(subject: Subject, variant: Variant, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Return what a step hands to collectives, (calls, bytes), and what consensus keeps: both may change."""
    attachment = subject.attachment
    with counted() as operations:
        for _ in range(_COUNTED):
            subject.step(*batch, observe=True)
    traffic = {kind: (seen["calls"] / _COUNTED, seen["bytes"] / _COUNTED) for kind, seen in operations.items()}
    if attachment is None or attachment.mask.agreement == "local":
        return {"traffic": traffic, "awaited": (0.0, 0.0), "kept_entries": None}
    units = sum(prod(touched["map"]) for touched in attachment.describe()["touched"])
    return {
        "traffic": traffic,
        "awaited": (traffic["allreduce"][0] / 2, units * (4 if variant.hook is None else 2)),
        "kept_entries": attachment.report().kept_entries,
    }


def _seconds(world: World, body: Any) -> float:
    """Return the seconds that the slowest rank takes, all having begun at the same time."""
    parallel.barrier(world)
    start = time.perf_counter()
    body()
    return parallel.largest_over_ranks(time.perf_counter() - start, world)


def show(result: dict[str, Any]) -> None:
    """Print what the link does, and one table of steps."""
    described = result["environment"]
    title = (
        f"{result['model']}, {result['image_size']} px, batch {result['batch_size']} on each of so many processes "
        f"({described['device']}), torch {described['torch']}, {result['rounds']} rounds of {result['steps']} steps"
    )
    headings = ["variant", "of", "link", "alone ms", "predicted", "measured", "error", "quartiles"]
    headings += ["own link", "no overlap"]
    rows = []
    for name, variant in result["variants"].items():
        for processes, rates in variant.get("processes", {}).items():
            for rate, row in rates.items():
                rows.append(
                    (
                        name,
                        str(processes),
                        rate,
                        *(number(row[f"{key}_ms"], 0) for key in ("alone", "predicted", "measured")),
                        _percent(row["error"]),
                        f"{_percent(row['error_quartiles'][0])} to {_percent(row['error_quartiles'][1])}",
                        _percent(row["error_own_link"]),
                        _percent(row["behind_nothing_ms"] / row["measured_ms"] - 1),
                    )
                )
    print_table(title, headings, rows)
    print_notes({name: row for name, row in result["variants"].items() if "processes" not in row})
    console = plain_console()
    for rate, link in result["link"].items():
        ring = ", ".join(f"{n} processes {_percent(of['error'])}" for n, of in link["ring"].items())
        console.print(
            f"{rate}: measured {link['mbit_per_s']:.0f} Mbit/s, {link['latency_us']:.0f} us; an all-reduce of "
            f"{_SIZES[1] / 1e6:.0f} MB predicted for {ring}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    console.print(
        "error: predicted / measured - 1, median over rounds; own link: the same with the link as measured between "
        "as many processes; no overlap: with communication that hides behind nothing",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _percent(share: float) -> str:
    return f"{100 * share:+.0f} %"
