"""A small model whose weights three ranks cannot share equally, and what must hold of their shards."""

from typing import Any

import tiny
import torch
from torch import nn

from gmscale.parallel import Wrapped


def uneven(frozen: bool = False) -> nn.Module:
    """Weights of 7 rows, of 1 row and of 2 entries, batch norm; with `frozen` the first layer does not train."""
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 1, 1), nn.Flatten())
    model.append(nn.Linear(36, 2))
    model[0].requires_grad_(not frozen)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Plain SGD, which has no state, over what trains."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)


def snapshot(wrapped: Wrapped) -> dict[str, Any]:
    """Copies of the whole weights and of this rank's shards."""
    weights = {name: weight.clone() for name, weight in wrapped.weights().items()}
    shards = {name: (*s[:2], s.entries.clone()) for name, s in wrapped.weight_shards().items()}
    return {"weights": weights, "shards": shards}


def check_shards(ranks: list[dict[str, Any]]) -> None:
    """All ranks' shards, one after the other, are the whole weights; a model that loads them is the same one."""
    whole = ranks[0]["weights"]
    assert whole.keys() == {n for rank in ranks for n in rank["shards"]}
    for name, weight in whole.items():
        parts = [rank["shards"][name] for rank in ranks if name in rank["shards"]]
        assert len(parts) == (1 if name.startswith("1.running") or "tracked" in name else len(ranks))
        assert {shape for shape, *_ in parts} == {tuple(weight.shape)}
        ends = [offset + len(entries) for _, offset, entries in parts]
        assert [offset for _, offset, _ in parts] == [0, *ends[:-1]]
        assert torch.equal(torch.cat([entries for *_, entries in parts]), weight.flatten())
    assert tiny.different(whole, ranks[0]["loaded"]) == []
    for rank in ranks:
        assert torch.equal(*rank["logits"])
