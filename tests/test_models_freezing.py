"""models.freeze: what trains, what rests, and patterns that name nothing."""

from typing import Any

import pytest
import torch
from torch import nn

from gmscale import config as configuration
from gmscale import models
from gmscale.config import FinetuneConfig
from gmscale.errors import UsageError
from gmscale.models import Frozen


def model(name: str = "test_resnet", **kwargs: Any) -> nn.Module:
    settings = {"model": {"name": name, "kwargs": kwargs}, "data": {"image_size": 32}}
    return models.create(configuration.from_dict(settings), 5)


def frozen(model: nn.Module, *patterns: str) -> Frozen:
    found = models.freeze(model, FinetuneConfig(freeze=list(patterns)))
    assert found is not None
    return found


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


class Tied(nn.Module):
    """Two layers that share a weight, and a third that has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight


def test_nothing_is_frozen_by_default() -> None:
    made = model()
    assert models.freeze(made, FinetuneConfig()) is None
    assert trained(made) == names(made)


def test_a_module_is_frozen_with_all_that_is_in_it() -> None:
    made = model()
    found = frozen(made, "layer1")
    assert set(found.parameters) == {name for name in names(made) if name.startswith("layer1.")}
    assert trained(made) == names(made) - set(found.parameters)
    assert list(found.modules) == ["layer1"]


def test_patterns_choose_among_modules_and_parameters() -> None:
    made = model("vit_tiny_patch16_224", depth=3)
    found = frozen(made, "blocks.[0-1]", "*_embed", "cls_token")
    assert trained(made) == {n for n in names(made) if n.startswith(("blocks.2.", "norm.", "head."))}
    assert list(found.modules) == ["patch_embed", "blocks.0", "blocks.1"]


def test_a_pattern_of_parameters_freezes_modules_that_have_no_others() -> None:
    made = model()
    found = frozen(made, "layer1.0.bn?.*", "conv1*")
    assert {name for name in found.modules if name.startswith("layer1.0")} == {
        f"layer1.0.{name}" for name, m in made.get_submodule("layer1.0").named_children() if "bn" in name
    }
    assert "layer1.0.conv1.weight" in trained(made)


def test_a_linear_probe_trains_the_classifier_alone() -> None:
    made = model()
    assert models.freeze(made, FinetuneConfig(linear_probe=True)) is not None
    assert trained(made) == {"fc.weight", "fc.bias"}


def test_a_linear_probe_trains_all_classifiers_that_a_model_has() -> None:
    made = model("deit_tiny_distilled_patch16_224", depth=1)
    assert models.freeze(made, FinetuneConfig(linear_probe=True)) is not None
    assert trained(made) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_frozen_modules_keep_their_statistics_and_have_no_dropout() -> None:
    made = model()
    found = frozen(made, "conv1*", "bn1", "layer1")
    before = {name: b.clone() for name, b in made.named_buffers()}
    for _ in range(2):
        made.train()
        found.hold()
        made(torch.randn(4, 3, 32, 32))
    changed = {name for name, b in made.named_buffers() if not torch.equal(b, before[name])}
    assert changed == {name for name in before if not name.startswith(("conv1.", "bn1.", "layer1."))}
    found.release()
    made.train()
    made(torch.randn(4, 3, 32, 32))
    assert all(not torch.equal(b, before[name]) for name, b in made.named_buffers())


def test_statistics_without_weights_rest_too() -> None:
    made = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1))
    found = frozen(made, "0", "1")
    made.train()
    found.hold()
    assert [m.training for m in made] == [False, False, True]


def test_a_shared_parameter_is_frozen_by_any_of_its_names() -> None:
    made = Tied()
    found = frozen(made, "second.weight")
    assert trained(made) == {"first.bias", "second.bias", "head.weight", "head.bias"}
    assert list(found.parameters) == ["first.weight"]
    assert not found.modules


def test_what_never_trained_is_not_released() -> None:
    made = model()
    made.get_parameter("conv1.0.weight").requires_grad_(False)
    found = frozen(made, "conv1", "layer1")
    found.release()
    assert trained(made) == names(made) - {"conv1.0.weight"}


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["layr1"], ["finetune.freeze", "'layr1'", "did you mean 'layer1'?"]),
        (["layer1", "layer1.0.conv9.weight"], ["'layer1.0.conv9.weight'", "did you mean 'layer1.0.conv"]),
        (["act1"], ["'act1'", "nothing to freeze"]),
        (["*"], ["freezes everything"]),
    ],
)
def test_patterns_that_make_no_sense(patterns: list[str], words: list[str]) -> None:
    made = model()
    with pytest.raises(UsageError) as caught:
        frozen(made, *patterns)
    assert all(word in str(caught.value) for word in words)
    assert trained(made) == names(made)


def test_a_probe_needs_a_classifier() -> None:
    with pytest.raises(UsageError, match=r"finetune\.linear_probe"):
        models.freeze(nn.Sequential(nn.Linear(2, 2)), FinetuneConfig(linear_probe=True))
