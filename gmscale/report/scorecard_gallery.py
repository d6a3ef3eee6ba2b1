"""The pictures of a scorecard page: saliency maps of several models on the same images."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gmscale.errors import UsageError
from gmscale.report.scorecard_comparison import ScoredArm

MAX_PICTURES = 8
_MAX_COLUMNS = 9  # of pictures beside an image


def gallery(arms: Sequence[ScoredArm]) -> tuple[list[tuple[str, str]], list[list[dict[str, Any]]], int]:
    """Return the columns (method, arm), rows of pictures as data URIs, and how many methods were left out.

    A row is one image: first the image itself, then each method of each arm; it is in the gallery of all of them.
    """
    found = [(arm, pictures) for arm in arms if (pictures := _pictures(arm))]
    if not found:
        return [], [], 0
    indices = [index for index in found[0][1] if all(index in pictures for _, pictures in found)][:MAX_PICTURES]
    methods = list(dict.fromkeys(m for _, pictures in found for one in pictures.values() for m in one["files"]))
    shown = methods[: max(1, _MAX_COLUMNS // len(found))]
    columns = [(method, arm.label) for method in shown for arm, _ in found]
    rows = []
    for index in indices:
        first = found[0][1][index]
        row = [{"uri": _uri(first["home"], first["image"]), "words": str(first["label"]), "wrong": False}]
        for method in shown:
            for _, pictures in found:
                one = pictures[index]
                overlap = (one.get("iou") or {}).get(method)
                words = [] if overlap is None else [f"IoU {100 * overlap:.0f} %"]
                wrong = one.get("predicted") != one.get("label")
                words += [f"→ {one['predicted']}"] if wrong else []
                file = one["files"].get(method)
                uri = _uri(one["home"], file) if file else ""
                row.append({"uri": uri, "words": ", ".join(words), "wrong": wrong})
        rows.append(row)
    return columns, rows, len(methods) - len(shown)


def _pictures(arm: ScoredArm) -> dict[Any, dict[str, Any]]:
    """Image number -> its entry, with `home`, in the first gallery of an arm's runs."""
    for card in arm.cards:
        home = card.path.parent / "gallery"
        try:
            listed = json.loads((home / "gallery.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UsageError(f"{home / 'gallery.json'} cannot be read as JSON: {error}") from None
        return {one["index"]: one | {"home": home} for one in listed}
    return {}


def _uri(home: Path, file: str) -> str:
    """The picture as a data URI; empty for one that is not there."""
    try:
        content = (home / Path(file).name).read_bytes()
    except OSError:
        return ""
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
