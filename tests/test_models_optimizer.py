"""Every optimizer of timm's trains, resumes exactly and leaves frozen weights alone, or is refused in one line."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from gmscale.checkpoint.tree import pack, unpack
from gmscale.config import OptimConfig
from gmscale.errors import UsageError
from gmscale.models import check_optimizer, optimizer, schedule

pytestmark = pytest.mark.filterwarnings("ignore:It is highly recommended")  # of kron: opt_einsum

NAMES = [str(name) for name in list_optimizers()]
REFUSED = {
    **{name: "CUDA required" for name in NAMES if name.startswith(("bnb", "fused"))},
    "adahessian": "needs second derivatives",
}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """kron compiles itself, a minute for each shape of a weight."""
    with torch.compiler.set_stance("force_eager"):
        yield


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Conv2d(2, 4, 3)
    return nn.Sequential(stem, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)  # of the images; an optimizer that draws from it would differ from rank to rank
        model(torch.randn(4, 2, 4, 4)).square().mean().backward()
        torch.manual_seed(len(steps))
        optimizer.step()
        optimizer.zero_grad()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("opt", [*NAMES, "lookahead_sgd", "lookahead_adamw", "Lookahead_Kron"])
def test_every_optimizer_goes_on_exactly_after_a_checkpoint_or_is_refused(opt: str) -> None:
    config = OptimConfig(opt=opt, lr=0.01, weight_decay=0.1)
    model = tiny()
    if opt in REFUSED and not (torch.cuda.is_available() and "CUDA" in REFUSED[opt]):
        with pytest.raises(UsageError, match=rf"optim\.opt {opt}.*{REFUSED[opt]}") as error:
            optimizer(model, config)
        assert "\n" not in str(error.value)
        return
    began = tiny()
    undisturbed = optimizer(model, config)
    train(model, undisturbed, range(7))  # lookahead looks back after six
    assert not same(model, began)
    tensors: dict[str, Tensor] = {}
    saved = json.loads(json.dumps(pack(undisturbed.state_dict(), tensors)))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed_model = tiny()
    resumed_model.load_state_dict(model.state_dict())
    resumed = optimizer(resumed_model, config)
    resumed.load_state_dict(unpack(saved, tensors))
    train(model, undisturbed, range(7, 14))
    train(resumed_model, resumed, range(7, 14))
    assert same(model, resumed_model)


@pytest.mark.parametrize("opt", [name for name in NAMES if name not in REFUSED])
def test_a_weight_without_gradient_stays_as_it_is_until_it_gets_one(opt: str) -> None:
    config = OptimConfig(opt=opt, lr=0.01, weight_decay=0.1)
    model = tiny()
    frozen = model[0]
    frozen.requires_grad_(False)
    began = frozen.weight.clone()
    made = optimizer(model, config, frozen_too=True)
    assert not frozen.weight.requires_grad
    train(model, made, range(2))
    assert torch.equal(frozen.weight, began)
    frozen.requires_grad_(True)
    train(model, made, range(2, 4))
    assert not torch.equal(frozen.weight, began)


def test_kron_draws_the_same_numbers_on_every_rank() -> None:
    one, other = tiny(), tiny()
    for seed, model in enumerate((one, other)):
        made = optimizer(model, OptimConfig(opt="kron", lr=0.01))
        model(torch.ones(4, 2, 4, 4)).square().mean().backward()
        torch.manual_seed(seed)
        made.step()
    assert same(one, other)


# ---- groups ----------------------------------------------------------------------------------------------------


def decayed(model: nn.Module, made: torch.optim.Optimizer) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p] for group in made.param_groups if group["weight_decay"] > 0 for p in group["params"]}


def test_biases_norms_and_what_the_model_or_the_settings_exclude_have_no_weight_decay() -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    plain = decayed(model, optimizer(model, OptimConfig()))
    weights = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert plain == weights - {"pos_embed", "cls_token"}
    less = decayed(model, optimizer(model, OptimConfig(no_weight_decay=["blocks.*.attn.*", "head.weight"])))
    assert less == {name for name in plain if ".attn." not in name and name != "head.weight"}
    assert decayed(model, optimizer(model, OptimConfig(weight_decay=0.0))) == set()


@pytest.mark.parametrize("layer_decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["test_vit", "test_byobnet", "test_convnext"])
def test_groups_are_timms(name: str, layer_decay: float) -> None:
    model = timm.create_model(name, num_classes=3)
    config = OptimConfig(opt="adamw", lr=0.01, weight_decay=0.1, layer_decay=layer_decay)
    expected = create_optimizer_v2(model, "adamw", 0.01, 0.1, layer_decay=layer_decay or None)
    found = optimizer(model, config)
    for ours, theirs in zip(found.param_groups, expected.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert ours | {"params": []} == theirs | {"params": []}
    assert found.defaults == expected.defaults | {"weight_decay": found.defaults["weight_decay"]}


@pytest.mark.parametrize("sched", ["cosine", "none"])
def test_layers_learn_slower_the_earlier_they_are(sched: str) -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    config = OptimConfig(lr=0.1, layer_decay=0.5, no_weight_decay=["blocks.0.*"], sched=sched)
    made = optimizer(model, config)
    if scheduler := schedule(made, config, 10, 5):
        scheduler.before(0)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    depth = len(model.blocks)
    assert rates[id(model.head.weight)] == 0.1
    for block in range(depth):
        for parameter in model.blocks[block].parameters():
            assert rates[id(parameter)] == pytest.approx(0.1 * 0.5 ** (depth - block))
    assert not any(name.startswith("blocks.0.") for name in decayed(model, made))


def test_what_will_unfreeze_is_grouped_as_if_it_trained() -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    config = OptimConfig(layer_decay=0.7)
    expected = [[id(p) for p in group["params"]] for group in optimizer(model, config).param_groups]
    model.blocks.requires_grad_(False)
    some = optimizer(model, config)
    found = optimizer(model, config, frozen_too=True)
    assert [[id(p) for p in group["params"]] for group in found.param_groups] == expected
    assert sum(len(group["params"]) for group in some.param_groups) < sum(map(len, expected))
    assert not any(p.requires_grad for p in model.blocks.parameters())


# ---- arguments ---------------------------------------------------------------------------------------------------


def test_arguments_reach_the_optimizer_and_its_groups() -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    made = optimizer(model, OptimConfig(opt="lookahead_adamw", opt_kwargs={"betas": [0.8, 0.9], "eps": 1e-6}))
    assert made.param_groups[0]["betas"] == (0.8, 0.9)
    assert made.param_groups[0]["lookahead_step"] == 0
    everything = OptimConfig(opt_kwargs={"filter_bias_and_bn": False})
    assert "norm.bias" in decayed(model, optimizer(model, everything))
    fallback = OptimConfig(opt="muon", opt_kwargs={"fallback_list": ["head.*"]})
    groups = optimizer(model, fallback).param_groups
    assert {id(p) for group in groups if group.get("use_fallback") for p in group["params"]} == {
        id(p) for p in model.head.parameters()
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opt": "adamv"}, r"optim\.opt: timm has no optimizer 'adamv'; did you mean 'adam"),
        ({"opt": "lookahead_sdg"}, r"timm has no optimizer 'lookahead_sdg'"),
        (
            {"opt": "adamw", "opt_kwargs": {"beta": 1}},
            r"of adamw has no field 'beta'; did you mean 'betas'",
        ),
        ({"opt_kwargs": {"betas": [0.9, 0.9]}}, r"opt_kwargs of sgd has no field 'betas'"),
        ({"opt_kwargs": {"lr": 1}}, r"opt_kwargs sets 'lr'; set optim\.lr instead"),
        ({"opt_kwargs": {"layer_decay_no_opt_scale": 0.1}}, r"set finetune\.freeze instead"),
        ({"opt_kwargs": {"layer_decay_min_scale": 0.1}}, r"has no field 'layer_decay_min_scale'"),
        ({"opt_kwargs": {"fallback_list": ["head.*"]}}, r"has no field 'fallback_list'"),
        ({"opt": "adamw", "opt_kwargs": {"betas": 0.9}}, r"optim\.opt adamw: "),
        ({"opt": "adamw", "opt_kwargs": {"betas": [0.9, 2.0]}}, r"optim\.opt adamw: Invalid beta"),
        ({"opt": "adamw", "opt_kwargs": {"eps": "small"}}, r"optim\.opt adamw: "),
    ],
)
def test_a_wrong_argument_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        optimizer(tiny(), OptimConfig(**settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "backend", "message"),
    [
        ({"no_weight_decay": ["pos_embd"]}, "ddp", r"no_weight_decay: 'pos_embd' .*did you mean 'pos_embed'"),
        (
            {"opt": "muon", "opt_kwargs": {"fallback_list": ["heads.*"]}},
            "ddp",
            r"opt_kwargs\.fallback_list: 'heads\.\*' matches no parameter",
        ),
        (
            {"opt": "kron"},
            "fsdp2",
            r"kron draws random numbers of its own, which parallel\.backend fsdp2 does not save",
        ),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(settings: Any, backend: str, message: str) -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    with pytest.raises(UsageError, match=message):
        check_optimizer(model, OptimConfig(**settings), backend)
    check_optimizer(model, OptimConfig(no_weight_decay=["pos_*"], layer_decay=0.7), backend)


def test_layer_decay_needs_layers() -> None:
    with pytest.raises(UsageError, match=r"optim\.layer_decay is 0\.7, but timm sees one layer"):
        check_optimizer(tiny(), OptimConfig(layer_decay=0.7), "single")
