"""Network namespaces and links between them whose rates can be limited: a slow network on one machine."""

import itertools
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
_NAME = re.compile(r"gmscale-(\d+)(?:\.\d+)?-(?:[a-z]|hub)\b")
_numbers = itertools.count()  # of the links that this process has made
_MOST_ENDS = 26  # each has a letter
_BRIDGE = "bridge"


class Link(NamedTuple):
    """Namespace, interface and address of each end."""

    namespaces: tuple[str, ...]
    interfaces: tuple[str, ...]
    addresses: tuple[str, ...]

    def first(self, ends: int) -> "Link":
        """Return so many of the ends."""
        return Link(self.namespaces[:ends], self.interfaces[:ends], self.addresses[:ends])


@contextmanager
def veth_link(ends: int = 2, asked_by: str = "bench comm") -> Iterator[Link]:
    """Make namespaces whose processes can talk to one another, and remove them on the way out.

    Two are the ends of one veth pair; more hang on a bridge, which lives in a namespace of its own. Processes
    inside have to be ended before that. Raises RunError where the machine does not allow it.
    """
    assert 2 <= ends <= _MOST_ENDS
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise RunError(
                f"{asked_by} needs network namespaces: there is no program {program!r} (install iproute2)"
            )
    if os.geteuid() != 0:
        raise RunError(f"{asked_by} needs network namespaces, which only root can make; run it as root")
    _remove_leftovers()
    own = f"gmscale-{os.getpid()}" + ("" if (number := next(_numbers)) == 0 else f".{number}")
    link = Link(
        tuple(f"{own}-{chr(ord('a') + end)}" for end in range(ends)),
        tuple(f"gmscale{end}" for end in range(ends)),
        tuple(f"10.0.0.{end + 1}" for end in range(ends)),
    )
    hub = f"{own}-hub"
    made = link.namespaces if ends == 2 else (*link.namespaces, hub)
    try:
        for namespace in made:
            _ip("netns", "add", namespace)
        if ends == 2:
            _join((link.namespaces[0], link.interfaces[0]), (link.namespaces[1], link.interfaces[1]))
        else:
            _ip("-n", hub, "link", "add", _BRIDGE, "type", "bridge")
            _ip("-n", hub, "link", "set", _BRIDGE, "up")
            for namespace, interface in zip(link.namespaces, link.interfaces, strict=True):
                _join((namespace, interface), (hub, interface))
                _ip("-n", hub, "link", "set", interface, "master", _BRIDGE, "up")
        for namespace, interface, address in zip(*link, strict=True):
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", interface)
            _ip("-n", namespace, "link", "set", interface, "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            run("ip", "netns", "exec", namespace, "tc", *_qdisc(interface, "1gbit"))  # refused here or never
        yield link
    finally:
        for namespace in made:
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


def _join(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Make a veth pair; its ends are (namespace, interface)."""
    command = ("link", "add", one[1], "netns", one[0], "type", "veth", "peer", "name", other[1], "netns", other[0])
    _ip(*command)


def _qdisc(interface: str, rate: str) -> tuple[str, ...]:
    return ("qdisc", "replace", "dev", interface, "root", "tbf", "rate", rate, "burst", "64kb", "latency", "50ms")


def run(*command: str) -> str:
    """Run a command and return its output; raise RunError with the first line of its complaint."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        complaint = (done.stderr.strip() or f"status {done.returncode}").splitlines()[0]
        raise RunError(f"gmscale bench cannot make its link here: `{' '.join(command)}` says: {complaint}")
    return done.stdout


def _ip(*arguments: str) -> None:
    run("ip", *arguments)


def _remove_leftovers() -> None:
    """Remove the namespaces of runs that were killed before they could do it themselves."""
    for match in _NAME.finditer(run("ip", "netns", "list")):
        if not os.path.exists(f"/proc/{match[1]}"):
            subprocess.run(["ip", "netns", "delete", match[0]], capture_output=True)
