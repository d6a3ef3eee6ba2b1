"""Attachment: what a mask does to a model's parameters, step by step, whatever the site."""

import hashlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmscale.errors import UsageError
from gmscale.masking import GradientMask
from gmscale.sites.selection import Selection, Touched

_TIMED_CALLS = 4096  # CUDA events kept between two reports, when nobody asks for one


@dataclass(frozen=True)
class MaskReport:
    """What the mask did since the last report, on this rank; means over steps."""

    kept_entries: float | None
    """Share of the masked parameters' gradient entries that the keep map keeps; None before the first step."""
    kept_energy: float | None
    """Mean over parameters, weighted by their entries, of the kept share of the gradient's squared norm."""
    layers: dict[str, tuple[float, float]]
    """(kept entries, kept energy) of each masked parameter."""
    hook_ms: float | None
    """Milliseconds a step spent masking, on the device that masks."""
    strength: float | None
    """Strength of the last step."""


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
        self._clock = _Clock()

    # -- time -----------------------------------------------------------------------------------------------
    def at(
        self, step: int, total_steps: int | None = None, *, grad_scale: float = 1.0, observe: bool = True
    ) -> None:
        """Say which optimizer step comes next; call it before the step's first backward pass.

        Needed only by masks with a schedule (which also need `total_steps`) and by the random operator.
        `grad_scale` is the loss scale that the coming gradients carry (`GradScaler.get_scale()`): what error
        feedback holds back is brought to the same scale. `observe` False skips the kept-share statistics.
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
        layers = {name: mean.value() for name, mean in self._kept.items()}
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

    def detach(self) -> None:
        """Stop masking; gradients pass through from now on. What error feedback held back is dropped."""
        self._active = False
        self._residuals = {}

    # -- for the sites --------------------------------------------------------------------------------------
    def _mask_all(self, gradients: Sequence[tuple[str, Tensor]]) -> None:
        """Mask gradients, named as in `touched`, in place."""
        for name, gradient in gradients:
            self._mask(name, gradient)

    def _mask(self, name: str, gradient: Tensor) -> None:
        if self._strength is None:
            raise UsageError(
                f"the mask depends on time (schedule or random operator): call attachment.at(step, total_steps) "
                f"before each step's backward pass (site {self.site})"
            )
        residual = self._residuals.get(name)
        if residual is None and self.mask.error_feedback and self._strength > 0:
            residual = self._residuals[name] = torch.zeros_like(gradient)
        kept = self.mask.apply_(
            gradient,
            strength=self._strength,
            residual=residual,
            generator=self._generator(name, gradient.device),
            observe=self._observe,
        )
        if self._strength == 0 and residual is not None and not residual.any():
            del self._residuals[name]  # all of it has just been sent; a non-finite gradient would have kept it here
        if kept is not None:
            self._kept.setdefault(name, _Mean()).add(kept.entries, kept.energy)

    def _generator(self, name: str, device: torch.device) -> torch.Generator | None:
        if self.mask.operator != "random":
            return None
        # A function of what the draw is for, so that resuming, bucket order and world size cannot change it.
        key = f"{self.mask.seed}/{self._step}/{self._rank}/{name}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())
        return torch.Generator(device).manual_seed(seed)


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

    @contextmanager
    def running(self, device: torch.device, share_of_step: float) -> Iterator[None]:
        """Time a block that does `share_of_step` of one step's masking calls."""
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
