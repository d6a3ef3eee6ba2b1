"""Site output: gradients of layer outputs, masked during backpropagation, against the oracle by hand."""

import copy
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import oracle
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import gmscale
from gmscale import GradientMask
from gmscale.errors import UsageError
from gmscale.masking.outputs import output_factor
from gmscale.sites.output import OUTPUT_DEFAULT, attach_output

FULL = GradientMask(operator="log", strength=1.0, error_feedback=False)
READ_BY_ORACLE = ("operator", "gate", "norm", "kappa", "sigma", "kernel_size", "paper_compat", "rescale")


class Net(nn.Module):
    """A CNN with in-place ReLUs, one of them used twice, and a last map of 4 x 4."""

    def __init__(self, double: bool = True) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3)
        self.act, self.fc = nn.GELU(), nn.Linear(6, 4)
        self.double() if double else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)) + x)
        return self.fc(self.act(self.pool(x)).mean((2, 3)))


def net(double: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(double)


def images(size: int = 12, n: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model: nn.Module, x: Tensor, loss_scale: float = 1.0) -> dict[str, Tensor]:
    """Gradients of the parameters and of the input; every output of a layer gets a gradient of its own."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (loss_scale * (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y)).sum()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n.replace("_orig_mod.", ""): g for n, g in found.items()} | {"input": x.grad}


def by_hand(model: nn.Module, names: Iterable[str], mask: GradientMask, layout: str, grid: Any = None) -> nn.Module:
    """Mask the gradients of these modules' outputs with the oracle."""
    settings = {n: getattr(mask, n) for n in READ_BY_ORACLE}

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        def masked(g: Tensor) -> Tensor:
            if g.ndim < 3:
                return g
            found = oracle.apply_output(g.double().numpy(), mask.peak_strength, layout, grid, **settings)
            return torch.from_numpy(found).to(g.dtype)

        output.register_hook(masked)

    for name in names:
        model.get_submodule(name).register_forward_hook(hook)
    return model


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference relative to each tensor's largest entry."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / (b[n].abs().max() + 1e-30)) for n in a)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def of_type(*types: str) -> Callable[[nn.Module], list[str]]:
    return lambda model: [n for n, m in model.named_modules() if type(m).__name__ in types]


# -- real models against the oracle -------------------------------------------------------------------------------
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "drop_path_rate": 0.0}


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "layers", "names", "layout", "grid"),
    [
        ("test_resnet", {}, 64, None, of_type("ReLU"), "NCHW", None),
        ("test_byobnet", {}, 64, None, of_type("ReLU"), "NCHW", None),
        ("test_efficientnet_ln", {}, 64, None, of_type("SiLU"), "NCHW", None),
        ("test_convnext", {}, 64, None, of_type("GELUTanh"), "NHWC", None),
        ("test_convnext", {}, 64, "stages", lambda m: [f"stages.{i}" for i in range(4)], "NCHW", None),
        ("test_resnet", {}, 64, ["stage1", "layer2.0"], lambda m: ["layer1", "layer2.0"], "NCHW", None),
        ("swin_tiny_patch4_window7_224", SWIN, 56, None, of_type("SwinTransformerBlock"), "NHWC", None),
        ("vit_tiny_patch16_224", VIT | {"img_size": 56}, 56, None, of_type("Block"), "NLD", (7, 7, 1)),
        (
            "vit_tiny_patch16_224",
            VIT | {"img_size": 56, "reg_tokens": 4},
            56,
            ["blocks.*"],
            of_type("Block"),
            "NLD",
            (7, 7, 5),
        ),
        ("vit_tiny_patch16_224", VIT | {"dynamic_img_size": True}, 64, "GELU", of_type("GELU"), "NLD", (8, 8, 1)),
        ("test_vit3", {}, 160, None, of_type("ParallelScalingBlock", "Block"), "NLD", (10, 10, 1)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_timm_models_are_masked_as_by_hand(name, kwargs, size, layers, names, layout, grid):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **kwargs).double().train()
    with torch.no_grad():  # models initialised with zeros would let nothing through
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.ndim > 1 else 1 + 0.1 * torch.randn_like(p))
    reference = by_hand(copy.deepcopy(model), names(model), FULL, layout, grid)
    plain = gradients(copy.deepcopy(model), images(size, 2))
    attachment = attach_output(model, FULL, layers)
    assert [t.name for t in attachment.touched] == names(model)
    masked = gradients(model, images(size, 2))
    assert difference(masked, gradients(reference, images(size, 2))) < 1e-9
    assert difference(masked, plain) > 1e-3
    assert 0 < attachment.report().kept_entries < 1


def test_grids_follow_images_of_varying_size():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT, dynamic_img_size=True).double().train()
    plain = copy.deepcopy(model)
    attach_output(model, FULL)
    for rows, cols in ((8, 7), (7, 9)):
        x = images(72)[:, :, : 8 * rows, : 8 * cols]
        reference = by_hand(copy.deepcopy(plain), ["blocks.0", "blocks.1"], FULL, "NLD", (rows, cols, 1))
        assert difference(gradients(model, x), gradients(reference, x)) < 1e-9


@pytest.mark.parametrize(
    "settings",
    [
        {"operator": "log", "sigma": 0.7},
        {"operator": "log", "norm": "l1", "strength": 0.3},
        {"operator": "log", "paper_compat": True, "sigma": 1.0},
        {"operator": "dog"},
        {"operator": "licnn", "norm": "max"},
        {"operator": "pool"},
        {"operator": "pool", "gate": "soft"},
        {"operator": "log", "rescale": True},
    ],
    ids=lambda s: " ".join(map(str, s.values())),
)
@pytest.mark.filterwarnings("ignore:paper_compat")
def test_every_operator_is_the_oracles(settings):
    mask = GradientMask(**{"strength": 0.8, "error_feedback": False} | settings)
    reference = by_hand(net(), ["relu", "act"], mask, "NCHW")
    model = net()
    attach_output(model, mask, ["ReLU", "GELU"])
    assert difference(gradients(model, images()), gradients(reference, images())) < 1e-9


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_in_every_precision_and_memory(memory_format, dtype):
    g = torch.randn(3, 5, 9, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    for norm in ("l2", "l1", "max"):
        mask = GradientMask(operator="log", norm=norm, error_feedback=False)
        factor, _ = output_factor(g.to(memory_format=memory_format), 1, mask, 0.75)
        last, _ = output_factor(g.to(memory_format=memory_format).movedim(1, -1), 3, mask, 0.75)
        assert torch.equal(factor.movedim(1, -1), last)
        for sample, m in zip(g.double().numpy(), factor.numpy(), strict=True):
            s = oracle.output_map(sample.transpose(1, 2, 0), norm)
            clear = ~oracle.near_threshold(s, 1e-5, operator="log")
            expected = 1 - 0.75 * (1 - oracle.keep_map(s, operator="log"))
            np.testing.assert_allclose(m[0][clear], expected[clear], rtol=1e-6)
            assert clear.mean() > 0.95


# -- laws ---------------------------------------------------------------------------------------------------------
def masked_alone(g: Tensor, mask: GradientMask) -> Tensor:
    """Send g[N, C, H, W] backwards through one masked layer."""
    model = nn.Sequential(nn.Conv2d(2, g.shape[1], 1), nn.ReLU()).to(g.dtype)
    attach_output(model, mask)
    arrived = []
    model[0].register_forward_hook(lambda m, a, out: out.register_hook(lambda v: arrived.append(v)) and None)
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(1.0)  # so that the ReLU lets everything through
    model(torch.ones(g.shape[0], 2, *g.shape[2:], dtype=g.dtype)).backward(g)
    return arrived[0]


def test_strength_zero_and_detach_and_eval_are_the_identity_bit_for_bit():
    x = images()
    plain = gradients(net(), x)
    zero, detached, off, evaluated = net(), net(), net(), net().eval()
    attach_output(zero, GradientMask(operator="log", strength=0.0))
    attach_output(detached, FULL).detach()
    attach_output(off, OUTPUT_DEFAULT).at(99, 100)
    assert not detached.relu._forward_hooks
    for model in (zero, detached, off):
        assert equal(gradients(model, x), plain)
    expected = gradients(copy.deepcopy(evaluated), x)
    attach_output(evaluated, FULL)
    assert equal(gradients(evaluated, x), expected)
    with torch.no_grad():
        attach_output(net(), FULL)
        net()(x)


@pytest.mark.parametrize("operator", ["pool", "log", "dog", "licnn"])
def test_scale_support_and_samples_of_their_own(operator):
    mask = GradientMask(operator=operator, strength=0.6, error_feedback=False)
    g = torch.randn(4, 3, 8, 9, generator=torch.Generator().manual_seed(2))
    masked = masked_alone(g, mask)
    assert torch.equal(masked_alone(g * 2.0**10, mask), masked * 2.0**10)
    ratio = masked / g
    assert 0.4 - 1e-6 <= ratio.min() < 0.5
    assert ratio.max() <= 1
    assert torch.equal(masked_alone(g[2:3], mask)[0], masked[2])


def test_non_finite_samples_stay_visible_and_alone():
    g = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = masked_alone(g, FULL)
    g[1, 0, 2, 2], g[1, 1, 5, 5] = float("nan"), float("inf")
    masked = masked_alone(g, FULL)
    assert torch.equal(masked[[0, 2]], expected[[0, 2]])
    assert torch.equal(masked[1].nan_to_num(), g[1].nan_to_num())
    assert masked[1, 0, 2, 2].isnan()
    assert masked[1, 1, 5, 5].isinf()


def test_no_contrast_and_small_maps_pass():
    flat = torch.ones(2, 3, 8, 8)
    assert torch.equal(masked_alone(flat, FULL), flat)
    model = net()
    attachment = attach_output(model, FULL, ["relu", "act"])
    gradients(model, images())
    assert attachment.passed == ("act",)  # 4 x 4
    assert [t.name for t in attachment.touched] == ["relu", "act"]
    assert [t["name"] for t in attachment.describe()["touched"]] == ["relu"]


def test_a_mask_that_touches_nothing_is_an_error():
    small = net()
    attach_output(small, FULL)
    with pytest.raises(UsageError, match=r"touches nothing.*at least 7x7"):
        small(images(6))
    frozen = net()
    attach_output(frozen, FULL, ["norm1"])
    frozen.conv1.requires_grad_(False)
    frozen.norm1.requires_grad_(False)
    with pytest.raises(UsageError, match="touches nothing"):
        frozen(images())
    with pytest.raises(UsageError, match="no parameter that requires a gradient"):
        attach_output(net().requires_grad_(False), FULL)


# -- time ---------------------------------------------------------------------------------------------------------
def test_the_schedule_is_looked_up_in_the_backward_pass():
    scheduled = GradientMask(operator="log", strength=1.0, start=0.5, error_feedback=False)
    model, always = net(), net()
    attachment = attach_output(model, scheduled)
    attach_output(always, FULL)
    with pytest.raises(UsageError, match=r"attachment\.at\(step, total_steps\)"):
        gradients(model, images())
    plain, masked = gradients(net(), images()), gradients(always, images())
    for step, expected in ((0, plain), (4, plain), (5, masked), (9, masked)):
        attachment.at(step, 10)
        assert equal(gradients(model, images()), expected)
        attachment.at(step, 10)


def test_every_backward_pass_is_masked_accumulating_or_not():
    model, parts = net(), net()
    attachment = attach_output(model, FULL)
    attach_output(parts, FULL)
    one, two = gradients(parts, images(seed=1))["conv1.weight"], gradients(parts, images(seed=2))["conv1.weight"]
    with attachment.no_sync():
        gradients(model, images(seed=1))
    held = model.conv1.weight.grad.clone()
    y = model(images(seed=2))
    (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y)).sum().backward()
    assert torch.equal(held, one)
    torch.testing.assert_close(model.conv1.weight.grad, one + two)


def test_random_draws_are_a_function_of_step_and_micro_batch():
    mask = GradientMask(operator="random", random_like="log", strength=1.0, error_feedback=False)

    def drawn(*steps: int) -> list[dict[str, Tensor]]:
        model = net()
        attachment = attach_output(model, mask)
        found = []
        for step in steps:
            attachment.at(step)
            found += [gradients(model, images()) for _ in range(2)]
        return found

    first, second, third, _ = drawn(3, 4)
    again = drawn(4)  # as after a resume
    assert equal(third, again[0])
    assert not equal(first, second)
    assert not equal(first, third)
    like, shuffled = net(), net()
    reports = []
    for model, m in ((like, FULL), (shuffled, mask)):
        attachment = attach_output(model, m, "norm2")
        attachment.at(0)
        gradients(model, images())
        reports.append(attachment.report())
    assert reports[0].kept_entries == pytest.approx(reports[1].kept_entries)
    assert reports[0].kept_energy > reports[1].kept_energy


# -- how models run -----------------------------------------------------------------------------------------------
class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        def middle(x: Tensor) -> Tensor:
            x = self.relu(self.norm1(self.conv1(x)))
            return self.relu(self.norm2(self.conv2(x)) + x)

        x = checkpoint(middle, x, use_reentrant=self.reentrant)
        return self.fc(self.act(self.pool(x)).mean((2, 3)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_masks_once(reentrant):
    torch.manual_seed(0)
    model, plain = Checkpointed(), net()
    model.reentrant = reentrant
    attachment = attach_output(model, FULL, "ReLU")
    attach_output(plain, FULL, "ReLU")
    assert difference(gradients(model, images()), gradients(plain, images())) < 1e-12
    assert attachment._calls["relu"] == 2  # used twice in a forward pass


def test_autocast_masks_low_precision_gradients_in_float32():
    def under_autocast(model: nn.Module) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):  # the backward pass too, as some loops have it
            return gradients(model, images(dtype=torch.float32))

    seen = []
    model, reference = net(double=False), net(double=False)
    attach_output(model, FULL, "conv2")
    model.conv2.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    by_hand(reference, ["conv2"], FULL, "NCHW")
    assert difference(under_autocast(model), under_autocast(reference)) < 1e-6
    assert seen == [torch.bfloat16]


def test_what_changes_an_output_in_place_afterwards():
    model, reference = net(), net()  # norm1's output is what the in-place ReLU overwrites
    by_hand(reference, ["norm1", "conv2"], FULL, "NCHW")
    attach_output(model, FULL, ["norm1", "conv2"])
    assert difference(gradients(model, images()), gradients(reference, images())) < 1e-9


class Branches(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.pack = nn.Conv2d(3, 4, 3, padding=1), pack

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.pack(y * 1.0, y.sum())


def test_tuples_are_masked_at_their_first_tensor_and_others_refused():
    def trained(pack: Callable[[Tensor, Tensor], Any], attach: bool, take: Any = 0) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(Branches(pack))
        if attach:
            attach_output(model, FULL, "0:NCHW")
        y = model(images(dtype=torch.float32))[take]
        (y * torch.linspace(-1, 1, y.numel()).view_as(y).sin()).sum().backward()
        return model[0].conv.weight.grad

    plain = trained(lambda y, z: (y, z), attach=False)
    assert not torch.equal(trained(lambda y, z: (y, z), attach=True), plain)
    assert torch.equal(trained(lambda y, z: (y, z), attach=True), trained(lambda y, z: [y, z], attach=True))
    with pytest.raises(UsageError, match="returns dict; expected a tensor"):
        trained(lambda y, z: {"y": y}, attach=True, take="y")


def test_copies_of_a_model_and_its_parameter_site():
    x = images()
    model, output_only = net(), net()
    weights = GradientMask(strength=1.0, error_feedback=False, block=1)
    attach_output(output_only, FULL)
    masked = gradients(output_only, x)
    both = (gmscale.attach(model, FULL, site="output"), gmscale.attach(model, weights, site="single"))
    found = gradients(model, x)
    for name, g in masked.items():
        expected = weights.apply(g) if g.ndim > 1 and name != "input" else g
        assert torch.equal(found[name], expected)
    assert both[0].report().layers.keys() == {"relu"}
    assert "conv1.weight" in both[1].report().layers
    average = copy.deepcopy(model)  # hooks and all
    average.eval()(x)


# -- torch.compile ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["attach first", "compile first", "run first"])
def test_compiled_models_are_masked_whatever_came_first(order):
    torch.compiler.reset()
    x, model, eager = images(), net(), net()
    expected_attachment = attach_output(eager, FULL)
    expected = gradients(eager, x)
    if order == "attach first":
        attachment = attach_output(model, FULL)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if order == "run first":
        gradients(compiled, x)
    if order != "attach first":
        attachment = attach_output(compiled, FULL)
    assert difference(gradients(compiled, x), expected) < 1e-12
    assert [t.name for t in attachment.touched] == ["relu", "act"]
    assert attachment.touched[0].map_shape == (12, 12)
    assert attachment.passed == ("act",)
    assert attachment.report().layers["relu"] == pytest.approx(expected_attachment.report().layers["relu"])


def test_changing_strength_neither_recompiles_nor_breaks_the_graph():
    torch.compiler.reset()
    counters.clear()
    x, model = images(), net()
    plain = gradients(net(), x)
    attachment = attach_output(model, GradientMask(operator="log", strength=1.0, warmup=0.9, error_feedback=False))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(UsageError, match=r"attachment\.at"):
        gradients(compiled, x)
    found = []
    for step in (0, 3, 6, 9):
        attachment.at(step, 10, observe=step != 6)
        found.append(gradients(compiled, x))
        report = attachment.report()
        assert (report.kept_entries is None) == (step in (0, 6))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert equal(found[0], plain)
    assert not equal(found[1], found[2])
    attachment.detach()
    assert equal(gradients(compiled, x), plain)


def test_compiled_for_images_of_varying_size():
    torch.compiler.reset()
    counters.clear()

    def tiny() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).double()

    model, eager, small = tiny(), tiny(), tiny()
    for m in (model, eager, small):
        attach_output(m, FULL)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for size, n in ((12, 3), (9, 2), (10, 4), (5, 2)):
        x = images(size, n)
        assert difference(gradients(compiled, x), gradients(eager, x)) < 1e-12
    assert not counters["graph_break"]
    with pytest.raises(UsageError, match="touches nothing"):
        torch.compile(small, backend="aot_eager")(images(5))


def test_compiled_tokens_in_bfloat16():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=56, **VIT | {"depth": 1}).train()
    eager = copy.deepcopy(model)
    attach_output(eager, FULL)
    attach_output(model, FULL)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        x = images(56, 2, dtype=torch.float32)
        assert difference(gradients(compiled, x), gradients(eager, x)) < 2e-2


@pytest.mark.slow
def test_inductor_masks_as_eager_does():
    torch.compiler.reset()

    def tiny() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).double()

    model, eager = tiny(), tiny()
    attach_output(eager, FULL)
    attachment = attach_output(model, GradientMask(operator="log", strength=1.0, start=0.5, error_feedback=False))
    compiled = torch.compile(model)
    attachment.at(0, 2)
    try:
        plain = gradients(compiled, images())
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no C++ compiler: {error}")
    assert difference(plain, gradients(tiny(), images())) < 1e-9
    attachment.at(1, 2)
    assert difference(gradients(compiled, images()), gradients(eager, images())) < 1e-9


# -- which layers -------------------------------------------------------------------------------------------------
def names(layers: Any, model: str = "test_resnet", mask: GradientMask = FULL, sigmas: Any = None) -> list[str]:
    return [t.name for t in attach_output(timm.create_model(model), mask, layers, sigmas).touched]


def test_words_choose_layers():
    assert names("stages") == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert names("stage2") == ["layer2"]
    assert names("layer2.*") == ["layer2.0.act1", "layer2.0.act2"]  # a pattern means activations
    assert names("layer2.0.bn?") == ["layer2.0.bn1", "layer2.0.bn2"]  # or what it says
    assert names("layer2.?") == ["layer2.0"]
    assert names(["Bottleneck", "layer1"])[0] == "layer1"
    assert names("blocks.[01]*", "test_vit") == ["blocks.0", "blocks.1"]
    some = GradientMask(operator="log", include=("layer1.*",), exclude=("*.act2",))
    assert names(None, mask=some) == ["layer1.0.act1"]
    assert names([]) == names(None)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("RelU", "did you mean 'ReLU'"),
        (["ReLU", "layer9"], "did you mean 'layer"),
        ("stage9", "did you mean 'stage"),
        ("layer1.*:NWHC", "expected NCHW, NHWC or a grid"),
    ],
)
def test_words_that_match_nothing_name_the_nearest(layers, said):
    with pytest.raises(UsageError, match=said) as caught:
        names(layers)
    assert "\n" not in str(caught.value)


def test_include_and_exclude_that_leave_nothing():
    with pytest.raises(UsageError, match="touches nothing: of 12 layers"):
        names(None, mask=GradientMask(operator="log", exclude=("*",)))


def test_sigma_by_stage_and_pattern():
    model = timm.create_model("test_resnet")
    attachment = attach_output(model, GradientMask(operator="dog", strength=1.0), None, [1, 2, 3, 4, 5])
    sigma = {layer.name: layer.mask.sigma for layer in attachment._layers}
    assert {s for n, s in sigma.items() if n.startswith("layer")} == {2, 3, 4, 5}
    assert sigma["layer3.0.act1"] == 4
    assert sigma["conv1.2"] == sigma["act1"] == 1
    by_word = attach_output(model, FULL, "ReLU", {"layer3.*": 2.5, "stage4": 0.5})._layers
    assert {x.mask.sigma for x in by_word if x.name.startswith("layer3")} == {2.5}
    assert {x.mask.sigma for x in by_word if x.name.startswith("layer4")} == {0.5}
    assert {x.mask.sigma for x in by_word if x.name.startswith("layer1")} == {None}
    for sigmas, said in (
        ([1, 2], "one for each of timm's 5 feature stages"),
        ({"layr3.*": 1.0}, "did you mean 'layer3"),
        ({"layer3.0.conv1": 1.0}, "none of the chosen layers"),
        ({"stage1": 0.0}, "expected a number"),
    ):
        with pytest.raises(UsageError, match=said):
            names(None, sigmas=sigmas)
    with pytest.raises(UsageError, match="operators log and dog, not 'pool'"):
        names(None, mask=GradientMask(), sigmas=[1, 2, 3, 4, 5])


class Own(nn.Module):
    """Not timm's: blocks of which nobody knows where their channels are, tokens whose grid nobody knows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.mix = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(2), nn.Linear(64, 64))
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x).transpose(1, 2)
        return self.norm(x if self.how == "tokens" else x.unflatten(1, (8, 8)))


def test_a_layout_that_cannot_be_told_is_asked_for():
    x = images(8, dtype=torch.float32)
    unknown, mixed = Own("tokens"), nn.Sequential(Own("image"), nn.ReLU())
    attach_output(unknown, FULL, "norm")
    with pytest.raises(UsageError, match=r"grid of these tokens is unknown.*'norm:14x14\+1'"):
        unknown(x)
    attach_output(mixed, FULL, "0")
    with pytest.raises(UsageError, match="'0:NCHW' or '0:NHWC'"):
        mixed(x)
    for how, word, layout in (("tokens", "norm:8x8", "NLD"), ("image", "norm:NHWC", "NHWC")):
        torch.manual_seed(0)
        model = Own(how)
        reference = by_hand(copy.deepcopy(model), ["norm"], FULL, layout, (8, 8, 0))
        attach_output(model, FULL, word)
        assert difference(gradients(model, x), gradients(reference, x)) < 1e-5


def test_two_layers_that_return_one_tensor_are_refused():
    model = timm.create_model("test_resnet").train()
    attach_output(model, FULL, ["layer1.0.act2", "layer1.0"])
    with pytest.raises(UsageError, match="return the same tensor; choose one"):
        model(images(64, dtype=torch.float32))


# -- what is reported ---------------------------------------------------------------------------------------------
def test_described_as_json_before_and_after_and_without_state():
    model = net()
    attachment = attach_output(model, GradientMask(operator="log", sigma=1.0))  # error feedback: on, and ignored
    assert json.loads(json.dumps(attachment.describe()))["touched"][0] == {
        "name": "relu",
        "shape": None,
        "map": None,
        "unit": "position",
        "entries": None,
    }
    names_before = [t.name for t in attachment.touched]
    gradients(model, images())
    gradients(model, images())
    described = json.loads(json.dumps(attachment.describe()))
    assert described["touched"][0]["shape"] == [6, 12, 12]
    assert described["touched"][0]["map"] == [12, 12]
    assert described["timing"] == "each backward"
    assert [t.name for t in attachment.touched] == names_before
    state = attachment.state_dict()
    assert state["residuals"] == {}
    attachment.load_state_dict(state)
    report = attachment.report()
    assert report.hook_ms > 0
    assert 0 < report.kept_entries < report.kept_energy < 1
    assert report.strength == 0.5
    assert OUTPUT_DEFAULT.strength_at(5, 100) == OUTPUT_DEFAULT.strength_at(65, 100) == 0
    assert OUTPUT_DEFAULT.strength_at(10, 100) == OUTPUT_DEFAULT.strength_at(64, 100) == 0.25
