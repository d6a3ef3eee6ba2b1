"""What a dry run found, as a table for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from gmscale.tracking import plain_console

_NAMES = 3  # of what a mask touches

Row = tuple[str, str]


def print_found(found: Mapping[str, Any]) -> None:
    """Print the table, the notes, and what the estimate takes for granted."""
    described = found["environment"]
    console = plain_console()
    title = (
        f"dry run: {described['world_size']} x {described['device']}, {described['backend']}, "
        f"torch {described['torch']}"
    )
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for rows in (_what(found), _costs(found), _estimate(found)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    console.print(table, highlight=False, markup=False)
    for line in (*found["notes"], *_assumptions(found)):
        console.print(f"* {line}", highlight=False, markup=False)


def _what(found: Mapping[str, Any]) -> Iterator[Row]:
    model, batch, steps = found["model"], found["batch"], found["steps"]
    yield "model", f"{model['name']}, {model['image_size']} px, {model['classes']} classes"
    frozen = model["parameters"] - model["trained"]
    yield "parameters", f"{count(model['parameters'])}: {count(model['trained'])} trained, {count(frozen)} frozen"
    if not found["masks"]:
        yield "mask", "none"
    for name, mask in found["masks"].items():
        yield from _mask(name, mask, model["parameters"])
    factors = f"{batch['ranks']} ranks x {batch['per_device']} a device x {batch['grad_accum_steps']} accumulated"
    yield "global batch", f"{batch['global']} images = {factors}"
    an_epoch = f"{steps['per_epoch']} an epoch of {steps['samples']} images"
    yield "steps", f"{steps['total']} in {steps['epochs']:g} epochs, {an_epoch}"


def _mask(name: str, mask: Mapping[str, Any], parameters: int) -> Iterator[Row]:
    strength = "" if mask["strength"] is None else f" {mask['strength']:g}"
    how = f"{mask['operator']}{strength}, site {mask['site']}, agreement {mask['agreement']}"
    if name == "output":
        yield "output mask", how
        yield "  touches", f"{len(mask['touched'])} layers: {first(mask['touched'])}"
    else:
        share = percent(mask["entries"] / parameters)
        yield "mask", how
        touched = mask["touched"]
        yield "  touches", f"{len(touched)} tensors with {share} of the parameters: {first(touched)}"
    if mask["passed"]:
        yield "  lets pass", f"{len(mask['passed'])}: {first(mask['passed'])}"
    if mask["kept_entries"] is not None:
        yield "  keeps", f"{percent(mask['kept_entries'])} of entries, {percent(mask['kept_energy'])} of energy"
    if mask["hook_ms"] is not None:
        yield "  takes", f"{mask['hook_ms']:.1f} ms, {percent(mask['hook_share'])} of a step"


def _costs(found: Mapping[str, Any]) -> Iterator[Row]:
    first_step = duration(found["first_step_ms"] / 1e3)
    yield "step", f"{found['step_ms']:.1f} ms, the first one {first_step}; {found['images_per_s']:.0f} images/s"
    yield "evaluation", f"{found['eval_images_per_s']:.0f} images/s a device"
    memory = found["memory"]
    yield "peak memory", f"{mib(memory['peak_mb'])} a rank"
    if memory["peak_mb"] > 1.01 * memory["training_peak_mb"]:
        yield "  in training", f"{mib(memory['training_peak_mb'])}, the rest in evaluation"
    for name, size in memory["parts_mb"].items():
        if size > 0:
            yield f"  {name}", mib(size)
    yield from _collectives(found)
    saved = found["checkpoint"]
    of_masks = f", {mib(saved['of_masks_mb'])} of it error feedback" if saved["of_masks_mb"] else ""
    kept = f"{saved['keep_checkpoints']} newest + {saved['keep_best']} best: {mib(saved['kept_mb'])}"
    yield f"checkpoint of {found['estimate']['devices']}", f"{mib(saved['mb'])}{of_masks}; {kept}"
    loader = found["loader"]
    needed = found["images_per_s"] / found["batch"]["ranks"] * loader["ranks_here"] / loader["core_images_per_s"]
    there = f"{loader['workers']} workers a rank, ranks here {loader['ranks_here']}, cores {loader['cores']}"
    yield "loader", f"{there}; to decode 500 x 375 JPEGs takes {needed:.1f} cores"


def _collectives(found: Mapping[str, Any]) -> Iterator[Row]:
    seen = found["collectives"]
    if not seen:
        yield "collectives", f"none here; a step of plain DDP: {_listed(found['expected_collectives'])}"
        return
    total = sum(operation["bytes"] for operation in seen.values())
    yield "collectives", f"{mb(total)} a step: {_listed(seen)}"
    mask = found["masks"].get("mask")
    if mask is not None and mask["wire_bytes"] is not None:
        yield "  of gradients", f"{mb(mask['wire_bytes'])}; plain DDP {mb(mask['dense_bytes'])}"


def _listed(operations: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{seen['calls']:g} {name} ({mb(seen['bytes'])})" for name, seen in operations.items())


def _estimate(found: Mapping[str, Any]) -> Iterator[Row]:
    e = found["estimate"]
    devices = f"{e['devices']} device{'s' if e['devices'] > 1 else ''}"
    steps = f"{e['steps']} steps of {e['global_batch']} images ({e['steps_per_epoch']} an epoch)"
    yield f"hours on {devices}", f"{duration(e['total_s'])} for {steps}"
    waiting = f"{1e3 * e['exposed_s']:.1f} ms of it waiting for communication"
    yield "  training", f"{duration(e['training_s'])}: {1e3 * e['step_s']:.1f} ms a step, {waiting}"
    evaluated = f"for {e['eval_images']} images" if e["eval_images"] else "(--val_samples is 0)"
    yield "  evaluation", f"{duration(e['evaluation_s'])} {evaluated}"
    yield "  saving", f"{duration(e['saving_s'])} for {e['saves']} checkpoints"


def _assumptions(found: Mapping[str, Any]) -> Iterator[str]:
    e, here = found["estimate"], found["environment"]["world_size"]
    yield (
        "a device trains on as many images a step whatever their number, and takes as long as measured here; "
        "loading data hides behind it" + (" (not with data.workers 0!)" if found["loader"]["workers"] == 0 else "")
    )
    yield (
        f"communication: rings of {e['link_gb_per_s']:g} GB/s and {e['latency_us']:g} us a hop; an all-reduce of b "
        "bytes takes 2 (n - 1) / n b / bandwidth + 2 (n - 1) latency, a gather or reduce-scatter half of it"
    )
    yield (
        "reductions hide behind the backward pass of the last micro-batch (two thirds of its time), from when the "
        "first of equal buckets is ready; the last one never does, and nothing else hides"
    )
    saving = "a copy in memory" if e["background_save"] else "writing at 0.5 GB/s"
    yield f"saving keeps training waiting for {saving}; checkpoints of new best models are not counted"
    if here != e["devices"]:
        yield f"measured on {here} and not on {e['devices']} devices: start as many to be sure"


def first(names: Sequence[str]) -> str:
    """Return the first few names."""
    return ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")


def count(number: float) -> str:
    """Return a large number in thousands or millions."""
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def mib(size: float) -> str:
    """Return a number of MiB, or of GiB where that reads better."""
    return f"{size / 1024:.2f} GiB" if size >= 1024 else f"{size:.1f} MiB"


def mb(nbytes: float) -> str:
    """Return bytes in MB, as links count."""
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e4 else f"{nbytes:.0f} bytes"


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
