"""What works on this machine."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from gmscale import __version__
from gmscale.doctor.finding import Finding
from gmscale.environment import PACKAGES, commit, package_version
from gmscale.parallel import cores, end_process

_EXTRAS = {
    "embedded": ("mlxtend", "scikit-image", "scikit-learn"),
    "remote": ("fsspec", "aiohttp", "s3fs"),
    "deepspeed": ("deepspeed",),
    "interop": ("accelerate", "lightning"),
    "export": ("onnx", "onnxscript", "onnxruntime", "huggingface_hub"),
    "sweep": ("ray", "optuna"),
    "eval": ("torch-pruning",),
}
_OLDEST_TORCH = (2, 8)
_TIMEOUT_S = 120


def examine(directory: Path) -> Iterator[Finding]:
    """Yield a Finding for everything a run needs, the slow ones last."""
    yield from _versions()
    yield from _devices()
    yield _writable(directory)
    yield Finding("cores", cores() >= 1, f"{cores()} usable")
    yield _all_reduce("gloo", processes=2)
    if torch.cuda.is_available():
        yield _all_reduce("nccl", processes=torch.cuda.device_count())


def _versions() -> Iterator[Finding]:
    source = commit()
    detail = __version__ + (f", commit {source[:12]}" if source else "")
    yield Finding("gmscale", True, detail)
    yield Finding("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")
    for name in PACKAGES:
        found = package_version(name)
        ok = found is not None
        if name == "torch" and found is not None:
            ok = tuple(int(x) for x in found.split(".")[:2]) >= _OLDEST_TORCH
        yield Finding(name, ok, found or "missing", "pip install -c constraints.txt -e . in the checkout")
    for extra, packages in _EXTRAS.items():
        missing = [name for name in packages if package_version(name) is None]
        detail = f"missing: {', '.join(missing)}" if missing else "installed"
        yield Finding(f"extra {extra}", not missing, detail, f'pip install "gmscale[{extra}]"', optional=True)


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            detail = f"{torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
            yield Finding(
                f"GPU {i}", free > total / 2, detail, "another process uses its memory (nvidia-smi)", True
            )
        return
    has_driver = shutil.which("nvidia-smi") is not None
    remedy = "torch cannot use the GPU: its CUDA build must match the driver (nvidia-smi)" if has_driver else (
        "none needed: training runs on the CPU with gloo"
    )  # fmt: skip
    yield Finding("GPU", False, "none", remedy, optional=not has_driver)


def _writable(directory: Path) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            file.write(b"x" * 2**20)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(directory).free / 2**30
    except OSError as error:
        return Finding("write test", False, f"{directory}: {error.strerror}", "choose a writable --run.dir")
    remedy = "free some space: checkpoints and shards go there"
    return Finding("write test", free > 2, f"{directory}: {free:.0f} GiB free", remedy)


def _all_reduce(backend: str, processes: int) -> Finding:
    """Run a real all-reduce under torchrun, as training will."""
    name = f"{backend} all-reduce"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
        "-m", "gmscale.doctor.machine", backend,
    ]  # fmt: skip
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"no answer in {_TIMEOUT_S} s", _network_remedy(backend))
    if result.returncode == 0:
        return Finding(name, True, f"{processes} processes on this machine")
    lines = [line for line in result.stderr.splitlines() if "Error" in line] or ["failed"]
    return Finding(name, False, lines[0].strip()[:200], _network_remedy(backend))


def _network_remedy(backend: str) -> str:
    if backend == "nccl":
        return "see why with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1 or NCCL_SOCKET_IFNAME=<interface>"
    return "this host's name must resolve to its own address (getent hosts $(hostname)); or GLOO_SOCKET_IFNAME=lo"


def _check_all_reduce(backend: str) -> None:
    """Body of each process that `_all_reduce` starts."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    value = torch.ones(1024, device=device)
    dist.all_reduce(value)
    correct = bool((value == dist.get_world_size()).all())
    dist.destroy_process_group()
    end_process(0 if correct else 1)


if __name__ == "__main__":
    _check_all_reduce(sys.argv[1])
