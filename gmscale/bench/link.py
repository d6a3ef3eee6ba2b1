"""Two network namespaces and a link between them whose rate can be limited: a slow network on one machine."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from gmscale.errors import RunError, UsageError

UNLIMITED = "unlimited"
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_NAME = re.compile(r"gmscale-(\d+)-[ab]\b")


class Link(NamedTuple):
    """Namespace, interface and address of each end."""

    namespaces: tuple[str, str]
    interfaces: tuple[str, str]
    addresses: tuple[str, str]


@contextmanager
def veth_link() -> Iterator[Link]:
    """Make two namespaces joined by a veth pair, and remove them on the way out.

    Processes inside have to be ended before that. Raises RunError where the machine does not allow it.
    """
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise RunError(
                f"bench comm needs network namespaces: there is no program {program!r} (install iproute2)"
            )
    if os.geteuid() != 0:
        raise RunError("bench comm needs network namespaces, which only root can make; run it as root")
    _remove_leftovers()
    link = Link(
        (f"gmscale-{os.getpid()}-a", f"gmscale-{os.getpid()}-b"), ("gmscale0", "gmscale1"), ("10.0.0.1", "10.0.0.2")
    )
    try:
        for namespace in link.namespaces:
            _ip("netns", "add", namespace)
        first, second = zip(link.interfaces, link.namespaces, strict=True)
        _ip(
            "link",
            "add",
            first[0],
            "netns",
            first[1],
            "type",
            "veth",
            "peer",
            "name",
            second[0],
            "netns",
            second[1],
        )
        for namespace, interface, address in zip(*link, strict=True):
            _ip("-n", namespace, "address", "add", f"{address}/30", "dev", interface)
            _ip("-n", namespace, "link", "set", interface, "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            run("ip", "netns", "exec", namespace, "tc", *_qdisc(interface, "1gbit"))  # refused here or never
        yield link
    finally:
        for namespace in link.namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def bits_per_s(rate: str) -> float | None:
    """Return the bits a second of a rate such as 100mbit; None for no limit. Raises UsageError."""
    if rate == UNLIMITED:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--rates: {rate!r}; expected {UNLIMITED}, or a rate such as 100mbit or 1gbit")
    return float(match[1]) * _UNITS[match[2]]


def limit(interface: str, rate: str) -> None:
    """Limit what an interface of the namespace that this process is in sends."""
    if rate == UNLIMITED:
        # without a queueing discipline there is nothing to delete
        subprocess.run(["tc", "qdisc", "delete", "dev", interface, "root"], capture_output=True)
    else:
        run("tc", *_qdisc(interface, rate))


def bytes_sent(interface: str) -> int:
    """Return what an interface of this process's namespace has sent, in bytes with all headers."""
    (shown,) = json.loads(run("ip", "-s", "-j", "link", "show", "dev", interface))
    return int(shown["stats64"]["tx"]["bytes"])


def _qdisc(interface: str, rate: str) -> tuple[str, ...]:
    return ("qdisc", "replace", "dev", interface, "root", "tbf", "rate", rate, "burst", "64kb", "latency", "50ms")


def run(*command: str) -> str:
    """Run a command and return its output; raise RunError with the first line of its complaint."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        complaint = (done.stderr.strip() or f"status {done.returncode}").splitlines()[0]
        raise RunError(f"bench comm cannot make its link here: `{' '.join(command)}` says: {complaint}")
    return done.stdout


def _ip(*arguments: str) -> None:
    run("ip", *arguments)


def _remove_leftovers() -> None:
    """Remove the namespaces of runs that were killed before they could do it themselves."""
    for match in _NAME.finditer(run("ip", "netns", "list")):
        if not os.path.exists(f"/proc/{match[1]}"):
            subprocess.run(["ip", "netns", "delete", match[0]], capture_output=True)
