"""The laws of all attacks, attacks whose best answer is known, and Captum and ART as oracles of FGSM and PGD."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gmscale.data import DataConfig, normalize
from gmscale.errors import UsageError
from gmscale.evaluation.attacks import Attack, apgd, fgsm, pgd, random_start, square, survivors
from gmscale.evaluation.attacks.ball import direction
from gmscale.evaluation.attacks.losses import cross_entropy, dlr
from gmscale.evaluation.subject import OnPixels

NORMS = ("linf", "l2")
ULP = 1e-6
OWN = ("fgsm", "pgd", "apgd-ce", "apgd-dlr", "square")  # without surrogates


def length(change: Tensor, norm: str) -> Tensor:
    flat = change.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def samples(count: int = 300, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [N, 3, 8, 8], labels and indices: noisy versions of five pictures, some of them saturated."""
    pictures = 0.4 + 0.2 * torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    return (pictures[labels] + 0.25 * noise).clamp(0, 1), labels, torch.arange(count)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small network that was trained to tell them apart."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(288, 5)
    )
    pixels, labels, _ = samples(seed=2)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(made(pixels), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return made.eval()


class Margin(nn.Module):
    """Two classes whose logits differ by w . (x - 0.5), times `scale`: the best attack is known."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.w = scale * torch.linspace(-1, 2, 12).view(3, 2, 2)
        self.offset = offset

    def forward(self, pixels: Tensor) -> Tensor:
        margin = ((pixels - 0.5) * self.w).sum((1, 2, 3)) + self.offset
        return torch.stack((margin, torch.zeros_like(margin)), 1)


# ---- laws --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 1) | st.just(4 / 255),
    steps=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_what_comes_back_is_an_image_within_eps(
    model: nn.Module, norm: str, eps: float, steps: int, seed: int
) -> None:
    pixels, labels, indices = samples(16)
    start = random_start(pixels, indices, eps=eps, norm=norm, key=(seed, 0))
    assert (length(start, norm) <= eps + ULP).all()
    for attacked in (
        fgsm(model, pixels, labels, eps=eps, norm=norm),
        pgd(model, pixels, labels, start, eps=eps, norm=norm, steps=steps),
        apgd(model, pixels, labels, start, eps=eps, norm=norm, steps=steps, loss=cross_entropy),
        apgd(model, pixels, labels, start, eps=eps, norm=norm, steps=steps, loss=dlr),
        square(model, pixels, labels, indices, eps=eps, norm=norm, queries=5 * steps, key=(seed, 0))[0],
    ):
        assert attacked.shape == pixels.shape
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert (length(attacked - pixels, norm) <= eps + ULP).all()


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_is_at_least_as_strong_as_fgsm(model: nn.Module, norm: str) -> None:
    pixels, labels, indices = samples()
    eps = 0.03 if norm == "linf" else 0.3
    attack = Attack(attack="fgsm", norm=norm, eps=eps)
    correct, after_fgsm, _ = survivors(model, pixels, labels, indices, attack, 0)
    attack = Attack(attack="pgd", norm=norm, eps=eps, steps=10)
    after_pgd = survivors(model, pixels, labels, indices, attack, 0).robust
    assert correct.sum() > 200
    assert after_pgd.sum() < after_fgsm.sum() < 0.5 * correct.sum()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [name for name in OWN if name != "fgsm"])
def test_robust_images_were_correct_and_restarts_leave_fewer(model: nn.Module, name: str, norm: str) -> None:
    pixels, labels, indices = samples()
    eps = 0.05 if norm == "linf" else 0.3
    left = []
    for restarts in (1, 2, 6):
        steps = 20 if name == "square" else 2
        attack = Attack(attack=name, norm=norm, eps=eps, steps=steps, restarts=restarts)
        correct, robust, _ = survivors(model, pixels, labels, indices, attack, 0)
        assert not (robust & ~correct).any()
        left.append(robust)
    assert not (left[1] & ~left[0]).any()
    assert not (left[2] & ~left[1]).any()
    assert left[2].sum() < left[0].sum()


@pytest.mark.parametrize("attack", OWN)
def test_without_room_nothing_changes(model: nn.Module, attack: str) -> None:
    for norm in NORMS:
        correct, robust, _ = survivors(model, *samples(), Attack(attack=attack, norm=norm, eps=0, steps=2), 0)
        assert torch.equal(correct, robust)
        assert 0 < correct.sum() < 300  # some are wrong from the start


@pytest.mark.parametrize("name", [*OWN, "transfer"])
def test_images_do_not_depend_on_their_batch(model: nn.Module, name: str) -> None:
    pixels, labels, indices = samples(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    for norm in NORMS:
        eps, steps = 0.03 if norm == "linf" else 0.3, 20 if name == "square" else 3
        attack = Attack(attack=name, norm=norm, eps=eps, steps=steps, restarts=2)
        whole = survivors(model, pixels, labels, indices, attack, 7, [model])
        assert 0 < whole.robust.sum() < whole.correct.sum()
        parts = [survivors(model, pixels[o], labels[o], indices[o], attack, 7, [model]) for o in order.split(7)]
        assert torch.equal(torch.cat([part.robust for part in parts]), whole.robust[order])
        assert torch.equal(torch.cat([part.queries for part in parts]), whole.queries[order])


@pytest.mark.parametrize("name", [*OWN, "transfer"])
def test_the_model_is_left_as_it_is(model: nn.Module, name: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0].weight.grad = torch.full_like(model[0].weight, 7)
    survivors(model, *samples(20), Attack(attack=name, eps=0.1, steps=2), 0, [model])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert (model[0].weight.grad == 7).all()
    model[0].weight.grad = None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# ---- where the best attack is known ------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_linear_model_loses_the_dual_norm_of_its_weights(norm: str, dual: int) -> None:
    model, eps = Margin(offset=3.0), 0.1
    pixels, labels = torch.full((2, 3, 2, 2), 0.5), torch.tensor([0, 1])
    loss = eps * float(model.w.flatten().norm(dual))
    for attacked in (
        fgsm(model, pixels, labels, eps=eps, norm=norm),
        pgd(model, pixels, labels, torch.zeros_like(pixels), eps=eps, norm=norm, steps=20),
    ):
        assert model(attacked)[:, 0].tolist() == pytest.approx([3 - loss, 3 + loss], rel=1e-3)


def test_the_gradient_of_a_confident_model_is_not_rounded_away() -> None:
    # in single precision 1 - p of the right class is 0 here, and the first pixel would seem to hurt the wrong one
    weights = 40 * torch.tensor([[1.0, 3.0], [0.9, 0.0]])

    class Confident(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.flatten(1) @ weights.T

    pixels = torch.tensor([0.5, 0.2]).view(1, 1, 1, 2)
    assert Confident()(pixels).diff().item() == pytest.approx(-26)
    moved = fgsm(Confident(), pixels, torch.tensor([0]), eps=0.1) - pixels
    assert moved.flatten().tolist() == pytest.approx([-0.1, -0.1])


def test_a_gradient_whose_squares_are_zero_in_single_precision_has_a_direction() -> None:
    gradient = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    for scale in (1.0, 1e-25, 1e-37):
        assert torch.allclose(direction(scale * gradient, "l2"), gradient / 5)
    assert direction(0 * gradient, "l2").tolist() == [[[[0, 0]]]]


# ---- random starts -----------------------------------------------------------------------------------------------


def test_starts_are_even_in_the_ball_and_differ_in_everything_that_they_depend_on() -> None:
    pixels, indices = torch.zeros(500, 3, 4, 4), torch.arange(500)
    cube = random_start(pixels, indices, eps=0.5, norm="linf", key=(0, 0))
    assert float(cube.mean()) == pytest.approx(0, abs=0.01)
    assert float(cube.std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.01)
    assert float(cube.flatten(1).T.corrcoef().fill_diagonal_(0).abs().max()) < 0.25  # between pixels
    assert float(cube.flatten(1)[:40].corrcoef().fill_diagonal_(0).abs().max()) < 0.6  # between images
    ball = random_start(pixels, indices, eps=0.5, norm="l2", key=(0, 0)).flatten(1)
    inside = (ball.norm(dim=1) / 0.5) ** 48  # the share of the ball's volume that is nearer to its centre
    assert float(inside.mean()) == pytest.approx(0.5, abs=0.04)
    directions = ball / ball.norm(dim=1, keepdim=True)
    assert directions.mean(0).abs().max() < 0.03
    others = [(1, 0), (0, 1), (1, 1), (2**40, 0)]
    starts = [cube, *(random_start(pixels, indices, eps=0.5, norm="linf", key=key) for key in others)]
    flat = torch.stack([start.flatten() for start in starts])
    assert float(flat.corrcoef().fill_diagonal_(0).abs().max()) < 0.03


# ---- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_model_sees_of_pixels_what_it_sees_of_images(channels: int) -> None:
    config = DataConfig(channels=channels)  # type: ignore[arg-type]
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, 3))
    on_pixels = OnPixels(inner, config)
    pixels = on_pixels.pixels(images)
    assert pixels.shape == (4, channels, 8, 8)
    if channels == 3:
        assert torch.allclose(pixels, images / 255, atol=1e-6)
    assert torch.allclose(on_pixels(pixels), inner(normalize(images, config)), atol=1e-5)


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"attack": "pgdd"},
            "--attack is 'pgdd'; expected one of fgsm, pgd, apgd-ce, apgd-dlr, square, transfer; did you",
        ),
        ({"norm": "l1"}, "--norm is 'l1'"),
        ({"eps": 1.5}, "--eps is 1.5; expected a number in [0, 1]"),
        ({"eps": -0.1, "norm": "l2"}, "--eps is -0.1"),
        ({"eps": math.nan}, "--eps is nan"),
        ({"steps": 0}, "--steps is 0"),
        ({"restarts": 0}, "--restarts is 0"),
        ({"attack": "square", "steps": 0}, "--queries is 0; expected a whole number in [1, inf)"),
        ({"images": 0}, "--attack_images is 0"),
    ],
)
def test_an_attack_that_cannot_be_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(UsageError) as error:
        Attack(**{"attack": "pgd", "eps": 0.1, **wrong})
    assert said in str(error.value)


def test_a_ball_of_the_l2_norm_may_be_larger_than_one_pixel() -> None:
    assert Attack(attack="pgd", norm="l2", eps=3.0).eps == 3


# ---- another implementation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_the_same_images_as_art_makes(model: nn.Module, norm: str) -> None:
    pytest.importorskip("art", reason="needs gmscale[eval]")
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    pixels, labels, _ = samples(64)
    eps, order = (0.05, math.inf) if norm == "linf" else (0.7, 2)
    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        (3, 8, 8),
        5,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    theirs = FastGradientMethod(classifier, norm=order, eps=eps, batch_size=64)
    made = torch.from_numpy(theirs.generate(pixels.numpy(), F.one_hot(labels, 5).numpy()))
    assert torch.allclose(fgsm(model, pixels, labels, eps=eps, norm=norm), made, atol=1e-5)
    theirs = ProjectedGradientDescentPyTorch(
        classifier, norm=order, eps=eps, eps_step=0.25 * eps, max_iter=10, batch_size=64, verbose=False
    )
    made = torch.from_numpy(theirs.generate(pixels.numpy(), F.one_hot(labels, 5).numpy()))
    ours = pgd(model, pixels, labels, torch.zeros_like(pixels), eps=eps, norm=norm, steps=10)
    assert torch.allclose(ours, made, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_the_same_images_as_captum_makes(model: nn.Module) -> None:
    pytest.importorskip("captum", reason="needs gmscale[eval]")
    from captum.robust import FGSM, PGD

    pixels, labels, _ = samples(64)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    theirs = FGSM(model, loss, lower_bound=0.0, upper_bound=1.0).perturb(pixels.clone(), 0.05, labels)
    assert torch.allclose(fgsm(model, pixels, labels, eps=0.05), theirs, atol=1e-5)
    # with L2 it would take steps along the sign all the same
    theirs = PGD(model, loss, lower_bound=0.0, upper_bound=1.0).perturb(pixels.clone(), 0.05, 0.0125, 10, labels)
    ours = pgd(model, pixels, labels, torch.zeros_like(pixels), eps=0.05, steps=10)
    assert torch.allclose(ours, theirs, atol=1e-5)
