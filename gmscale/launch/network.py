"""This machine's addresses and its way to another: what must hold before processes on two machines can meet.

Linux, standard library only. Nothing here opens a connection but `reach`, and nothing listens but `can_listen`.
"""

import ctypes
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from gmscale.errors import RunError, UsageError

# What `reach` says of the three failures that have different causes; anything else is the system's own words.
REFUSED = "connection refused"
NO_ANSWER = "no answer"
NO_ROUTE = "no route"


class Route(NamedTuple):
    """The local end of the way to another machine."""

    address: str
    interface: str


def interfaces() -> dict[str, list[str]]:
    """Return the IPv4 and IPv6 addresses of every interface of this machine that is up and has one."""
    found: dict[str, list[str]] = {}
    for name, flags, address in _interface_addresses():
        if flags & _IS_UP:
            found.setdefault(name, []).append(address)
    return found


def has_link(interface: str) -> bool:
    """Whether an interface with an address has a carrier: a cable, and something that is up at its other end."""
    return any(name == interface and flags & _HAS_CARRIER for name, flags, _ in _interface_addresses())


def addresses_of(host: str) -> list[str]:
    """Return the addresses that `host` resolves to on this machine, in the resolver's order.

    Raises:
        UsageError: the name does not resolve here.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise UsageError(
            f"host name {host!r} does not resolve on {socket.gethostname()}: add it to /etc/hosts or the DNS, "
            "or give an IP address instead"
        )
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_here(host: str) -> bool:
    """Whether `host` names this machine: one of its addresses is a loopback address or one of ours."""
    return bool(_own(addresses_of(host)))


def route_to(host: str, port: int) -> Route:
    """Return the local address and interface by which packets to `host` leave; none is sent.

    If `host` is this machine: its address that `host` resolves to, preferably one that others can use.

    Raises:
        RunError: there is no route to any of its addresses.
    """
    addresses = addresses_of(host)
    own = sorted(_own(addresses), key=is_loopback)
    if own:
        return Route(own[0], _interface_with(own[0]))
    reasons = []
    for address in addresses:
        try:
            with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
                probe.connect((address, port))  # chooses the source address, no more
                local = str(probe.getsockname()[0])
        except OSError as error:
            reasons.append(f"{address}: {error.strerror}")
            continue
        return Route(local, _interface_with(local))
    raise RunError(
        f"{socket.gethostname()} has no route to {host} ({'; '.join(reasons)}); "
        f"is the interface up? Up here: {', '.join(interfaces()) or 'none'}"
    )


def is_loopback(address: str) -> bool:
    """Whether only this machine can use `address`."""
    parsed = ipaddress.ip_address(_bare(address))
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def can_listen(port: int, address: str = "") -> str | None:
    """Return None if a server could listen on `port` now, or why it cannot; `address` '' means all addresses."""
    try:
        # As torch's TCPStore does: both families where the machine has both, and ports just left are free.
        for family, where in [(_family(address), address)] if address else _any_address():
            with socket.socket(family, socket.SOCK_STREAM) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind((where, port))
                server.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "another program listens on it"
        if error.errno == errno.EACCES:
            return "only root may listen on it (ports below 1024)"
        return error.strerror or str(error)
    except OverflowError:
        return "not a port: expected 1 to 65535"
    return None


def reach(host: str, port: int, timeout_s: float) -> float | str:
    """Return the seconds that a TCP connection took, or why it failed: REFUSED, NO_ANSWER, NO_ROUTE or other."""
    addresses = addresses_of(host)
    end = time.monotonic() + timeout_s
    reasons: list[str] = []
    for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        start = time.monotonic()
        try:
            with socket.socket(_family(address), socket.SOCK_STREAM) as client:
                client.settimeout(max(0.01, (end - start) / left))
                client.connect((address, port))
                return time.monotonic() - start
        except TimeoutError:
            reasons.append(NO_ANSWER)
        except OSError as error:
            reasons.append(_REASONS.get(error.errno or 0, error.strerror or str(error)))
    return min(reasons, key=_telling)


_REASONS = {
    errno.ECONNREFUSED: REFUSED,
    errno.ETIMEDOUT: NO_ANSWER,
    errno.EHOSTUNREACH: NO_ROUTE,
    errno.ENETUNREACH: NO_ROUTE,
    errno.ENETDOWN: NO_ROUTE,
}


def _telling(reason: str) -> int:
    """Order of reasons: of a host's addresses, the one that came furthest says most."""
    return [REFUSED, NO_ANSWER, NO_ROUTE].index(reason) if reason in (REFUSED, NO_ANSWER, NO_ROUTE) else 3


def _bare(address: str) -> str:
    return address.partition("%")[0]  # fe80::1%eth0


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _own(addresses: list[str]) -> list[str]:
    here = {address for found in interfaces().values() for address in found}
    return [address for address in addresses if is_loopback(address) or _bare(address) in here]


def _interface_with(address: str) -> str:
    for name, found in interfaces().items():
        if _bare(address) in found:
            return name
    # 127.0.1.1 belongs to the loopback interface without being listed there.
    return next((name for name, found in interfaces().items() if any(map(is_loopback, found))), "lo")


def _any_address() -> list[tuple[socket.AddressFamily, str]]:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))  # a socket of both families, unless the machine is set up otherwise
    except OSError:
        return [(socket.AF_INET, "0.0.0.0")]
    return [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]


class _Address(ctypes.Structure):  # struct sockaddr_in and sockaddr_in6, as far as both have it
    _fields_ = [("family", ctypes.c_ushort), ("port", ctypes.c_ushort), ("rest", ctypes.c_ubyte * 24)]


class _Interface(ctypes.Structure):  # struct ifaddrs of getifaddrs(3)
    pass


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.POINTER(_Address)),
    ("netmask", ctypes.c_void_p),
    ("destination", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]
_IS_UP, _HAS_CARRIER = 0x1, 0x10000  # IFF_UP, IFF_LOWER_UP


def _interface_addresses() -> Iterator[tuple[str, int, str]]:
    """Yield (interface, flags, address); interfaces without an address do not appear."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Interface)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise RunError(f"cannot list the network interfaces: {os.strerror(ctypes.get_errno())}")
    try:
        entry = first
        while entry:
            interface = entry.contents
            if interface.address:
                address = interface.address.contents
                where = ctypes.addressof(address)
                if address.family == socket.AF_INET:
                    packed = ctypes.string_at(where + 4, 4)
                    yield interface.name.decode(), interface.flags, socket.inet_ntop(socket.AF_INET, packed)
                elif address.family == socket.AF_INET6:
                    packed = ctypes.string_at(where + 8, 16)
                    yield interface.name.decode(), interface.flags, socket.inet_ntop(socket.AF_INET6, packed)
            entry = interface.next
    finally:
        libc.freeifaddrs(first)
