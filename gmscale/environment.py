"""What a result was made with: versions, commit, hardware, command."""

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gmscale import __version__
from gmscale.data.config import without_secrets
from gmscale.parallel import World, cores

PACKAGES = ("torch", "torchvision", "timm", "webdataset", "simplejpeg", "pillow", "safetensors", "numpy")


def describe(world: World) -> dict[str, Any]:
    """Return versions, commit, hardware, world size and the command of this process."""
    gpu = world.device.type == "cuda"
    return {
        "gmscale": __version__,
        "python": platform.python_version(),
        **{name: package_version(name) for name in (*PACKAGES, "triton", "deepspeed")},
        "commit": commit(),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(world.device) if gpu else f"CPU, {cores()} cores",
        "backend": world.backend,
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "command": command(world),
    }


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit gmscale runs from, with '+' when the tree has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def command(world: World) -> str:
    """Return the command line that starts this process's job on one node."""
    arguments = without_secrets(shlex.join(sys.argv[1:]))
    if world.backend == "single":
        return f"gmscale {arguments}"
    local = os.environ.get("LOCAL_WORLD_SIZE", str(world.size))
    return f"torchrun --nproc_per_node {local} -m gmscale {arguments}"
