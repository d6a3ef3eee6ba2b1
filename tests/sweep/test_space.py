"""The space of a sweep: what YAML may say, what is drawn from it, and what it makes of a base configuration."""

import json
import math
import random
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmscale.config import MaskConfig, OutputConfig, TrainConfig, from_dict, parse
from gmscale.errors import UsageError
from gmscale.sweep import space
from gmscale.sweep.space import Domain
from gmscale.trials import as_flags

law = settings(max_examples=60, deadline=None, derandomize=True)

numbers = st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.6g}"))
lists = st.lists(st.sampled_from(["pool", "log"]) | numbers | st.booleans() | st.none(), min_size=1, max_size=4)
domains = st.one_of(
    lists.map(lambda values: Domain("choice", tuple({json.dumps(v): v for v in values}.values()))),
    st.tuples(numbers, numbers).filter(lambda x: x[0] < x[1]).map(lambda x: Domain("uniform", (), *x)),
    st.tuples(st.floats(1e-8, 1), st.floats(1.1, 1e4)).map(lambda x: Domain("loguniform", (), *x)),
    st.tuples(st.integers(-9, 9), st.integers(1, 9)).map(lambda x: Domain("int", (), x[0], x[0] + x[1])),
)
spaces = st.lists(domains, min_size=1, max_size=4).map(lambda found: {f"field{i}": d for i, d in enumerate(found)})
finite = spaces.filter(lambda found: space.size(found) <= 200)


def inside(domain: Domain, value: Any) -> bool:
    if domain.kind == "choice":
        return any(value is v or (type(value) is type(v) and value == v) for v in domain.values)
    return domain.low <= value <= domain.high and isinstance(value, int if domain.kind == "int" else float)


def refused(given: dict[str, Any], base: TrainConfig | None = None) -> str:
    """The words with which a space is refused."""
    with pytest.raises(UsageError) as caught:
        space.check(space.parse_all(given), base or TrainConfig())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- laws -------------------------------------------------------------------------------------------------------


@law
@given(spaces, st.integers(0, 2**32))
def test_what_is_drawn_lies_in_the_space(found: space.Space, seed: int) -> None:
    for point in space.sample(found, min(5, int(min(space.size(found), 5))), seed):
        assert point.keys() == found.keys()
        assert all(inside(found[field], value) for field, value in point.items())


@law
@given(spaces, st.integers(0, 2**32))
def test_the_same_seed_draws_the_same_points_and_more_trials_begin_with_those_of_fewer(
    found: space.Space, seed: int
) -> None:
    most = int(min(space.size(found), 6))
    points = space.sample(found, most, seed)
    assert points == space.sample(found, most, seed)
    assert points[: most // 2] == space.sample(found, most // 2, seed)


@law
@given(finite)
def test_a_grid_is_the_product_and_a_sample_of_all_is_the_grid(found: space.Space) -> None:
    points = [json.dumps(point) for point in space.grid(found)]
    assert len(points) == space.grid_size(found) == math.prod(len(d.points or ()) for d in found.values())
    assert len(set(points)) == len(points)
    assert sorted(points) == sorted(map(json.dumps, space.sample(found, len(points), 0)))


@law
@given(spaces, st.integers(0, 2**32))
def test_perturbed_settings_stay_in_the_space(found: space.Space, seed: int) -> None:
    rng = random.Random(seed)
    point = {**space.sample(found, 1, seed)[0], "other": 1}
    for _ in range(20):
        point = space.perturb(found, point, rng)
        assert point.pop("other") == 1
        assert all(inside(found[field], value) for field, value in point.items())
        point["other"] = 1


def test_the_first_field_of_a_grid_is_the_slowest() -> None:
    found = space.parse_all({"mask.operator": ["pool", "log"], "mask.block": {"int": [1, 2]}})
    assert list(space.grid(found)) == [
        {"mask.operator": "pool", "mask.block": 1},
        {"mask.operator": "pool", "mask.block": 2},
        {"mask.operator": "log", "mask.block": 1},
        {"mask.operator": "log", "mask.block": 2},
    ]


def test_numbers_are_perturbed_by_a_factor_and_lists_to_a_neighbour() -> None:
    found = {
        "x": Domain("uniform", (), 0.0, 100.0),
        "n": Domain("int", (), 1, 100),
        "w": Domain("choice", ("a", "b", "c", "d", "e")),
    }
    rng = random.Random(0)
    seen = [space.perturb(found, {"x": 10.0, "n": 1, "w": "c"}, rng) for _ in range(400)]
    # a quarter is drawn anew, and may hit the others
    for field, near in (("x", (8.0, 12.5)), ("n", (1, 2)), ("w", ("b", "d"))):
        share = sum(settings[field] in near for settings in seen) / len(seen)
        assert 0.68 < share < 0.9, field
        assert len({settings[field] for settings in seen}) > 2


def test_a_loguniform_range_is_even_in_the_logarithm() -> None:
    points = space.sample({"x": Domain("loguniform", (), 1e-4, 1.0)}, 2000, 0)
    assert sum(point["x"] < 1e-2 for point in points) / 2000 == pytest.approx(0.5, abs=0.05)


def test_optuna_reads_the_same_space() -> None:
    optuna = pytest.importorskip("optuna", reason='pip install "gmscale[sweep]"')
    found = space.parse_all(
        {
            "mask.operator": ["pool", "log"],
            "mask.kappa": {"uniform": [0.5, 1]},
            "optim.lr": {"loguniform": [1e-3, 1e-1]},
            "mask.block": {"int": [1, 16]},
        }
    )
    assert space.to_optuna(found) == {
        "mask.operator": optuna.distributions.CategoricalDistribution(("pool", "log")),
        "mask.kappa": optuna.distributions.FloatDistribution(0.5, 1.0),
        "optim.lr": optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True),
        "mask.block": optuna.distributions.IntDistribution(1, 16),
    }


# ---- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "domain", "said"),
    [
        ("mask.strenght", [1], "'mask.strenght' is no field of a run; did you mean 'mask.strength'"),
        ("strength", [1], "did you mean 'mask.strength'.*written like mask.strength"),
        ("mask", {"strength": [1]}, "'mask' is no field.*written like mask.strength"),
        ("mask.strength", [], "mask.strength is an empty list"),
        (
            "mask.strength",
            0.5,
            r"mask.strength is 0.5; expected a list of values, or one of \{uniform",
        ),
        ("mask.strength", [0.5, "a"], "mask.strength is 'a'; expected a number or null"),
        ("mask.strength", [0.5, 2], r"sweep.space: mask.strength is 2.0; expected a number in \[0, 1\]"),
        ("mask.strength", [1, 1.0], "mask.strength holds 1.0 twice"),
        ("mask.strength", {"unifrom": [0, 1]}, "did you mean 'uniform'"),
        ("mask.strength", {"uniform": [0, 1], "int": [0, 1]}, "mask.strength is .*expected a list"),
        ("mask.strength", {"uniform": [1]}, r"uniform is \[1\]; expected \[low, high\]"),
        (
            "mask.strength",
            {"uniform": [1, 0]},
            "uniform is .1, 0.; expected the smaller number first",
        ),
        ("mask.strength", {"uniform": [0, 1.5]}, r"mask.strength is 1.5; expected a number in \[0, 1\]"),
        ("mask.strength", {"uniform": [0, math.inf]}, "high of uniform is inf"),
        ("mask.strength", {"uniform": ["a", 1]}, "low of uniform is 'a'; expected a number"),
        ("optim.lr", {"loguniform": [0, 1]}, r"low of loguniform is 0; expected a number in \(0"),
        ("mask.block", {"int": [1.5, 3]}, "low of int is 1.5; expected a whole number"),
        ("mask.block", {"uniform": [1, 3]}, "mask.block takes whole numbers; expected {int"),
        ("mask.gate", {"uniform": [0, 1]}, "mask.gate is .*expected one of hard, soft"),
        ("mask.gate", ["hard", "sotf"], "did you mean 'soft'"),
        ("run.seed", [1, 2], "run.seed follows from sweep.seeds"),
        ("run.dir", ["a", "b"], "run.dir has to be the same in every trial; set it in section run"),
        ("parallel.backend", ["ddp"], "parallel.backend has to be the same in every trial"),
        (
            "mask.operator",
            ["pool", "random"],
            "\"random\": this is the arm 'random mask'",
        ),
        ("mask.enabled", [True, False], "false: this is the arm 'no mask'"),
        ("output.strength", [0.5], "output.strength does nothing: output.enabled is false"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(field: str, domain: Any, said: str) -> None:
    assert re.search(said, refused({"optim.lr": [0.1], field: domain}))


def test_a_combination_that_cannot_be_is_named_whole() -> None:
    said = refused({"mask.start": [0, 0.5], "mask.end": [0.3, 1.0], "optim.lr": [0.1, 0.2]})
    assert said.startswith("sweep.space: mask.start 0.5, mask.end 0.3, optim.lr 0.1: mask.start + warmup")
    # two that only go together are no mistake
    space.check(space.parse_all({"mask.rescale": [True], "mask.error_feedback": [False]}), TrainConfig())


def test_every_whole_number_of_a_short_range_is_tried() -> None:
    log = TrainConfig(mask=MaskConfig(operator="log"))
    assert "mask.kernel_size is 8; expected an odd number" in refused({"mask.kernel_size": {"int": [7, 9]}}, log)


def test_the_error_of_a_mask_of_outputs_names_its_own_field() -> None:
    base = TrainConfig(output=OutputConfig(enabled=True))
    assert "output.strength 2.0: mask.strength is 2.0" in refused({"output.strength": [0.5, 2]}, base)


def test_a_large_space_is_tried_at_random_points() -> None:
    tenths = [i / 10 for i in range(1, 11)]
    fields = ("mask.strength", "mask.kappa", "optim.momentum", "optim.label_smoothing", "optim.lr")
    given = dict.fromkeys(fields, tenths)
    space.check(space.parse_all(given), TrainConfig())
    assert "optim.momentum is 1.1" in refused({**given, "optim.momentum": [*tenths, 1.1]})


def test_a_field_without_effect_is_warned_of_once() -> None:
    found = space.parse_all({"mask.operator": ["pool", "log"], "mask.sigma": [0.5, 1, 2]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        space.check(found, TrainConfig())
    assert [str(w.message) for w in caught] == [
        "sweep.space: mask.sigma has no effect with operator 'pool' (it is read by dog, log)"
    ]


def test_more_trials_than_points_are_refused() -> None:
    with pytest.raises(UsageError, match=r"sweep.trials is 3, but sweep.space has only 2 points; take search grid"):
        space.sample(space.parse_all({"mask.strength": [0.5, 1]}), 3, 0)


# ---- on a base --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"mask.strength": 1, "optim.lr": "1e-3", "run.epochs": 2},
        {"mask.include": ["layer4.*"], "augment.crop_scale": [0.5, 1], "mask.kappa": None},
        {"mask.operator": "log", "mask.kappa": None, "output.enabled": True, "output.sigmas": {"stage0": 2.0}},
        {},
    ],
)
def test_settings_make_what_the_same_sections_make(changed: dict[str, Any]) -> None:
    base = from_dict({"mask": {"kappa": 0.7}, "optim": {"momentum": 0.8}})
    nested: dict[str, dict[str, Any]] = {"mask": {"kappa": 0.7}, "optim": {"momentum": 0.8}}
    for field, value in changed.items():
        section, name = field.split(".")
        nested.setdefault(section, {})[name] = value
    assert space.apply(base, changed) == from_dict(nested)


def test_what_is_drawn_survives_the_ledger_and_the_command_line() -> None:
    base = replace(TrainConfig(), output=OutputConfig(enabled=True))
    found = space.parse_all(
        {
            "mask.gate": ["hard", "soft"],
            "mask.kappa": [None, 0.5],
            "optim.lr": {"loguniform": [1e-5, 1e-4]},
            "augment.crop_scale": [[0.5, 1.0]],
            "output.sigmas": [{}, {"stage0": 2.0}],
        }
    )
    for point in space.sample(found, 4, 0):
        read = json.loads(json.dumps(point))
        assert read == point
        assert space.apply(base, read) == parse(as_flags({"output.enabled": True, **read}))[0]


@pytest.mark.parametrize(("field", "said"), [("mask.strenght", "mask.strength"), ("seed", "run.seed")])
def test_settings_of_no_field_are_refused(field: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"{field}.*did you mean '{said}'"):
        space.apply(TrainConfig(), {field: 1})


def test_arms_follow_from_what_is_on() -> None:
    on, off = MaskConfig(), MaskConfig(enabled=False)
    chance = MaskConfig(operator="random")
    outputs = OutputConfig(enabled=True)
    assert space.arm_of(TrainConfig(mask=on)) == "mask"
    assert space.arm_of(TrainConfig(mask=off)) == "no mask"
    assert space.arm_of(TrainConfig(mask=chance)) == "random mask"
    assert space.arm_of(TrainConfig(mask=off, output=outputs)) == "mask"
    assert space.arm_of(TrainConfig(mask=chance, output=outputs)) == "mask"
    assert space.arm_of(TrainConfig(mask=off, output=replace(outputs, operator="random"))) == "random mask"
