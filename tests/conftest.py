"""What the tests share: one tiny embedded data set and one finished run on it, each made once."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported, here and in every process started from here

import pytest
import tiny

# What a launcher tells a process. DeepSpeed insists on one of them, and so leaves it behind.
LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@pytest.fixture(autouse=True)
def no_launcher() -> Iterator[None]:
    """Programs that a test starts must not believe that a launcher started them."""
    yield
    for name in LAUNCHERS:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data.cache_dir that holds the tiny embedded set."""
    folder = tmp_path_factory.mktemp("data")
    tiny.build(folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with everything on that a checkpoint must hold. Look, do not touch."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    tiny.train(tiny.config(cache, run_dir, **tiny.EVERYTHING))
    return run_dir
