"""One page about scorecards: a model's own, or arms and seeds against their baselines."""

import itertools
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gmscale import robustness, scorecards
from gmscale.report import html
from gmscale.report import scorecard_curves as curves
from gmscale.report import scorecard_figures as figures
from gmscale.report import scorecard_tables as tables
from gmscale.report.comparison import plain
from gmscale.report.scorecard_comparison import (
    Card,
    Comparison,
    ScoredArm,
    compare,
    images_differ,
    load_cards,
    scored_arms,
)
from gmscale.report.scorecard_gallery import gallery
from gmscale.statistics import ENOUGH_SEEDS

MARGIN = 1.0  # percentage points: a smaller difference is taken to be of no consequence
_SECTIONS = ("shifts", "pruning", "attacks", "corruptions", "saliency", "quality")
_ATTACK = ("attack", "norm", "eps", "steps", "restarts", "images")
_MAX_NAMED = 6


def write_scorecards(
    cards: Sequence[str | Path], baselines: Sequence[str | Path], out: str | Path, margin: float = MARGIN
) -> Path:
    """Write the page on scorecards, files or run directories that have one, and return where it is.

    Runs that differ by their seed only are one arm. Each arm is compared with the baseline that is best by the
    metric at hand, paired over seeds: Student's t, with Holm's correction over all comparisons (Holm 1979).
    Baselines are `baselines`; without any the unmasked runs, where others are masked. A difference of less than
    `margin` percentage points is of no consequence. Raises UsageError for what has no scorecard and for an `out`
    that cannot be written.
    """
    found = load_cards(cards, baseline=False)
    known = {card.path.resolve() for card in found}
    found += [card for card in load_cards(baselines, baseline=True) if card.path.resolve() not in known]
    out = Path(out)
    return html.write(_render(found, margin, out.absolute().parent), out)


def _render(cards: Sequence[Card], margin: float, home: Path) -> str:
    arms = scored_arms(cards)
    compared = [] if images_differ(cards) else compare(arms, margin)
    drawn = figures.styles(arms)
    main = [arm for arm in arms if arm is arms[0] or not arm.baseline]
    judged = tables.quality(arms)
    masks = list(dict.fromkeys(row.name for row in judged.rows)) if judged else []
    gallery_columns, gallery_rows, gallery_left_out = gallery(main)
    return html.render(
        "scorecard.html.j2",
        title=_title(cards),
        facts=[(term, words) for term, words in _facts(cards, arms) if words not in ("", "–")],
        headline=_headline(compared),
        findings=_findings(compared),
        numbers=list(_numbers(arms, margin)),
        notices=list(_notices(cards, arms, compared)),
        arms=arms,
        styles=drawn,
        margin=margin,
        compared=[(name, list(group)) for name, group in itertools.groupby(compared, lambda one: one.metric)],
        tests=sum(one.adjusted_p is not None for one in compared),
        differences=figures.differences(compared, drawn),
        lower_is_better=lambda metric: not scorecards.higher_is_better(metric),
        accuracy=tables.accuracy(arms),
        shifts=tables.shifts(arms),
        reliability=figures.reliability(arms, drawn),
        classes=tables.classes(arms),
        pruning=tables.pruning(arms),
        pruning_curves=curves.pruning(arms, drawn),
        costs=[
            (curves.costs(arms, drawn, key, f"{what} left, % of the whole model"), f"Top1 against {what} left")
            for key, what in (("flops_share", "FLOPs"), ("parameters_share", "parameters"))
        ],
        attacks=tables.attacks(arms),
        radii=curves.radii(arms, drawn),
        warnings=list(_warnings(arms)),
        corruptions=[(*of, figures.corruptions(main, suite)) for suite, of in tables.corruptions(arms).items()],
        maps_left_out=max(0, len(main) - figures.MAX_MAPS),
        saliency=tables.saliency(arms),
        saliency_notes=list(
            dict.fromkeys(e["note"] for card in cards for e in card.entries("saliency") if e.get("note"))
        ),
        gallery_columns=gallery_columns,
        gallery_rows=gallery_rows,
        gallery_left_out=gallery_left_out,
        quality=judged,
        layers=[(mask, *figures.quality(main, drawn, mask)) for mask in masks],
        conditions=[(arm, _conditions(card, home)) for arm in arms for card in arm.cards],
        commands=[(arm, command) for arm in arms if (command := _command(arm.cards[0]))],
    )


def _title(cards: Sequence[Card]) -> str:
    models = _several(card.run.setting("model.name") if card.run else card.name for card in cards)
    sources = _several(Path(str(_setting(card, "source") or "images")).name for card in cards)
    return f"{models} on {sources}"


def _facts(cards: Sequence[Card], arms: Sequence[ScoredArm]) -> Iterator[tuple[str, str]]:
    def setting(key: str) -> str:
        return _several(card.run.setting(key) for card in cards if card.run)

    yield "Models", str(len(cards))
    yield "Arms", str(len(arms)) if len(arms) > 1 else ""
    yield "Seeds", ", ".join(map(str, sorted({card.seed for card in cards}))) if len(cards) > 1 else ""
    yield "Images", _several(card.content.get("samples") for card in cards)
    yield "Source", _several(_setting(card, "source") for card in cards)
    yield "Split", _several(_setting(card, "val_split") for card in cards)
    yield "Weights", _several({"ema": "averaged", "model": "plain"}.get(_weights(card), "") for card in cards)
    yield "Epochs", setting("run.epochs")
    yield "Learning rate", setting("optim.lr")
    for name in ("torch", "timm", "gmscale"):
        yield f"{name}, in training", _several(card.run.environment.get(name) for card in cards if card.run)


def _headline(compared: Sequence[Comparison]) -> str:
    """The outcome of all comparisons in one sentence; empty without any."""
    if not compared:
        return ""
    enough = [one for one in compared if one.paired.n >= ENOUGH_SEEDS]
    if not enough:
        return f"No comparison has {ENOUGH_SEEDS} paired seeds: nothing here is evidence of a difference."
    counts = [
        (sum(one.better is True for one in enough), "better than the best baseline"),
        (sum(one.better is False for one in enough), "worse"),
        (sum(one.better is None for one in enough), "not significantly different"),
    ]
    outcome = "; ".join(f"{count} {words}" for count, words in counts if count)
    untuned = sum(bool(one.control) for one in enough)
    control = f" Uncontrolled, as the baseline is not tuned: {untuned} of these." if untuned else ""
    return f"Of {len(enough)} comparisons with at least {ENOUGH_SEEDS} paired seeds: {outcome}.{control}"


def _findings(compared: Sequence[Comparison]) -> list[str]:
    """What is significant, a sentence for each arm and direction, the uncontrolled ones called so."""
    sentences = []
    for arm in dict.fromkeys(one.arm.label for one in compared):
        for better, word in ((True, "better"), (False, "worse")):
            found = [one for one in compared if one.arm.label == arm and one.better is better]
            if found:
                names = [one.metric + (" (uncontrolled)" if one.control else "") for one in found]
                more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
                sentences.append(f"{arm}, {word} by: {', '.join(names[:_MAX_NAMED])}{more}.")
    return sentences


def _numbers(arms: Sequence[ScoredArm], margin: float) -> Iterator[tuple[str, str]]:
    """The headline of a page on a single arm, as (term, words)."""
    if len(arms) > 1:
        return
    arm = arms[0]

    def mean(metric: str) -> float | None:
        return arm.summary(metric).mean

    top1 = mean("top1")
    if top1 is not None:
        yield "Top1", f"{html.decimal(top1)} %"
    if (ece := mean("ece")) is not None:
        yield "Calibration error", f"{html.decimal(ece)} %"
    pruned = {e["sparsity"]: mean(f"pruned global {e['sparsity']:g} top1") for e in arm.cards[0].entries("pruning")}
    known = {share: value for share, value in pruned.items() if value is not None}
    light = list(
        itertools.takewhile(lambda share: top1 is not None and known[share] > top1 - margin, sorted(known))
    )
    if known:
        words = f"{100 * light[-1]:g} %" if light else "no share that was tried"
        yield f"Smallest weights that can go, top1 within {margin:g} point{'' if margin == 1 else 's'}", words
    strongest: dict[str, list[float]] = {}
    for entry in arm.cards[0].entries("attacks"):
        ball = f"{robustness.NORM_NAMES[entry['norm']]} {scorecards.radius(entry['eps'])}"
        ball += f", {entry['images']} images" if entry.get("images") else ""
        strongest.setdefault(ball, []).append(entry["top1"])
    for ball, left in strongest.items():
        attacks = f"the strongest of {len(left)} attacks" if len(left) > 1 else "one attack"
        yield f"Top1 under {attacks}, {ball}", f"{html.decimal(min(left))} %"
    for name in arm.cards[0].values:
        if name.startswith("corruptions"):
            yield f"{name[0].upper()}{name[1:]}", f"{html.decimal(mean(name))} %"


def _notices(
    cards: Sequence[Card], arms: Sequence[ScoredArm], compared: Sequence[Comparison]
) -> Iterator[tuple[str, str]]:
    """What a reader has to know before the numbers, as (heading, sentence)."""
    if any(_setting(card, "source") == "embedded" for card in cards):
        yield (
            "Toy-sized data",
            "These models are measured on the small embedded set (digits pasted on photographs). It shows that the "
            "software works; nothing here follows for ImageNet.",
        )
    if len(arms) > 1 and images_differ(cards):
        yield "Different images", "The scorecards are of different images, so nothing is compared."
    elif len(arms) > 1 and not compared and not arms[0].baseline:
        yield "No baseline", "None of these models is a baseline, so nothing is compared; name one with --baseline."
    if not compared and len({card.baseline for card in cards}) > 1 and all(arm.baseline for arm in arms):
        yield "Nothing to compare", "The models differ from their baselines by the seed at most: they are one arm."
    if lacking := sorted({one.control for one in compared if one.control}):
        metrics = list(dict.fromkeys(one.metric for one in compared if one.control))
        everywhere = len(metrics) == len({one.metric for one in compared})
        where = "" if everywhere else f", by {_several(metrics)}"
        yield (
            "Uncontrolled comparison",
            f"{'; '.join(lacking).capitalize()}{where}. A gain over a baseline that was not tuned is often matched "
            "by changing its learning rate: train it at several, with the best inside, before claiming one.",
        )
    if compared and max(one.paired.n for one in compared) < ENOUGH_SEEDS:
        yield "Too few seeds", f"No comparison has {ENOUGH_SEEDS} paired seeds, so none is evidence."
    if len(cards) == 1:
        yield "One model", "Its numbers describe this model; they are no evidence on how it was trained."
    if len({_weights(card) for card in cards}) > 1:
        yield "Different weights", "Some models are judged with averaged weights, others with plain ones."


def _warnings(arms: Sequence[ScoredArm]) -> Iterator[tuple[str, list[str]]]:
    """What speaks against the attacks' numbers, by arm: of their means over seeds, which the page shows."""
    for arm in arms:
        means: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for entry in (entry for card in arm.cards for entry in card.entries("attacks")):
            means.setdefault(tuple(entry.get(name) for name in _ATTACK), []).append(entry)
        mean_entries = [entries[0] | {"top1": fmean(e["top1"] for e in entries)} for entries in means.values()]
        if words := robustness.warnings(mean_entries):
            yield arm.label, words


def _conditions(card: Card, home: Path) -> dict[str, str]:
    """What one card was measured on, column -> words; its file as seen from `home`."""
    images: dict[str, str] = {}
    for section in _SECTIONS:
        numbers = dict.fromkeys(str(e.get("images") or "all") for e in card.entries(section))
        images[section] = ", ".join(numbers) if numbers else "–"
    return {
        "seed": str(card.seed),
        "weights": f"{_weights(card)}, step {plain(card.content.get('step'))}",
        "sha256": str(card.content.get("sha256") or "–")[:12],
        "accuracy": plain(card.content.get("samples")),
        **{section: images[section] for section in _SECTIONS if section not in ("shifts", "quality")},
        "file": os.path.relpath(card.path.absolute(), home),
    }


def _command(card: Card) -> str:
    """How the model came about; empty for one that was not trained here."""
    command = card.run.environment.get("command") if card.run else None
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")


def _setting(card: Card, key: str) -> Any:
    return (card.content.get("settings") or {}).get(key)


def _weights(card: Card) -> str:
    return str(card.content.get("weights") or "model")


def _several(values: Iterable[Any]) -> str:
    """The distinct values in order of appearance, the first four of them in full."""
    distinct = list(dict.fromkeys(text for value in values if (text := plain(value)) != "–"))
    more = f" and {len(distinct) - 4} more" if len(distinct) > 4 else ""
    return ", ".join(distinct[:4]) + more
