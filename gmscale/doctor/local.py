"""What a node can find out by itself: names, addresses, interfaces, the way to the head."""

import os
import socket
import time
from collections.abc import Iterator

import torch

from gmscale.doctor.finding import Finding
from gmscale.doctor.plan import Plan
from gmscale.errors import RunError, UsageError
from gmscale.launch import network

_ATTEMPT_S = 4.0  # the system takes three to find that nobody has an address
_PAUSE_S = 0.2


def look_around(plan: Plan) -> Iterator[Finding]:
    """Yield what can be said without any other node; while one of them has failed there is no use in going on."""
    yield from _gpus(plan)
    try:
        addresses = network.addresses_of(plan.head)
    except UsageError:
        remedy = f"put `ADDRESS {plan.head}` into /etc/hosts on this node, ask for a DNS entry, or give the address"
        yield Finding("name of the head", False, f"{plan.head!r} does not resolve on {plan.host}", remedy)
        return
    yield _head(plan, addresses)
    yield _own_name(plan)
    try:
        route = network.route_to(plan.head, plan.port)
    except RunError as error:
        remedy = "bring the interface up, or give an address of the head in a network that this node is in too"
        yield Finding("way to the head", False, str(error).split("; is the interface")[0], remedy)
        return
    remedy = "plug it in, or see why its other end is down (switch port); else choose an address in another network"
    linked = network.has_link(route.interface)
    detail = f"{route.address} on {route.interface}{'' if linked else ', which has no link'}"
    yield Finding("way to the head", linked, detail, remedy)
    yield from _chosen_interfaces(route)
    if plan.is_head():
        yield _port(plan, addresses)


def reach_head(plan: Plan) -> Finding:
    """Connect to the head; it may start later than this node, within the timeout."""
    name, where = "head reachable", f"{plan.head}:{plan.port}"
    deadline, why = time.monotonic() + plan.timeout_s, ""
    while True:
        left = deadline - time.monotonic()
        answer = network.reach(plan.head, plan.port, max(0.1, min(_ATTEMPT_S, left)))
        if isinstance(answer, float):
            return Finding(name, True, f"{where} in {1e3 * answer:.1f} ms")
        if answer != network.NO_ANSWER or left >= _ATTEMPT_S or not why:  # a short attempt says nothing
            why = answer
        if time.monotonic() + _PAUSE_S >= deadline:
            break
        time.sleep(_PAUSE_S)
    waited = f"{why}, for {plan.timeout_s:.0f} s"
    own = ", ".join(address for found in network.interfaces().values() for address in found)
    remedies = {
        network.REFUSED: (
            f"the machine answers, but nothing listens there: run `gmscale doctor --launch` on the head too, at "
            f"about the same time and with the same port (if this is the head, --head must be one of {own})"
        ),
        network.NO_ANSWER: (
            f"a firewall drops the packets, or no machine has that address: open TCP port {plan.port} on the head "
            f"to the other nodes, and all ports above 1024 between nodes, which gloo and NCCL choose from"
        ),
        network.NO_ROUTE: (
            "the head is off, or in a network that this node cannot get to: compare its addresses with this node's "
            f"({own})"
        ),
    }
    return Finding(name, False, f"{where}: {waited}", remedies.get(why, "see what the system says of it"))


def _gpus(plan: Plan) -> Iterator[Finding]:
    gpus = torch.cuda.device_count()
    if 0 < gpus < plan.nproc_per_node:
        remedy = "start at most one process a GPU (NPROC_PER_NODE), or ask for more GPUs on each node"
        yield Finding("GPUs", False, f"{plan.nproc_per_node} processes for {gpus} visible GPUs", remedy)


def _head(plan: Plan, addresses: list[str]) -> Finding:
    name, shown = "name of the head", ", ".join(addresses)
    ours = all(network.is_loopback(address) for address in addresses)
    mixed = any(network.is_loopback(address) for address in addresses) and not plan.is_head()
    if plan.nnodes > 1 and (ours or mixed) and not plan.on_one_machine:
        detail = f"{plan.head} resolves to {shown} on {plan.host}, which is this machine itself for any node"
        remedy = (
            f"take {plan.head} off the 127.x line of /etc/hosts here, or give the head's address in the network"
        )
        return Finding(name, False, detail, remedy)
    role = "this node" if plan.is_head() else "another node"
    return Finding(name, True, shown if plan.head in addresses else f"{plan.head} is {shown}, {role}")


def _own_name(plan: Plan) -> Finding:
    name = "name of this node"
    try:
        addresses = network.addresses_of(plan.host)
        problem = all(network.is_loopback(address) for address in addresses) and plan.nnodes > 1
        detail = f"{plan.host} is {', '.join(addresses)}"
    except UsageError:
        problem, detail = True, f"{plan.host} does not resolve"
    remedy = (
        "gloo goes by this name unless GLOO_SOCKET_IFNAME is set, which launch/ does; programs started otherwise "
        "need it, or the node's address beside its name in /etc/hosts"
    )
    return Finding(name, not problem or "GLOO_SOCKET_IFNAME" in os.environ, detail, remedy, optional=True)


def _chosen_interfaces(route: network.Route) -> Iterator[Finding]:
    up = network.interfaces()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        given = os.environ.get(variable)
        if not given:
            continue
        # NCCL takes prefixes, =names, and ^ for all others
        wanted = [word for word in given.lstrip("^=").split(",") if word]
        exact = variable.startswith("GLOO") or given.startswith("=")
        chosen = [one for one in up if any(one == word or (not exact and one.startswith(word)) for word in wanted)]
        if given.startswith("^"):
            chosen = [one for one in up if one not in chosen]
        known = ", ".join(f"{one} ({', '.join(found)})" for one, found in up.items())
        if not chosen:
            remedy = f"set it to {route.interface}, which leads to the head, or unset it; up here: {known}"
            yield Finding(variable, False, f"{given} is not an interface of this node with an address", remedy)
        elif route.interface not in chosen:
            remedy = f"right if {', '.join(chosen)} also joins the nodes; the way to the head is {route.interface}"
            yield Finding(variable, False, f"{given} is not the interface to the head", remedy, optional=True)
        else:
            yield Finding(variable, True, given)


def _port(plan: Plan, addresses: list[str]) -> Finding:
    name, where = "port of the head", str(plan.port)
    if not network.is_here(plan.head):
        own = ", ".join(address for found in network.interfaces().values() for address in found)
        remedy = f"give an address of this machine as --head: {own}"
        return Finding(name, False, f"{plan.head} ({', '.join(addresses)}) is not {socket.gethostname()}", remedy)
    trouble = network.can_listen(plan.port)
    remedy = (
        "take another port, the same on all nodes (--port, MASTER_PORT), or end what holds it "
        f"(ss -ltnp 'sport = :{plan.port}'); start doctor once on each node (srun --ntasks-per-node 1)"
    )
    return Finding(name, trouble is None, f"{where}: {trouble}" if trouble else f"{where} is free", remedy)
