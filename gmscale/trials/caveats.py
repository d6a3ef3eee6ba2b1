"""What a reader of a sweep's numbers has to know before them."""

from collections.abc import Iterator, Mapping
from typing import Any

from gmscale.statistics import ENOUGH_SEEDS
from gmscale.trials.confirmation import baseline_learning_rates, complete, count
from gmscale.trials.findings import best, configurations
from gmscale.trials.ledger import Record
from gmscale.trials.trial import BASELINE, MASK


def caveats(records: Mapping[int, Record], sweep: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader has to know before the numbers, as (heading, sentence)."""
    search, unmasked = (configurations(records, "search", arm) for arm in (MASK, BASELINE))
    notes = []
    if waiting := sum(not record.ended for record in records.values()):
        running = sum(record.state == "running" for record in records.values())
        notes.append(
            (
                "Not finished",
                f"{waiting} of {count(len(records), 'trial')} have not ended ({running} running); "
                "every number below is so far.",
            )
        )
    notes.append(
        (
            "Configurations tried",
            f"{count(len(search), 'mask configuration')} and {count(len(unmasked), 'configuration')} without a "
            "mask. The best of many is too good by chance; only the confirmation on fresh seeds is free of that.",
        )
    )
    notes += _missing_controls(records, sweep)
    notes += _confirmation_notes(records, sweep)
    stopped = sum(r.state == "stopped" for r in records.values())
    if stopped:
        notes.append(
            (
                "Stopped early",
                f"The scheduler ({sweep.get('scheduler', 'none')}) stopped {count(stopped, 'trial')} early. They "
                "are no candidates, also those that would have come out ahead in the end.",
            )
        )
    if sweep.get("search") in ("tpe", "nsga2"):
        notes.append(
            (
                "Adaptive search",
                f"{sweep['search']} tries more where it found good values, so configurations are no independent "
                "sample, and the p values of hyper-parameters describe this search only.",
            )
        )
    for state, sentence in (
        ("diverged", "to NaN or infinity; each counts as the worst value."),
        ("failed", "after all retries and are left out of every mean."),
    ):
        if number := sum(record.state == state for record in records.values()):
            notes.append((f"{state.capitalize()} trials", f"{count(number, 'trial')} {state} {sentence}"))
    return notes


def _missing_controls(records: Mapping[int, Record], sweep: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    unmasked = configurations(records, "search", BASELINE)
    if not sweep.get("no_mask_lr"):
        yield (
            "Uncontrolled",
            "The sweep of the learning rate without a mask is switched off (sweep.no_mask_lr). A tuned learning "
            "rate often explains more than a mask does.",
        )
    if not sweep.get("random_mask"):
        yield (
            "Uncontrolled",
            "The random mask of equal density is switched off (sweep.random_mask), so what any mask does and what "
            "this one does cannot be told apart.",
        )
    rates = baseline_learning_rates(records)
    if sweep.get("no_mask_lr") and unmasked and all(r.ended for c in unmasked for r in c.records):
        for objective in sweep["objectives"]:
            found = best(records, objective, BASELINE)
            rate = found.settings.get("optim.lr") if found else None
            if len(rates) > 1 and rate in (rates[0], rates[-1]):
                yield (
                    "The baseline may not be tuned",
                    f"The best learning rate without a mask by {objective}, {rate:g}, lies at the edge of its "
                    f"sweep ({rates[0]:g} to {rates[-1]:g}); widen sweep.no_mask_lr.",
                )
        if len(rates) == 1:
            yield (
                "The baseline is not tuned",
                f"Without a mask there was one learning rate only, {rates[0]:g}.",
            )


def _confirmation_notes(records: Mapping[int, Record], sweep: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    seeds = int(sweep.get("confirm_seeds", 0))
    if not seeds:
        yield (
            "No confirmation",
            "It is switched off (sweep.confirm_seeds 0), so the best of the search is not a winner yet, only the "
            "luckiest so far.",
        )
    elif not complete(records, seeds):
        yield (
            "Not confirmed yet",
            f"The best configurations of the search have still to be trained on {count(seeds, 'fresh seed')}; "
            "nothing is a winner before.",
        )
    if 0 < seeds < ENOUGH_SEEDS:
        yield (
            "Too few seeds",
            f"Below {ENOUGH_SEEDS} confirmation seeds a difference is shown but is no evidence.",
        )
