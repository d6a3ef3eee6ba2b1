"""gmscale bench comm: training steps of two processes over a link whose rate is limited, as ratios to plain DDP.

Each process lives in a network namespace of its own (link.py); the link between them is a veth pair that tc's
token bucket slows down. Beside the bytes that a step hands to collectives stand those that the interface sent.
"""

import statistics
import sys
from typing import Any

from gmscale.bench.link import UNLIMITED, Link, bits_per_s, bytes_sent, limit, veth_link
from gmscale.bench.options import add_training, chosen_variants, setting_of
from gmscale.bench.step import attempt
from gmscale.bench.table import number, print_notes, print_table, write_json
from gmscale.bench.training import Duel, Setting, alone
from gmscale.errors import OneLineParser
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks

_PORT = "29400"  # the namespaces are new: nobody else listens there


def main(argv: list[str]) -> int:
    """Measure and show; status 1 if a variant failed or this machine does not allow it."""
    parser = OneLineParser(prog="gmscale bench comm", description=__doc__)
    add_training(parser, model="resnet18", image_size=64, batch_size=32, rounds=3, steps=1)
    parser.add_argument(
        "--rates", nargs="+", default=[UNLIMITED, "1gbit", "100mbit"], metavar="RATE",
        help=f"rates of the link, as tc writes them, or {UNLIMITED}",
    )  # fmt: skip
    options = parser.parse_args(argv)
    names, setting = chosen_variants(options), setting_of(options)
    for rate in options.rates:
        bits_per_s(rate)
    with veth_link() as link:
        result = measure(setting, names, options.rates, link)
    result["command"] = " ".join(("gmscale bench comm", *argv))
    show(result)
    write_json(result, options.json)
    return int(any("failed" in row for row in result["variants"].values()))


def measure(setting: Setting, names: list[str], rates: list[str], link: Link) -> dict[str, Any]:
    """Return the settings, the environment and one row a variant, with the rates in it."""
    rows: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(names, 1):
        rows[name] = row = attempt(name, lambda name=name: _row(setting, name, rates, link))
        said = row.get("skipped") or row.get("failed")
        said = said or ", ".join(f"{rate} {of['ratio']:.3f}" for rate, of in row["rates"].items())
        print(f"{done}/{len(names)} {name}: {said}", file=sys.stderr, flush=True)
    environments = [row.pop("environment") for row in rows.values() if "environment" in row]
    return {"environment": environments[0], **vars(setting), "rates": rates, "variants": rows}


def _row(setting: Setting, name: str, rates: list[str], link: Link) -> dict[str, Any]:
    measured = _in_namespaces(over_link, link, setting, name, rates, link.interfaces)
    return {"rates": measured, **_in_namespaces(alone, link, setting, name)}


def _in_namespaces(function: Any, link: Link, *args: Any) -> dict[str, Any]:
    environ = [
        # on the CPU: NCCL would find its way around the link
        {
            "MASTER_ADDR": link.addresses[0],
            "MASTER_PORT": _PORT,
            "GLOO_SOCKET_IFNAME": own,
            "CUDA_VISIBLE_DEVICES": "",
        }
        for own in link.interfaces
    ]
    return run_ranks(function, len(environ), *args, namespaces=link.namespaces, environ=environ)


def over_link(
    world: World, setting: Setting, name: str, rates: list[str], interfaces: tuple[str, str]
) -> dict[str, dict[str, Any]]:
    """Return the rows of one variant, by rate."""
    interface = interfaces[world.rank]
    pair = Duel(world, setting, name)
    rows = {}
    for rate in rates:
        limit(interface, rate)
        turns = pair.turns(setting.rounds, lambda: bytes_sent(interface))
        sent = statistics.median(turn.variant_sent for turn in turns)
        plain_sent = statistics.median(turn.plain_sent for turn in turns)
        rows[rate] = {
            **pair.row(turns),
            "interface_bytes_per_step": sent / setting.steps,
            "interface_bytes_ratio": sent / plain_sent,
            "plain_mbit_per_s": 8e-6 * statistics.median(turn.plain_sent / turn.plain for turn in turns),
        }
    limit(interface, UNLIMITED)
    return rows


def show(result: dict[str, Any]) -> None:
    """Print one table, rate by rate."""
    described = result["environment"]
    title = (
        f"{result['model']}, {result['image_size']} px, batch {result['batch_size']} on each of two processes with "
        f"a link between them ({described['device']}), amp {result['amp']}, torch {described['torch']}, "
        f"{result['rounds']} rounds of {result['steps']} steps"
    )
    headings = ("link", "variant", "step ms", "ratio", "quartiles", "hook ms", "MB", "MB on the link", "ratio")
    rows = []
    for rate in result["rates"]:
        for name, variant in result["variants"].items():
            row = variant.get("rates", {}).get(rate)
            if row is None:
                rows.append((rate, name, *["-"] * (len(headings) - 2)))
                continue
            first, third = row["ratio_quartiles"]
            rows.append(
                (
                    rate,
                    name,
                    number(row["step_ms"], 0),
                    number(row["ratio"], 3),
                    f"{first:.3f}-{third:.3f}",
                    number(row["hook_ms"], 1),
                    number(variant["bytes_per_step"] / 1e6, 1),
                    number(row["interface_bytes_per_step"] / 1e6, 1),
                    number(row["interface_bytes_ratio"], 3),
                )
            )
    print_table(title, headings, rows)
    print_notes(result["variants"])
