"""What is said of attacks, and when their numbers together must not be believed."""

from typing import Any

import pytest

from gmscale.evaluation.attacks import Attack
from gmscale.robustness import described, warnings


def entry(attack: str, top1: float, **settings: Any) -> dict[str, Any]:
    """An entry of a scorecard."""
    return vars(Attack(attack=attack, **{"eps": 4 / 255, **settings})) | {"top1": top1, "clean_top1": 90.0}


SQUARE = entry("square", 50.0, steps=200)


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (Attack(attack="fgsm", eps=8 / 255), "FGSM L-inf eps 8/255"),
        (Attack(attack="pgd", eps=0.3, norm="l2", steps=10), "PGD L2 eps 0.3, steps 10, restarts 1"),
        (
            Attack(attack="apgd-dlr", eps=4 / 255, steps=9, images=25),
            "APGD-DLR L-inf eps 4/255, steps 9, 25 images",
        ),
        (Attack(attack="apgd-ce", eps=0, steps=5, restarts=3), "APGD-CE L-inf eps 0, steps 5, restarts 3"),
        (Attack(attack="square", eps=1 / 255, steps=200), "Square L-inf eps 1/255, 200 queries"),
        (Attack(attack="transfer", eps=1 / 255, steps=10), "Transferred PGD L-inf eps 1/255, steps 10"),
    ],
)
def test_attacks_in_words(attack: Attack, words: str) -> None:
    assert attack.words == words


def test_scorecards_of_before_had_no_number_of_images() -> None:
    old = entry("pgd", 30.0, steps=10)
    del old["images"]
    assert described(old) == "PGD L-inf eps 4/255, steps 10, restarts 1"


def test_numbers_that_fit_together_are_not_warned_of() -> None:
    assert warnings([]) == []
    fit = [
        entry("fgsm", 40.0),
        entry("pgd", 30.0, steps=10),
        entry("pgd", 30.0, steps=20),
        entry("pgd", 20.0, steps=10, eps=8 / 255),
        SQUARE,
        entry("transfer", 60.0, steps=10),
    ]
    assert warnings(fit) == []


@pytest.mark.parametrize("black", [SQUARE, entry("transfer", 50.0, steps=10)])
def test_attacks_without_the_gradients_that_leave_fewer(black: dict[str, Any]) -> None:
    said = warnings([entry("fgsm", 70.0), entry("pgd", 60.25, steps=10), entry("apgd-ce", 66.0, steps=20), black])
    assert said == [
        f"{described(black)} leaves 50.00 % without the model's gradients, fewer than the strongest white-box "
        "attack, PGD L-inf eps 4/255, steps 10, restarts 1 leaves 60.25 %: a sign that gradients mislead, so count "
        "on the lower number at most."
    ]


@pytest.mark.parametrize("other", [{"eps": 8 / 255}, {"norm": "l2"}, {"images": 100}])
def test_only_attacks_of_the_same_ball_and_images_are_compared(other: dict[str, Any]) -> None:
    others = [entry("square", 50.0, steps=200, **other), entry("fgsm", 40.0, **other)]
    said = warnings([entry("pgd", 60.0, steps=10), *others])
    assert not any("fewer" in sentence for sentence in said)


def test_one_step_that_is_stronger_than_many() -> None:
    said = warnings([entry("fgsm", 55.5), entry("pgd", 60.0, steps=10), SQUARE | {"top1": 80.0}])
    assert said == [
        "FGSM L-inf eps 4/255 leaves 55.50 %, in one step fewer than PGD L-inf eps 4/255, steps 10, restarts 1 "
        "leaves 60.00 %: gradients are masked, or PGD takes too few steps."
    ]


def test_more_steps_and_larger_balls_that_leave_more() -> None:
    said = warnings(
        [
            entry("pgd", 42.0, steps=40),
            entry("pgd", 40.0, steps=10),
            entry("apgd-dlr", 30.0, steps=10),
            entry("apgd-dlr", 31.0, steps=10, eps=8 / 255),
            SQUARE,
        ]
    )
    steps, eps = said
    assert steps.startswith("PGD L-inf eps 4/255, steps 40, restarts 1 leaves 42.00 %, more than PGD L-inf")
    assert "more steps should leave no more" in steps
    assert eps.startswith("APGD-DLR L-inf eps 8/255, steps 10 leaves 31.00 %, more than APGD-DLR L-inf eps 4/255")
    assert "a larger radius should leave no more" in eps


def test_what_only_gradients_have_attacked() -> None:
    said = warnings([entry("pgd", 40.0, steps=10), entry("pgd", 40.0, norm="l2", steps=10), SQUARE])
    assert said == [
        "Of L2 attacks only white-box ones were measured, which misleading gradients can defeat: measure square "
        "and transfer too before calling a model robust."
    ]
