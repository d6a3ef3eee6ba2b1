"""The examples in this folder, run the way a user runs them, with the mask and without it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# A plain DDP script of torch 2.14 may end like this after its last line: gloo threads outlive the interpreter. With
# the mask attached it must not (attach waits for them).
TORCHS_ABORT = "terminate called without an active exception"
LINE = re.compile(r"rank (\d): kept ([\d.]+) of the masked gradients' entries, (\w+) ([0-9a-f]{16})")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "launcher", "package"),
    [
        ("plain_ddp.py", TORCHRUN, "torch"),
        ("timm_loop.py", TORCHRUN, "timm"),
        ("accelerate_ddp.py", TORCHRUN, "accelerate"),
        ("lightning_fit.py", (sys.executable,), "lightning"),
    ],
)
def test_the_mask_is_at_work_and_ranks_agree(
    script: str, launcher: tuple[str, ...], package: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f'{package} is not installed: pip install "gmscale[interop]"')
    command = [*launcher, str(HERE / script)]
    both = [start(command, tmp_path), start([*command, "--no_mask"], tmp_path)]
    outputs = [output_of(process) for process in both]
    for _ in range(3):
        if TORCHS_ABORT in outputs[1]:
            outputs[1] = output_of(start([*command, "--no_mask"], tmp_path))
    masked, plain = map(weights_by_rank, outputs)

    for what in masked[0][1]:
        assert masked[0][1][what] == masked[1][1][what]
        assert plain[0][1][what] == plain[1][1][what]
        assert masked[0][1][what] != plain[0][1][what]
    for rank in (0, 1):
        assert 0.05 < masked[rank][0] < 0.95
        assert plain[rank][0] == 1.0
    assert not list(tmp_path.iterdir()), "an example left files in the working directory"


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output_of(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0 or ("--no_mask" in process.args and TORCHS_ABORT in output), output
    return output


def weights_by_rank(output: str) -> dict[int, tuple[float, dict[str, str]]]:
    """Return {rank: (kept share, {what: digest of it})} from what an example printed."""
    found: dict[int, tuple[float, dict[str, str]]] = {}
    for rank, kept, what, digest in LINE.findall(output):
        found.setdefault(int(rank), (float(kept), {}))[1][what] = digest
    assert set(found) == {0, 1}, output
    return found
