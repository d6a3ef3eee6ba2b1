"""The scorecard while it is filled: one result after another, each kept at once."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gmscale import scorecards
from gmscale.errors import UsageError
from gmscale.evaluation.measurement import Measurement
from gmscale.files import write_atomically


class Scorecard:
    """The scorecard at `path`. All its results are of one model and one set of images, which `about` describes."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Take up the results at `path`. Raises UsageError if they are of another model or other images."""
        self._path = path
        self.content = scorecards.read(path)
        if self.content:
            different = [key for key, now in _flat(about).items() if _flat(self.content).get(key) != now]
            if different == ["sha256"]:
                self.content = {}  # of weights that are no more: the run was trained again in this directory
            elif different:
                key = next(key for key in different if key != "sha256")
                was, now = (_flat(values).get(key) for values in (self.content, about))
                raise UsageError(
                    f"{path} holds results of {key} {_shown(was)}, these would be of {_shown(now)}; name another "
                    "file with --out, or remove it"
                )
        if not self.content:
            self.content = {**about, "samples": None, "accuracy": {}}

    def has(self, what: Measurement) -> bool:
        """Whether the result is there."""
        return entry_of(self.content, what) is not None

    def add(self, what: Measurement, found: Mapping[str, Any]) -> None:
        """Keep what was found; the file is complete at any moment."""
        asked, known = asdict(what), _finite(dict(found))
        if asked:
            entries = self.content.setdefault(what.section, [])
            entries.append({**asked, **known})
            entries.sort(key=lambda entry: [(entry.get(name) is not None, entry.get(name)) for name in asked])
        else:
            self.content[what.section] = known
        if what.section == "accuracy":
            self.content["samples"] = known.pop("count")
        write_atomically(self._path, json.dumps(self.content, indent=1, allow_nan=False))


def entry_of(card: Mapping[str, Any], what: Measurement) -> Mapping[str, Any] | None:
    """Return what a scorecard holds of a measurement; None if that is missing."""
    asked, section = asdict(what), card.get(what.section)
    if not asked:
        return section or None
    return next((entry for entry in section or () if asked.items() <= entry.items()), None)


def _finite(value: Any) -> Any:
    """Return `value` with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key != "settings"} | about.get("settings", {})


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
