"""parallel.comm_hook: 16-bit reduction of a training run's gradients, with a mask and without."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
from ranks import run_ranks


def train(rank: int, cache: Path, folder: Path, masked: bool) -> list[bool]:
    names = ("allreduce", "bf16", "fp16")
    sections: tiny.Sections = {"run": {"epochs": 0.34}, "mask": {"enabled": masked}}
    return [
        tiny.train_rank(rank, 2, "ddp", cache, folder / name, sections | {"parallel": {"comm_hook": name}})
        for name in names
    ]


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "no mask"])
def test_16_bits_change_the_weights_by_their_rounding(cache: Path, tmp_path: Path, masked: bool) -> None:
    assert run_ranks(train, 2, tmp_path, cache, tmp_path, masked) == [[True] * 3] * 2
    exact, *rounded = (tiny.tensors(tmp_path / name) for name in ("allreduce", "bf16", "fp16"))
    weights = [name for name in exact if name.startswith("model.") and "num_batches" not in name]
    for found in rounded:
        assert tiny.different({n: exact[n] for n in weights}, {n: found[n] for n in weights})
        for name in weights:
            torch.testing.assert_close(found[name], exact[name], rtol=0.05, atol=5e-3)
