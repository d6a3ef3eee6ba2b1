"""Scorecards whose numbers follow from a few arguments, in run directories, with galleries."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from gmscale.corruption_error import FAMILIES

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LAYERS = ("conv1.weight", *(f"layer{i}.{j}.conv{k}.weight" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)))


def make_card(gain: float = 0.0, seed: int = 0, *, everything: bool = True, **settings: Any) -> dict[str, Any]:
    """Return a scorecard of a model that is `gain` points better than the first in every respect.

    What a seed adds is the same for every gain, but for a little of its own.
    """
    shared, own = random.Random(seed), random.Random(f"{seed} {gain}")

    def near(value: float, spread: float = 0.5) -> float:
        noise = shared.gauss(0, spread) + own.gauss(0, 0.2 * spread)
        return min(100.0, max(0.0, value + gain + noise))

    top1 = near(85.0)
    sure = [(i + 0.5) / 15 for i in range(15)]
    bins = [{"confidence": c, "accuracy": 0.94 * c + gain / 100, "count": int(900 * c * c)} for c in sure]
    card: dict[str, Any] = {
        "checkpoint": "step-00000100",
        "step": 100,
        "weights": "model",
        "sha256": f"{seed:04x}" * 16,
        "settings": {"source": "embedded", "val_split": "val", "limit": None} | settings,
        "seed": seed,
        "samples": 2000,
        "accuracy": {
            "top1": top1,
            "top5": near(97.0, 0.2),
            "loss": 0.9 - near(40) / 100,
            "ece": 10 - near(5),
            "bins": bins,
            "per_class": {name: {"top1": near(80 + i, 2), "count": 200} for i, name in enumerate(CLASSES)},
        },
    }
    if not everything:
        return card
    card["shifts"] = [
        {"name": "real", "path": "real.json", "top1": near(88), "top5": near(98, 0.2), "count": 1950},
        {
            "name": "imagenet-r",
            "path": "r",
            "top1": near(40),
            "top5": near(60),
            "top1_within": near(52),
            "count": 900,
        },
    ]
    ways = [(share, how, 0) for how in ("global", "layer", "structured") for share in (0.25, 0.5, 0.8, 0.9)]
    lost = {"global": 25, "layer": 40, "structured": 60, "2:4": 12}
    card["pruning"] = [
        {
            "sparsity": share,
            "how": how,
            "finetune": steps,
            "measured": share,
            "top1": near(85 - lost[how] * share**3 + steps / 10),
            "parameters": round(11e6 * (1 - share)),
            "parameters_share": 1 - share,
            "flops": 2e8,
            "flops_share": 1 - (0.7 if how == "global" else 1.0) * share,
        }
        for share, how, steps in [*ways, (0.5, "2:4", 0), (0.5, "2:4", 50), (0.9, "global", 50)]
    ]
    kinds = [("fgsm", 1, None), ("pgd", 10, None), ("apgd-ce", 20, 250), ("apgd-dlr", 20, 250)]
    kinds += [("square", 200, 250), ("transfer", 10, 250)]
    card["attacks"] = [
        {
            "attack": attack,
            "norm": "linf",
            "eps": eps / 255,
            "steps": steps,
            "restarts": 1,
            "images": images,
            "top1": near(70 - 12 * eps + 6 * (5 - place), 1.0),
            "clean_top1": top1,
        }
        for eps in (2, 4)
        for place, (attack, steps, images) in enumerate(kinds)
    ]
    card["corruptions"] = []
    for number, family in enumerate(FAMILIES):
        values = [near(80 - (2 + number % 5) * severity) for severity in range(1, 6)]
        mean = sum(values) / 5
        found = {"top1": values, "mean_top1": mean, "clean_top1": top1, "error": 100 - mean}
        card["corruptions"].append({"family": family, "images": 500, **found})
    card["saliency"] = [
        {
            "method": method,
            "images": 100,
            "boxes": None,
            "correct": 85,
            "count": 60,
            "iou": near(30) / 100,
            "ebpg": near(45) / 100,
            "pointing": near(70) / 100,
            "deletion": (90 - near(70)) / 100,
            "insertion": near(60) / 100,
            "randomisation": 0.1,
            "centre_iou": 0.28,
            "centre_ebpg": 0.33,
            "centre_pointing": 0.55,
            "note": None,
        }
        for method in ("log-paper", "log", "gradcam")
    ]
    layers = {
        name: {"gain": 0.01 + 0.002 * i + 0.001 * gain, "control_gain": -0.02, "alignment": 0.3, "snr": 0.1}
        for i, name in enumerate(LAYERS)
    }
    combined = {"gain": 0.02, "control_gain": -0.02, "over_control": 0.04, "alignment": 0.3, "kept_entries": 0.4}
    combined |= {"kept_energy": 0.8, "snr": 0.1, "snr_masked": 0.2}
    card["quality"] = [
        {"operator": "configured", "judged": "pool", "pairs": 8, "layers": layers, "combined": combined}
    ]
    return card


def make_scored_run(
    path: Path,
    arm: str = "no mask",
    seed: int = 0,
    gain: float = 0.0,
    *,
    lr: float = 0.1,
    pictures: bool = False,
    everything: bool = True,
) -> Path:
    """Write a finished run of `arm` with its scorecard, and pictures of three saliency methods on four images."""
    masked = arm != "no mask"
    config = {
        "run": {"arm": arm, "seed": seed, "epochs": 2},
        "model": {"name": "resnet18"},
        "data": {"source": "embedded", "size": 400},
        "optim": {"opt": "sgd", "lr": lr},
        "mask": {"enabled": masked, "operator": "pool", "strength": 0.5},
    }
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "environment.json").write_text(json.dumps({"torch": "2.14.0", "command": ["gmscale", "train", "<b>"]}))
    (path / "summary.json").write_text(json.dumps({"top1": 85.0 + gain, "steps": 100}))
    (path / "scorecard.json").write_text(json.dumps(make_card(gain, seed, everything=everything)))
    if pictures:
        _pictures(path / "gallery", seed)
    return path


def _pictures(home: Path, seed: int) -> None:
    home.mkdir()
    listed = []
    methods = ("log-paper", "log", "gradcam")
    for index in (0, 500, 1000, 1500):
        files = {method: f"{index:03d}-{method}.png" for method in methods}
        for number, file in enumerate([f"{index:03d}-image.png", *files.values()]):
            Image.linear_gradient("L").rotate(90 * number + seed).convert("RGB").resize((64, 64)).save(home / file)
        listed.append(
            {
                "index": index,
                "label": CLASSES[index // 500],
                "predicted": CLASSES[index // 500 + (index == 1000)],
                "image": f"{index:03d}-image.png",
                "files": files,
                "box": [4, 4, 30, 30],
                "iou": dict.fromkeys(methods, 0.4),
            }
        )
    (home / "gallery.json").write_text(json.dumps(listed))
