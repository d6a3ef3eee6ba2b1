"""Magnitude pruning of single weights: what goes, what stays, and torch's own pruning as the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from gmscale.data import DataConfig
from gmscale.errors import UsageError
from gmscale.evaluation.pruning import Pruning, pruned
from gmscale.evaluation.pruning.cost import cost
from gmscale.evaluation.pruning.smallest import prunable, zeros


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([m.weight.detach().flatten() for m in layers(model)])


@pytest.mark.parametrize("channels_last", [False, True])
@given(sparsity=st.floats(0.001, 0.999), seed=st.integers(0, 3))
def test_the_smallest_go_the_others_stay_and_the_model_is_untouched(
    channels_last: bool, sparsity: float, seed: int
) -> None:
    model = network(seed)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = pruned(model, sparsity)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    was, now = weights(model), weights(sparse.model)
    gone = torch.cat([entries.flatten() for entries in sparse.gone.values()])
    assert torch.equal(now == 0, gone)
    assert abs(float(gone.double().mean()) - sparsity) <= 0.5 / len(was) + 1e-9
    assert torch.equal(now[~gone], was[~gone])
    if gone.any() and not gone.all():
        assert was[gone].abs().max() <= was[~gone].abs().min()
    others = {name for name in before if "weight" not in name or name.startswith("1.")}
    assert all(torch.equal(before[name], sparse.model.state_dict()[name]) for name in others)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_the_same_as_torch_prunes_globally(sparsity: float) -> None:
    model = network()
    sparse = pruned(model, sparsity)
    prune.global_unstructured([(m, "weight") for m in layers(model)], prune.L1Unstructured, amount=sparsity)
    assert torch.equal(weights(sparse.model), weights(model))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_the_same_as_torch_prunes_each_layer(sparsity: float) -> None:
    model = network()
    sparse = pruned(model, sparsity, "layer")
    for layer in layers(model):
        prune.l1_unstructured(layer, "weight", amount=sparsity)
    assert torch.equal(weights(sparse.model), weights(model))
    assert not torch.equal(weights(sparse.model), weights(pruned(network(), sparsity).model))


# ---- N:M ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["1:2", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_of_neighbouring_inputs_the_largest_stay(how: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 6, 3), nn.Flatten(), nn.Linear(24, 5))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    n, m = map(int, how.split(":"))
    sparse = pruned(model, 1 - n / m, how)
    assert sparse.whole == ()
    was, now = model[0].weight, sparse.model[0].weight
    places = [(o, i, y, x) for o in range(6) for i in range(0, 16, m) for y in range(3) for x in range(3)]
    runs = [(was[o, i : i + m, y, x], now[o, i : i + m, y, x]) for o, i, y, x in places]
    runs += list(zip(model[2].weight.view(-1, m), sparse.model[2].weight.view(-1, m), strict=True))
    for before, after in runs:
        stays = after != 0
        assert int(stays.sum()) == n
        assert torch.equal(after[stays], before[stays])
        assert before[~stays].abs().max() < before[stays].abs().min()


def test_layers_that_a_pattern_does_not_fit_stay_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    sparse = pruned(model, 0.5, "2:4")
    assert sparse.whole == ("0", "1")
    assert set(sparse.gone) == {"2"}
    assert all(torch.equal(sparse.model[i].weight, model[i].weight) for i in (0, 1))
    with pytest.raises(UsageError, match="--prune is 8:16, but no layer of Sequential has a multiple of 16 inputs"):
        pruned(model, 0.5, "8:16")


# ---- which weights -----------------------------------------------------------------------------------------------


def test_a_shared_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    sparse = pruned(model, 0.5)
    assert int((sparse.model[0].weight == 0).sum()) == zeros(prunable(sparse.model)) == 8
    assert sparse.model[1].weight is sparse.model[0].weight


def test_a_model_without_layers_to_prune_is_refused() -> None:
    with pytest.raises(UsageError, match="BatchNorm2d has no convolution or linear layer"):
        pruned(nn.BatchNorm2d(3), 0.5)


# ---- what it costs -----------------------------------------------------------------------------------------------


def test_parameters_and_operations_by_hand() -> None:
    model = network()
    first, second, last = 5 * 3 * 9, 4 * 5 * 9, 3 * 16
    found = cost(model, DataConfig(image_size=6))  # maps of 4 x 4, then 2 x 2
    assert found.parameters == first + 5 + 2 * 5 + second + 4 + last + 3
    assert found.flops == found.flops_nonzero == 2 * (first * 16 + second * 4 + last)
    with torch.no_grad():
        model[0].weight[:, 1] = 0  # a third of them
        model[5].weight[0] = 0
    sparse = cost(model, DataConfig(image_size=6))
    assert sparse.parameters == found.parameters - first // 3 - 16
    assert sparse.flops == found.flops
    assert sparse.flops_nonzero == found.flops - 2 * (first // 3 * 16 + 16)


def test_standardised_weights_multiply_with_no_zero() -> None:
    from timm.layers import StdConv2d

    model = nn.Sequential(StdConv2d(3, 4, 3, padding=0, bias=False), nn.Flatten(), nn.Linear(4, 2, bias=False))
    sparse = pruned(model, 0.5, "layer").model
    found = cost(sparse, DataConfig(image_size=3))
    assert found.flops - found.flops_nonzero == 2 * 4
    assert found.parameters == (4 * 27 + 8) // 2


def test_operations_of_attention_count() -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    tokens, width, blocks = 5, 64, 6  # four patches and the class token; the classifier sees one token
    block = tokens * width * (3 + 1 + 2 * 3) * width + 2 * tokens * tokens * width
    operations = 2 * (4 * 3 * 16 * 16 * width + blocks * block + width * 10)
    assert cost(model, DataConfig(image_size=32)).flops == operations


# ---- what is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "made", "words"),
    [
        (("0.8",), Pruning(0.8), "pruned by 80 %"),
        ((" 4/5", "layer"), Pruning(0.8, "layer"), "pruned by 80 % in each layer"),
        (
            ("0.25", "structured", 1),
            Pruning(0.25, "structured", 1),
            "25 % of channels pruned, 1 step of fine-tuning",
        ),
        (("2:4",), Pruning(0.5, "2:4"), "pruned 2:4"),
        (("1:4", "layer", 50), Pruning(0.75, "1:4", 50), "pruned 1:4, 50 steps of fine-tuning"),
    ],
)
def test_words_for_a_pruning(asked: tuple, made: Pruning, words: str) -> None:
    assert Pruning.parse(*asked) == made
    assert made.words == words


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("1",), "--prune is 1; expected a share between 0 and 1, such as 0.8"),
        (("0",), "--prune is 0; expected a share"),
        (("-0.5",), "--prune is -0.5; expected a share"),
        (("nan",), "--prune is 'nan'; expected a number such as 0.8, or N:M such as 2:4"),
        (("1e999",), "--prune is '1e999'; expected a number"),
        (("half",), "--prune is 'half'; expected a number"),
        (("4:2",), "--prune is '4:2'; expected N:M with N below M, such as 2:4"),
        (("0:4",), "--prune is '0:4'"),
        (("2:4:8",), "--prune is '2:4:8'"),
        (("2:4", "structured"), "--prune is 2:4, which is of single weights; --prune_how structured needs a share"),
        (
            ("0.5", "layers"),
            "--prune_how is 'layers'; expected one of global, layer, structured; did you mean 'layer'?",
        ),
        (("0.5", "global", -1), "--finetune is -1; expected a whole number in [0, inf)"),
    ],
)
def test_a_pruning_that_cannot_be_is_refused(asked: tuple, said: str) -> None:
    with pytest.raises(UsageError) as error:
        Pruning.parse(*asked)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
