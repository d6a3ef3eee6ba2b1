"""Saliency maps: laws that hold for every method, Captum and NumPy as oracles, and the sanity check."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import correlate, gaussian_laplace
from scipy.stats import spearmanr
from torch import Tensor, nn

from gmscale.data import DataConfig
from gmscale.errors import UsageError
from gmscale.evaluation.draws import uniform
from gmscale.evaluation.saliency.cam import gradcam, gradcam_plus_plus
from gmscale.evaluation.saliency.gradients import (
    COPIES,
    NOISE,
    STEPS,
    gradient,
    integrated,
    integrated_gradients,
    smoothgrad,
)
from gmscale.evaluation.saliency.lateral import lateral
from gmscale.evaluation.saliency.layers import at_each_layer, last_maps
from gmscale.evaluation.saliency.maps import METHODS, saliency
from gmscale.evaluation.saliency.randomisation import randomised, similarity
from gmscale.evaluation.subject import OnPixels
from gmscale.masking.inhibition import log_kernel

SIZE, COUNT = 64, 3
BY_GRID = ("log-paper", "log", "gradcam", "gradcam++")
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4, "patch_size": 4}
MODELS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_vit": {"img_size": SIZE},
    "swin_tiny_patch4_window7_224": {"img_size": SIZE, **SMALL_SWIN},
}

pixels = torch.rand(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
labels, indices = torch.tensor([0, 3, 9]), torch.tensor([4, 0, 300])


def made(name: str, **settings: Any) -> OnPixels:
    """A timm model on pixels, with random weights and statistics that a batch normalisation might have."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **{**MODELS.get(name, {}), **settings})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return OnPixels(model.eval().requires_grad_(False), DataConfig(image_size=SIZE))


def maps(model: nn.Module, method: str, chosen: slice = slice(None), seed: int = 0) -> Tensor:
    return saliency(model, pixels[chosen], labels[chosen], method, indices=indices[chosen], seed=seed)


@pytest.fixture(scope="module")
def models() -> dict[str, OnPixels]:
    return {name: made(name) for name in MODELS}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, models: dict[str, OnPixels]) -> OnPixels:
    return models[request.param]


# ---- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_map_is_of_its_image_alone(model: OnPixels, method: str) -> None:
    found = maps(model, method)
    assert found.shape == (COUNT, SIZE, SIZE)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found.amax((1, 2)) > found.amin((1, 2))).any()  # where no channel speaks for a class, its CAM is zero
    parts = torch.cat([maps(model, method, slice(0, 2)), maps(model, method, slice(2, None))])
    torch.testing.assert_close(parts, found, rtol=1e-3, atol=1e-4 * found.max().item())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(method: str, fails: bool) -> None:
    model = made("test_resnet")
    model.requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = pixels[:2].clone()
    targets = torch.tensor([1, 99 if fails else 2])
    with torch.no_grad():
        if fails:
            with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
                saliency(model, given, targets, method, indices=indices[:2], seed=0)
        else:
            saliency(model, given, targets, method, indices=indices[:2], seed=0)
        assert not torch.is_grad_enabled()
    assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not given.requires_grad
    assert torch.equal(given, pixels[:2])


class Quadrant(nn.Module):
    """Sees the lower right quarter of an image only, through ReLUs that work in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(inplace=True), nn.AvgPool2d(4), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(8, 10)
        self.head.weight.data.abs_()

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.zeros_like(x)
        seen[..., SIZE // 2 :, SIZE // 2 :] = x[..., SIZE // 2 :, SIZE // 2 :]
        features: Tensor = self.layers(seen)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


@pytest.mark.parametrize("method", METHODS)
def test_maps_lie_where_the_model_looks(method: str) -> None:
    found = maps(Quadrant(), method)
    inside = found[:, SIZE // 2 :, SIZE // 2 :].sum((1, 2)) / found.sum((1, 2))
    assert (inside > 0.7).all(), inside


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_of_the_label(models: dict[str, OnPixels], method: str) -> None:
    one = maps(models["test_resnet"], method)
    other = saliency(models["test_resnet"], pixels, (labels + 1) % 10, method, indices=indices, seed=0)
    assert (similarity(one, other) < 0.999).any()


@pytest.mark.parametrize("method", BY_GRID)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_recomputed_activations_change_nothing(models: dict[str, OnPixels], name: str, method: str) -> None:
    checkpointed = made(name)
    checkpointed.model.set_grad_checkpointing(True)  # type: ignore[operator]
    torch.testing.assert_close(maps(checkpointed, method), maps(models[name], method))


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(UsageError, match=r"--saliency is 'grad-cam'; expected one of .*did you mean 'gradcam'"):
        maps(Quadrant(), "grad-cam")


class Flat(nn.Module):
    """Has no grid anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 10), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


@pytest.mark.parametrize("method", BY_GRID)
def test_a_model_without_a_grid_is_named(method: str) -> None:
    model = OnPixels(Flat(), DataConfig(image_size=SIZE))
    with pytest.raises(UsageError, match=r"^Flat has no .*grid of positions.*gradient, smoothgrad or integrated$"):
        maps(model, method)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- layers ------------------------------------------------------------------------------------------------------


def heard(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the gradients at the model's layers, from the input on."""
    shapes: list[tuple[int, ...]] = []
    at_each_layer(model, pixels, labels, lambda g: shapes.append(tuple(g.shape[1:])))
    return shapes[::-1]


def test_layers_of_architectures(models: dict[str, OnPixels]) -> None:
    resnet = [m for m in models["test_resnet"].modules() if isinstance(m, nn.ReLU)]
    assert len(heard(models["test_resnet"])) == len(resnet) > 10
    assert heard(models["test_vit"]) == [(64, 4, 4)] * 6
    assert heard(models["swin_tiny_patch4_window7_224"]) == [(16, 16, 16), (32, 8, 8)]
    # NHWC within blocks that are NCHW outside; the squeeze of squeeze-and-excite has one position
    assert set(heard(models["test_convnext"])) == {(96, 16, 16), (128, 8, 8), (192, 4, 4), (256, 2, 2)}
    assert all(rows == cols > 1 for _, rows, cols in heard(models["test_efficientnet"]))


def test_stages_where_nothing_else_has_a_grid() -> None:
    small = {"embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    model = made("pvt_v2_b0", **small)
    assert heard(model) == [(8, 16, 16), (8, 8, 8), (8, 4, 4), (8, 2, 2)]


def test_last_layers_of_architectures(models: dict[str, OnPixels]) -> None:
    shapes = {name: last_maps(model, pixels, labels).activations.shape[1:] for name, model in models.items()}
    assert shapes["test_resnet"] == (96, 2, 2)
    assert shapes["test_convnext"] == (64, 2, 2)
    assert shapes["test_vit"] == (64, 4, 4)
    assert shapes["swin_tiny_patch4_window7_224"] == (32, 8, 8)


def test_a_stage_that_leaves_one_position_does_not_count() -> None:
    model: Any = made("resnet26")
    small = pixels[..., ::2, ::2]  # in the last stage, a branch of 2x2 begins a sum of 1x1
    with torch.no_grad():
        expected = model.model.forward_intermediates((small - model.mean) / model.std)
    found = last_maps(model, small, labels)
    assert found.activations.shape == (COUNT, 1024, 2, 2)
    torch.testing.assert_close(found.activations, expected[1][3])


def test_images_need_not_be_square(models: dict[str, OnPixels]) -> None:
    wide = pixels[..., :50, :]
    for name in ("test_resnet", "test_convnext"):
        for method in BY_GRID:
            found = saliency(models[name], wide, labels, method, indices=indices, seed=0)
            assert found.shape == (COUNT, 50, SIZE)
    assert last_maps(models["test_resnet"], wide, labels).activations.shape[1:] == (96, 2, 2)


class Pointwise(nn.Module):
    """A convolution of 1x1 and the same as a linear layer, where channels, rows and columns are equally many."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.act, self.head = nn.Linear(3, 16), nn.ReLU(), nn.Conv2d(16, 10, 16)
        self.conv = nn.Conv2d(3, 16, 1)
        self.conv.load_state_dict({"weight": self.linear.weight[..., None, None], "bias": self.linear.bias})
        self.by_linear = linear

    def forward(self, x: Tensor) -> Tensor:
        if self.by_linear:
            inner: Tensor = self.act(self.linear(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        else:
            inner = self.act(self.conv(x))
        logits: Tensor = self.head(inner).flatten(1)
        return logits


@pytest.mark.parametrize("method", ["log", "log-paper"])
def test_where_channels_are_is_not_guessed_from_sizes(method: str) -> None:
    small = pixels[..., :16, :16]
    one, other = (saliency(Pointwise(b), small, labels, method, indices=indices, seed=0) for b in (False, True))
    torch.testing.assert_close(one, other)


# ---- oracles -----------------------------------------------------------------------------------------------------


def bilinear(s: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """A map [rows, cols] at the centres of size x size pixels."""
    for axis in (0, 1):
        n = s.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, None)
        low = np.minimum(np.floor(at).astype(int), n - 1)
        part = np.expand_dims(at - low, 1 - axis)
        s = (1 - part) * s.take(low, axis) + part * s.take(np.minimum(low + 1, n - 1), axis)
    return s


def by_layers(model: nn.Module, kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The authors' method in NumPy: gradients as a hook of torch's graph sees them, images one by one."""
    maps = []
    for image, label in zip(pixels, labels, strict=True):
        gradients: list[NDArray[np.float64]] = []

        def listen(module: nn.Module, args: Any, output: Tensor, into: list[Any] = gradients) -> None:
            node: Any = output.grad_fn
            node.register_hook(lambda entering, leaving: into.append(entering[0][0].double().numpy()))

        handles = [m.register_forward_hook(listen) for m in model.modules() if isinstance(m, nn.ReLU)]
        model(image[None].requires_grad_())[0, label].backward()
        for handle in handles:
            handle.remove()
        assert gradients
        responses = [correlate(np.sqrt((g**2).sum(0)), kernel, mode="mirror") for g in gradients]
        maps.append(sum(np.maximum(bilinear(r, SIZE), 0) for r in responses))
    return np.stack(maps)


@pytest.mark.parametrize("name", ["quadrant", "test_resnet"])
def test_log_paper_is_the_authors_method(models: dict[str, OnPixels], name: str) -> None:
    model = Quadrant() if name == "quadrant" else models[name]
    impulse = np.zeros((5, 5))
    impulse[2, 2] = 1
    authors = -gaussian_laplace(impulse, sigma=11)
    expected = by_layers(model, authors / np.abs(authors).sum())
    np.testing.assert_allclose(maps(model, "log-paper"), expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_log_is_the_same_with_a_negative_lobe(models: dict[str, OnPixels]) -> None:
    kernel = log_kernel(1.0)
    assert kernel.shape == (7, 7)
    assert kernel.min() < -0.01
    expected = by_layers(models["test_resnet"], kernel.numpy())
    np.testing.assert_allclose(maps(models["test_resnet"], "log"), expected, rtol=1e-3, atol=1e-5 * expected.max())
    even = lateral(models["test_resnet"], pixels, labels, torch.zeros(5, 5, dtype=torch.float64))
    assert not even.any()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_gradients_are_captums(models: dict[str, OnPixels], name: str) -> None:
    attr = pytest.importorskip("captum.attr")
    model = models[name]
    expected = attr.Saliency(model).attribute(pixels.clone().requires_grad_(), labels, abs=True).amax(1)
    torch.testing.assert_close(gradient(model, pixels, labels), expected)
    expected = attr.IntegratedGradients(model).attribute(
        pixels, torch.zeros_like(pixels), labels, n_steps=STEPS, method="gausslegendre", internal_batch_size=COUNT
    )
    torch.testing.assert_close(integrated_gradients(model, pixels, labels), expected.float(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        integrated(model, pixels, labels), expected.float().sum(1).abs(), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_integrated_gradients_are_complete(models: dict[str, OnPixels], name: str) -> None:
    model = models[name]
    with torch.no_grad():
        change = (model(pixels) - model(torch.zeros_like(pixels))).gather(1, labels[:, None])[:, 0]
    total = integrated_gradients(model, pixels, labels).sum((1, 2, 3))
    torch.testing.assert_close(total, change, rtol=0, atol=0.02 * change.abs().max().item())


def test_smoothgrad_is_the_mean_over_noisy_images(models: dict[str, OnPixels]) -> None:
    attr = pytest.importorskip("captum.attr")
    model, images = models["test_vit"], 0.2 + torch.tensor([0.1, 0.5, 0.8])[:, None, None, None] * pixels
    total = torch.zeros(COUNT, SIZE, SIZE)
    spread = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    for copy in range(COPIES):
        normal = torch.distributions.Normal(0, 1).icdf(uniform(indices, 3 * SIZE * SIZE, (7, copy)))
        assert normal.std() == pytest.approx(1, abs=0.02)
        noisy = images + NOISE * spread[:, None, None, None] * normal.view(images.shape)
        total += attr.Saliency(model).attribute(noisy.requires_grad_(), labels, abs=True).amax(1)
    found = smoothgrad(model, images, labels, indices, seed=7)
    torch.testing.assert_close(found, total / COPIES, rtol=1e-3, atol=1e-6)
    assert not torch.equal(found, smoothgrad(model, images, labels, indices, seed=8))


def test_gradcam_is_captums(models: dict[str, OnPixels]) -> None:
    attr = pytest.importorskip("captum.attr")
    model: Any = models["test_resnet"]
    coarse = attr.LayerGradCam(model, model.model.layer4).attribute(pixels, labels, relu_attributions=True)
    expected = F.interpolate(coarse, (SIZE, SIZE), mode="bilinear")[:, 0].detach()
    torch.testing.assert_close(gradcam(model, pixels, labels), expected)


def last_by_hand(model: Any, layer: nn.Module) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Output of a layer and its gradient, float64."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(pixels.clone().requires_grad_())
    handle.remove()
    gradients = torch.autograd.grad(logits[range(COUNT), labels].sum(), kept[0])[0]
    return kept[0].detach().double().numpy(), gradients.double().numpy()


def cams(
    weights_of: Callable[[Any, Any], NDArray[np.float64]], A: NDArray[np.float64], G: NDArray[np.float64]
) -> NDArray[np.float64]:
    weights = weights_of(A, G)
    coarse = np.maximum((weights[:, :, None, None] * A).sum(1), 0)
    return np.stack([bilinear(one, SIZE) for one in coarse])


def plus_plus(A: NDArray[np.float64], G: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of Chattopadhay et al. 2018, equations 5 and 19, but for the factor exp(S)."""
    second, third = G**2, G**3
    alpha = second / (2 * second + A.sum((2, 3), keepdims=True) * third)
    return (alpha * np.maximum(G, 0)).sum((2, 3))


def test_gradcam_plus_plus_is_its_formula(models: dict[str, OnPixels]) -> None:
    model: Any = models["test_resnet"]
    A, G = last_by_hand(model, model.model.layer4)
    expected = cams(plus_plus, A, G)
    found = gradcam_plus_plus(model, pixels, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_cams_of_a_vision_transformer_weight_the_patches_of_its_last_block(models: dict[str, OnPixels]) -> None:
    model: Any = models["test_vit"]
    vit = model.model
    prefix = vit.num_prefix_tokens
    assert prefix > 0
    A, G = (
        x[:, prefix:].reshape(COUNT, 4, 4, -1).transpose(0, 3, 1, 2)
        for x in last_by_hand(model, vit.blocks[-1].norm1)
    )
    expected = cams(lambda A, G: G.mean((2, 3)), A, G)
    np.testing.assert_allclose(gradcam(model, pixels, labels), expected, rtol=1e-3, atol=1e-5 * expected.max())
    expected = cams(plus_plus, A, G)
    found = gradcam_plus_plus(model, pixels, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4 * expected.max())


# ---- sanity check ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_weights_are_drawn_anew_from_the_output_on(name: str) -> None:
    model = made(name).model
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():  # as if trained: no two alike
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    stages = list(randomised(model, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    names = [name for name, _ in model.named_parameters()]
    kept = [{n for n in names if torch.equal(before[n], copied.get_parameter(n))} for _, copied in stages]
    assert len(kept) == 4
    assert kept[3] == set()
    assert set(names) > kept[0] > kept[1] > kept[2] > kept[3]
    assert len({layer for layer, _ in stages}) == 4
    assert not any("head" in n or n.startswith("fc") for n in kept[0])
    for (_, one), (_, other) in zip(stages, randomised(model, seed=5), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert not one.training
    for module in stages[3][1].modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            assert torch.equal(module.running_var, torch.ones_like(module.running_var))
    other = next(randomised(model, seed=6))[1]
    assert any(not torch.equal(p, stages[0][1].get_parameter(n)) for n, p in other.named_parameters())


def test_what_layers_keep_for_evaluation_is_drawn_anew_too() -> None:
    settings = {"embed_dim": (16, 16, 16), "num_heads": (1, 1, 1), "key_dim": 8, "depth": (1, 1, 1)}
    model = made("levit_128s", img_size=SIZE, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("attention_biases"):
            parameter.normal_()
    model(pixels)  # keeps these biases, as the attention needs them
    found = list(randomised(model, seed=0))[-1][1]
    found(pixels)
    attentions: list[Any] = [m for m in found.modules() if hasattr(m, "attention_bias_cache")]
    kept = [(m, values) for m in attentions for values in m.attention_bias_cache.values()]
    assert kept
    for attention, values in kept:
        assert torch.equal(values, attention.attention_biases[:, attention.attention_bias_idxs])


def test_similarity_is_spearmans() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(6, 9, 11, generator=generator), torch.rand(6, 9, 11, generator=generator)
    b[1] += a[1]
    a[2] = (3 * a[2]).floor()  # ties
    b[2] = (2 * b[2] + a[2]).floor()
    b[3] = a[3] ** 3
    b[4] = -a[4]
    b[5] = 0.5
    found = similarity(a, b)
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a[:5], b[:5], strict=True)]
    np.testing.assert_allclose(found[:5], expected, atol=1e-12)
    assert found[2] > 0.2
    assert found[3] == pytest.approx(1, abs=1e-12)
    assert found[4] == pytest.approx(-1, abs=1e-12)
    assert found[5] == 0  # no order
