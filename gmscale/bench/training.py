"""Training steps to be measured: the variants, one variant's model, and turns taken with plain DDP.

Every variant is measured against a plain DDP model that lives in the same processes: the two take turns, a few
steps each, the order changing from round to round, and the ratio is the median over rounds of (variant / plain in
the same round), so that a machine's drift hits both alike. Only these two models are alive at a time, so that a
large model fits; plain DDP against a second plain DDP shows the noise. Memory and bytes are taken from processes
in which the variant lives alone.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from gmscale import environment, parallel
from gmscale.bench.memory import copy_gb_per_s, least_bytes
from gmscale.errors import UsageError
from gmscale.masking import GradientMask
from gmscale.parallel import World
from gmscale.sites import Attachment, attach
from gmscale.sites.output import OUTPUT_DEFAULT
from gmscale.traffic import counted, total_bytes

PLAIN = "plain DDP"
WARM_UP = 4  # steps: buckets are rebuilt, PowerSGD has begun, allocators are filled
_COUNTED = 3  # steps over which bytes are averaged: a mask may keep more in one than in another
_POWER_SGD_FROM = 2  # the first step PowerSGD may compress


@dataclass(frozen=True)
class Variant:
    """A way to reduce gradients: a mask, one of torch's communication hooks, both, or neither."""

    mask: GradientMask | None = None
    hook: Callable[..., Any] | None = None
    site: str = "ddp"
    only_kernels: bool = False
    """Mask the k x k convolutions and nothing else."""
    note: str = ""

    def state(self, group: dist.ProcessGroup) -> Any:
        """Return what the hook takes as its state."""
        if self.hook is powerSGD_hook:
            return PowerSGDState(group, start_powerSGD_iter=_POWER_SGD_FROM)
        return group


_log = GradientMask(operator="log", error_feedback=False)
_consensus = GradientMask(agreement="consensus")
VARIANTS: dict[str, Variant] = {
    PLAIN: Variant(note="its ratio is that of a second plain DDP model: the noise"),
    "fp16 hook": Variant(hook=fp16_compress_hook),
    "bf16 hook": Variant(hook=bf16_compress_hook),
    "PowerSGD": Variant(
        hook=powerSGD_hook, note="rank 1; on gloo with one bucket for everything (several deadlock there)"
    ),
    "strength 0": Variant(GradientMask(strength=0.0)),
    "pool": Variant(GradientMask(error_feedback=False)),
    "pool, error feedback": Variant(GradientMask(), note="the default mask"),
    "log": Variant(_log),
    "log, k x k only": Variant(_log, only_kernels=True),
    "random": Variant(GradientMask(operator="random", error_feedback=False)),
    "consensus": Variant(_consensus),
    "consensus + bf16": Variant(_consensus, bf16_compress_hook),
    "output site": Variant(
        replace(OUTPUT_DEFAULT, start=0.0, end=1.0),
        site="output",
        note="log, sigma 1, strength 0.25 on the gradients of layer outputs",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and how long."""

    model: str
    image_size: int
    batch_size: int
    amp: str
    rounds: int
    steps: int


class Subject:
    """One variant's model with everything a training step needs; trained by the ranks of `group`, or by all."""

    def __init__(
        self, variant: Variant, setting: Setting, world: World, group: dist.ProcessGroup | None = None
    ) -> None:
        torch.manual_seed(0)
        bare = create(setting).to(memory_format=torch.channels_last).to(world.device)
        self.model = DistributedDataParallel(
            bare,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=_bucket_cap_mb(variant, bare, world),
            process_group=group,
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.attachment = self._attach(variant)
        self._autocast = partial(
            torch.autocast, world.device.type, dtype=torch.bfloat16, enabled=setting.amp == "bf16"
        )
        self._steps_done = 0

    def _attach(self, variant: Variant) -> Attachment | None:
        mask = variant.mask
        if mask is None:
            if variant.hook is not None:
                self.model.register_comm_hook(variant.state(self.model.process_group), variant.hook)
            return None
        if variant.only_kernels:
            mask = replace(mask, include=kernel_names(self.model.module))
        if variant.hook is None:
            return attach(self.model, mask, variant.site)
        state = variant.state(self.model.process_group)
        return attach(self.model, mask, variant.site, hook=variant.hook, hook_state=state)

    def step(self, images: Tensor, labels: Tensor, observe: bool = False) -> None:
        """Do one training step; `observe` what the mask keeps."""
        if self.attachment is not None:
            self.attachment.at(self._steps_done, 10**6, observe=observe)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self._steps_done += 1

    def least_hook_bytes(self) -> int | None:
        """Return what masking must move at least in a step; None where the mask is not this rank's alone."""
        attachment = self.attachment
        if attachment is None or attachment.site != "ddp" or attachment.mask.agreement != "local":
            return None
        if attachment.mask.peak_strength == 0:
            return None
        masked = {t.name for t in attachment.touched}
        weights = [p for name, p in self.model.module.named_parameters() if name in masked]
        return least_bytes(weights, attachment.mask.error_feedback)


def create(setting: Setting) -> nn.Module:
    """Return the timm model, made for the image size where its shape depends on it."""
    try:
        return timm.create_model(setting.model, num_classes=1000, img_size=setting.image_size)
    except TypeError:  # a convolutional network has no such argument
        return timm.create_model(setting.model, num_classes=1000)


def kernel_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of k x k convolutions, k > 1."""
    names = tuple(
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1
    )
    if not names:
        raise UsageError("the model has no k x k convolution")
    return names


def _bucket_cap_mb(variant: Variant, model: nn.Module, world: World) -> float | None:
    if variant.hook is not powerSGD_hook or world.device.type == "cuda":
        return None  # torch's default
    # Its callbacks wait for all-reduces that gloo's two threads, both in such callbacks, never come to.
    return 2.0 + sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def made_up_batch(setting: Setting, world: World) -> tuple[Tensor, Tensor]:
    """Return random images and labels, other ones on each rank."""
    generator = torch.Generator().manual_seed(world.rank)
    shape = (setting.batch_size, 3, setting.image_size, setting.image_size)
    images = torch.randn(shape, generator=generator).to(world.device, memory_format=torch.channels_last)
    return images, torch.randint(1000, (setting.batch_size,), generator=generator).to(world.device)


class Turn(NamedTuple):
    """One round: seconds of the slowest rank for each model's steps, GB/s of a memory copy, bytes sent."""

    plain: float
    variant: float
    copy: float
    plain_sent: int
    variant_sent: int


class Duel:
    """A variant and plain DDP, warmed up and ready to take turns."""

    def __init__(self, world: World, setting: Setting, name: str) -> None:
        self._world, self._setting = world, setting
        self._batch = made_up_batch(setting, world)
        self._plain = Subject(VARIANTS[PLAIN], setting, world)
        self.subject = Subject(VARIANTS[name], setting, world)
        for subject in (self._plain, self.subject):
            for _ in range(WARM_UP):
                subject.step(*self._batch)

    def turns(self, rounds: int, bytes_sent: Callable[[], int] = lambda: 0) -> list[Turn]:
        """Take turns; the first to go changes from round to round. `bytes_sent` reads a counter."""
        if self.subject.attachment is not None:
            self.subject.attachment.report()  # starts its clock afresh, without the warm-up
        done = []
        for number in range(rounds):
            order = (self._plain, self.subject) if number % 2 == 0 else (self.subject, self._plain)
            taken = {}
            for subject in order:
                before = bytes_sent()
                taken[subject] = self._seconds(subject), bytes_sent() - before
            (plain, plain_sent), (variant, variant_sent) = taken[self._plain], taken[self.subject]
            done.append(Turn(plain, variant, copy_gb_per_s(self._world.device), plain_sent, variant_sent))
        return done

    def _seconds(self, subject: Subject) -> float:
        """Return the seconds that the slowest rank takes for the steps of one turn."""
        world = self._world
        parallel.barrier(world)
        start = time.perf_counter()
        for _ in range(self._setting.steps):
            subject.step(*self._batch)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX, group=world.control)
        return float(elapsed)

    def row(self, turns: list[Turn]) -> dict[str, Any]:
        """Return what the turns say, in milliseconds a step and ratios."""
        ratios = [turn.variant / turn.plain for turn in turns]
        steps = self._setting.steps
        attachment, least = self.subject.attachment, self.subject.least_hook_bytes()
        hook_ms = attachment.report().hook_ms if attachment else None
        copy = statistics.median(turn.copy for turn in turns)
        return {
            "step_ms": 1e3 * statistics.median(turn.variant for turn in turns) / steps,
            "plain_step_ms": 1e3 * statistics.median(turn.plain for turn in turns) / steps,
            "ratio": statistics.median(ratios),
            "ratio_quartiles": quartiles(ratios),
            "hook_ms": hook_ms,
            "hook_least_bytes": least,
            "copy_gb_per_s": copy,
            "share_of_copy": least / (hook_ms * 1e6) / copy if least and hook_ms else None,
        }


def quartiles(values: list[float]) -> list[float]:
    """Return the first and the third quartile."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def duel(world: World, setting: Setting, name: str) -> dict[str, Any]:
    """Return the times of a variant against plain DDP."""
    pair = Duel(world, setting, name)
    return pair.row(pair.turns(setting.rounds))


def alone(world: World, setting: Setting, name: str) -> dict[str, Any]:
    """Return the peak memory of a variant that lives alone, and what a step of it hands to collectives."""
    batch = made_up_batch(setting, world)
    subject = Subject(VARIANTS[name], setting, world)
    for _ in range(WARM_UP):
        subject.step(*batch)
    row: dict[str, Any] = {"peak_memory_mb": parallel.peak_memory_mb(world.device)}
    if subject.attachment is not None:
        subject.attachment.report()
    with counted() as operations:
        for _ in range(_COUNTED):
            subject.step(*batch, observe=True)
    row["bytes_per_step"] = total_bytes(operations) / _COUNTED
    row["collectives"] = operations
    if subject.attachment is not None:
        said = subject.attachment.report()
        row |= {"kept_entries": said.kept_entries, "kept_energy": said.kept_energy}
        row |= {"reported_wire_bytes": said.wire_bytes, "travelled_whole": said.dense_parameters}
    return {**row, "environment": environment.describe(world)}
