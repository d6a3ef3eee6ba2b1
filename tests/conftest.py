"""What the tests share: one tiny embedded data set and one finished run on it, each made once."""

import os
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported, here and in every process started from here

import pytest
import tiny


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
