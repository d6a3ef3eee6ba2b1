"""The words of an error: one line that names what was wrong and the nearest valid choice."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A user's mistake: shown as one line, without a traceback, and exit status 2."""


class RunError(RuntimeError):
    """A run that cannot go on although it was asked for correctly: one line and exit status 1."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return '; did you mean X?' for the choice closest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise UsageError for the first of `given` that is not in `known`."""
    known = list(known)
    for key in given:
        if key not in known:
            raise UsageError(f"{where} has no field {key!r}{nearest(key, known)} (its fields: {', '.join(known)})")


def check_choice(value: str, choices: Iterable[str], name: str) -> None:
    """Raise UsageError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(choices)}{nearest(value, choices)}")


def check_range(value: float, name: str, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Raise UsageError unless low <= value <= high (low < value when `open_low`); NaN never passes."""
    above = value > low if open_low else value >= low
    if not (above and value <= high):
        bracket = "(" if open_low else "["
        top = "inf)" if high == float("inf") else f"{high:g}]"
        raise UsageError(f"{name} is {value}; expected a number in {bracket}{low:g}, {top}")
