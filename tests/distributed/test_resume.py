"""Three ranks: a sum of three depends on its order, and a resumed run must add in the same one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
from ranks import run_ranks

WORLD = 3
CONSENSUS: tiny.Sections = {
    "mask": {"agreement": "consensus"},
    "output": {"enabled": True, "operator": "random", "start": 0.0},
    "parallel": {"comm_hook": "bf16"},
}


def train(rank: int, cache: Path, run_dir: Path, sections: tiny.Sections, stop_after: int | None) -> bool:
    sections = tiny.EVERYTHING | {"data": {"batch_size_per_device": 5}} | sections
    return tiny.train_rank(rank, WORLD, "ddp", cache, run_dir, sections, stop_after)


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, CONSENSUS], ids=["local", "consensus and layer outputs"])
def test_three_ranks_resume_bit_for_bit(cache: Path, tmp_path: Path, sections: tiny.Sections) -> None:
    undisturbed, run_dir, stores = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "stores"
    stores.mkdir()
    assert run_ranks(train, WORLD, stores, cache, undisturbed, sections, None) == [True] * WORLD
    assert run_ranks(train, WORLD, stores, cache, run_dir, sections, 3) == [False] * WORLD
    assert tiny.checkpoint_steps(run_dir) == [2, 3]
    assert run_ranks(train, WORLD, stores, cache, run_dir, sections, None) == [True] * WORLD
    assert tiny.different(tiny.tensors(undisturbed), tiny.tensors(run_dir)) == []
    assert tiny.untimed(tiny.metrics(undisturbed)) == tiny.untimed(tiny.metrics(run_dir))
    assert {r["count"] for r in tiny.metrics(run_dir) if "count" in r} == {tiny.VALIDATION_SIZE}
    sent = [(r["wire_bytes"], r["dense_bytes"]) for r in tiny.metrics(run_dir) if r["phase"] == "train"]
    shares = [r["wire_share"] for r in tiny.metrics(run_dir) if r["phase"] == "train"]
    assert shares == [wire / dense for wire, dense in sent]
    assert (
        all(wire < 0.5 * dense for wire, dense in sent) if sections else all(wire == dense for wire, dense in sent)
    )
