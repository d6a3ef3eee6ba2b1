"""What ImageNet-C measures: families of corruptions, and the mean corruption error over them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GROUPS: Mapping[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""Families by group. The last group is ImageNet-C's held-out one, which no mean counts."""
EXTRA = GROUPS["extra"]
FAMILIES = tuple(family for group, families in GROUPS.items() if group != "extra" for family in families)
"""The 15 families over which means are taken."""
SEVERITIES = (1, 2, 3, 4, 5)

Entry = Mapping[str, Any]


def suites(entries: Iterable[Entry]) -> dict[tuple[str | None, int | None], list[Entry]]:
    """Return a scorecard's entries by (path, images): only errors on the same images belong in one mean.

    `path` is None for corruptions that gmscale made, `images` for all of them.
    """
    found: dict[tuple[str | None, int | None], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.get("path"), entry.get("images")), []).append(entry)
    return found


def mean_corruption_error(entries: Sequence[Entry], baseline: Sequence[Entry] = ()) -> dict[str, Any]:
    """Return the mean corruption error of one suite's `entries`, in percent.

    Each entry has family, top1 (percent at five severities) and clean_top1; the four extra families do not count.

    * mean_error: mean over families of the top1 error averaged over severities, without a reference;
    * families, missing: how many of the 15 it has, and the names of the others;
    * reference: "none", or "baseline" if `baseline` has entries. Then over the families that both have,
      `compared` in number:
    * mce: mean over c of CE_c = sum_s E(s, c) / sum_s E_baseline(s, c);
    * relative_mce: mean over c of
      sum_s (E(s, c) - E(clean)) / sum_s (E_baseline(s, c) - E_baseline(clean)).

    SOURCE: Hendrycks and Dietterich 2019 (arXiv 1903.12261), section 4.2, whose reference is AlexNet; here it is
    the baseline alone, so mce compares with published numbers only if that is AlexNet. What cannot be is None:
    means over nothing, and ratios to a baseline that makes no errors (mce) or that some family does not harm
    (relative_mce). Raises ValueError if a family is there twice.
    """
    own, other = _by_family(entries), _by_family(baseline)
    found: dict[str, Any] = {
        "mean_error": _mean([sum(_errors(entry)) / len(_errors(entry)) for entry in own.values()]),
        "families": len(own),
        "missing": [family for family in FAMILIES if family not in own],
        "reference": "baseline" if baseline else "none",
    }
    if baseline:
        both = [(own[family], other[family]) for family in FAMILIES if family in own and family in other]
        found |= {
            "compared": len(both),
            "mce": _mean([_ratio(sum(_errors(a)), sum(_errors(b))) for a, b in both]),
            "relative_mce": _mean([_ratio(_added(a), _added(b)) for a, b in both]),
        }
    return found


def _by_family(entries: Sequence[Entry]) -> dict[str, Entry]:
    counted = [entry for entry in entries if entry["family"] in FAMILIES]
    found = {entry["family"]: entry for entry in counted}
    if len(found) < len(counted):
        raise ValueError("a family of corruptions is there twice; expected the entries of one suite")
    return {family: found[family] for family in FAMILIES if family in found}


def _errors(entry: Entry) -> list[float]:
    return [100 - top1 for top1 in entry["top1"]]


def _added(entry: Entry) -> float:
    """Return the sum over severities of the errors that the corruption adds."""
    return sum(error - (100 - entry["clean_top1"]) for error in _errors(entry))


def _ratio(own: float, reference: float) -> float:
    return 100 * own / reference if reference > 0 else math.nan


def _mean(values: Sequence[float]) -> float | None:
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None
