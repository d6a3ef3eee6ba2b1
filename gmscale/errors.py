"""The words of an error: one line that names what was wrong and the nearest valid choice."""

import argparse
import difflib
import math
from collections.abc import Iterable
from typing import NoReturn


class UsageError(ValueError):
    """A user's mistake: shown as one line, without a traceback, and exit status 2."""


class RunError(RuntimeError):
    """A run that cannot go on although it was asked for correctly: one line and exit status 1."""


class OneLineParser(argparse.ArgumentParser):
    """argparse that raises UsageError, instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


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
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(choices)}{nearest(str(value), choices)}")


def check_range(
    value: float, name: str, low: float, high: float = math.inf, *, open_low: bool = False, whole: bool = False
) -> None:
    """Raise UsageError unless `value` is a finite number, low <= value <= high (low < value when `open_low`).

    `whole` asks for an int. NaN, infinities, booleans and other types never pass.
    """
    kind = "a whole number" if whole else "a number"
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not (low < value if open_low else low <= value) or value > high:
        top = "inf)" if high == math.inf else f"{high:g}]"
        raise UsageError(f"{name} is {value!r}; expected {kind} in {'(' if open_low else '['}{low:g}, {top}")
