"""Fine-tuning on two ranks: pretrained weights are downloaded once, and a thaw survives every interruption."""

import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
import torch
import torch.distributed as dist
from file_hub import Hub, weights_of
from ranks import run_ranks
from torch import Tensor

from gmscale import build
from gmscale.parallel import World

WORLD = 2
THAWING: tiny.Sections = {
    "run": {"epochs": 2.0},
    "data": {"batch_size_per_device": 8},
    "finetune": {"freeze": ["stem", "stages.[0-1]"], "unfreeze_epoch": 0.5},
    "optim": {"opt": "adamw", "lr": 0.01},
}
THAW = 3


def train(rank: int, cache: Path, run_dir: Path, stop_after: int | None) -> bool:
    return tiny.train_rank(rank, WORLD, "ddp", cache, run_dir, THAWING, stop_after)


@pytest.mark.slow
def test_a_thaw_on_two_ranks_survives_interruptions_before_and_at_it(cache: Path, tmp_path: Path) -> None:
    undisturbed, run_dir, stores = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "stores"
    stores.mkdir()
    assert run_ranks(train, WORLD, stores, cache, undisturbed, None) == [True] * WORLD
    for stop_after, step in ((THAW - 1, THAW - 1), (1, THAW)):
        assert run_ranks(train, WORLD, stores, cache, run_dir, stop_after) == [False] * WORLD
        assert tiny.checkpoint_steps(run_dir)[-1] == step
    assert run_ranks(train, WORLD, stores, cache, run_dir, None) == [True] * WORLD
    assert tiny.different(tiny.tensors(undisturbed), tiny.tensors(run_dir)) == []
    assert tiny.untimed(tiny.metrics(undisturbed)) == tiny.untimed(tiny.metrics(run_dir))
    assert '"stem.' in (run_dir / "touched.json").read_text()


def start(rank: int, cache: Path, hub_cache: Path, address: str) -> dict[str, Tensor]:
    """Build what a fine-tuning run starts with; return its weights."""
    import huggingface_hub.constants as hub

    hub.ENDPOINT, hub.HF_HUB_CACHE = address, str(hub_cache)
    hub.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    torch.manual_seed(rank)  # so that only the pretrained weights can be equal
    config = tiny.config(cache, hub_cache, model={"name": "test_vit", "pretrained": True})
    world = World(rank, rank, WORLD, torch.device("cpu"), "ddp", dist.group.WORLD)
    return dict(build.training_state(config, world, 10, 6).wrapped.bare.state_dict())


def test_pretrained_weights_are_downloaded_by_one_rank(cache: Path, tmp_path: Path) -> None:
    Hub.file, Hub.asked = tmp_path / "model.safetensors", []
    weights = weights_of(Hub.file)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        stores = tmp_path / "stores"
        stores.mkdir()
        found = run_ranks(
            start, WORLD, stores, cache, tmp_path / "hub", f"http://127.0.0.1:{server.server_port}", timeout_s=120
        )
    finally:
        server.shutdown()
        server.server_close()
    assert len(Hub.asked) == 1
    for name in ("blocks.0.attn.qkv.weight", "norm.weight"):
        assert all(torch.equal(own[name], weights[name]) for own in found)
