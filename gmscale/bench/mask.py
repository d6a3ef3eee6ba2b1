"""gmscale bench mask: the masking alone, on gradients shaped like those of real models; no processes.

The gradients lie in buckets as DDP makes them and are masked bucket by bucket, the way the communication hook
does it. In every round each operator takes its turn and so does a memory copy: an operator's share of the copy is
the bytes that it must move at least (memory.least_bytes), a second, over the bytes a second of the copy.
"""

import argparse
import statistics
import sys
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gmscale import environment, parallel
from gmscale.bench.memory import copy_gb_per_s, least_bytes, seconds_of
from gmscale.bench.options import check_model
from gmscale.bench.table import number, print_table, write_json
from gmscale.errors import OneLineParser, UsageError, nearest
from gmscale.masking import GradientMask
from gmscale.parallel import World
from gmscale.sites import Attachment
from gmscale.sites.selection import select

OPERATORS: dict[str, dict[str, Any]] = {
    "pool": {},
    "pool, soft": {"gate": "soft"},
    "log": {"operator": "log"},
    "dog": {"operator": "dog"},
    "licnn": {"operator": "licnn"},
    "random": {"operator": "random"},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BUCKET_MB = 25  # DDP's default
_WARM_UP = 2

Bucket = list[tuple[str, Tensor]]


class Masking(Attachment):
    """What the communication hook does with a bucket, without the communication."""

    site = "bench"
    timing = "once per step"

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, buckets: list[Bucket]) -> None:
        """Mask one step's gradients in place."""
        with torch.no_grad():
            for bucket in buckets:
                self._mask_all(bucket)


class Gradients:
    """Random gradients of a model's masked parameters, in the buckets that DDP would put them in."""

    def __init__(self, model: nn.Module, masked: set[str], dtype: torch.dtype, device: torch.device) -> None:
        self.buckets: list[Bucket] = []
        self._buffers: list[Tensor] = []
        self._fresh: list[Tensor] = []
        generator = torch.Generator().manual_seed(0)
        for parameters in _in_buckets(model, dtype.itemsize):
            entries = sum(p.numel() for _, p in parameters)
            fresh = torch.randn(entries, generator=generator).mul_(1e-3).to(device, dtype)
            buffer, offset, bucket = torch.empty_like(fresh), 0, []
            for name, p in parameters:
                if name in masked:
                    bucket.append((name, buffer.as_strided(p.shape, p.stride(), offset)))
                offset += p.numel()
            self._fresh.append(fresh)
            self._buffers.append(buffer)
            self.buckets.append(bucket)

    def refresh(self) -> None:
        """Undo what masking has changed: what is damped again and again would end in slow denormal numbers."""
        for buffer, fresh in zip(self._buffers, self._fresh, strict=True):
            buffer.copy_(fresh)

    def tensors(self) -> list[Tensor]:
        return [gradient for bucket in self.buckets for _, gradient in bucket]


def _in_buckets(model: nn.Module, itemsize: int) -> list[list[tuple[str, nn.Parameter]]]:
    buckets: list[list[tuple[str, nn.Parameter]]] = [[]]
    filled = 0
    for name, p in reversed(list(model.named_parameters())):  # the order in which the backward pass comes to them
        buckets[-1].append((name, p))
        filled += p.numel() * itemsize
        if filled >= _BUCKET_MB * 2**20:
            buckets.append([])
            filled = 0
    return [bucket for bucket in buckets if bucket]


def main(argv: list[str]) -> int:
    """Measure and show."""
    parser = OneLineParser(
        prog="gmscale bench mask", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    models = ["resnet50", "vit_small_patch16_224", "convnext_tiny"]
    parser.add_argument("--models", nargs="+", default=models, metavar="NAME", help="timm models")
    parser.add_argument(
        "--operators", nargs="+", default=list(OPERATORS), metavar="NAME", help=f"of: {', '.join(OPERATORS)}"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the gradients")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if any")
    parser.add_argument("--threads", type=int, default=parallel.cores(), help="threads on CPU")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each operator")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file too")
    options = parser.parse_args(argv)
    _check(options)
    result = measure(options)
    result["command"] = " ".join(("gmscale bench mask", *argv))
    show(result)
    write_json(result, options.json)
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in options.models:
        check_model(name, "--models")
    for name in options.operators:
        if name not in OPERATORS:
            raise UsageError(
                f"--operators: unknown {name!r}{nearest(name, OPERATORS)} (there are {', '.join(OPERATORS)})"
            )
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}; expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the environment and, by model, one row for each operator and error feedback."""
    gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        models = {}
        for name in options.models:
            models[name] = _measure_model(name, options, device)
            print(f"{name}: done", file=sys.stderr, flush=True)
        described = environment.describe(World(0, 0, 1, device, "single"))
    finally:
        torch.set_num_threads(threads)
    return {"environment": described, "dtype": options.dtype, "rounds": options.rounds, "models": models}


def _measure_model(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model = timm.create_model(name).to(memory_format=torch.channels_last)
    masked = {t.name for t in select(model, GradientMask()).touched}
    gradients = Gradients(model, masked, DTYPES[options.dtype], device)
    names = list(product(options.operators, (False, True)))
    maskings = {key: _masking(model, *key) for key in names}
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in names}
    copies = []
    for turn in range(-_WARM_UP, options.rounds):
        copy = copy_gb_per_s(device)
        for key, masking in maskings.items():
            gradients.refresh()
            masking.at(turn + _WARM_UP, 10**6, observe=False)
            taken = seconds_of(lambda masking=masking: masking.step(gradients.buckets), device)  # type: ignore[misc]
            if turn >= 0:
                seconds[key].append(taken)
        if turn >= 0:
            copies.append(copy)
    rows = []
    for key in names:
        least = least_bytes(gradients.tensors(), key[1])
        rates = [least / s / 1e9 for s in seconds[key]]
        launches = _launches(maskings[key], gradients) if device.type == "cuda" else None
        rows.append(
            {
                "operator": key[0],
                "error_feedback": key[1],
                "ms": 1e3 * statistics.median(seconds[key]),
                "least_bytes": least,
                "gb_per_s": statistics.median(rates),
                "share_of_copy": statistics.median(r / c for r, c in zip(rates, copies, strict=True)),
                "launches_per_bucket": launches,
            }
        )
    entries = sum(g.numel() for g in gradients.tensors())
    shapes = {"masked_entries": entries, "parameters": len(masked), "buckets": len(gradients.buckets)}
    return {**shapes, "copy_gb_per_s": statistics.median(copies), "rows": rows}


def _masking(model: nn.Module, operator: str, error_feedback: bool) -> Masking:
    mask = GradientMask(**OPERATORS[operator], error_feedback=error_feedback)
    return Masking(mask, select(model, mask), rank=0)


def _launches(masking: Masking, gradients: Gradients) -> float:
    """Return the kernels launched for a bucket, copies and fills apart."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        masking.step(gradients.buckets)
        torch.cuda.synchronize()
    events = [e.name for e in seen.events() if e.device_type == DeviceType.CUDA]
    return len([name for name in events if not name.startswith(("Mem", "Context"))]) / len(gradients.buckets)


def show(result: dict[str, Any]) -> None:
    """Print one table a model."""
    described = result["environment"]
    where = f"{described['device']}, {described['threads']} threads, torch {described['torch']}"
    for name, model in result["models"].items():
        title = (
            f"{name}: {model['masked_entries'] / 1e6:.1f} M masked {result['dtype']} entries in {model['buckets']} "
            f"buckets ({where}); a copy reaches {model['copy_gb_per_s']:.1f} GB/s; {result['rounds']} rounds"
        )
        headings = ("operator", "error feedback", "ms", "MB at least", "GB/s", "of copy", "launches a bucket")
        rows = [
            (
                row["operator"],
                "yes" if row["error_feedback"] else "no",
                number(row["ms"], 2),
                number(row["least_bytes"] / 1e6, 0),
                number(row["gb_per_s"], 2),
                number(row["share_of_copy"], 2),
                number(row["launches_per_bucket"], 1),
            )
            for row in model["rows"]
        ]
        print_table(title, headings, rows)
