"""Attacks of a scorecard in words, and where their numbers together must not be believed."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from gmscale.scorecards import radius

# How people write the attacks: four follow the model's own gradients, the others cannot be misled by them.
NAMES = {
    "fgsm": "FGSM",
    "pgd": "PGD",
    "apgd-ce": "APGD-CE",
    "apgd-dlr": "APGD-DLR",
    "square": "Square",
    "transfer": "Transferred PGD",
}
NORM_NAMES = {"linf": "L-inf", "l2": "L2"}

_BLACK_BOX = ("square", "transfer")
_ITERATED = ("pgd", "apgd-ce", "apgd-dlr")

Entry = Mapping[str, Any]


def described(entry: Entry) -> str:
    """Return an attack of a scorecard in words, such as APGD-DLR L-inf eps 4/255, steps 20, 250 images."""
    attack, restarts, images = entry["attack"], entry["restarts"], entry.get("images")
    words = [f"{NAMES[attack]} {NORM_NAMES[entry['norm']]} eps {radius(entry['eps'])}"]
    if attack != "fgsm":
        words.append(f"{entry['steps']} queries" if attack == "square" else f"steps {entry['steps']}")
        words += [f"restarts {restarts}"] if attack == "pgd" or restarts > 1 else []
    words += [f"{images} images"] if images is not None else []
    return ", ".join(words)


def warnings(attacks: Sequence[Entry]) -> list[str]:
    """Return in sentences what speaks against the robustness that the attacks of one model seem to show.

    `attacks` are entries of a scorecard. The signs of masked gradients are those of Athalye et al. 2018 (arXiv
    1802.00420, section 3.1) and Carlini et al. 2019 (arXiv 1902.06705).
    """
    found: list[str] = []
    for group in _alike(attacks, "norm", "eps", "images"):
        found += [*_misled(group), *_fgsm_is_stronger(group)]
    iterated = [entry for entry in attacks if entry["attack"] in _ITERATED]
    for group in _alike(iterated, "attack", "norm", "eps", "restarts", "images"):
        found += _leaving_more(
            group, "steps", "more steps should leave no more; gradients may mislead, so do not rely on this attack"
        )
    for group in _alike(attacks, "attack", "norm", "steps", "restarts", "images"):
        found += _leaving_more(
            group, "eps", "a larger radius should leave no more; gradients may mislead, or the attack is too weak"
        )
    for group in _alike(attacks, "norm"):
        if not any(entry["attack"] in _BLACK_BOX for entry in group):
            found.append(
                f"Of {NORM_NAMES[group[0]['norm']]} attacks only white-box ones were measured, which misleading "
                "gradients can defeat: measure square and transfer too before calling a model robust."
            )
    return found


def _misled(group: Sequence[Entry]) -> Iterator[str]:
    """Yield what attacks without the model's gradients do better than those with them."""
    white = [entry for entry in group if entry["attack"] not in _BLACK_BOX]
    if not white:
        return
    strongest = min(white, key=_top1)
    for entry in group:
        if entry["attack"] in _BLACK_BOX and _top1(entry) < _top1(strongest):
            yield (
                f"{_result(entry)} without the model's gradients, fewer than the strongest white-box attack, "
                f"{_result(strongest)}: a sign that gradients mislead, so count on the lower number at most."
            )


def _fgsm_is_stronger(group: Sequence[Entry]) -> Iterator[str]:
    walks = [entry for entry in group if entry["attack"] == "pgd"]
    if not walks:
        return
    strongest = min(walks, key=_top1)
    for entry in group:
        if entry["attack"] == "fgsm" and _top1(entry) < _top1(strongest):
            yield (
                f"{_result(entry)}, in one step fewer than {_result(strongest)}: gradients are masked, or PGD "
                "takes too few steps."
            )


def _leaving_more(group: Sequence[Entry], name: str, why: str) -> Iterator[str]:
    """Yield where the attack with the next larger `name` leaves more."""
    for less, more in pairwise(sorted(group, key=lambda entry: entry[name])):
        if _top1(more) > _top1(less):
            yield f"{_result(more)}, more than {_result(less)}: {why}."


def _alike(attacks: Sequence[Entry], *names: str) -> list[list[Entry]]:
    """Return the attacks in groups that agree in what is named, in their order."""
    groups: defaultdict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in attacks:
        groups[tuple(entry.get(name) for name in names)].append(entry)
    return list(groups.values())


def _result(entry: Entry) -> str:
    return f"{described(entry)} leaves {_top1(entry):.2f} %"


def _top1(entry: Entry) -> float:
    return float(entry["top1"])
