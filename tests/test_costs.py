"""The cost model: laws of rings, and an estimate worked out by hand."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmscale import costs
from gmscale.costs import Cluster, Link, Measured, Recipe, Traffic

devices = st.integers(1, 4096)
nbytes = st.floats(0, 1e12)
links = st.builds(Link, st.floats(1e6, 1e12), st.floats(0, 1e-2))
seconds = st.floats(1e-6, 1e3)
traffics = st.fixed_dictionaries(
    {},
    optional={
        name: st.builds(Traffic, st.integers(0, 1000), nbytes)
        for name in ("allreduce", "reduce_scatter_base", "allgather_base", "broadcast")
    },
)


def ring_by_hand(n: int, size: float, link: Link) -> float:
    """Walk the ring: in each of its rounds every device sends one n-th to the next and waits for it."""
    total = 0.0
    for _ in range(n - 1):  # reduce-scatter
        total += link.latency_s + size / n / link.bytes_per_s
    for _ in range(n - 1):  # all-gather
        total += link.latency_s + size / n / link.bytes_per_s
    return total


@given(st.integers(1, 50), nbytes, links)
def test_an_all_reduce_takes_the_rounds_of_a_ring(n: int, size: float, link: Link) -> None:
    assert costs.ring_all_reduce_s(size, n, link) == pytest.approx(ring_by_hand(n, size, link))


@given(nbytes, links, st.integers(1, 100))
def test_one_device_talks_to_nobody(size: float, link: Link, calls: int) -> None:
    for time in (costs.ring_all_reduce_s, costs.ring_half_s, costs.broadcast_s):
        assert time(size, 1, link, calls) == 0


@given(nbytes, devices, links, st.integers(1, 100))
def test_gathering_and_scattering_make_an_all_reduce(size: float, n: int, link: Link, calls: int) -> None:
    halves = costs.ring_half_s(size, n, link, calls) + costs.ring_half_s(size, n, link, calls)
    assert costs.ring_all_reduce_s(size, n, link, calls) == pytest.approx(halves)


@given(nbytes, devices, links)
def test_bytes_of_an_all_reduce_cross_a_link_less_than_twice(size: float, n: int, link: Link) -> None:
    no_latency = replace(link, latency_s=0.0)
    assert costs.ring_all_reduce_s(size, n, no_latency) <= 2 * size / link.bytes_per_s


@given(traffics, devices, links, seconds)
def test_more_devices_never_wait_less(traffic: dict, n: int, link: Link, backward: float) -> None:
    fewer, more = (costs.exposed_s(traffic, k, link, backward) for k in (n, n + 1))
    assert 0 <= fewer <= more * (1 + 1e-9)


@given(traffics, devices, links, seconds)
def test_what_hides_is_at_most_the_backward_pass(traffic: dict, n: int, link: Link, backward: float) -> None:
    everything = costs.exposed_s(traffic, n, link, 0.0)
    shown = costs.exposed_s(traffic, n, link, backward)
    assert everything - backward - 1e-9 * everything <= shown <= everything


def timeline(buckets: int, compute_s: float, maps_s: float, values_s: float) -> float:
    """Walk through a backward pass in equal buckets; return by how much communication lengthens it.

    Each bucket's maps are reduced when it is ready, on a network that does one thing at a time; the pass waits for
    them. Its values follow, and nobody waits for them before the end.
    """
    now = network = 0.0
    for _ in range(buckets):
        now += compute_s / buckets
        network = max(now, network) + maps_s
        if maps_s:
            now = network
        network += values_s
    return max(now, network) - compute_s


@given(st.integers(1, 20), seconds, st.floats(1e-4, 1e2), st.floats(1e-4, 1e2))
def test_what_shows_is_that_of_equal_buckets_one_after_the_other(
    n: int, backward: float, maps: float, values: float
) -> None:
    link = Link(1e9, 0.0)  # between two devices an all-reduce of b bytes takes b / 1e9
    plain = costs.exposed_s({"allreduce": Traffic(n, 1e9 * n * values)}, 2, link, backward)
    assert plain == pytest.approx(timeline(n, backward, 0.0, values))
    both, awaited = {"allreduce": Traffic(2 * n, 1e9 * n * (maps + values))}, Traffic(n, 1e9 * n * maps)
    assert costs.exposed_s(both, 2, link, backward, awaited) == pytest.approx(timeline(n, backward, maps, values))


def test_the_last_bucket_and_what_is_not_reduced_always_show() -> None:
    link = Link(1e9, 0.0)
    traffic = {"allreduce": Traffic(4, 4e9), "broadcast": Traffic(1, 1e9)}
    # 4 s of reductions hide behind 100 s but for a quarter, 2 (2 - 1) / 2 x 1 s; the broadcast takes 1 s
    assert costs.exposed_s(traffic, 2, link, 100.0) == pytest.approx(1.0 + 1.0)
    # of 1.5 s the first quarter is over when the first bucket is ready
    assert costs.exposed_s(traffic, 2, link, 1.5) == pytest.approx(4 - 1.5 * 3 / 4 + 1.0)


clusters = st.builds(Cluster, devices_per_node=st.integers(1, 16), between=links, inside=links)


@given(clusters, st.integers(1, 16), nbytes)
def test_a_node_needs_no_network(cluster: Cluster, n: int, size: float) -> None:
    n = min(n, cluster.devices_per_node)
    assert cluster.ring(n) == cluster.inside


@given(clusters, devices)
def test_a_ring_is_as_fast_as_its_slowest_link(cluster: Cluster, n: int) -> None:
    if cluster.nodes(n) == 1:
        return
    hops = [cluster.between] * cluster.nodes(n) + [cluster.inside] * (n - cluster.nodes(n))
    ring = cluster.ring(n)
    assert ring.bytes_per_s == min(hop.bytes_per_s for hop in hops)
    assert ring.latency_s == pytest.approx(sum(hop.latency_s for hop in hops) / n)


def test_without_an_end_to_the_rate_bytes_take_no_time() -> None:
    assert costs.ring_all_reduce_s(1e9, 8, Link(math.inf, 0.0)) == 0


MEASURED = Measured(
    devices=1,
    step_s=0.3,
    first_step_s=10.3,
    grad_accum_steps=2,
    traffic={"allreduce": Traffic(1, 3e8)},
    eval_images_per_s=500.0,
    save_s=2.0,
)
RECIPE = Recipe(steps=1000, eval_images=8000, saves=5)


def test_an_estimate_worked_out_by_hand() -> None:
    # 2 x 3/4 x 0.3 GB at 1 GB/s and 2 x 3 x 1 ms; its one bucket hides behind nothing
    found = costs.estimate(MEASURED, RECIPE, 4, Link(1e9, 1e-3))
    assert found.exposed_s == pytest.approx(0.45 + 0.006)
    assert found.step_s == pytest.approx(0.3 + 0.456)
    assert found.training_s == pytest.approx(1000 * 0.756 + 10)
    assert found.evaluation_s == pytest.approx(8000 / 4 / 500)
    assert found.saving_s == pytest.approx(10)
    assert found.total_s == pytest.approx(766 + 4 + 10)


@given(devices, links)
def test_on_as_many_devices_as_were_measured_a_step_takes_what_was_measured(n: int, link: Link) -> None:
    assert costs.estimate(replace(MEASURED, devices=n), RECIPE, n, link).step_s == MEASURED.step_s


@given(devices, devices, links)
def test_no_step_is_faster_than_the_measured_one(here: int, there: int, link: Link) -> None:
    assert costs.estimate(replace(MEASURED, devices=here), RECIPE, there, link).step_s >= MEASURED.step_s


def test_buckets_are_as_many_as_are_needed() -> None:
    assert [costs.buckets(n, 25) for n in (0, 1, 25, 26, 100)] == [0, 1, 1, 2, 4]
