"""What is compared with what, and the rows of the table."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from gmscale import models, parallel
from gmscale.config import TrainConfig
from gmscale.parallel import World
from gmscale.verify.verdict import MORE, Difference, Verdict, classify, difference
from gmscale.verify.ways import Batches, Trajectory, Way, batch_norms, train

NAMES = (
    "ranks", "buckets", "strength0", "accumulation", "bf16", "channels_last", "compile", "batchnorm", "backend"
)  # fmt: skip
_FLOAT32 = 1e-4  # largest relative difference that is rounding
_FLOAT64 = 1e-9  # where float32 cannot tell: a ReLU at zero may take either side of a rounding error
_BFLOAT16 = 0.3  # 8 bits, through many layers, seen up to 0.15; a wrong factor such as a missed mean is 0.5 or more
_GATE = "a hard gate turns rounding at its threshold into a step"
_SGD = ("sgd", "momentum", "nesterov")


@dataclass(frozen=True)
class Row:
    """One comparison with the mask off or on."""

    name: str
    title: str
    mask: Literal["off", "on"]
    difference: Difference | None
    bound: float
    """Largest relative difference of gradients that counts as rounding; of weights 10 times as much a step."""
    mask_error: float | None
    """Largest difference of what arrived to the mean of the ranks' masked gradients, relative, over all steps."""
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """A way to train beside the one that it must agree with."""

    title: str
    way: Way
    reference: Way
    bound: float = _FLOAT32
    off_must_differ: str = ""
    on_must_differ: str = ""
    on: bool = True
    """Whether to compare with the mask on too."""


def comparisons(config: TrainConfig, ranks: int, wanted: Sequence[str], batch_norm: bool) -> dict[str, Comparison]:
    """Return what to compare, by name; `batch_norm` says whether the model has such layers."""
    one, many = Way(), Way(ranks=ranks)
    masked = config.mask.enabled and config.mask.peak_strength > 0
    different = (
        "one mask from the ranks' mean map is not the mask of their mean gradient"
        if config.mask.agreement == "consensus"
        else "mask-then-average is not average-then-mask"
    )
    found = {
        "ranks": Comparison(f"{ranks} ranks : 1 rank", many, one, on_must_differ=different if masked else ""),
        "buckets": Comparison("tiny buckets : buckets", replace(many, bucket_cap_mb=0.01), many),
        "strength0": Comparison(
            "mask at strength 0 : no mask", replace(many, masked=True, strength=0.0), many, on=False
        ),
        "accumulation": Comparison("2 micro-batches : 1", replace(one, micro_batches=2), one),
        "bf16": Comparison("AMP bf16 : float32", replace(one, amp="bf16"), one, bound=_BFLOAT16),
        "channels_last": Comparison("channels_last : contiguous", replace(one, channels_last=True), one),
        "compile": Comparison("torch.compile : eager", replace(one, compiled=True), one),
    }
    if batch_norm:
        found["batchnorm"] = Comparison(
            f"batch statistics: {ranks} ranks : 1",
            replace(many, batch_statistics=True),
            replace(one, batch_statistics=True),
            off_must_differ="each rank normalises by its own images",
            on=False,
        )
    if config.parallel.backend in ("deepspeed", "fsdp2"):
        backend = config.parallel.backend
        ways = replace(many, backend=backend), many
        found["backend"] = Comparison(f"{backend} : ddp", *ways, on=config.mask.agreement == "local")
    return {name: comparison for name, comparison in found.items() if name in wanted}


def run(world: World, config: TrainConfig, batches: Batches, wanted: Sequence[str]) -> dict[str, Any]:
    """Train in every way that is needed, on all ranks; return the rows on the main one."""
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
    results: dict[Way, Trajectory | str] = {}

    def result(way: Way) -> Trajectory | str:
        if way not in results:
            alone = replace(world, rank=0, size=1, backend="single", control=None, store=None, watch=None)
            here = alone if way.ranks == 1 else replace(world, backend=way.backend)
            if way.ranks > 1 or world.is_main:
                results[way] = _train(config, way, batches, here)
            else:
                results[way] = ""
        return results[way]

    masks: list[Literal["off", "on"]] = ["off", "on"] if config.mask.enabled else ["off"]
    rows = []
    batch_norm = bool(batch_norms(models.create(config, batches.classes)))
    for name, comparison in comparisons(config, world.size, wanted, batch_norm).items():
        for mask in masks if comparison.on else masks[:1]:
            ways = comparison.way, comparison.reference
            if mask == "on":
                ways = replace(ways[0], masked=True), replace(ways[1], masked=True)
            ours, reference = result(ways[0]), result(ways[1])
            row = None
            if world.is_main:
                row = _row(name, comparison, mask, ours, reference, config, len(batches.images))
            doubtful = row is not None and row.verdict.kind == "UNEXPECTED" and comparison.bound == _FLOAT32
            if parallel.any_rank(doubtful, world):
                ours, reference = (result(replace(way, float64=True)) for way in ways)
                if row is not None:
                    row = _second_look(row, ours, reference, _weights_bound(_FLOAT64, config, len(batches.images)))
            if row is not None:
                rows.append(asdict(row))
    return {"rows": rows}


def _second_look(row: Row, ours: Trajectory | str, reference: Trajectory | str, weights_bound: float) -> Row:
    """Return the row with the verdict that float64 suggests: what is rounding in float32 vanishes there."""
    if isinstance(ours, str) or isinstance(reference, str) or row.verdict.reason != MORE:
        return row
    found = difference((ours.gradient, ours.weights), (reference.gradient, reference.weights), reference.before)
    if found.gradient_rel is None or not (found.gradient_rel <= _FLOAT64 and found.weights_rel <= weights_bound):
        return row
    reason = f"rounding took the other side of a ReLU or a maximum: in float64 the gradients agree to {_FLOAT64:g}"
    return replace(row, verdict=Verdict("rounding", reason))


def _train(config: TrainConfig, way: Way, batches: Batches, world: World) -> Trajectory | str:
    """Train; return why not where the machine has no working compiler."""
    if not way.compiled:
        return train(config, way, batches, world)
    try:
        return train(config, way, batches, world)
    except Exception as error:  # whatever a compiler and its tool chain may raise
        return f"torch.compile failed: {' '.join(str(error).split())[:150] or type(error).__name__}"


def _row(
    name: str,
    comparison: Comparison,
    mask: Literal["off", "on"],
    ours: Trajectory | str,
    reference: Trajectory | str,
    config: TrainConfig,
    steps: int,
) -> Row:
    for skipped in (ours, reference):
        if isinstance(skipped, str):
            return Row(name, comparison.title, mask, None, comparison.bound, None, Verdict("skipped", skipped))
    assert isinstance(ours, Trajectory)
    assert isinstance(reference, Trajectory)
    found = difference((ours.gradient, ours.weights), (reference.gradient, reference.weights), reference.before)
    verdict = classify(
        found,
        comparison.bound,
        _weights_bound(comparison.bound, config, steps),
        mask_error=ours.mask_error,
        must_differ=comparison.on_must_differ if mask == "on" else comparison.off_must_differ,
        may_differ=_GATE if mask == "on" else "",
    )
    return Row(name, comparison.title, mask, found, comparison.bound, ours.mask_error, verdict)


def _weights_bound(bound: float, config: TrainConfig, steps: int) -> float:
    # Adaptive optimizers divide a gradient that is all rounding by itself: their weights are shown, not judged.
    return 10 * steps * bound if config.optim.opt.lower() in _SGD else math.inf
