"""gmscale bench plan: a network of more than two processes, and the model's error beside what it measures."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmscale import bench, cli, costs
from gmscale.bench import link
from gmscale.bench.plan import link_of
from gmscale.errors import RunError
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks

SIZE = ["--model", "test_byobnet", "--image_size", "32", "--batch_size", "2"]
BYTES = 1_500_000


@pytest.fixture
def star() -> Any:
    """Three ends on a bridge."""
    try:
        with link.veth_link(3, "bench plan") as made:
            yield made
    except RunError as error:
        pytest.skip(str(error))


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def sees(world: World, interfaces: tuple[str, ...]) -> dict[str, Any]:
    """Return what this rank sees of the network, and what each rank sent for three all-reduces."""
    import torch
    import torch.distributed as dist

    own = interfaces[world.rank]
    link.limit(own, "100mbit")
    before = link.bytes_sent(own)
    for _ in range(3):
        dist.all_reduce(torch.ones(BYTES // 4))
    everyone = torch.zeros(world.size)
    everyone[world.rank] = link.bytes_sent(own) - before
    dist.all_reduce(everyone)
    return {"interfaces": sorted(os.listdir("/proc/sys/net/ipv4/conf")), "sent": everyone.tolist()}


def test_three_processes_make_a_ring_over_the_bridge(star: link.Link) -> None:
    hub = star.namespaces[0].removesuffix("-a") + "-hub"
    assert len(star.namespaces) == len(star.interfaces) == len(star.addresses) == 3
    assert all(name in namespaces() for name in (*star.namespaces, hub))
    environ = [
        {"MASTER_ADDR": star.addresses[0], "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": interface}
        for interface in star.interfaces
    ]
    seen = run_ranks(sees, 3, star.interfaces, namespaces=star.namespaces, environ=environ)
    assert seen["interfaces"] == ["all", "default", "gmscale0", "lo"]  # the others' are elsewhere
    ring = 2 * 2 / 3 * BYTES  # what the cost model says each sends; headers come on top
    for sent in seen["sent"]:
        assert 3 * ring < sent < 1.15 * 3 * ring


def test_the_first_ends_are_a_network_too(star: link.Link) -> None:
    pair = star.first(2)
    assert pair == (star.namespaces[:2], star.interfaces[:2], star.addresses[:2])


def test_a_star_is_removed_with_its_hub(star: link.Link) -> None:
    # the fixture has made one; a killed run's is removed with it by the next
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = [f"gmscale-{ended.pid}-{end}" for end in ("c", "hub")]
    for name in left:
        subprocess.run(["ip", "netns", "add", name], check=True)
    link._remove_leftovers()
    listed = namespaces()
    assert not any(name in listed for name in left)
    assert star.namespaces[2] in listed


@given(st.integers(2, 16), st.floats(1e6, 1e12), st.floats(0, 1e-2))
def test_a_link_is_found_again_from_the_times_that_it_makes(n: int, rate: float, latency: float) -> None:
    made = costs.Link(rate, latency)
    seconds = {size: costs.ring_all_reduce_s(size, n, made) for size in (2**16, 2**23)}
    found = link_of(seconds, n)
    assert found.bytes_per_s == pytest.approx(rate, rel=1e-3)
    assert found.latency_s == pytest.approx(latency, abs=1e-9 + 1e-3 * 2**16 / rate)


@pytest.mark.slow
def test_it_reports_how_far_off_the_model_is(
    star: link.Link, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    few = ["--rounds", "2", "--rates", "20mbit", "--processes", "2", "--variants", "consensus"]
    assert bench.main(["plan", *SIZE, *few, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert 10 < found["link"]["20mbit"]["mbit_per_s"] < 22
    assert found["link"]["20mbit"]["ring"]["2"]["error"] == pytest.approx(0, abs=0.02)  # what it was taken from
    for name in ("plain DDP", "consensus"):
        row = found["variants"][name]["processes"]["2"]["20mbit"]
        assert row["alone_ms"] < row["predicted_ms"] <= row["behind_nothing_ms"]
        assert -0.5 < row["error"] < 1  # so few bytes that the bucket's first 64 kB, which pass at once, matter
    plain, consensus = (found["variants"][name]["processes"]["2"]["20mbit"] for name in found["variants"])
    assert consensus["measured_ms"] < plain["measured_ms"]
    assert consensus["awaited"][1] > plain["awaited"][1] == 0
    assert "predicted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--processes", "1"], "--processes is 1"),
        (["--processes", "2", "40"], "--processes is 40"),
        (["--rates", "fast"], "--rates: 'fast'"),
        (["--variants", "concensus"], "did you mean 'consensus'"),
    ],
)
def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "plan", *SIZE, *flags])
    error = capsys.readouterr().err
    assert (left.value.code, error.count("\n")) == (2, 1)
    assert said in error


def test_without_root_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "plan", *SIZE])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "gmscale: error: bench plan needs network namespaces, which only root can make; run it as root"
