"""Addresses and routes of this machine, compared with what the system says, and with sockets that connect."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from gmscale.errors import RunError, UsageError
from gmscale.launch import network

UNKNOWN = "no-such-host.invalid"  # .invalid never resolves (RFC 6761)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        yield listening


@pytest.fixture
def full(server: socket.socket) -> Iterator[int]:
    """A port whose queue is full: the system drops further connections, as a firewall does."""
    port = server.getsockname()[1]
    waiting = []
    for _ in range(4):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        waiting.append(client)
    yield port
    for client in waiting:
        client.close()


def resolving(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> None:
    """Let names resolve as if they stood in /etc/hosts."""
    plain = socket.getaddrinfo

    def getaddrinfo(host, port, *rest, **options):
        found = [plain(address, port, *rest, **options) for address in names.get(host, [host])]
        return [entry for entries in found for entry in entries]

    monkeypatch.setattr(network.socket, "getaddrinfo", getaddrinfo)


def test_interfaces_hold_the_loopback_and_every_address_of_the_kernels_tables():
    found = network.interfaces()
    assert "127.0.0.1" in found["lo"]
    here = {address for addresses in found.values() for address in addresses}
    six = Path("/proc/net/if_inet6")
    for line in six.read_text().splitlines() if six.exists() else []:
        packed, *_, name = line.split()
        assert socket.inet_ntop(socket.AF_INET6, bytes.fromhex(packed)) in found[name]
    local = Path("/proc/net/fib_trie").read_text().splitlines()
    hosts = {line.split()[-1] for line, after in pairwise(local) if "32 host LOCAL" in after}
    assert set() < hosts <= here


def test_the_loopback_has_a_link_and_an_unknown_interface_none():
    assert network.has_link("lo")
    assert not network.has_link("no-such-interface")


def test_a_name_resolves_to_its_addresses_each_once(monkeypatch):
    resolving(monkeypatch, {"head": ["192.0.2.7", "192.0.2.8", "192.0.2.7"]})
    assert network.addresses_of("head") == ["192.0.2.7", "192.0.2.8"]
    assert network.addresses_of("192.0.2.9") == ["192.0.2.9"]


@pytest.mark.parametrize("host", [UNKNOWN, "", "a..b", "x" * 300])
@pytest.mark.parametrize("ask", [network.addresses_of, network.is_here, lambda host: network.reach(host, 1, 1.0)])
def test_an_unknown_name_is_one_line_that_names_host_and_machine(host, ask):
    with pytest.raises(UsageError) as error:
        ask(host)
    text = str(error.value)
    for part in (repr(host), socket.gethostname(), "/etc/hosts"):
        assert part in text
    assert "\n" not in text


def test_this_machine_is_here_and_another_is_not(monkeypatch):
    resolving(monkeypatch, {"debian": ["127.0.1.1"], "two-faced": ["192.0.2.200", "127.0.0.1"]})
    assert all(map(network.is_here, ["localhost", "debian", "two-faced"]))
    for addresses in network.interfaces().values():
        assert all(network.is_here(address) for address in addresses)
    assert not network.is_here("192.0.2.200")


def test_the_way_to_this_machine_is_the_address_its_name_resolves_to(monkeypatch):
    assert network.route_to("127.0.0.1", 1) == ("127.0.0.1", "lo")
    resolving(monkeypatch, {"debian": ["127.0.1.1"]})
    assert network.route_to("debian", 1) == ("127.0.1.1", "lo")
    others = [(n, a) for n, found in network.interfaces().items() for a in found if not network.is_loopback(a)]
    for name, address in others:
        resolving(monkeypatch, {"node": ["127.0.1.1", address]})  # the address that others can use
        assert network.route_to("node", 1) == (address, name)


def test_no_route_is_a_run_error_that_names_the_interfaces():
    code = (
        "from gmscale.launch.network import *\n"
        "try: print(route_to('192.0.2.1', 1))\n"
        "except RunError as error: print(error)\n"
        "print(reach('192.0.2.1', 1, 5.0))\n"
        "print(interfaces())"
    )
    alone = subprocess.run(  # a network namespace with nothing in it
        ["unshare", "--net", sys.executable, "-c", code], capture_output=True, text=True, timeout=30
    )
    if alone.returncode:
        pytest.skip(f"no network namespaces here: {alone.stderr.strip()}")
    error, reached, found = alone.stdout.splitlines()
    assert "no route to 192.0.2.1" in error
    assert "Up here: none" in error
    assert (reached, found) == (network.NO_ROUTE, "{}")


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        *[(address, True) for address in ("127.0.0.1", "127.0.1.1", "::1", "::ffff:127.0.0.1")],
        *[(address, False) for address in ("192.0.2.1", "fe80::1%eth0", "0.0.0.0")],
    ],
)
def test_loopback_addresses(address, loopback):
    assert network.is_loopback(address) is loopback


def test_a_port_is_free_until_somebody_listens(server):
    port = server.getsockname()[1]
    assert "another program" in network.can_listen(port)
    assert "another program" in network.can_listen(port, "127.0.0.1")
    assert network.can_listen(port, "127.0.0.2") is None
    server.close()
    assert network.can_listen(port) is None
    assert network.can_listen(port) is None  # trying left nothing behind
    assert "1 to 65535" in network.can_listen(70000)
    assert network.can_listen(port, "192.0.2.200") is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop to another user")
def test_a_port_of_the_system_is_not_for_users():
    code = "import os; os.setuid(65534)\nfrom gmscale.launch.network import can_listen\nprint(can_listen(80))"
    first = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if not first.exists() or int(first.read_text()) <= 80:
        pytest.skip("users may listen on port 80 here")
    result = subprocess.run(
        [sys.executable, "-c", f"import gmscale.launch.network\n{code}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "root" in result.stdout


def test_reaching_a_server_takes_some_time(server):
    seconds = network.reach("127.0.0.1", server.getsockname()[1], 5.0)
    assert isinstance(seconds, float)
    assert 0 < seconds < 5


def test_nobody_listening_is_refused_and_a_full_queue_is_no_answer(server, full):
    assert network.reach("127.0.0.1", full, 0.3) == network.NO_ANSWER
    server.close()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert network.reach("127.0.0.1", unused.getsockname()[1], 5.0) == network.REFUSED


def test_one_address_of_several_is_enough(monkeypatch, server):
    resolving(monkeypatch, {"head": ["127.0.0.2", "127.0.0.1"]})  # nobody listens on the first
    assert isinstance(network.reach("head", server.getsockname()[1], 5.0), float)


def test_it_needs_no_torch():
    code = "import sys, gmscale.launch.network\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_a_failing_system_call_is_one_line(monkeypatch):
    monkeypatch.setattr(network.ctypes, "CDLL", lambda *_, **__: type("libc", (), {"getifaddrs": lambda _: -1}))
    with pytest.raises(RunError, match="network interfaces"):
        network.interfaces()
