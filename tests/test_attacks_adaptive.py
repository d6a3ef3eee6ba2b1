"""Auto-PGD, Square and transferred attacks: written plainly once more, counted, and against ART's."""

import copy
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmscale.data import val_loader
from gmscale.errors import UsageError
from gmscale.evaluation.attacks import Attack, apgd, pgd, random_start, square, survivors
from gmscale.evaluation.attacks.auto_pgd import checks
from gmscale.evaluation.attacks.losses import Loss, cross_entropy, dlr, margin
from gmscale.evaluation.attacks.squares import _bump, _moved_mass, _square, share_of_image
from gmscale.evaluation.subject import Subject
from gmscale.parallel import World
from gmscale.parallel.local_ranks import run_ranks
from gmscale.robustness import warnings
from gmscale.trained import load

NORMS = ("linf", "l2")
LOSSES = {"apgd-ce": cross_entropy, "apgd-dlr": dlr}
COUNT, CLASSES, SIZE = 120, 5, 16


def samples(seed: int, count: int = COUNT) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [N, 3, 16, 16], labels and indices: noisy versions of five coarse pictures."""
    coarse = torch.rand(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures = F.interpolate(0.3 + 0.4 * coarse, size=SIZE, mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = 0.4 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (pictures[labels] + noise).clamp(0, 1), labels, torch.arange(count)


def trained_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first, second = nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.Conv2d(12, 16, 3)
    made = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(576, CLASSES))
    pixels, labels, _ = samples(seed + 10, 600)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(made(pixels), labels).backward()
        optimizer.step()
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small network that is right on most images, and attackable."""
    return trained_network(0)


class Counting(nn.Module):
    """A model that counts the images it sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return self.model(pixels)


def robust_share(model: nn.Module, attacked: Tensor, labels: Tensor) -> float:
    return 100 * float((model(attacked).argmax(1) == labels).double().mean())


# ---- Auto-PGD ----------------------------------------------------------------------------------------------------


def test_lengths_are_checked_when_the_paper_says() -> None:
    assert checks(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    for steps in range(1, 60):
        assert all(0 < step <= steps for step in checks(steps))
        assert sum(checks(steps).values()) == max(checks(steps))


def algorithm_1(
    model: nn.Module, image: Tensor, label: Tensor, start: Tensor, eps: float, norm: str, steps: int, loss: Loss
) -> tuple[Tensor, bool]:
    """Auto-PGD for one image as the paper writes it; stops where the image is misclassified."""

    def project(x: Tensor) -> Tensor:
        change = x.clamp(0, 1) - image
        length = change.abs().max() if norm == "linf" else change.norm()
        if norm == "linf":
            change = change.clamp(-eps, eps)
        elif length > eps:
            change = change * eps / length
        return (image + change).clamp(0, 1)

    def f(x: Tensor) -> tuple[float, Tensor, bool]:
        x = x.clone().requires_grad_()
        logits = model(x[None])
        value = loss(logits, label[None])[0]
        gradient = torch.autograd.grad(value, x)[0]
        direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        return value.item(), direction, bool(logits.argmax() != label)

    w, p = [0], [Fraction(0), Fraction(22, 100)]
    while p[-1] <= 1:
        w.append(math.ceil(p[-1] * steps))
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    before = x = project(image + start)
    value, up, fooled = f(x)
    best, best_value, best_up = x, value, up
    eta, eta_then, best_then, rises = 2 * eps, None, best_value, 0
    for k in range(1, steps + 1):
        if fooled:
            return x, True
        z = project(x + eta * up)
        new = z if k == 1 else project(x + 0.75 * (z - x) + 0.25 * (x - before))
        before, x, last = x, new, value
        value, up, fooled = f(x)
        rises += value > last
        if value > best_value:
            best, best_value, best_up = x, value, up
        if k in w[1:]:
            interval = k - max(v for v in w if v < k)
            eta_now = eta
            if rises < 0.75 * interval or (eta_then in (None, eta) and best_then == best_value):
                eta, x, value, up = eta / 2, best, best_value, best_up
            eta_then, best_then, rises = eta_now, best_value, 0
    return (x, True) if fooled else (best, False)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_all_images_at_once_go_where_each_alone_goes(model: nn.Module, name: str, norm: str) -> None:
    # in single precision the rounding of one image and of many would part their ways
    pixels, labels, indices = (values[:40] for values in samples(1))
    model, pixels = copy.deepcopy(model).double(), pixels.double()
    eps = 0.03 if norm == "linf" else 0.45
    start = random_start(pixels, indices, eps=eps, norm=norm, key=(0, 0)).double()
    ours = apgd(model, pixels, labels, start, eps=eps, norm=norm, steps=25, loss=LOSSES[name])
    fooled = 0
    for i in range(len(pixels)):
        theirs, broken = algorithm_1(model, pixels[i], labels[i], start[i], eps, norm, 25, LOSSES[name])
        assert torch.allclose(ours[i], theirs, atol=1e-9), i
        fooled += broken
    assert 5 < fooled < 35


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_auto_pgd_is_no_weaker_than_pgd_and_images_that_are_fooled_cost_no_more(
    model: nn.Module, name: str, norm: str
) -> None:
    pixels, labels, indices = samples(1)
    eps = 0.02 if norm == "linf" else 0.35
    counting = Counting(model)
    found = survivors(counting, pixels, labels, indices, Attack(attack=name, norm=norm, eps=eps, steps=20), 0)
    plain = survivors(model, pixels, labels, indices, Attack(attack="pgd", norm=norm, eps=eps, steps=20), 0)
    right, robust = int(found.correct.sum()), int(found.robust.sum())
    assert robust <= plain.robust.sum() + 2
    assert 0 < robust < 0.8 * right
    all_steps = 21
    assert COUNT + right + robust * all_steps < counting.seen < COUNT + right + 0.9 * right * all_steps


def test_dlr_is_the_papers_and_does_not_mind_the_scale() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 6
    for row, label, loss, gap in zip(logits, labels, dlr(logits, labels), margin(logits, labels), strict=True):
        others = [float(z) for i, z in enumerate(row) if i != label]
        first, _, third, *_ = sorted(row.tolist(), reverse=True)
        assert float(gap) == pytest.approx(float(row[label]) - max(others))
        assert float(loss) == pytest.approx(-(float(row[label]) - max(others)) / (first - third))
    assert torch.allclose(dlr(1e4 * logits, labels), dlr(logits, labels), atol=1e-4)
    assert dlr(torch.zeros(1, 4), torch.tensor([2])).tolist() == [0]


def test_dlr_needs_three_classes() -> None:
    with pytest.raises(UsageError, match="at least 3 classes; this one has 2: expected apgd-ce"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))


def test_where_a_gradient_is_no_number_no_step_is_taken() -> None:
    class Root(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            brightness = (pixels - pixels.detach()).flatten(1).sum(1).sqrt()  # 0 / 0 for the gradient
            return torch.stack((brightness + 1, brightness * 0, brightness * 0), 1)

    pixels, labels = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    attacked = apgd(Root(), pixels, labels, torch.zeros_like(pixels), eps=0.1, steps=3)
    assert torch.equal(attacked, pixels)


# ---- Square ------------------------------------------------------------------------------------------------------


def test_squares_shrink_as_the_paper_says() -> None:
    halvings = {10: 0, 11: 1, 50: 1, 51: 2, 200: 2, 201: 3, 500: 3, 1000: 4, 2000: 5, 4000: 6, 6000: 7, 8001: 9}
    for query, times in halvings.items():
        assert share_of_image(query, 10000) == 0.8 / 2**times
    assert [share_of_image(query, 100) for query in (0, 1, 3, 99)] == [0.8, 0.2, 0.1, 0.8 / 512]


@pytest.mark.parametrize("side", [1, 2, 3, 7, 8])
def test_bumps_are_those_of_equation_2(side: int) -> None:
    def eta(h1: int, h2: int) -> Tensor:
        n, values = h1 // 2, torch.zeros(h1, h2)
        for r in range(1, h1 + 1):
            for s in range(1, h2 + 1):
                m = n - max(abs(r - h1 // 2 - 1), abs(s - h2 // 2 - 1))
                values[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
        return values

    both = torch.cat((eta(side, side // 2), -eta(side, side - side // 2)), 1)
    assert torch.allclose(_bump(side, both), both / both.norm(), atol=1e-6)


def test_a_query_changes_one_square_of_an_image_and_each_image_another() -> None:
    pixels, indices = torch.full((400, 3, 9, 12), 0.5), torch.arange(400)
    tried = _square(pixels, pixels, indices, (0, 3), 0.1, 16 / 108)
    changed = tried != pixels
    assert (changed.sum((2, 3)) == 16).all()
    assert (changed[:, 0] == changed[:, 2]).all()
    rows, columns = changed[:, 0].any(2).int().argmax(1), changed[:, 0].any(1).int().argmax(1)
    assert {*zip(rows.tolist(), columns.tolist(), strict=True)} == {(r, c) for r in range(6) for c in range(9)}
    assert ((tried - pixels).abs()[changed] - 0.1).abs().max() < 1e-6
    signs = (tried - pixels).sign().sum((2, 3)) / 16
    assert (signs.abs() == 1).all()  # one for a channel of a square
    assert len({*map(tuple, signs.tolist())}) == 8
    assert not torch.equal(tried, _square(pixels, pixels, indices, (0, 4), 0.1, 16 / 108))


def test_an_l2_query_moves_what_two_windows_had_into_one_and_uses_the_whole_radius() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, indices = torch.full((50, 3, 11, 14), 0.5), torch.arange(50)
    change = 0.01 * torch.randn(pixels.shape, generator=generator)
    eps = 1.5 * float(change.flatten(1).norm(dim=1).max())
    new = _moved_mass(pixels + change, pixels, indices, (0, 1), eps, 25 / 154) - pixels
    assert torch.allclose(new.flatten(1).norm(dim=1), torch.tensor(eps), rtol=1e-4)
    moved = (new - change).abs() > 1e-7
    emptied = moved & (new.abs() < 1e-9)
    assert (moved.any(1).sum((1, 2)) <= 50).all()
    assert ((moved & ~emptied).any(1).sum((1, 2)) == 25).all()


def test_queries_are_counted_and_images_that_are_fooled_are_asked_no_more(model: nn.Module) -> None:
    pixels, labels, indices = samples(1)
    for norm, eps in (("linf", 0.12), ("l2", 1.5)):
        counting = Counting(model)
        attacked, used = square(counting, pixels, labels, indices, eps=eps, norm=norm, queries=60)
        assert counting.seen == int(used.sum())
        fooled = model(attacked).argmax(1) != labels
        assert (used[~fooled] == 60).all()
        assert used[fooled].double().mean() < 40
        assert 20 < fooled.sum() < COUNT
        gap = margin(model(attacked), labels)
        assert (gap[~fooled] < margin(model(pixels), labels)[~fooled]).double().mean() > 0.9


def test_square_breaks_what_has_no_gradient_at_all(model: nn.Module) -> None:
    class Rounded(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return model((pixels * 16).round() / 16)

    masked = Rounded()
    pixels, labels, indices = samples(1)
    left = {
        name: survivors(masked, pixels, labels, indices, Attack(attack=name, eps=0.1, steps=steps), 0)
        for name, steps in (("pgd", 10), ("apgd-dlr", 10), ("square", 100))
    }
    right = left["pgd"].correct.sum()
    assert right > 0.8 * COUNT
    assert left["pgd"].robust.sum() > 0.7 * right
    assert left["apgd-dlr"].robust.sum() > 0.7 * right
    assert left["square"].robust.sum() < 0.5 * right


# ---- misleading gradients ----------------------------------------------------------------------------------------


def test_confidence_hides_the_gradient_of_cross_entropy_and_the_warnings_say_so(model: nn.Module) -> None:
    class Confident(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return 1e4 * model(pixels)

    pixels, labels, indices = samples(1)
    entries: list[dict[str, Any]] = []
    for name, steps in (("pgd", 20), ("apgd-ce", 20), ("apgd-dlr", 20), ("square", 200)):
        attack = Attack(attack=name, eps=0.06, steps=steps)
        honest, masked = (survivors(m, pixels, labels, indices, attack, 0) for m in (model, Confident()))
        assert torch.equal(honest.correct, masked.correct)
        share = 100 * float(masked.robust.double().mean())
        entries.append(vars(attack) | {"top1": share, "honest": 100 * float(honest.robust.double().mean())})
    pgd_entry, ce, dlr_entry, square_entry = entries
    assert pgd_entry["honest"] < 10
    assert pgd_entry["top1"] > 60
    assert ce["top1"] > 60
    for immune in (dlr_entry, square_entry):
        assert immune["top1"] == pytest.approx(immune["honest"], abs=2)
    assert square_entry["top1"] < pgd_entry["top1"] - 10
    said = warnings([pgd_entry, ce, square_entry])
    assert len(said) == 1
    assert said[0].startswith(f"Square L-inf eps 0.06, 200 queries leaves {square_entry['top1']:.2f} %")
    assert warnings([pgd_entry, ce, dlr_entry, square_entry]) == []  # DLR has found what CE could not


# ---- transfer ----------------------------------------------------------------------------------------------------


def test_a_transferred_attack_is_pgd_on_the_surrogates_and_all_must_fail(model: nn.Module) -> None:
    pixels, labels, indices = samples(1)
    others = [trained_network(1), trained_network(2)]
    attack = Attack(attack="transfer", eps=0.05, steps=10)

    def left(*surrogates: nn.Module) -> Tensor:
        return survivors(model, pixels, labels, indices, attack, 3, surrogates).robust

    own = survivors(model, pixels, labels, indices, Attack(attack="pgd", eps=0.05, steps=10), 3)
    assert torch.equal(left(model), own.robust)
    one, two = left(others[0]), left(others[1])
    assert own.robust.sum() < one.sum() < own.correct.sum()
    assert torch.equal(left(*others), one & two)
    start = random_start(pixels, indices, eps=0.05, norm="linf", key=(3, 0))
    attacked = pgd(others[0], pixels, labels, start, eps=0.05, steps=10)
    assert torch.equal(one, own.correct & (model(attacked).argmax(1) == labels))


# ---- as an entry of the scorecard --------------------------------------------------------------------------------

MEASURED = (
    Attack(attack="pgd", eps=0.02, steps=3),
    Attack(attack="apgd-ce", eps=0.02, steps=5, images=11),
    Attack(attack="apgd-dlr", norm="l2", eps=0.3, steps=5, restarts=2),
    Attack(attack="square", eps=0.05, steps=20),
    Attack(attack="transfer", eps=0.05, steps=3, images=20),
)


def _found(world: World, run_dir: str) -> dict[str, Any]:
    trained = load(Path(run_dir), "last", "model")
    loader = val_loader(trained.config.data, world.rank, world.size)
    torch.manual_seed(0)
    other = timm.create_model("test_byobnet", num_classes=trained.outputs).eval()
    subject = Subject(trained.model.requires_grad_(False), trained.config, loader, world, trained.classes, (other,))
    return {attack.words: attack.measure(subject) for attack in MEASURED}


def test_ranks_find_together_what_one_finds(finished_run: Path) -> None:
    alone = _found(tiny.ALONE, str(finished_run))
    assert run_ranks(_found, 2, str(finished_run)) == alone
    for attack in MEASURED:
        found = alone[attack.words]
        assert 0 <= found["top1"] <= found["clean_top1"] <= 100
        assert ("queries" in found) == (attack.attack == "square")
    few = alone[MEASURED[1].words]
    assert few["clean_top1"] * 11 / 100 == pytest.approx(round(few["clean_top1"] * 11 / 100))


def test_a_transferred_attack_needs_a_baseline(finished_run: Path) -> None:
    trained = load(finished_run, "last", "model")
    loader = val_loader(trained.config.data, 0, 1)
    subject = Subject(trained.model, trained.config, loader, tiny.ALONE, trained.classes)
    with pytest.raises(UsageError, match="--attack transfer needs --baseline RUN"):
        Attack(attack="transfer", eps=0.1).measure(subject)


# ---- another implementation --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(model: nn.Module) -> Any:
    pytest.importorskip("art", reason="needs gmscale[eval]")
    from art.estimators.classification import PyTorchClassifier

    shape = (3, SIZE, SIZE)
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), shape, CLASSES, clip_values=(0.0, 1.0), device_type="cpu"
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_auto_pgd_leaves_what_arts_leaves(model: nn.Module, classifier: Any, name: str, norm: str) -> None:
    from art.attacks.evasion import AutoProjectedGradientDescent

    pixels, labels, indices = samples(1)
    eps, order = (0.03, math.inf) if norm == "linf" else (0.45, 2)
    np.random.seed(0)
    made = AutoProjectedGradientDescent(
        classifier,
        norm=order,
        eps=eps,
        eps_step=2 * eps,
        max_iter=20,
        nb_random_init=1,
        batch_size=COUNT,
        loss_type={"apgd-ce": "cross_entropy", "apgd-dlr": "difference_logits_ratio"}[name],
        verbose=False,
    ).generate(pixels.numpy(), F.one_hot(labels, CLASSES).float().numpy())
    theirs = robust_share(model, torch.from_numpy(made), labels)
    attack = Attack(attack=name, norm=norm, eps=eps, steps=20)
    ours = 100 * float(survivors(model, pixels, labels, indices, attack, 0).robust.double().mean())
    print(f"{attack.words}: ours {ours:.1f} %, ART's {theirs:.1f} %")
    assert 10 < theirs < 80
    assert abs(ours - theirs) <= 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning:art.*")
@pytest.mark.parametrize("norm", NORMS)
def test_square_leaves_no_more_than_arts(model: nn.Module, classifier: Any, norm: str) -> None:
    from art.attacks.evasion import SquareAttack

    pixels, labels, indices = samples(1)
    eps, order = (0.06, math.inf) if norm == "linf" else (1.0, 2)
    np.random.seed(0)  # its squares are the same for all images, so seeds differ by several points
    made = SquareAttack(classifier, norm=order, eps=eps, max_iter=150, batch_size=COUNT, verbose=False).generate(
        pixels.numpy().copy(), F.one_hot(labels, CLASSES).float().numpy()
    )
    theirs = robust_share(model, torch.from_numpy(made), labels)
    attack = Attack(attack="square", norm=norm, eps=eps, steps=150)
    ours = 100 * float(survivors(model, pixels, labels, indices, attack, 0).robust.double().mean())
    print(f"{attack.words}: ours {ours:.1f} %, ART's {theirs:.1f} %")
    assert 10 < theirs < 90
    assert ours <= theirs + 4
