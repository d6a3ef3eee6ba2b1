"""All-reduce between the nodes: right or not, and how fast. Each process of it is a program of its own.

So whatever a library does when a network fails, hang or abort, doctor goes on and says so.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from gmscale.doctor.finding import Finding
from gmscale.launch import network

_SMALL, _MEDIUM, _LARGE = 1_000, 4_000_000, 64_000_000  # bytes
_SMALL_ROUNDS, _LARGE_ROUNDS = 20, 5
_LONGEST_S = 15.0  # of the large rounds together
_SLOW = 0.125e9  # bytes a second: 1 Gbit/s
_STARTING_S = 60.0  # to import torch from a busy file server


class Transfer:
    """The processes of this node in an all-reduce of all nodes."""

    def __init__(
        self, backend: str, where: tuple[str, int], name: str, ranks: Sequence[int], size: int, timeout_s: float
    ) -> None:
        """Start them, as `ranks` of `size`; they meet in the store at `where`, under `name`."""
        self._deadline = time.monotonic() + timeout_s + _STARTING_S + _LONGEST_S
        meeting = [name, where[0], str(where[1]), str(size), str(timeout_s)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "gmscale.doctor.link", backend, str(rank), str(place), *meeting],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            )
            for place, rank in enumerate(ranks)
        ]

    def finish(self) -> dict[str, Any]:
        """Wait for them; return what was measured, or {"error": why not}."""
        try:
            answers = [self._answer(process) for process in self._processes]
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        return next((answer for answer in answers if "error" in answer), answers[0])

    def _answer(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        try:
            printed, complaints = process.communicate(timeout=max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return {"error": "no end in sight"}
        with suppress(ValueError, IndexError):
            return dict(json.loads(printed.splitlines()[-1]))
        said = [line for line in complaints.splitlines() if line.strip()]
        return {"error": f"ended with status {process.returncode}{': ' + said[-1][:200] if said else ''}"}


def link_finding(backend: str, size: int, answers: list[dict[str, Any]], hosts: list[str]) -> Finding:
    """Return what the nodes' answers come to, each by its node."""
    name = f"{backend} all-reduce"
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    ways = ", ".join(f"{one} ({', '.join(found)})" for one, found in network.interfaces().items())
    errors = [
        f"{answer['error']} on {host}" for host, answer in zip(hosts, answers, strict=True) if "error" in answer
    ]
    if errors:
        if backend == "nccl":
            remedy = "see why with NCCL_DEBUG=INFO; try NCCL_SOCKET_IFNAME=<interface>, or NCCL_IB_DISABLE=1"
        else:
            remedy = (
                f"all ports above 1024 must be open between the nodes, on {interface or 'the interface'}; "
                f"GLOO_SOCKET_IFNAME names another one of: {ways}"
            )
        return Finding(name, False, "; ".join(dict.fromkeys(errors))[:400], remedy)
    large, small = (max(answer[which] for answer in answers) for which in ("large_s", "small_s"))
    rate = bytes_on_the_link(_LARGE, size) / large
    detail = (
        f"{size} processes: {rate / 1e9:.3g} GB/s ({_LARGE / 1e6:.0f} MB in {1e3 * large:.3g} ms), "
        f"{1e3 * small:.2g} ms for {_SMALL / 1e3:.0f} kB"
    )
    remedy = (
        f"less than 1 Gbit/s: is {interface or 'the interface'} right? {backend.upper()}_SOCKET_IFNAME names "
        f"another: {ways}; or send less, see gmscale bench comm"
    )
    return Finding(name, rate >= _SLOW, detail, remedy, optional=True)


def bytes_on_the_link(payload: int, size: int) -> float:
    """Return the bytes that each of `size` processes has to send for an all-reduce of `payload`, and to receive."""
    return 2 * payload * (size - 1) / size


def _take_part(
    backend: str, place: int, store: dist.Store, rank: int, size: int, timeout_s: float
) -> dict[str, Any]:
    """Return the median seconds of all-reduces. Raises RuntimeError if one does not work or adds up wrongly."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

    def seconds(count: int, rounds: int) -> Iterator[float]:
        for _ in range(rounds):
            values = torch.full((count // 4,), float(rank + 1), device=device)
            took = _seconds(values, device)
            if not bool((values == size * (size + 1) / 2).all()):
                raise RuntimeError(f"the sum over {size} processes is wrong")
            yield took

    list(seconds(_SMALL, 3))  # connections are made by the first
    small = statistics.median(seconds(_SMALL, _SMALL_ROUNDS))
    trial = torch.tensor([max(seconds(_MEDIUM, 2))], dtype=torch.float64, device=device)
    dist.all_reduce(trial, op=dist.ReduceOp.MAX)  # all have to do equally many rounds
    rounds = int(_LONGEST_S / (float(trial) * _LARGE / _MEDIUM))
    return {"small_s": small, "large_s": statistics.median(seconds(_LARGE, min(max(rounds, 1), _LARGE_ROUNDS)))}


def _seconds(values: torch.Tensor, device: torch.device) -> float:
    """Sum `values` over all processes, in place."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    dist.all_reduce(values)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _main(arguments: list[str]) -> NoReturn:
    """Body of each process that a Transfer starts."""
    backend, rank, place, name, host, port, size, timeout = arguments
    timeout_s = float(timeout)
    try:
        store = dist.TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        store.set(f"{name}/here/{rank}", "")  # torch starts at its own pace; the time limit is the network's
        store.wait([f"{name}/here/{other}" for other in range(int(size))], timedelta(seconds=_STARTING_S))
        answer = _take_part(backend, int(place), dist.PrefixStore(name, store), int(rank), int(size), timeout_s)
    except RuntimeError as error:
        answer = {"error": " ".join(str(error).split())[:200] or type(error).__name__}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # whatever gloo and NCCL still do, doctor has its answer


if __name__ == "__main__":
    _main(sys.argv[1:])
