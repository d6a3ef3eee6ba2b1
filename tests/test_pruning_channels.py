"""Structured pruning: the smaller model computes what the original does without those channels."""

import copy
import sys
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from gmscale.data import DataConfig
from gmscale.errors import UsageError
from gmscale.evaluation.pruning.channels import channels, without_channels

pytest.importorskip("torch_pruning")

SMALL = DataConfig(image_size=32)
CLASSES = 7

# Layer normalisation depends on all channels of a token, also on those at zero; so here transformers have none.
MODELS: dict[str, dict] = {
    "test_resnet": {},
    "test_byobnet": {},
    "test_efficientnet": {},  # depthwise, squeeze and excitation
    "mobilenetv3_small_050": {},
    "regnety_002": {},  # groups
    "test_vit": {"img_size": 32, "norm_layer": nn.Identity},
}


def random(name: str, **settings: object) -> nn.Module:
    """A model of whose parameters and statistics none is zero or one."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **settings).eval().requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for statistics in (module.weight, module.running_var):
                statistics.uniform_(0.5, 1.5)
            for statistics in (module.bias, module.running_mean):
                statistics.uniform_(-0.3, 0.3)
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            module.bias.uniform_(-0.3, 0.3)
            if name.endswith("qkv"):
                module.weight.mul_(30)  # so that attention is far from even
    return model


@pytest.fixture
def at_zero(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """Makes a copy of a model that has zeros where channels have been taken out of it."""
    import torch_pruning
    from torch_pruning.dependency import group as grouped

    taken: list[tuple[str, list[int]]] = []
    prune = grouped.Group.prune
    outputs = torch_pruning.function.PrunerBox.values()

    def noted(group: grouped.Group, *arguments: object) -> None:
        for dependency, indices in group:
            name = dependency.target.name.split(" ")[0]
            if any(dependency.handler == pruner.prune_out_channels for pruner in outputs):
                # what belongs to no layer of torch has no name there; here all of it is as wide as tokens
                names = ("cls_token", "pos_embed") if name.startswith("UnwrappedParameter") else (name,)
                taken.extend((name, [int(index) for index in indices]) for name in names)
        prune(group, *arguments)

    def zeroed(model: nn.Module) -> nn.Module:
        twin = copy.deepcopy(model)
        found = dict(twin.named_modules()) | dict(twin.named_parameters())
        for name, indices in taken:
            part = found[name]
            tensors = [part] if isinstance(part, Tensor) else list(part.parameters(recurse=False))
            for tensor in tensors:
                tensor[(..., indices) if isinstance(part, Tensor) else indices] = 0
        assert taken
        return twin

    monkeypatch.setattr(grouped.Group, "prune", noted)
    return zeroed


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_is_the_original_with_those_channels_at_zero(
    name: str, sparsity: float, at_zero: Callable[[nn.Module], nn.Module]
) -> None:
    model = random(name, **MODELS[name])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller = without_channels(model, sparsity, SMALL)
    images = torch.randn(4, 3, 32, 32)
    outputs, expected = smaller(images), at_zero(model)(images)
    assert outputs.shape == (4, CLASSES)
    assert torch.allclose(outputs, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(outputs, model(images), atol=0.1 * float(expected.abs().max()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert 1 - channels(smaller) / channels(model) == pytest.approx(sparsity, abs=0.06)  # groups of eight
    assert not any(p.requires_grad for p in smaller.parameters())


def test_the_channels_with_the_smallest_weights_go() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 10, 3)
            self.second = nn.Conv2d(10, 4, 3)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.second(self.first(images).relu()).relu().mean((2, 3)))

        def get_classifier(self) -> nn.Module:
            return self.head

    torch.manual_seed(0)
    model = Net()
    square = model.first.weight.square().sum((1, 2, 3)) + model.second.weight.square().sum((0, 2, 3))
    stays = square.topk(1).indices  # nine of ten go, also where (1 - 0.9) * 10 is a little less than one
    smaller = without_channels(model, 0.9, SMALL)
    assert torch.equal(smaller.first.weight, model.first.weight[stays])
    square = model.second.weight.square().sum((1, 2, 3)) + model.head.weight.square().sum(0)
    last = square.topk(1).indices  # of four one stays
    assert torch.equal(smaller.second.weight, model.second.weight[last][:, stays])
    assert torch.equal(smaller.head.weight, model.head.weight[:, last])
    assert torch.equal(smaller.head.bias, model.head.bias)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_convnext"])
def test_models_with_layer_normalisation_become_smaller(name: str) -> None:
    model = random(name)
    smaller = without_channels(model, 0.5, DataConfig(image_size=160))
    assert smaller(torch.randn(2, 3, 160, 160)).shape == (2, CLASSES)
    assert 1 - channels(smaller) / channels(model) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_vit3", "VisionTransformer: it does not know the heads of its AttentionPoolLatent"),
        ("test_nfnet", "NormFreeNet: "),
        ("ghostnet_050", "GhostNet: it would take"),
    ],
)
def test_models_that_cannot_be_taken_apart_are_refused(name: str, said: str) -> None:
    size = 160 if "vit" in name else 64
    with pytest.raises(UsageError) as error:
        without_channels(random(name), 0.5, DataConfig(image_size=size))
    assert f"--prune_how structured: torch-pruning cannot take channels from {said}" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UsageError, match=r'needs torch-pruning; run: pip install "gmscale\[eval\]"'):
        without_channels(nn.Linear(2, 2), 0.5, SMALL)
