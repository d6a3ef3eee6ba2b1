"""Pruning as a measurement, and the fine-tuning after it: what is gone stays gone, on one rank and on several."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from gmscale import models
from gmscale.data import normalize, val_loader
from gmscale.errors import RunError
from gmscale.evaluation.pruning import Pruning, pruned
from gmscale.evaluation.pruning.channels import without_channels
from gmscale.evaluation.pruning.finetuning import RATE, finetune, rate
from gmscale.evaluation.pruning.smallest import Pruned
from gmscale.evaluation.subject import Subject
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks

CLASSES = 10


def subject(cache: Path | str, name: str, world: World = tiny.ALONE, **sections: dict[str, Any]) -> Subject:
    settings = {"model": {"name": name, "kwargs": {}}, **sections}
    config = tiny.config(Path(cache), Path("run"), **settings)
    torch.manual_seed(0)
    model = models.create(config, CLASSES).eval().requires_grad_(False)
    loader = val_loader(config.data, world.rank, world.size)
    return Subject(model, config, loader, world, tuple(map(str, range(CLASSES))))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- fine-tuning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["global", "layer", "2:4"])
@pytest.mark.parametrize("optim", [{"opt": "sgd"}, {"opt": "adamw", "clip_grad": 1.0}, {"opt": "muon"}])
def test_what_is_gone_stays_gone_and_the_rest_learns(cache: Path, how: str, optim: dict[str, Any]) -> None:
    of = subject(cache, "test_vit", optim={"lr": 0.05, **optim})
    before = state(of.model)
    sparse = pruned(of.model, 0.5, how)
    start = state(sparse.model)
    finetune(sparse, of, 3)
    assert same(before, of.model.state_dict())
    for name, gone in sparse.gone.items():
        weight = sparse.model.get_submodule(name).weight
        assert not weight[gone].any()
        assert not torch.equal(weight, start[f"{name}.weight"])
    assert not sparse.model.training
    assert not any(p.requires_grad for p in sparse.model.parameters())


def test_fine_tuning_is_that_of_the_run_with_a_falling_rate_and_no_mixing(cache: Path) -> None:
    """Two steps of SGD written out, through two micro-batches each."""
    of = subject(
        cache,
        "test_resnet",
        optim={
            "opt": "momentum",
            "lr": 0.4,
            "lr_batch_size": 16,
            "weight_decay": 0.01,
            "grad_accum_steps": 2,
            "clip_grad": 0.1,
        },
        augment={"mixup": 0.8, "erase_prob": 0.5},
        data={"batch_size_per_device": 8},
    )
    sparse = pruned(of.model, 0.5, "layer")
    model, gone = copy.deepcopy(sparse.model).requires_grad_(True).train(), sparse.gone
    heard: list[tuple[int, int]] = []
    finetune(sparse, replace(of, progress=lambda done, total: heard.append((done, total))), 2)
    assert heard == [(1, 2), (2, 2)]
    mean, std = (torch.tensor(values)[:, None, None] for values in of.config.data.statistics)
    momenta = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for lr, micro_batches in zip((0.04, 0.02), of.training().epoch(0), strict=False):
        assert lr == pytest.approx(rate(0.4, int(lr == 0.02), 2))
        model.zero_grad()
        for batch in micro_batches:
            logits = model((batch.images / 255 - mean) / std)
            (torch.nn.functional.cross_entropy(logits, batch.labels) / 2).backward()
        with torch.no_grad():
            for layer, entries in gone.items():
                model.get_submodule(layer).weight.grad.masked_fill_(entries, 0)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for name, p in model.named_parameters():
                decay = 0.01 if p.dim() > 1 else 0.0
                momenta[name] = 0.9 * momenta[name] + p.grad + decay * p
                p -= lr * momenta[name]
                if (layer := name.removesuffix(".weight")) in gone:
                    p.masked_fill_(gone[layer], 0)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, sparse.model.state_dict()[name], atol=1e-5), name


def test_the_rate_falls_from_a_tenth_of_the_runs_to_nothing() -> None:
    rates = [rate(0.5, step, 10) for step in range(11)]
    assert rates[0] == RATE * 0.5 == 0.05
    assert rates[5] == pytest.approx(0.025)
    assert rates[10] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_fine_tuning_recovers_what_pruning_cost(cache: Path) -> None:
    of = subject(cache, "test_resnet", optim={"lr": 0.5})
    full = Pruned(copy.deepcopy(of.model), {})
    finetune(full, of, 30)
    trained = of.of(full.model)

    def loss(model: nn.Module) -> float:
        """Of the images that it was trained on: there are too few to learn others from."""
        batches = [batch for micro_batches in of.training().epoch(0) for batch in micro_batches]
        images = normalize(torch.cat([batch.images for batch in batches]), of.config.data)
        return float(nn.functional.cross_entropy(model(images), torch.cat([batch.labels for batch in batches])))

    smaller = without_channels(trained.model, 0.3, of.config.data)
    for sparse in (Pruned(smaller, {}), pruned(trained.model, 0.8)):
        cut = loss(sparse.model)
        finetune(sparse, trained, 10)
        assert loss(trained.model) < loss(sparse.model) < cut - 0.05


def test_it_goes_on_beyond_an_epoch_and_twice_the_same(cache: Path) -> None:
    of = subject(cache, "test_byobnet", model={"name": "test_byobnet", "drop_rate": 0.3})
    assert of.training().steps_per_epoch < 8
    found = []
    for _ in range(2):
        sparse = pruned(of.model, 0.5, "layer")
        finetune(sparse, of, 8)
        found.append(state(sparse.model))
        torch.rand(1)  # whatever else is drawn
    assert same(*found)


def test_a_gradient_that_is_not_finite_ends_it(cache: Path) -> None:
    of = subject(cache, "test_byobnet", optim={"lr": 1e30})
    with pytest.raises(RunError, match=r"step \d of fine-tuning the pruned model has no finite gradient"):
        finetune(pruned(of.model, 0.5), of, 5)


# ---- several ranks -----------------------------------------------------------------------------------------------


def _rank(world: World, cache: str, out: str) -> dict[str, Any]:
    of = subject(cache, "test_vit", world, data={"batch_size_per_device": 8})
    sparse = pruned(of.model, 0.6, "layer")
    finetune(sparse, of, 4)
    torch.save(sparse.model.state_dict(), f"{out}{world.rank}")
    return Pruning(0.6, "layer", 4).measure(of)


def test_two_ranks_make_of_it_what_one_does(cache: Path, tmp_path: Path) -> None:
    two = run_ranks(_rank, 2, str(cache), str(tmp_path / "rank"))
    of = subject(cache, "test_vit", data={"batch_size_per_device": 16})
    sparse = pruned(of.model, 0.6, "layer")
    finetune(sparse, of, 4)
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert same(first, second)
    start = of.model.state_dict()
    for name, tensor in sparse.model.state_dict().items():
        moved = float((tensor - start[name]).abs().max())
        assert torch.allclose(tensor, first[name], atol=1e-3 * moved + 1e-7), name
    one = Pruning(0.6, "layer", 4).measure(of)
    for top in ("top1", "top5"):
        assert two.pop(top) == pytest.approx(
            one.pop(top), abs=100 / tiny.VALIDATION_SIZE
        )  # rounding may tip one image
    assert two == one


# ---- the measurement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        Pruning(0.8),
        Pruning(0.8, "layer"),
        Pruning(0.5, "2:4"),
        Pruning(0.5, "structured"),
        Pruning(0.8, "global", 2),
        Pruning(0.5, "structured", 2),
    ],
    ids=lambda asked: asked.words,
)
def test_what_a_scorecard_says_of_it(cache: Path, asked: Pruning) -> None:
    of = subject(cache, "test_resnet")
    before = state(of.model)
    found = asked.measure(of)
    assert same(before, of.model.state_dict())
    sizes = [m.weight.numel() for m in of.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    everything = sum(p.numel() for p in of.model.parameters())
    assert 0 <= found["top1"] <= found["top5"] <= 100
    assert found["parameters_share"] == pytest.approx(found["parameters"] / everything)
    assert 0 < found["flops_share"] < 1
    if asked.how == "structured":
        assert found["channels"] == pytest.approx(0.5, abs=0.01)
        assert found["flops"] == found["flops_nonzero"]
        assert found["flops_share"] == pytest.approx(0.25, abs=0.05)  # half of the inputs, half of the outputs
    else:
        assert found["parameters"] == everything - round(found["measured"] * sum(sizes))
        whole = 432 if asked.how == "2:4" else 0  # the layer that sees the three colours
        assert found["measured"] == pytest.approx(asked.sparsity * (1 - whole / sum(sizes)), abs=2e-3)
        assert found["flops_nonzero"] / found["flops"] == pytest.approx(found["flops_share"])
    assert set(asdict(asked)) == {"sparsity", "how", "finetune"}
    if asked.how == "2:4":
        assert found["layers_left_whole"] == ["conv1.0"]
