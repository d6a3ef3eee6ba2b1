"""A cost model of data-parallel training: measured times and bytes -> hours on other numbers of devices.

Pure functions of numbers, in seconds and bytes. Collectives follow the alpha-beta model (a message of b bytes takes
latency + b / bandwidth) on a ring: P. Patarasuk and X. Yuan, Bandwidth optimal all-reduce algorithms for clusters
of workstations, J. Parallel Distrib. Comput. 69 (2009); R. Thakur, R. Rabenseifner and W. Gropp, Optimization of
collective communication operations in MPICH, Int. J. High Perform. Comput. Appl. 19 (2005).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Share of a forward and backward pass that is the backward one, twice as much work as the forward one:
# section 2.1 of https://arxiv.org/abs/2001.08361
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Link:
    """What joins a device to the next one of the ring."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Cluster:
    """Nodes with equally many devices, the nodes joined by a network without a bottleneck in its middle."""

    devices_per_node: int
    between: Link
    """From one node to another; bytes a second of all its network cards together."""
    inside: Link
    """From a device to the next one of its node."""

    def nodes(self, devices: int) -> int:
        """Return how many nodes so many devices take up."""
        return math.ceil(devices / self.devices_per_node)

    def ring(self, devices: int) -> Link:
        """Return the link of one ring through all devices that enters and leaves each node once.

        The ring is as fast as its slowest link, and a hop of it takes the mean of all hops. Several rings side by
        side, one a network card, are the same one: each carries its part of the bytes over its part of the rate.
        """
        nodes = self.nodes(devices)
        if nodes == 1:
            return self.inside
        hops = [(nodes, self.between), (devices - nodes, self.inside)]
        return Link(
            bytes_per_s=min(link.bytes_per_s for number, link in hops if number),
            latency_s=sum(number * link.latency_s for number, link in hops) / devices,
        )


@dataclass(frozen=True)
class Traffic:
    """What a step hands to one kind of collective."""

    calls: float
    bytes: float
    """Of the full buffers: what each rank has after an all-reduce or all-gather, or gives to a reduce-scatter."""


def ring_all_reduce_s(nbytes: float, devices: int, link: Link, calls: float = 1) -> float:
    """Return the time of all-reduces of `nbytes` together: a reduce-scatter, then an all-gather.

    2 (n - 1) / n nbytes / bandwidth + 2 (n - 1) latency for each call.
    """
    return 2 * ring_half_s(nbytes, devices, link, calls)


def ring_half_s(nbytes: float, devices: int, link: Link, calls: float = 1) -> float:
    """Return the time of reduce-scatters, or of all-gathers, whose full buffers have `nbytes` together.

    (n - 1) / n nbytes / bandwidth + (n - 1) latency for each call.
    """
    others = devices - 1
    return others / devices * nbytes / link.bytes_per_s + others * link.latency_s * calls


def broadcast_s(nbytes: float, devices: int, link: Link, calls: float = 1) -> float:
    """Return the time of broadcasts along the ring, in pieces so small that only the latencies of hops add up."""
    return 0.0 if devices == 1 else nbytes / link.bytes_per_s + (devices - 1) * link.latency_s * calls


NOTHING = Traffic(0, 0)


def exposed_s(
    traffic: Mapping[str, Traffic], devices: int, link: Link, backward_s: float, awaited: Traffic = NOTHING
) -> float:
    """Return the time of a step's collectives during which nothing is computed.

    Reductions of gradients run beside the last micro-batch's backward pass (`backward_s`), in buckets that become
    ready one after the other (https://arxiv.org/abs/2006.15704), here equal ones at equal intervals: nothing can
    hide before the first is ready, what is longer than the rest of the pass shows, and the last always does.
    Broadcasts and gathering of weights run beside nothing. `traffic` is by torch's names of the operations;
    `awaited` of its all-reduces hold the backward pass up, one before each other one, which needs its result.
    """
    reducing = last = other = buckets = 0.0
    waiting = ring_all_reduce_s(awaited.bytes, devices, link, awaited.calls)
    for operation, seen in traffic.items():
        if seen.calls == 0:
            continue
        if "reduce" in operation:
            time = ring_half_s if "scatter" in operation else ring_all_reduce_s
            reducing += time(seen.bytes, devices, link, seen.calls)
            calls, nbytes = seen.calls, seen.bytes
            if operation == "allreduce":
                calls, nbytes = max(1, calls - awaited.calls), nbytes - awaited.bytes
            last = max(last, time(nbytes / calls, devices, link))
            buckets += calls
        else:
            time = broadcast_s if "broadcast" in operation else ring_half_s
            other += time(seen.bytes, devices, link, seen.calls)
    hides_s = backward_s * (1 - 1 / max(1.0, buckets))
    return max(reducing - hides_s, waiting + last) + other


def buckets(nbytes: float, cap_bytes: float) -> int:
    """Return in how many messages gradients of `nbytes` travel when none is larger than `cap_bytes`."""
    return math.ceil(nbytes / cap_bytes)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured on `devices` devices; what a device has to do in a step is the same on any number."""

    devices: int
    step_s: float
    first_step_s: float
    """Of a run's first step, which compiles and warms up."""
    grad_accum_steps: int
    traffic: Mapping[str, Traffic]
    eval_images_per_s: float
    """Of one device."""
    save_s: float
    """How long a checkpoint keeps a step waiting."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How much there is to do, all devices together."""

    steps: int
    eval_images: int
    """Images of all evaluations together."""
    saves: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds that a recipe takes on so many devices."""

    devices: int
    step_s: float
    exposed_s: float
    """Of each step: communication beside which nothing is computed."""
    training_s: float
    evaluation_s: float
    saving_s: float

    @property
    def total_s(self) -> float:
        return self.training_s + self.evaluation_s + self.saving_s


def estimate(measured: Measured, recipe: Recipe, devices: int, link: Link) -> Estimate:
    """Return what `recipe` takes on `devices` devices joined by `link`.

    A step takes as long as measured, and longer by what communication there shows more than it does, by the same
    model, on the devices that were measured; fewer devices are not taken to be faster. Each device trains on as
    many images as before, and evaluates its share.
    """
    backward_s = BACKWARD_SHARE * measured.step_s / measured.grad_accum_steps
    here, there = (exposed_s(measured.traffic, n, link, backward_s) for n in (measured.devices, devices))
    step_s = measured.step_s + max(0.0, there - here)
    warm_up_s = max(0.0, measured.first_step_s - measured.step_s) if recipe.steps else 0.0
    return Estimate(
        devices=devices,
        step_s=step_s,
        exposed_s=there,
        training_s=recipe.steps * step_s + warm_up_s,
        evaluation_s=recipe.eval_images / devices / measured.eval_images_per_s,
        saving_s=recipe.saves * measured.save_s,
    )
