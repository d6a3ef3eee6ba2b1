"""Sweeps whose numbers are made up, so that what a report says of them is known."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gmscale.trials import BASELINE, MASK, RANDOM, Arm, Record, Result, Stage, State, Trial

SPACE: dict[str, Any] = {
    "mask.operator": ["pool", "log", "dog", "licnn"],
    "mask.strength": {"uniform": [0.1, 1.0]},
    "mask.kappa": [0.25, 0.5, 1.0, 2.0],
    "optim.lr": {"loguniform": [0.001, 0.1]},
    "mask.rescale": [True, False],
    "mask.block": {"int": [4, 32]},
}
SWEEP: dict[str, Any] = {
    "space": SPACE,
    "search": "random",
    "scheduler": "none",
    "objectives": ["top1"],
    "workers": 1,
    "no_mask_lr": [0.5, 1, 2, 4],
    "random_mask": True,
    "confirm_seeds": 5,
}
BASE: dict[str, Any] = {
    "run": {"epochs": 10},
    "model": {"name": "resnet18"},
    "data": {"source": "embedded"},
    "optim": {"opt": "sgd", "lr": 0.02},
}


def record(
    number: int,
    arm: Arm = MASK,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    *,
    stage: Stage = "search",
    state: State = "finished",
    failures: Iterable[str] = (),
    results: Iterable[Result] = (),
    **values: float,
) -> Record:
    trial = Trial(number, stage, arm, settings or {}, seed)
    return Record(trial, state, 1, list(failures), list(results), values, wall_s=12.0)


def numbered(records: Iterable[Record]) -> dict[int, Record]:
    return {one.trial.number: one for one in records}


def random_twin(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, "mask.operator": "random", "mask.random_like": settings.get("mask.operator", "pool")}


def no_mask(lr: float) -> dict[str, Any]:
    return {"mask.enabled": False, "optim.lr": lr}


def baselines(tops: Mapping[float, float], first: int) -> list[Record]:
    """The search's controls: learning rate -> top1."""
    return [record(first + i, BASELINE, no_mask(lr), top1=top1) for i, (lr, top1) in enumerate(tops.items())]


def confirmation(
    settings: Mapping[str, Any],
    gain: float,
    first: int,
    *,
    seeds: int = 5,
    twin_gain: float = 0.0,
    lr: float = 0.02,
) -> list[Record]:
    """Mask, random twin and the best without a mask; `gain` is the mask's over no mask, with a little noise."""
    found, number = [], first
    for seed in range(seeds):
        base, noise = 60.0 + seed, 0.1 * (-1) ** seed
        for arm, given, top1 in (
            (BASELINE, no_mask(lr), base),
            (MASK, settings, base + gain + noise),
            (RANDOM, random_twin(settings), base + twin_gain - noise),
        ):
            found.append(record(number, arm, given, 1000 + seed, stage="confirm", top1=top1, loss=2 - top1 / 100))
            number += 1
    return found


def write(folder: Path, records: Iterable[Record], base: Any = BASE, **sweep: Any) -> Path:
    """Write a sweep's folder, its ledger in one go: Ledger syncs every line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP | sweep))
    (folder / "trials.jsonl").write_text("".join(json.dumps(e) + "\n" for one in records for e in _events(one)))
    return folder


def _events(one: Record) -> Iterable[dict[str, Any]]:
    at = {"trial": one.trial.number, "time": 1.7e9}
    yield {"event": "planned", **{k: v for k, v in asdict(one.trial).items() if k != "number"}, **at}
    if one.state == "planned":
        return
    yield {"event": "started", "attempt": 1, "where": "here", **at}
    for error in one.failures[:-1]:
        yield {"event": "failure", "error": error, "wall_s": 1.0, **at}
    for result in one.results:
        yield {"event": "result", **asdict(result), **at}
    for branch in one.branches:
        yield {"event": "branch", **asdict(branch), **at}
    if one.ended:
        error = one.failures[-1] if one.failures else ""
        yield {"event": "ended", "state": one.state, "values": one.values, "wall_s": 12.0, "error": error, **at}


def draw(rng: np.random.Generator) -> dict[str, Any]:
    """A point of SPACE."""
    return {
        "mask.operator": str(rng.choice(SPACE["mask.operator"])),
        "mask.strength": round(float(rng.uniform(0.1, 1)), 4),
        "mask.kappa": float(rng.choice(SPACE["mask.kappa"])),
        "optim.lr": float(f"{np.exp(rng.uniform(np.log(0.001), np.log(0.1))):.4g}"),
        "mask.rescale": bool(rng.integers(2)),
        "mask.block": int(rng.integers(4, 33)),
    }


def trained(
    number: int, arm: Arm, settings: dict[str, Any], seed: int, stage: Stage, rng: Any, stop: bool
) -> Record:
    """A trial of ten evaluations: its learning rate decides most, the strength a little; large rates diverge."""
    lr, strength = settings["optim.lr"], settings.get("mask.strength", 0.5)
    top = 60 - 8 * abs(np.log10(lr / 0.02)) + 3 * strength * (arm == MASK) + rng.normal(0, 1.0)
    tops = [float(top * (1 - np.exp(-epoch / 3)) + rng.normal(0, 0.6)) for epoch in range(1, 11)]
    results = [Result(60 * e, float(e), {"top1": t, "loss": 4 - t / 20}) for e, t in enumerate(tops, 1)]
    if lr > 0.08:
        cut = int(rng.integers(1, 4))
        return record(
            number,
            arm,
            settings,
            seed,
            stage=stage,
            state="diverged",
            results=results[:cut],
            failures=["loss is NaN"],
        )
    if stop and rng.random() < 0.6:
        cut = int(rng.choice([1, 3]))
        return record(
            number,
            arm,
            settings,
            seed,
            stage=stage,
            state="stopped",
            results=results[:cut],
            **results[cut - 1].values,
        )
    last = results[-1].values
    more = {
        "pruned_top1": last["top1"] * (0.5 + 0.4 * strength),
        "fgsm_top1": 30 * (1 - strength) + rng.normal(0, 2),
    }
    return record(number, arm, settings, seed, stage=stage, results=results, **last, **more)


def large(trials: int, *, stop: bool = False, seed: int = 0, confirm: bool = True) -> list[Record]:
    """A sweep of so many trials with ten evaluations each, its controls, and a confirmation of the best."""
    rng = np.random.default_rng(seed)
    masks = trials - 5 - 15 * confirm
    found = [
        trained(i + 1, BASELINE, no_mask(lr), 0, "search", rng, False)
        for i, lr in enumerate((0.01, 0.02, 0.04, 0.08))
    ]
    random = {"mask.operator": "random", "mask.random_like": "pool", "optim.lr": 0.02}
    found.append(trained(5, RANDOM, random, 0, "search", rng, False))
    found += [trained(6 + i, MASK, draw(rng), 0, "search", rng, stop) for i in range(masks)]
    if confirm:
        finished = [r for r in found if r.trial.arm == MASK and r.state == "finished"]
        best = dict(max(finished, key=lambda r: r.values["top1"]).trial.settings)
        number = len(found)
        for at in range(1000, 1005):
            for arm, settings in ((BASELINE, no_mask(0.02)), (MASK, best), (RANDOM, random_twin(best))):
                number += 1
                found.append(trained(number, arm, settings, at, "confirm", rng, False))
    return found
