"""The space that a sweep searches: fields of the training configuration, each with a list of values or a range.

In YAML a list, or {uniform: [low, high]}, {loguniform: [low, high]}, {int: [low, high]} with both ends included.
"""

import itertools
import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from gmscale.config import MAY_CHANGE_ON_RESUME, TrainConfig
from gmscale.config.parsing import field_types, field_value
from gmscale.config.sections import plain
from gmscale.errors import UsageError, check_choice, check_range, nearest
from gmscale.trials import BASELINE, MASK, RANDOM, Arm

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Range = Literal["uniform", "loguniform", "int"]

MOST_CHECKED = 4096
"""Points of a space that are tried before anything starts; where there are more, as many at random."""
RESAMPLED = 0.25
"""Probability that population based training draws a value anew instead of moving it."""
FACTORS = 0.8, 1.25
"""By which it multiplies a number."""

_SEEDS = ("run.seed", "mask.seed", "output.seed")


@dataclass(frozen=True)
class Domain:
    """What a field may be: one of `values`, or a number from `low` to `high`, both included."""

    kind: Literal["choice"] | Range
    values: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0

    @property
    def points(self) -> Sequence[Any] | None:
        """Everything the field may be, in order; None for a range of real numbers."""
        if self.kind == "int":
            return range(int(self.low), int(self.high) + 1)
        return self.values or None

    def draw(self, rng: random.Random) -> Any:
        """Return a value at random; real numbers have six significant digits, as people copy them."""
        if self.points is not None:
            return rng.choice(self.points)
        if self.kind == "loguniform":
            return self._fitted(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self._fitted(rng.uniform(self.low, self.high))

    def moved(self, value: Any, rng: random.Random) -> Any:
        """Return a value near `value`: its neighbour in the list, or the number times one of FACTORS."""
        if self.kind == "choice":
            i = self.values.index(value)
            near = [self.values[j] for j in (i - 1, i + 1) if 0 <= j < len(self.values)]
            return rng.choice(near) if near else value
        factor = rng.choice(FACTORS)
        if self.kind == "int":
            step = max(1, abs(round(value * factor) - value))
            return int(min(max(value + (step if factor > 1 else -step), self.low), self.high))
        return self._fitted(value * factor)

    def _fitted(self, value: float) -> float:
        return min(max(float(f"{value:.6g}"), self.low), self.high)

    def extremes(self) -> Sequence[Any]:
        """Return the values that stand for all when a space is checked: all of a list, both ends of a range."""
        if self.points is not None and (self.kind == "choice" or len(self.points) <= 64):
            return self.points  # also of short ranges of whole numbers, of which some fields take only odd ones
        return self.low, self.high


Space = Mapping[str, Domain]


def parse_all(given: Mapping[str, Any]) -> dict[str, Domain]:
    """Return the domains of the fields in `sweep.space`. Raises UsageError for what is wrong with the first."""
    if not given:
        raise UsageError("sweep.space is empty; give it fields, such as '{mask.strength: [0.25, 0.5, 1]}'")
    return {field: parse(field, domain) for field, domain in given.items()}


def parse(field: str, given: Any) -> Domain:
    """Return the domain that YAML gives a field. Raises UsageError, in one line that names the field."""
    where = f"sweep.space: {field}"
    _check_field(field)
    if isinstance(given, list | tuple):
        if not given:
            raise UsageError(f"{where} is an empty list; expected its values")
        values = [_value(field, value) for value in given]
        for i, value in enumerate(values):
            if value in values[:i]:
                raise UsageError(f"{where} holds {value!r} twice")
        return Domain("choice", tuple(values))
    if not isinstance(given, Mapping) or len(given) != 1:
        raise UsageError(
            f"{where} is {given!r}; expected a list of values, or one of {{uniform: [low, high]}}, "
            f"{{loguniform: [low, high]}}, {{int: [low, high]}}"
        )
    ((kind, ends),) = given.items()
    check_choice(kind, get_args(Range), f"{where}: the kind of range")
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise UsageError(f"{where}: {kind} is {ends!r}; expected [low, high]")
    for name, end in zip(("low", "high"), ends, strict=True):
        lowest, positive = (0, True) if kind == "loguniform" else (-math.inf, False)
        check_range(end, f"{where}: {name} of {kind}", lowest, open_low=positive, whole=kind == "int")
    low, high = ends if kind == "int" else map(float, ends)
    if low >= high:
        raise UsageError(f"{where}: {kind} is [{low:g}, {high:g}]; expected the smaller number first")
    taken = (field_types()[field], *get_args(field_types()[field]))
    if kind != "int" and int in taken and float not in taken:
        raise UsageError(f"{where} takes whole numbers; expected {{int: [low, high]}} or a list, not {kind}")
    _value(field, low)
    return Domain(kind, low=low, high=high)


def _check_field(field: str) -> None:
    known = field_types()
    if field not in known:
        written = " (fields are written like mask.strength)" if "." not in field else ""
        raise UsageError(f"sweep.space: {field!r} is no field of a run{nearest(field, known)}{written}")
    section, _, name = field.partition(".")
    if field in _SEEDS:
        raise UsageError(f"sweep.space: {field} follows from sweep.seeds and sweep.confirm_seeds; leave it out")
    if section == "parallel" or name in MAY_CHANGE_ON_RESUME.get(section, ()):
        raise UsageError(f"sweep.space: {field} has to be the same in every trial; set it in section {section}")


def _value(field: str, value: Any) -> Any:
    """Return a value as the field takes it and JSON keeps it."""
    try:
        return plain(field_value(field, value))
    except UsageError as error:
        raise UsageError(f"sweep.space: {error}") from None


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """Yield every point, the first field slowest. Raises UsageError if a field has no list."""
    for values in itertools.product(*_lists(space)):
        yield dict(zip(space, values, strict=True))


def grid_size(space: Space) -> int:
    """Return the number of points of the grid. Raises UsageError if a field has no list."""
    return math.prod(map(len, _lists(space)))


def _lists(space: Space) -> list[Sequence[Any]]:
    lists = []
    for field, domain in space.items():
        if domain.points is None:
            raise UsageError(
                f"sweep.space: {field} is a {domain.kind} range, and search grid needs lists; give it some values, "
                f"or take search random"
            )
        lists.append(domain.points)
    return lists


def size(space: Space) -> float:
    """Return the number of points, infinity where there are ranges of real numbers."""
    return math.prod(math.inf if domain.points is None else len(domain.points) for domain in space.values())


def check_size(space: Space, n: int) -> None:
    """Raise UsageError if the space has fewer than n points."""
    if n > size(space):
        raise UsageError(
            f"sweep.trials is {n}, but sweep.space has only {size(space):g} points; take search grid for all"
        )


def sample(space: Space, n: int, seed: int) -> list[dict[str, Any]]:
    """Return n points at random, those of a smaller n first; distinct ones if all fields have lists.

    Raises UsageError if the space has fewer.
    """
    check_size(space, n)
    endless = size(space) == math.inf
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    while len(found) < n:
        point = {field: domain.draw(rng) for field, domain in space.items()}
        if endless or point not in found:
            found.append(point)
    return found


def perturb(space: Space, settings: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return settings near these, within the space: how population based training explores."""
    return {
        **settings,
        **{
            field: domain.draw(rng) if rng.random() < RESAMPLED else domain.moved(settings[field], rng)
            for field, domain in space.items()
        },
    }


def to_optuna(space: Space) -> dict[str, "BaseDistribution"]:
    """Return the space as Optuna's distributions, for lists of numbers, words and null."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for field, domain in space.items():
        if domain.kind == "choice":
            found[field] = CategoricalDistribution(domain.values)
        elif domain.kind == "int":
            found[field] = IntDistribution(int(domain.low), int(domain.high))
        else:
            found[field] = FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform")
    return found


# ---- on top of a base configuration -----------------------------------------------------------------------------


def apply(base: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """Return `base` with dotted fields such as mask.strength set; strict like gmscale.config."""
    for field in settings:
        if field not in field_types():
            raise UsageError(f"{field!r} is no field of a run{nearest(field, field_types())}")
    return _with(base, {field: field_value(field, value) for field, value in settings.items()})


def _with(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    sections: dict[str, dict[str, Any]] = {}
    for field, value in values.items():
        section, _, name = field.partition(".")
        sections.setdefault(section, {})[name] = value
    changed: dict[str, Any] = {name: replace(getattr(base, name), **fields) for name, fields in sections.items()}
    return replace(base, **changed)


def arm_of(config: TrainConfig) -> Arm:
    """Return the arm of a sweep that a configuration belongs to."""
    operators = {section.operator for section in (config.mask, config.output) if section.enabled}
    if not operators:
        return BASELINE
    return RANDOM if operators == {"random"} else MASK


def check(space: Space, base: TrainConfig) -> None:
    """Raise UsageError, in one line that names the values, if a point of the space is no configuration with a mask.

    Lists are tried in full, ranges at both ends, all in combination: up to MOST_CHECKED points, others at random.
    What the mask warns of is said once.
    """
    for field in space:
        section = field.partition(".")[0]
        if (
            section in ("mask", "output")
            and not getattr(base, section).enabled
            and f"{section}.enabled" not in space
        ):
            raise UsageError(f"sweep.space: {field} does nothing: {section}.enabled is false")
    values = {field: [field_value(field, v) for v in domain.extremes()] for field, domain in space.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for point in _points(values):
            try:
                arm = arm_of(_with(base, point))
            except UsageError as error:
                raise UsageError(f"sweep.space: {_blamed(base, point, str(error))}") from None
            if arm != MASK:
                raise UsageError(
                    f"sweep.space: {_words(point)}: this is the arm {arm!r}, which a sweep trains as a control "
                    f"(sweep.no_mask_lr, sweep.random_mask); the space is for masks"
                )
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        warnings.warn(f"sweep.space: {text}", stacklevel=2)


def _points(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    if math.prod(map(len, values.values())) <= MOST_CHECKED:
        for point in itertools.product(*values.values()):
            yield dict(zip(values, point, strict=True))
        return
    rng = random.Random(0)
    for _ in range(MOST_CHECKED):
        yield {field: rng.choice(of_field) for field, of_field in values.items()}


def _blamed(base: TrainConfig, point: Mapping[str, Any], error: str) -> str:
    """Return the error of a point with the one value that is wrong by itself, or with all of a combination."""
    for field, value in point.items():
        try:
            _with(base, {field: value})
        except UsageError as alone:
            if str(alone) == error:
                return error if error.startswith(field) else f"{_words({field: value})}: {error}"
    return f"{_words(point)}: {error}"


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} {json.dumps(plain(value))}" for field, value in settings.items())
