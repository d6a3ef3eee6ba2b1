"""Global magnitude pruning: what goes, what stays, and torch's own pruning as the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from gmscale.errors import UsageError
from gmscale.evaluation.pruning import pruned


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([m.weight.detach().flatten() for m in model if isinstance(m, nn.Conv2d | nn.Linear)])


@pytest.mark.parametrize("channels_last", [False, True])
@given(sparsity=st.floats(0.001, 0.999), seed=st.integers(0, 3))
def test_the_smallest_go_the_others_stay_and_the_model_is_untouched(
    channels_last: bool, sparsity: float, seed: int
) -> None:
    model = network(seed)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse, measured = pruned(model, sparsity)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    was, now = weights(model), weights(sparse)
    gone = now == 0
    assert measured == gone.double().mean()
    assert abs(measured - sparsity) <= 0.5 / len(was) + 1e-9
    assert torch.equal(now[~gone], was[~gone])
    if gone.any() and not gone.all():
        assert was[gone].abs().max() <= was[~gone].abs().min()
    others = {name for name in before if "weight" not in name or name.startswith("1.")}
    assert all(torch.equal(before[name], sparse.state_dict()[name]) for name in others)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_the_same_as_torch_prunes(sparsity: float) -> None:
    model = network()
    sparse, _ = pruned(model, sparsity)
    layers = [(m, "weight") for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    assert torch.equal(weights(sparse), weights(model))


def test_a_shared_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    sparse, measured = pruned(model, 0.5)
    assert measured == 0.5
    assert int((sparse[0].weight == 0).sum()) == 8
    assert sparse[1].weight is sparse[0].weight


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_sparsity_that_is_none_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        pruned(network(), sparsity)


def test_a_model_without_layers_to_prune_is_refused() -> None:
    with pytest.raises(UsageError, match="BatchNorm2d has no convolution or linear layer"):
        pruned(nn.BatchNorm2d(3), 0.5)
