"""Attachment: what a mask does to a model's parameters, step by step, whatever the site."""

import hashlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.autograd.profiler import record_function

from gmscale.errors import UsageError
from gmscale.masking import GradientMask
from gmscale.masking.plan import MaskPlan
from gmscale.sites.selection import Selection, Touched

_TIMED_CALLS = 4096  # CUDA events kept between two reports, when nobody asks for one


@dataclass(frozen=True)
class MaskReport:
    """What the mask did since the last report, on this rank: means over the observed steps (time: over all)."""

    kept_entries: float | None
    """Share of the masked parameters' gradient entries that the keep map keeps; None before the first step."""
    kept_energy: float | None
    """Mean over parameters, weighted by their entries, of the kept share of the gradient's squared norm."""
    layers: dict[str, tuple[float, float]]
    """(kept entries, kept energy) of each masked parameter, in the model's order."""
    hook_ms: float | None
    """Milliseconds a step spent masking, on the device that masks."""
    strength: float | None
    """Strength of the last step."""
    wire_bytes: float | None = None
    """Bytes a step that this rank handed to all-reduces (site ddp, torch's own plain and 16-bit hooks)."""
    dense_bytes: float | None = None
    """Bytes a step that plain DDP would hand to its all-reduces."""
    dense_parameters: dict[str, str] = field(default_factory=dict)
    """consensus: masked parameters that travelled whole in some step, and why in the last such step."""


class Watcher(Protocol):
    """Sees what the mask sees and what it lets travel; changes neither."""

    def before_mask(self, gradients: Sequence[tuple[str, Tensor]], residuals: Mapping[str, Tensor]) -> None:
        """See this rank's raw gradients, named as in `touched`, and what error feedback will add to them."""

    def after_mask(self, gradients: Sequence[tuple[str, Tensor]]) -> None:
        """See the same gradients as this rank sends them."""


class Attachment(ABC):
    """A mask attached to a model: names what it touches, takes the step, reports, saves its state, detaches.

    The sites (`ddp`, `single`) are subclasses; they decide when `_mask` sees which gradient.
    """

    site: str
    timing: str
    """When the site masks: once a step or every micro-batch (law 9)."""
    agreement = "local"

    def __init__(self, mask: GradientMask, selection: Selection | None, rank: int) -> None:
        self.mask = mask
        self.touched: tuple[Touched, ...] = selection.touched if selection else ()
        self.passed: tuple[str, ...] = selection.passed if selection else ()
        self._names = {id(p): name for name, p in selection.parameters.items()} if selection else {}
        self._rank = rank
        self._active = True
        self._step: int | None = None
        self._strength: float | None = None if mask.needs_time else mask.peak_strength
        self._grad_scale = 1.0
        self._observe = True
        self._residuals: dict[str, Tensor] = {}
        self._kept: dict[str, _Mean] = {}
        self._plans: dict[tuple[Any, ...], MaskPlan] = {}
        self._clock = _Clock()
        self._watcher: Watcher | None = None

    # -- time -----------------------------------------------------------------------------------------------
    def at(
        self, step: int, total_steps: int | None = None, *, grad_scale: float = 1.0, observe: bool = True
    ) -> None:
        """Say which optimizer step comes next; call it before the step's first backward pass.

        Needed only by masks with a schedule (which also need `total_steps`) and by the random operator.
        `grad_scale` is the loss scale that the coming gradients carry (`GradScaler.get_scale()`): what error
        feedback holds back is brought to the same scale. `observe` False leaves the step out of the report, but for
        its time.
        """
        self._step = step
        self._observe = observe
        if total_steps is not None:
            self._strength = self.mask.strength_at(step, total_steps)
        elif self.mask.is_scheduled:
            raise UsageError("this mask has a schedule: call attachment.at(step, total_steps)")
        else:
            self._strength = self.mask.peak_strength
        if grad_scale != self._grad_scale:
            for residual in self._residuals.values():
                residual.mul_(grad_scale / self._grad_scale)
            self._grad_scale = grad_scale

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Context of the micro-batches before the last one of a step: gradients accumulate, unmasked."""

    # -- what was done --------------------------------------------------------------------------------------
    def report(self) -> MaskReport:
        """Return the kept shares and the time a step since the last report, and start afresh."""
        entries = {t.name: torch.Size(t.shape).numel() for t in self.touched}
        # in the model's order: gradients arrive from the last layer to the first
        layers = {t.name: self._kept[t.name].value() for t in self.touched if t.name in self._kept}
        total = sum(entries[name] for name in layers)
        weighted = [
            sum(kept[i] * entries[name] for name, kept in layers.items()) / total if total else None for i in (0, 1)
        ]
        hook_ms = self._clock.milliseconds_a_step()
        self._kept, self._clock = {}, _Clock()
        return MaskReport(weighted[0], weighted[1], layers, hook_ms, self._strength)

    def describe(self) -> dict[str, Any]:
        """Return what the mask touches, as written to `touched.json` and compared on resume."""
        return {
            "site": self.site,
            "agreement": self.agreement,
            "timing": self.timing,
            "touched": [
                {
                    "name": t.name,
                    "shape": list(t.shape),
                    "map": list(t.map_shape),
                    "unit": t.unit,
                    "entries": torch.Size(t.shape).numel(),
                }
                for t in self.touched
            ],
            "passed": list(self.passed),
        }

    # -- state ----------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: what error feedback holds back, and the loss scale it carries."""
        return {"grad_scale": self._grad_scale, "residuals": dict(self._residuals)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` of the same rank returned; raise UsageError if it belongs to another model."""
        shapes = {t.name: t.shape for t in self.touched}
        for name, residual in state["residuals"].items():
            if shapes.get(name) != tuple(residual.shape):
                raise UsageError(
                    f"the mask state holds {name} of shape {list(residual.shape)}, "
                    f"but this mask touches {name} with shape {list(shapes.get(name, ()))}"
                )
        self._residuals = dict(state["residuals"])
        self._grad_scale = float(state["grad_scale"])

    def watch(self, watcher: Watcher | None) -> None:
        """Show gradients to `watcher` before and after they are masked, until called with None.

        The time a watched step spends masking is not reported: the watcher's work would be in it.
        """
        self._watcher = watcher
        self._clock.paused = watcher is not None

    def detach(self) -> None:
        """Stop masking; gradients pass through from now on. What error feedback held back is dropped."""
        self._active = False
        self._residuals = {}

    # -- for the sites --------------------------------------------------------------------------------------
    def _mask_all(self, gradients: Sequence[tuple[str, Tensor]]) -> None:
        """Mask gradients, named as in `touched`, in place."""
        if self._strength is None:
            raise UsageError(
                f"the mask depends on time (schedule or random operator): call attachment.at(step, total_steps) "
                f"before each step's backward pass (site {self.site})"
            )
        self._before_mask(gradients)
        names, tensors = [name for name, _ in gradients], [gradient for _, gradient in gradients]
        kept = self._plan(names, tensors).mask_(
            tensors,
            strength=self._strength,
            residuals=[self._residual(name, gradient) for name, gradient in gradients],
            generators=[self._generator(name, gradient.device) for name, gradient in gradients],
            observe=self._observe,
        )
        for name, shares in zip(names, kept, strict=True):
            residual = self._residuals.get(name)
            if self._strength == 0 and residual is not None and not residual.any():
                del self._residuals[name]  # all of it has just been sent; a non-finite gradient would have kept it
            if shares is not None:
                self._kept.setdefault(name, _Mean()).add(shares.entries, shares.energy)
        self._after_mask(gradients)

    def _plan(self, names: Sequence[str], gradients: Sequence[Tensor]) -> MaskPlan:
        """Return the plan of these gradients, made when they first come together (DDP rebuilds its buckets)."""
        key = (*names, *((g.dtype, g.device, g.stride()) for g in gradients))
        plan = self._plans.get(key)
        if plan is None:
            stale = [k for k in self._plans if not set(names).isdisjoint(k)]
            for k in stale:
                del self._plans[k]
            plan = self._plans[key] = MaskPlan(self.mask, gradients)
        return plan

    def _residual(self, name: str, gradient: Tensor) -> Tensor | None:
        """Return what error feedback holds back of a gradient, laid out in memory as the gradient is."""
        residual = self._residuals.get(name)
        if residual is None:
            if not self.mask.error_feedback or self._strength == 0:
                return None
            residual = self._residuals[name] = torch.zeros_like(gradient)
        elif residual.stride() != gradient.stride():
            residual = self._residuals[name] = torch.empty_like(gradient).copy_(residual)
        return residual

    def _before_mask(self, gradients: Sequence[tuple[str, Tensor]]) -> None:
        """Show the watcher this rank's raw gradients, before residuals are added."""
        if self._watcher is not None:
            self._watcher.before_mask(gradients, self._residuals)

    def _after_mask(self, gradients: Sequence[tuple[str, Tensor]]) -> None:
        """Show the watcher what this rank sends of the same gradients, dense and before it is averaged."""
        if self._watcher is not None:
            self._watcher.after_mask(gradients)

    def _generator(self, name: str, device: torch.device) -> torch.Generator | None:
        if self.mask.operator != "random":
            return None
        return seeded(device, self.mask.seed, self._step, self._rank, name)


def seeded(device: torch.device, *key: object) -> torch.Generator:
    """Return a generator for one draw, seeded by what the draw is for.

    Then resuming, the order of buckets and the number of ranks cannot change it.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest))


class _Mean:
    """Running mean of (entries, energy), kept on the device: nothing waits for it until it is read."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0

    def add(self, entries: Tensor, energy: Tensor) -> None:
        pair = torch.stack((entries, energy)).double()
        self.sum = pair if self.sum is None else self.sum + pair
        self.count += 1

    def value(self) -> tuple[float, float]:
        assert self.sum is not None
        entries, energy = (self.sum / self.count).tolist()
        return entries, energy


class _Clock:
    """Time spent masking, a step: wall time on CPU, device time on CUDA (read only when reported)."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._steps = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event, float]] = deque(maxlen=_TIMED_CALLS)
        self.paused = False

    @contextmanager
    def running(self, device: torch.device, share_of_step: float) -> Iterator[None]:
        """Time a block that does `share_of_step` of one step's masking calls; a trace shows it as a range."""
        if self.paused:
            yield
            return
        # a range costs microseconds even where nobody traces
        with record_function("gradient mask") if profiler._is_profiler_enabled else nullcontext():
            if device.type == "cuda":
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[0].record()
                yield
                events[1].record()
                self._events.append((*events, share_of_step))
            else:
                start = time.perf_counter()
                yield
                self._seconds += time.perf_counter() - start
                self._steps += share_of_step

    def milliseconds_a_step(self) -> float | None:
        if self._events:
            self._events[-1][1].synchronize()
        total = 1e3 * self._seconds + sum(a.elapsed_time(b) for a, b, _ in self._events)
        # the events that are still held, and the steps that they belong to
        steps = self._steps + sum(share for *_, share in self._events)
        return total / steps if steps > 0 else None
