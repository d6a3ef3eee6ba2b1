"""Every command and every Python block of the README does what it says."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import warm
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
# A whole environment each: CI's own way in, and the launch test's.
RUN_ELSEWHERE = {"./launch/quickstart.sh", "./launch/test.sh"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory like the checkout, in which commands may write."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 10)):
        for number in range(count):
            path = folder / "images" / split / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    return folder


def as_installed(command: str) -> list[str]:
    """Return the arguments of Python that make it the command."""
    program, *arguments = shlex.split(command)
    programs = {"gmscale": ["-m", "gmscale"], "torchrun": TORCHRUN}
    # As little work as it goes: the test is that the command works.
    is_training = "--config" in arguments and "train" in arguments
    shrink = ["--data.size", "256", "--parallel.threads", "1"] if is_training else []
    return [*programs[program], *arguments, *shrink]


@pytest.mark.slow
def test_the_commands_run_in_the_readmes_order(checkout, tmp_path):
    commands = [c for c in COMMANDS if c and c not in RUN_ELSEWHERE]
    assert len(commands) >= 5
    for command in commands:
        warm.run(tmp_path / "log", as_installed(command), checkout)
    assert (checkout / "runs" / "report.html").stat().st_size > 10_000
    assert (checkout / "runs" / "two" / "summary.json").exists()


def test_the_launch_commands_exist_and_parse():
    assert set(COMMANDS) >= RUN_ELSEWHERE
    for script in [*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.s*"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.slow
def test_the_script_runs_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(next(text for text in PYTHON if "init_process_group" in text))
    output = warm.run(tmp_path / "log", [*TORCHRUN, "--nproc_per_node", "2", str(script)], tmp_path)
    assert re.search(r"touches \d+ weights, keeps \d+% of their gradient entries", output)


def test_every_file_of_the_tour_exists():
    for name in re.findall(r"gmscale/[\w/]+(?:\.py|\.md)?", README):
        assert (ROOT / name).exists(), name
