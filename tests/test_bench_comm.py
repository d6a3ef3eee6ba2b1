"""gmscale bench comm: a slow link on one machine, made and always removed; needs root, ip and tc."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gmscale import bench, cli
from gmscale.bench import link
from gmscale.errors import RunError
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks

SIZE = ["--model", "test_byobnet", "--image_size", "32", "--batch_size", "2"]


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> None:
    try:
        with link.veth_link():
            pass
    except RunError as error:
        pytest.skip(str(error))


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_a_link_is_removed_whatever_happens() -> None:
    with contextlib.suppress(KeyboardInterrupt), link.veth_link() as made:
        assert all(name in namespaces() for name in made.namespaces)
        raise KeyboardInterrupt
    assert f"gmscale-{os.getpid()}" not in namespaces()


def test_what_a_killed_run_left_is_removed_by_the_next_one() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = f"gmscale-{ended.pid}-a"
    subprocess.run(["ip", "netns", "add", left], check=True)
    with link.veth_link() as made:
        assert left not in namespaces()
        assert made.namespaces[1] in namespaces()


@pytest.mark.slow
def test_a_terminated_run_removes_its_link() -> None:
    run = subprocess.Popen([sys.executable, "-m", "gmscale", "bench", "comm", *SIZE], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while f"gmscale-{run.pid}-b" not in namespaces() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert f"gmscale-{run.pid}-b" in namespaces()
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 128 + signal.SIGTERM
    assert f"gmscale-{run.pid}" not in namespaces()


def sees(world: World, interfaces: tuple[str, str]) -> dict[str, Any]:
    """Return a rank's interfaces, what its own sent for five all-reduces, and how fast."""
    import torch
    import torch.distributed as dist

    own = interfaces[world.rank]
    link.limit(own, "40mbit")
    before, start = link.bytes_sent(own), time.monotonic()
    for _ in range(5):
        dist.all_reduce(torch.ones(250_000))
    seconds, sent = time.monotonic() - start, link.bytes_sent(own) - before
    return {
        "interfaces": sorted(os.listdir("/proc/sys/net/ipv4/conf")),
        "sent": sent,
        "mbit_per_s": 8e-6 * sent / seconds,
    }


def test_ranks_talk_over_the_link_and_no_faster_than_it() -> None:
    with link.veth_link() as made:
        environ = [
            {"MASTER_ADDR": made.addresses[0], "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": interface}
            for interface in made.interfaces
        ]
        seen = run_ranks(sees, 2, made.interfaces, namespaces=made.namespaces, environ=environ)
    assert seen["interfaces"] == ["all", "default", "gmscale0", "lo"]
    assert 5 * 1e6 <= seen["sent"] < 1.2 * 5 * 1e6
    assert seen["mbit_per_s"] < 50  # the bucket lets 64 KiB through at once


@pytest.mark.slow
def test_comm_reports_ratios_and_what_the_interface_saw(tmp_path: Path) -> None:
    out = tmp_path / "comm.json"
    few = ["--rounds", "2", "--rates", "unlimited", "20mbit", "--variants", "fp16 hook"]
    assert bench.main(["comm", *SIZE, *few, "--json", str(out)]) == 0
    variants = json.loads(out.read_text())["variants"]
    for variant in variants.values():
        for row in variant["rates"].values():
            assert variant["bytes_per_step"] <= row["interface_bytes_per_step"] < 1.3 * variant["bytes_per_step"]
    slow = variants["fp16 hook"]["rates"]["20mbit"]
    assert slow["interface_bytes_ratio"] == pytest.approx(0.5, abs=0.1)
    assert slow["ratio"] < 0.9


def test_where_it_cannot_be_done_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "comm", *SIZE])
    assert left.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "gmscale: error: bench comm needs network namespaces, which only root can make; run it as root"
    ]
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "tc" else program)
    with pytest.raises(RunError, match="no program 'tc'"):
        bench.main(["comm", *SIZE])
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"cannot make its link here: `ip netns add a/b` says: .+"):
        link.run("ip", "netns", "add", "a/b")
