"""Put the tables and figures of runs on one HTML page, or hand a sweep over to its own."""

import base64
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gmscale.report import figures, html, sweep
from gmscale.report.comparison import Arm, ArmsTable, arms, differing_keys, masks, plain
from gmscale.report.runs import Run, find_runs
from gmscale.statistics import ENOUGH_SEEDS

MAX_SAMPLES = 12
_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
# environment.json fields with a place of their own on the page, or of no use to a reader.
_NOT_VERSIONS = {"commit", "hostname", "device", "threads", "command", "backend", "platform"}
_NOT_VERSIONS |= {"world_size", "world_sizes", "branched_from"}


def write_report(paths: Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Write the report on the runs at or below `paths`, or on the one sweep there, and return where it is.

    Without `out` it is report.html in the paths' common parent, or inside a single given directory. The
    page appears complete or not at all; UsageError where nothing is found or the place is not writable.
    """
    given = [Path(path) for path in paths]
    swept = sweep.the_one(given)
    runs = [] if swept else find_runs(given)
    out = Path(out) if out else Path(os.path.commonpath([path.absolute() for path in given])) / "report.html"
    if out.is_dir():
        out = out / "report.html"
    return html.write(sweep.render(swept) if swept else _render(runs, out.absolute().parent), out)


def _render(runs: Sequence[Run], home: Path) -> str:
    table = arms(runs)
    shown = table.arms if len(table.arms) <= figures.MAX_ARMS else _best(table.arms)
    masked = [arm for arm in shown if arm.masked]
    packed = [arm for arm in table.arms if (arm.values["wire_share"].mean or 1.0) < 1]  # others send all
    drawn = figures.styles(shown)
    layer_entries, layers_left_out = figures.layers(masked, drawn, "kept_entries", "kept entries, %")
    layer_energy, _ = figures.layers(masked, drawn, "kept_energy", "kept energy, %")

    def curves(found: Sequence[Arm], phase: str, key: str, x: str, label: str, scale: float = 1.0) -> str:
        return figures.curves(found, drawn, phase, key, x, label, scale)

    return html.render(
        "page.html.j2",
        title=_title(runs),
        facts=_facts(runs),
        notices=_notices(runs, table),
        headline=_headline(table),
        table=table,
        packed=packed,
        shown=shown,
        styles=drawn,
        differences=figures.differences(shown, drawn),
        learning=[
            (curves(shown, "validation", "top1", "epoch", "validation top1, %"), "Validation top1 against epoch"),
            (curves(shown, "train", "loss", "epoch", "training loss"), "Training loss against epoch"),
        ],
        layers=[(layer_entries, "Kept entries per layer"), (layer_energy, "Kept energy per layer")],
        layers_left_out=layers_left_out,
        over_time=[
            (curves(masked, "train", "kept_entries", "step", "kept entries, %", 100), "Kept entries against step"),
            (curves(masked, "train", "strength", "step", "strength"), "Mask strength against step"),
            (
                curves(masked, "train", "output_kept_entries", "step", "kept at outputs, %", 100),
                "Kept at layer outputs",
            ),
            (curves(masked, "train", "output_strength", "step", "strength at outputs"), "Strength at outputs"),
            (
                curves(
                    [arm for arm in masked if arm in packed], "train", "wire_share", "step", "bytes sent, %", 100
                ),
                "Bytes against step",
            ),
        ],
        quality=[
            (curves(masked, "quality", "gain", "step", "held-out alignment gain dQ"), "dQ of the mask"),
            (curves(masked, "quality", "control_gain", "step", "dQ of a random mask"), "dQ of a random mask"),
        ],
        step_time=figures.step_time(shown),
        samples=[(arm, run, pictures) for arm in shown for run, pictures in [_samples(arm)] if pictures],
        mask_keys=differing_keys([_mask_settings(arm.runs[0]) for arm in table.arms if arm.masked]),
        runs=[(arm, run, os.path.relpath(run.path.absolute(), home)) for arm in table.arms for run in arm.runs],
        commands=[(arm, command) for arm in shown if (command := _command(arm.runs[0]))],
    )


def _best(found: Sequence[Arm]) -> tuple[Arm, ...]:
    """The best unmasked arm and the best masked ones, MAX_ARMS in all (both are ordered by top1)."""
    unmasked = [arm for arm in found if not arm.masked]
    masked = [arm for arm in found if arm.masked]
    kept = unmasked[: max(1, figures.MAX_ARMS - len(masked))]
    return (*kept, *masked[: figures.MAX_ARMS - len(kept)])


def _title(runs: Sequence[Run]) -> str:
    models = _several(run.setting("model.name") for run in runs)
    sources = _several(Path(str(run.setting("data.source", "data"))).name for run in runs)
    return f"{models} on {sources}"


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the runs are, as (term, description); values that differ between runs are all named."""

    def setting(key: str) -> str:
        return _several(run.setting(key) for run in runs)

    def environment(key: str) -> str:
        return _several(run.environment.get(key) for run in runs)

    finished = sum(run.finished for run in runs)
    versions = {key: None for run in runs for key in run.environment if key not in _NOT_VERSIONS}
    commits = _several(str(run.environment.get("commit") or "")[:12] for run in runs)
    facts = [
        ("Model", setting("model.name")),
        ("Data", setting("data.source")),
        ("Embedded size", _several(run.setting("data.size") for run in runs if _embedded(run))),
        ("Runs", f"{len(runs)}, {finished} finished"),
        ("Seeds", _ranges({run.seed for run in runs})),
        ("Epochs", setting("run.epochs")),
        ("Optimizer", setting("optim.opt")),
        ("Learning rate", setting("optim.lr")),
        ("World size", _several(" then ".join(map(str, run.processes)) for run in runs)),
        ("Batch per device", setting("data.batch_size_per_device")),
        ("Device", environment("device")),
        ("Mask touches", _several(_touches(run) for run in runs if run.has("mask"))),
        ("Output mask touches", _several(_outputs_touched(run) for run in runs if "output" in run.touched)),
        ("Versions", ", ".join(f"{key} {environment(key)}" for key in versions)),
        ("Commit", commits),
    ]
    return [(term, description) for term, description in facts if description not in ("", "–")]


def _embedded(run: Run) -> bool:
    return bool(run.setting("data.source") == "embedded")


def _touches(run: Run) -> str:
    mask = run.touched.get("mask", {})
    touched, passed = mask.get("touched", []), mask.get("passed", [])
    if not touched:
        return ""
    entries = sum(layer.get("entries", 0) for layer in touched)
    where = f"site {plain(mask.get('site'))}, agreement {plain(mask.get('agreement'))}"
    return f"{len(touched)} parameters ({entries:,} entries), {len(passed)} pass through; {where}"


def _outputs_touched(run: Run) -> str:
    output = run.touched["output"]
    return f"{len(output.get('touched', []))} layer outputs, {len(output.get('passed', []))} pass through"


def _notices(runs: Sequence[Run], table: ArmsTable) -> list[tuple[str, str]]:
    """What a reader has to know before the numbers, as (heading, sentence)."""
    notices = []
    if any(map(_embedded, runs)):
        notices.append(
            (
                "Toy-sized data",
                "These runs train on the small embedded set (digits pasted on photographs). It shows that the "
                "software works; nothing here follows for ImageNet.",
            )
        )
    if table.control:
        notices.append(("Uncontrolled comparison", table.control))
    compared = [arm.difference.n for arm in table.arms if arm.difference]
    if compared and max(compared) < ENOUGH_SEEDS:
        notices.append(("Too few seeds", f"No comparison has {ENOUGH_SEEDS} paired seeds, so none is evidence."))
    if waiting := sum(not run.finished for run in runs):
        words = "1 run is" if waiting == 1 else f"{waiting} runs are"
        notices.append(("Unfinished runs", f"{words} not finished and left out of every mean and comparison."))
    return notices


def _headline(table: ArmsTable) -> str:
    """The outcome of all comparisons in one sentence; empty without any."""
    compared = [arm.difference for arm in table.arms if arm.difference and arm.difference.n >= ENOUGH_SEEDS]
    if not compared:
        return ""
    clear = [arm.difference.mean or 0.0 for arm in table.arms if arm.significant and arm.difference]
    higher = sum(mean > 0 for mean in clear)
    counts = [
        (higher, "higher than"),
        (len(clear) - higher, "lower than"),
        (len(compared) - len(clear), "not significantly different from"),
    ]
    outcome = "; ".join(f"{count} {words} no mask" for count, words in counts if count)
    return f"Masked arms with at least {ENOUGH_SEEDS} paired seeds, by top1: {outcome}."


def _samples(arm: Arm) -> tuple[Run, list[dict[str, Any]]]:
    """The first run of `arm` that has sample pictures, and these as data URIs."""
    for run in arm.shown_runs:
        pictures = []
        for sample in run.samples[:MAX_SAMPLES]:
            file = run.path / "samples" / Path(str(sample.get("file", ""))).name
            if file.suffix.lower() in _IMAGE_TYPES and file.is_file():
                content = base64.b64encode(file.read_bytes()).decode("ascii")
                uri = f"data:{_IMAGE_TYPES[file.suffix.lower()]};base64,{content}"
                label, predicted = str(sample.get("label")), str(sample.get("predicted"))
                pictures.append(
                    {
                        "uri": uri,
                        "label": label,
                        "predicted": predicted,
                        "right": label == predicted,
                        "confidence": sample.get("confidence"),
                    }
                )
        if pictures:
            return run, pictures
    return arm.runs[0], []


def _mask_settings(run: Run) -> dict[str, Any]:
    return {
        key: value
        for key, value in run.settings.items()
        if key.startswith(masks(run)) and not key.endswith(".seed")
    }


def _command(run: Run) -> str:
    command = run.environment.get("command") or ""
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)


def _several(values: Iterable[Any]) -> str:
    """The distinct values in order of appearance, the first four of them in full."""
    distinct = list(dict.fromkeys(text for value in values if (text := plain(value)) != "–"))
    more = f" and {len(distinct) - 4} more" if len(distinct) > 4 else ""
    return ", ".join(distinct[:4]) + more or "–"


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 7} -> '0–2, 7'."""
    parts: list[list[int]] = []
    for value in sorted(numbers):
        if parts and value == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], value]
        else:
            parts.append([value])
    return _several("–".join(map(str, part)) for part in parts)
