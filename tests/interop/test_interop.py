"""The examples in this folder, run the way a user runs them, with the mask and without it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm

HERE = Path(__file__).parent
LINE = re.compile(r"rank (\d): kept ([\d.]+) of the masked gradients' entries, (\w+) ([0-9a-f]{16})")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "launcher", "package"),
    [
        ("plain_ddp.py", warm.TORCHRUN, "torch"),
        ("timm_loop.py", warm.TORCHRUN, "timm"),
        ("accelerate_ddp.py", warm.TORCHRUN, "accelerate"),
        ("lightning_fit.py", (), "lightning"),
    ],
)
def test_the_mask_is_at_work_and_ranks_agree(
    script: str, launcher: tuple[str, ...], package: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f'{package} is not installed: pip install "gmscale[interop]"')
    folder = tmp_path / "work"
    folder.mkdir()
    command = [*launcher, str(HERE / script)]
    plain_run = warm.Program(tmp_path / "plain", [*command, "--no_mask"], folder)
    try:
        whole = script == "plain_ddp.py"
        output = run_whole(command, folder) if whole else warm.run(tmp_path / "masked", command, folder)
        assert plain_run.wait() == 0, plain_run.output
    finally:
        plain_run.kill()
    masked, plain = weights_by_rank(output), weights_by_rank(plain_run.output)

    for what in masked[0][1]:
        assert masked[0][1][what] == masked[1][1][what]
        assert plain[0][1][what] == plain[1][1][what]
        assert masked[0][1][what] != plain[0][1][what]
    for rank in (0, 1):
        assert 0.05 < masked[rank][0] < 0.95
        assert plain[rank][0] == 1.0
    assert not list(folder.iterdir()), "an example left files in the working directory"


def run_whole(command: list[str], folder: Path) -> str:
    """Return the output of `python COMMAND`, a process from its beginning to its end.

    Without the mask it may end badly after the last line: gloo's threads outlive the interpreter (torch 2.14).
    With it, it must not: attach waits for them.
    """
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def weights_by_rank(output: str) -> dict[int, tuple[float, dict[str, str]]]:
    """Return {rank: (kept share, {what: digest of it})} from what an example printed."""
    found: dict[int, tuple[float, dict[str, str]]] = {}
    for rank, kept, what, digest in LINE.findall(output):
        found.setdefault(int(rank), (float(kept), {}))[1][what] = digest
    assert set(found) == {0, 1}, output
    return found
