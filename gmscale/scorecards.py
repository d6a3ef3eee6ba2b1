"""The scorecard of a run, scorecard.json: what gmscale evaluate has measured of one of its models."""

import json
import math
from pathlib import Path
from typing import Any

from gmscale.errors import UsageError

NAME = "scorecard.json"


def read(path: Path) -> dict[str, Any]:
    """Return what a scorecard holds; nothing if there is none. Raises UsageError for a file that is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}; remove it to measure again") from None
    if not isinstance(content, dict) or not isinstance(content.get("accuracy"), dict):
        raise UsageError(f"{path} is not a scorecard; remove it, or choose another --out")
    return content


def values(run_dir: Path, *, prune: float, eps: float) -> dict[str, float]:
    """Return by name, in percent, what the scorecard of a run says at one sparsity and one L-inf eps.

    pruned_top1 at sparsity `prune`; fgsm_top1 and pgd_top1 at `eps` on pixels in [0, 1], of several PGD attacks the
    one with most steps in all. What has not been measured is missing.
    """
    card = read(Path(run_dir) / NAME)
    found = {}
    for entry in card.get("pruning", []):
        if math.isclose(entry["sparsity"], prune):
            found["pruned_top1"] = entry["top1"]
    attacks = [e for e in card.get("attacks", []) if e["norm"] == "linf" and math.isclose(e["eps"], eps)]
    for entry in sorted(attacks, key=lambda e: e["steps"] * e["restarts"]):
        found[f"{entry['attack']}_top1"] = entry["top1"]
    return found
