"""The model card: README.md of an exported folder, filled from what the run recorded and nothing else."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jinja2
import yaml
from timm.optim import get_optimizer_info

from gmscale.config import OutputConfig, TrainConfig
from gmscale.data import AugmentConfig
from gmscale.export.timm_files import CARD
from gmscale.trained import Trained

Rows = list[tuple[str, str]]

_MOST_NAMES = 20
_PACKAGES = ("gmscale", "python", "torch", "torchvision", "timm", "deepspeed", "triton")


def write(trained: Trained, folder: Path) -> None:
    """Write the model card."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # this is Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _cell
    config, run = trained.config, trained.run
    text = environment.get_template("card.md.j2").render(
        front_matter=yaml.safe_dump(_front_matter(trained), sort_keys=False, allow_unicode=True, width=10**6),
        trained=trained,
        config=config,
        data_name=_data_name(config),
        toy=config.data.source == "embedded",
        finished=run.finished,
        last_step=run.last_step,
        channels=config.data.channels,
        size=config.data.image_size,
        model=_model(trained),
        data=_data(trained),
        training=_training(trained),
        mask=_mask(trained, "mask"),
        output=_mask(trained, "output"),
        results=_results(trained),
        environment=_environment(trained),
        command=_command(trained),
        settings=_settings(config).strip(),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _front_matter(trained: Trained) -> dict[str, Any]:
    """Return what the hub reads of a card."""
    masked = trained.config.mask.enabled or trained.config.output.enabled
    found = trained.validation(trained.averaged)
    head: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": "unknown",
        "tags": ["image-classification", "timm", "gmscale", *(["gradient-mask"] if masked else [])],
        "metrics": ["accuracy"],
    }
    if found:
        name = _data_name(trained.config)
        head["model-index"] = [
            {
                "name": trained.name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": name, "type": name, "split": trained.config.data.val_split},
                        "metrics": [
                            {"type": "accuracy", "name": f"{key} (%)", "value": round(found[key], 3)}
                            for key in ("top1", "top5")
                            if found.get(key) is not None
                        ],
                    }
                ],
            }
        ]
    return head


def _model(trained: Trained) -> Rows:
    config, names = trained.config, trained.classes
    listed = ", ".join(names[:_MOST_NAMES]) + (
        f" and {len(names) - _MOST_NAMES} more" if names[_MOST_NAMES:] else ""
    )
    parameters = sum(p.numel() for p in trained.model.parameters())
    rows = [
        ("Architecture", f"`{config.model.name}` (timm)"),
        ("Arguments", _given(config.model.kwargs)),
        ("Parameters", f"{parameters / 1e6:.2f} million"),
        ("Input", f"{config.data.channels} x {config.data.image_size} x {config.data.image_size}"),
        ("Classes", f"{trained.outputs}: {listed}" if names else f"{trained.outputs}, their names unknown"),
        ("Weights", _weights(trained)),
        ("Started from", _start(trained)),
    ]
    return _known(rows)


def _weights(trained: Trained) -> str:
    average = f"moving average (decay {trained.config.model.ema_decay:g})" if trained.averaged else "plain"
    return f"{average}, after {trained.step} optimizer steps"


def _start(trained: Trained) -> str:
    model, found = trained.config.model, trained.started_from
    if model.checkpoint:
        start = f"`{Path(model.checkpoint).name}`"
    else:
        start = f"timm's pretrained `{model.name}`" if model.pretrained else "random weights"
    counts = [f"{len(found[kind])} {kind}" for kind in ("loaded", "adapted", "fresh") if found.get(kind)]
    return f"{start}: tensors {', '.join(counts)}" if counts else start


def _data_name(config: TrainConfig) -> str:
    """Return the data's name: an address as it is, a directory without the path to it."""
    source = config.data.source
    if source == "embedded":
        return "gmscale-embedded"
    return source if "://" in source else Path(source).name


def _data(trained: Trained) -> Rows:
    data = trained.config.data
    last = (trained.validations(False) or [{}])[-1]
    rows = [
        ("Source", f"`{_data_name(trained.config)}`"),
        ("Training split", f"`{data.train_split}`{_count(trained.training_samples)}"),
        ("Validation split", f"`{data.val_split}`{_count(last.get('count'))}"),
        ("Mean, deviation", ", ".join(map(_numbers, data.statistics))),
        (
            "Validation images",
            f"shorter side resized to {data.image_size / data.crop_pct:.0f} ({data.eval_interpolation}), "
            f"centre {data.image_size} x {data.image_size}",
        ),
    ]
    return _known(rows)


def _training(trained: Trained) -> Rows:
    config, world = trained.config, next(iter(trained.run.processes), None)  # the batch is that of the beginning
    optim, run = config.optim, config.run
    per_device = config.data.batch_size_per_device
    accumulated = f" x {optim.grad_accum_steps} accumulated" if optim.grad_accum_steps > 1 else ""
    if world is None:
        batch = f"{per_device} a device{accumulated}, number of devices unknown"
    else:
        total = per_device * world * optim.grad_accum_steps
        batch = f"{total} ({per_device} x {world} device{'s' if world > 1 else ''}{accumulated})"
    warmup = f", {optim.warmup_epochs:g} epochs warm-up" if optim.warmup_epochs else ""
    meant_for = f" for a batch of {optim.lr_batch_size}, scaled ({optim.lr_scaling})" if optim.lr_batch_size else ""
    rows = [
        ("Epochs", f"{run.epochs:g}"),
        ("Optimizer", f"{optim.opt} {_given(optim.opt_kwargs)}".strip()),
        ("Momentum", f"{optim.momentum:g}" if get_optimizer_info(optim.opt.lower()).has_momentum else ""),
        ("Learning rate", f"{optim.lr:g}{meant_for}, schedule {optim.sched} by {optim.sched_on}{warmup}"),
        ("Schedule's arguments", _given(optim.sched_kwargs)),
        ("Weight decay", f"{optim.weight_decay:g}"),
        ("Layer decay", f"{optim.layer_decay:g}" if optim.layer_decay else ""),
        ("Global batch", batch),
        ("Loss", {"ce": "cross-entropy", "bce": "binary cross-entropy"}[optim.loss]),
        ("Label smoothing", f"{optim.label_smoothing:g}" if optim.label_smoothing else ""),
        ("Dropout", f"{config.model.drop_rate:g}" if config.model.drop_rate else ""),
        ("Stochastic depth", f"{config.model.drop_path_rate:g}" if config.model.drop_path_rate else ""),
        ("Gradient clipping", f"{optim.clip_mode} {optim.clip_grad:g}" if optim.clip_grad else ""),
        ("Augmentation", _augmentation(config.augment)),
        ("Mixed precision", optim.amp),
        ("Moving average of weights", f"decay {config.model.ema_decay:g}" if config.model.ema_decay else "none"),
        ("Frozen", "all but the classifier" if config.finetune.linear_probe else ", ".join(config.finetune.freeze)),
        ("Seed", str(run.seed)),
    ]
    return _known(rows)


def _augmentation(augment: AugmentConfig) -> str:
    """Return every setting of augmentation that does something."""
    off = {"mix_prob", "mix_switch_prob", "mix_mode", "mix_off_epoch"} if not augment.takes_pairs else set()
    off |= {"erase_mode", "erase_count"} if augment.erase_prob == 0 else set()
    off |= set() if augment.guided else {"guide"}
    off |= set() if augment.guided_crop else {"guided_crop_scale"}
    off |= {"repeats"} if augment.repeats == 1 else set()
    if augment.auto_augment and "3a" not in augment.auto_augment:
        off |= {"color_jitter"}  # the policy replaces it
    values = {field.name: getattr(augment, field.name) for field in fields(augment) if field.name not in off}
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items() if value not in (0, "", None))


def _mask(trained: Trained, section: str) -> Rows:
    """Return what the mask of weight or output gradients is and did; nothing if there was none."""
    mask = getattr(trained.config, section)
    if not mask.enabled:
        return []
    run, prefix = trained.run, "" if section == "mask" else "output_"
    found = run.touched.get(section, {})
    touched, passed = found.get("touched", []), found.get("passed", [])
    entries = sum(layer.get("entries", 0) for layer in touched)
    what = "layer outputs" if isinstance(mask, OutputConfig) else f"parameters ({entries:,} entries)"
    changed = {
        name: value
        for name, value in _differences(mask, type(mask)())
        if name not in ("enabled", "site", "operator", "strength", "agreement", "seed", "start", "end")
    }
    rows = [
        ("Operator", mask.operator),
        ("Strength", f"{mask.peak_strength:g}"),
        ("Acts", f"from {100 * mask.start:g} to {100 * mask.end:g} % of training"),
        ("Further settings", _given(changed)),
        ("Site", str(found.get("site", ""))),
        ("Agreement", str(found.get("agreement", ""))),
        ("Timing", str(found.get("timing", ""))),
        ("Touches", f"{len(touched)} {what}; {len(passed)} pass through" if found else "not recorded"),
        ("Kept entries", _share(trained, f"{prefix}kept_entries")),
        ("Kept energy", _share(trained, f"{prefix}kept_energy")),
    ]
    return _known(rows)


def _share(trained: Trained, key: str) -> str:
    """Return the mean of a logged share up to this checkpoint, as a percentage."""
    lines = trained.run.lines("train")
    found = [line[key] for line in lines if line["step"] <= trained.step and line.get(key) is not None]
    return f"{100 * sum(found) / len(found):.1f} % (mean of {len(found)} logged steps)" if found else ""


def _results(trained: Trained) -> list[dict[str, Any]]:
    """Return validation records: of the exported weights, and the last and best of plain and averaged ones."""
    rows: dict[tuple[bool, int], dict[str, Any]] = {}
    for averaged in (False, True):
        found = trained.validations(averaged)
        if not found:
            continue
        best = max(found, key=lambda line: (line["top1"], line["step"]))
        for line, word in ((trained.validation(averaged), ""), (best, "best"), (found[-1], "last")):
            if line is None or not (word or averaged == trained.averaged):
                continue
            row = rows.setdefault((averaged, line["step"]), {"notes": [], **line})
            row["weights"] = "averaged" if averaged else "plain"
            row["exported"] = averaged == trained.averaged and line["step"] == trained.step
            row["notes"] += [word] if word else []
    return [rows[key] for key in sorted(rows)]


def _environment(trained: Trained) -> Rows:
    found, processes = trained.run.environment, " then ".join(map(str, trained.run.processes))
    commit = str(found.get("commit") or "")
    rows = [
        ("Versions", ", ".join(f"{name} {found[name]}" for name in _PACKAGES if found.get(name))),
        ("Commit of gmscale", f"{commit.rstrip('+')[:12]}{' with changes' if commit.endswith('+') else ''}"),
        ("Device", str(found.get("device") or "")),
        ("Processes", f"{processes} ({found.get('backend')})" if processes else ""),
    ]
    return _known(rows)


def _command(trained: Trained) -> str:
    """Return the command line of the run, without the places of one machine; empty if it was started otherwise."""
    command = str(trained.run.environment.get("command") or "")
    for place in (trained.config.run.dir, trained.config.data.cache_dir, trained.config.data.source):
        if Path(place).is_absolute():
            command = command.replace(place, Path(place).name)
    return command if " train" in command or " compare" in command else ""


def _settings(config: TrainConfig) -> str:
    """Return the whole configuration as YAML, without the places of one machine."""
    elsewhere = TrainConfig()
    source = "embedded" if config.data.source == "embedded" else _data_name(config)
    checkpoint = Path(config.model.checkpoint).name
    return replace(
        config,
        run=replace(config.run, dir=elsewhere.run.dir),
        model=replace(config.model, checkpoint=checkpoint),
        data=replace(config.data, source=source, cache_dir=elsewhere.data.cache_dir),
    ).to_yaml()


def _differences(value: Any, default: Any) -> Iterable[tuple[str, Any]]:
    for field in fields(value):
        if getattr(value, field.name) != getattr(default, field.name):
            yield field.name, getattr(value, field.name)


def _known(rows: Rows) -> Rows:
    return [(term, text) for term, text in rows if text]


def _count(samples: Any) -> str:
    return f", {samples:,} images" if samples else ""


def _numbers(values: Iterable[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _given(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in arguments.items())


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_value, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """Return text that stays within its cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")
