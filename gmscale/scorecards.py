"""The scorecard of a run, scorecard.json: what gmscale evaluate has measured of one of its models."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gmscale import corruption_error
from gmscale.errors import UsageError

NAME = "scorecard.json"

_LOWER_IS_BETTER = ("loss", "ece", "error", "deletion")
_SALIENCY = ("iou", "ebpg", "pointing", "deletion", "insertion")


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
        plainly = entry.get("how", "global") == "global" and not entry.get("finetune")
        if plainly and math.isclose(entry["sparsity"], prune):
            found["pruned_top1"] = entry["top1"]
    attacks = [e for e in card.get("attacks", []) if e["norm"] == "linf" and math.isclose(e["eps"], eps)]
    for entry in sorted(attacks, key=lambda e: e["steps"] * e["restarts"]):
        if entry["attack"] in ("fgsm", "pgd") and entry.get("images") is None:
            found[f"{entry['attack']}_top1"] = entry["top1"]
    return found


def metrics(card: dict[str, Any]) -> dict[str, float]:
    """Return every number of a scorecard that models are compared by, under a name that says how it was measured.

    "top1", "ece", "pruned global 0.8 top1", "pgd linf 4/255 10 steps top1", "corruptions mean error",
    "saliency log iou": two cards' values of one name may be compared. All are percent (shares times 100), but for
    "loss", the mean cross-entropy. Left out are checks on the measurements, such as the randomisation test of
    saliency maps, and gradient quality, which is about the mask rather than the model.
    """
    return {name: float(value) for name, value in _named(card) if value is not None}


def higher_is_better(name: str) -> bool:
    """Whether a greater value of one of `metrics` speaks for the model."""
    return not name.endswith(_LOWER_IS_BETTER)


def unit(name: str) -> str:
    """Return what differences of one of `metrics` are measured in: percentage points, or nats for the loss."""
    return "nats" if name.endswith("loss") else "points"


def radius(eps: float) -> str:
    """Return 4/255 for what is that, as people write radii of attacks."""
    steps = round(eps * 255)
    return f"{steps}/255" if steps and math.isclose(eps * 255, steps) else f"{eps:g}"


def pruning_name(entry: dict[str, Any]) -> str:
    """Return what was done, such as "global 0.8" or "2:4 finetuned 50" (optimizer steps)."""
    how = entry.get("how", "global")
    share = "" if ":" in how else f" {entry['sparsity']:g}"
    finetune = entry.get("finetune")
    return how + share + (f" finetuned {finetune}" if finetune else "")


def attack_name(entry: dict[str, Any]) -> str:
    """Return the attack and its effort without norm and radius, such as "pgd 10 steps" or "square 200 queries"."""
    words = [entry["attack"]]
    if entry["attack"] != "fgsm":
        words.append(f"{entry['steps']} {'queries' if entry['attack'] == 'square' else 'steps'}")
        words += [f"{entry['restarts']} restarts"] if entry["restarts"] > 1 else []
    return " ".join(words)


def _named(card: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    accuracy = card.get("accuracy", {})
    for name in ("top1", "top5", "loss", "ece"):
        yield name, accuracy.get(name)
    for entry in card.get("shifts", ()):
        yield f"{entry['name']} top1", entry.get("top1")
        yield f"{entry['name']} top1 within its classes", entry.get("top1_within")
    for entry in card.get("pruning", ()):
        yield f"pruned {pruning_name(entry)} top1", entry.get("top1")
    for entry in card.get("attacks", ()):
        attack, _, effort = attack_name(entry).partition(" ")
        words = [attack, entry["norm"], radius(entry["eps"]), effort, _images(entry), "top1"]
        yield " ".join(filter(None, words)), entry.get("top1")
    for images, entries in corruption_error.suites(card.get("corruptions", ())).items():
        yield (
            f"{suite_name(images, entries)} mean error",
            corruption_error.mean_corruption_error(entries)["mean_error"],
        )
    for entry in card.get("saliency", ()):
        for name in _SALIENCY:
            value = entry.get(name)
            words = ["saliency", entry["method"], _images(entry), name]
            yield " ".join(filter(None, words)), None if value is None else 100 * value


def mask_name(entry: dict[str, Any]) -> str:
    """Return which mask a quality entry judges: an operator, or the run's own with its operator."""
    operator, judged = entry.get("operator", "configured"), entry.get("judged")
    return f"configured ({judged})" if operator == "configured" and judged else str(operator)


def suite_name(suite: tuple[str | None, int | None], entries: Sequence[Mapping[str, Any]]) -> str:
    """Return what one of `corruption_error.suites` is called, with its families where it is short of some."""
    path, images = suite
    missing = corruption_error.mean_corruption_error(entries)["missing"]
    words = ["corruptions", f"of {path}" if path else "", f"{images} images" if images else ""]
    if len(missing) > len(entries):
        words.append(", ".join(sorted(entry["family"] for entry in entries)))
    elif missing:
        words.append(f"without {', '.join(missing)}")
    return " ".join(filter(None, words))


def _images(entry: dict[str, Any]) -> str:
    return f"{entry['images']} images" if entry.get("images") else ""
