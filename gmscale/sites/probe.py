"""Probe: measures on some steps, beside the training, what the mask does to gradient quality (masking/quality.py).

    probe = GradientProbe(attachment, every=100)
    for step, ...:
        attachment.at(step, total_steps)
        probe.before(step)                 # before the step's first backward pass; on every rank
        ...                                # forward and backward passes, all micro-batches
        report = probe.after(step)         # after the last backward pass, before or after the optimizer's step
        if report is not None: ...         # QualityReport of step - 1, the same on every rank

A measurement takes two adjacent steps, t = 0, every, 2 * every, ... and t + 1; `after(t + 1)` returns it. It is a
pure observer: weights, residuals, masks and random streams are bit for bit those without it. It costs copies of the
masked parameters' gradients (three from t on, a fourth at t + 1, float32, freed then) and five all-reduces of their
size, issued by `after` outside of any hook; `report.cost_ms` is the time. All other steps cost nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite, nan

import torch
import torch.distributed as dist
from torch import Tensor

from gmscale.errors import check_range
from gmscale.masking import GradientMask, quality
from gmscale.masking.lateral import expand, lateral_map, unit_entries
from gmscale.masking.quality import Spread
from gmscale.sites.attachment import Attachment, _Clock, seeded
from gmscale.sites.selection import Touched

_CHUNK = 2**22  # entries reduced together


@dataclass(frozen=True)
class Quality:
    """Gradient quality of one parameter, or of all, weighted by entries. None: the gradient was not finite."""

    alignment: float | None
    """cos(G_t, G_t+1): what the raw gradient reaches."""
    gain: float | None
    """Held-out alignment gain dQ = cos(m_t, G_t+1) - cos(G_t, G_t+1).

    With error feedback m_t carries earlier gradients too, which alone can raise dQ: compare with the control.
    """
    control_gain: float | None
    """dQ of a random mask with equally many kept units and the same strength, on the tensor that the mask saw."""
    kept_entries: float | None
    """Share of the entries that the keep map keeps; a unit whose gradient is zero counts as not kept."""
    kept_energy: float | None
    """Share of the squared norm, of what the mask saw, that the keep map keeps (at full strength)."""


@dataclass(frozen=True)
class Diagnostics:
    """Never evidence that a mask helps: zeroing all but one layer improves them. Samples are ranks."""

    raw: Spread
    masked: Spread
    gsnr: float | None
    """Of the raw gradients, see `quality.gsnr`."""


@dataclass(frozen=True)
class QualityReport:
    """One measurement."""

    step: int
    """Step t, whose mask was measured."""
    layers: dict[str, Quality]
    combined: Quality
    """Means over the layers, weighted by their entries."""
    diagnostics: Diagnostics | None
    """Of all masked parameters as one vector (gsnr: weighted mean of layers). None with fewer than two ranks."""
    layer_diagnostics: dict[str, Diagnostics]
    non_finite: int
    """Parameters left out of `combined` because a gradient was not finite."""
    cost_ms: float
    """Milliseconds that the measurement took on this rank, both steps together."""


class GradientProbe:
    """Measures gradient quality every `every` steps; see the module for use and cost.

    Serves every parameter site: `attachment` is what `gmscale.attach` returned. Ranks are those of `group`, by
    default the default process group if there is one (site `single`: this process alone). A step at scheduled
    strength 0 is not measured. Raises UsageError unless `every` is a whole number from 2 on.
    """

    def __init__(self, attachment: Attachment, every: int = 100, *, group: dist.ProcessGroup | None = None) -> None:
        check_range(every, "probe every", 2, whole=True)
        self._attachment = attachment
        self._every = every
        self._alone = attachment.site == "single" or not dist.is_initialized()
        self._group = group
        self._samples = 1 if self._alone else dist.get_world_size(group)
        self._capture: _Capture | None = None
        self._first: _First | None = None

    def before(self, step: int) -> None:
        """Start watching if `step` is one of a measurement; call on every rank before the first backward pass."""
        if self._first is not None and step != self._first.step + 1:
            self._first = None
        if self._first is not None:
            self._capture = _Capture(self._attachment, step, self._first.clock, masked=False)
        elif step % self._every == 0:
            self._capture = _Capture(self._attachment, step, _Clock(), masked=True)
        self._attachment.watch(self._capture)

    @torch.no_grad()
    def after(self, step: int) -> QualityReport | None:
        """Stop watching; return what `step` completes. Call on every rank after the step's last backward pass."""
        capture, self._capture = self._capture, None
        first, self._first = self._first, None
        self._attachment.watch(None)
        if capture is None or not capture.raw:
            return None
        assert step == capture.step, f"probe.before({capture.step}), then probe.after({step})"
        if first is not None:
            return self._second_step(first, capture)
        if self._attachment._strength:  # at strength 0 nothing was masked
            self._first = self._first_step(capture)
        return None

    def _first_step(self, capture: "_Capture") -> "_First":
        """Reduce the gradients of step t: keep their means, and the numbers that need no step t + 1."""
        first = _First(capture.step, capture.clock)
        with capture.clock.running(capture.device, 0.0):
            for layers in self._chunks():
                raw, masked, control = (
                    capture.flat(g, layers) for g in (capture.raw, capture.masked, capture.control)
                )
                of_ranks = torch.stack((_squares(raw, layers), _squares(masked, layers)))
                deviation = raw.clone() if self._samples > 1 else None
                for flat in (raw, masked, control):
                    self._sum(flat).div_(self._samples)
                first.means.append((layers, raw, masked, control))
                if deviation is not None:
                    variance = self._sum(deviation.sub_(raw).square_()).div_(self._samples - 1)
                    ratios = [
                        quality.gsnr(*pair)
                        for pair in zip(_split(raw, layers), _split(variance, layers), strict=True)
                    ]
                    of_mean = torch.stack((_squares(raw, layers), _squares(masked, layers)))
                    self._sum(of_ranks).div_(self._samples)
                    first.spread.append(torch.cat((of_mean, of_ranks, torch.stack(ratios)[None])))
            kept = self._sum(torch.stack([capture.kept_of(t.name) for t in self._attachment.touched]))
            first.kept = (kept[:, :2] / kept[:, 2:]).T
        return first

    def _second_step(self, first: "_First", capture: "_Capture") -> QualityReport:
        """Compare the means of step t with the raw mean of step t + 1."""
        columns = []
        with first.clock.running(capture.device, 1.0):
            for layers, *means in first.means:
                following = self._sum(capture.flat(capture.raw, layers))  # a cosine needs no division by the ranks
                of_layers = zip(*(_split(flat, layers) for flat in (*means, following)), strict=True)
                columns += [quality.alignment_gains(g, masked, after) for g, *masked, after in of_layers]
            table = torch.cat((torch.stack(columns, dim=1), first.kept, *_joined(first.spread))).T.tolist()
        return _report(first, table, self._attachment.touched, self._samples)

    def _chunks(self) -> Iterator[list[Touched]]:
        """Yield the masked parameters in runs of about `_CHUNK` entries: one all-reduce and little memory each."""
        chunk: list[Touched] = []
        for touched in self._attachment.touched:
            chunk.append(touched)
            if sum(_entries(t) for t in chunk) >= _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if not self._alone:
            dist.all_reduce(tensor, group=self._group)
        return tensor


@dataclass
class _First:
    """What step t leaves for step t + 1."""

    step: int
    clock: _Clock
    means: list[tuple[list[Touched], Tensor, Tensor, Tensor]] = field(default_factory=list)
    """(parameters, raw, masked, control): means over ranks, flat."""
    spread: list[Tensor] = field(default_factory=list)
    """[5, parameters]: |mean|^2 raw and masked, mean |g|^2 raw and masked, gsnr; empty on one rank."""
    kept: Tensor = field(default_factory=lambda: torch.empty(0))
    """[2, parameters]: kept entries, kept energy."""


class _Capture:
    """What one rank's mask sees (and on step t lets travel) in one step, summed over its calls for a parameter."""

    def __init__(self, attachment: Attachment, step: int, clock: _Clock, *, masked: bool) -> None:
        self.step, self.clock = step, clock
        self.raw: dict[str, Tensor] = {}
        self.masked: dict[str, Tensor] = {}
        self.control: dict[str, Tensor] = {}
        self.device = torch.device("cpu")
        self._attachment = attachment
        self._with_mask = masked
        self._pending: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    @torch.no_grad()
    def before_mask(self, gradients: Sequence[tuple[str, Tensor]], residuals: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients:
            self.device = gradient.device
            with self.clock.running(self.device, 0.0):
                _add(self.raw, name, gradient)
                if self._with_mask:
                    residual = residuals.get(name)
                    self._pending[name] = gradient.clone() if residual is None else gradient + residual

    @torch.no_grad()
    def after_mask(self, gradients: Sequence[tuple[str, Tensor]]) -> None:
        if not self._with_mask or not self._attachment._strength:
            return
        for name, sent in gradients:
            with self.clock.running(self.device, 0.0):
                self._see(name, self._pending.pop(name), sent, self._attachment._strength)

    def _see(self, name: str, total: Tensor, sent: Tensor, strength: float) -> None:
        mask = self._attachment.mask
        m, s = _keep_map(total, sent, mask, strength)
        units, last = unit_entries(total, mask.block)
        entries = (units * m.sum() - (units - last) * m[:, -1].sum()) / total.numel()
        energy = torch.nan_to_num((m * s).square().sum() / s.square().sum(), nan=1.0)
        _add(self._kept, name, torch.stack((entries, energy, torch.ones_like(entries))))
        # Ranks that share one mask (consensus) have one number here, so that they share one control too.
        call = self._calls[name] = self._calls.get(name, 0) + 1  # tells micro-batches apart
        generator = seeded(m.device, "control", mask.seed, self.step, self._attachment._rank, name, call)
        shuffled = m.flatten()[torch.randperm(m.numel(), generator=generator, device=m.device)].view(m.shape)
        _add(self.masked, name, sent)
        _add(self.control, name, total.mul_(expand(1 - strength * (1 - shuffled), total, mask.block)))

    def flat(self, gradients: dict[str, Tensor], layers: list[Touched]) -> Tensor:
        """Take the gradients of `layers` out of the dict as one vector; zeros for what this rank did not use."""
        parts = [gradients.pop(t.name, None) for t in layers]
        return torch.cat(
            [
                torch.zeros(_entries(t), device=self.device) if part is None else part.reshape(-1)
                for t, part in zip(layers, parts, strict=True)
            ]
        )

    def kept_of(self, name: str) -> Tensor:
        """Return [sum of kept entries, sum of kept energy, calls]."""
        kept = self._kept.get(name)
        return torch.zeros(3, dtype=torch.float64, device=self.device) if kept is None else kept


def _keep_map(total: Tensor, sent: Tensor, mask: GradientMask, strength: float) -> tuple[Tensor, Tensor]:
    """Return (keep map, lateral map of what the mask saw), float64, measured from what it saw and what it sent.

    Measured, because then it holds for every site and agreement: within a unit all entries have one factor.
    """
    s, s_sent = (lateral_map(x, "l2", mask.block).double() for x in (total, sent))
    factor = s_sent / s
    if mask.rescale:
        factor = factor / torch.nan_to_num(factor).amax()
    m = (1 - (1 - factor) / strength).clamp(0, 1)
    if mask.gate == "hard":
        m = m.round()  # what travels may be rounded to 16 bits
    return torch.where(s == 0, (s == 0).all().to(m.dtype), m), s


def _add(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)
    sums[name] = sums[name].add_(x) if name in sums else x


def _entries(touched: Touched) -> int:
    return torch.Size(touched.shape).numel()


def _split(flat: Tensor, layers: list[Touched]) -> tuple[Tensor, ...]:
    return flat.split([_entries(t) for t in layers])


def _squares(flat: Tensor, layers: list[Touched]) -> Tensor:
    """Return each layer's squared norm, float64."""
    return torch.stack([torch.linalg.vector_norm(x.double()).square() for x in _split(flat, layers)])


def _joined(spread: list[Tensor]) -> list[Tensor]:
    return [torch.cat(spread, dim=1)] if spread else []


def _report(first: _First, table: list[list[float]], touched: Sequence[Touched], samples: int) -> QualityReport:
    entries = {t.name: _entries(t) for t in touched}
    rows = dict(zip(entries, table, strict=True))
    layers = {name: Quality(*(_finite(x) for x in row[:5])) for name, row in rows.items()}
    combined = (
        quality.combine({name: getattr(layer, f.name) for name, layer in layers.items()}, entries)
        for f in fields(Quality)
    )
    of_layers = {name: _diagnostics(row[5:], samples) for name, row in rows.items() if len(row) > 5}
    finite = [row[5:] for row in rows.values() if len(row) > 5 and all(map(isfinite, row[5:9]))]
    whole = None
    if finite:
        sums = [sum(column) for column in zip(*(row[:4] for row in finite), strict=True)]
        gsnr = quality.combine({name: d.gsnr for name, d in of_layers.items()}, entries)
        whole = _diagnostics([*sums, gsnr], samples)
    return QualityReport(
        step=first.step,
        layers=layers,
        combined=Quality(*combined),
        diagnostics=whole,
        layer_diagnostics=of_layers,
        non_finite=sum(layer.gain is None for layer in layers.values()),
        cost_ms=first.clock.milliseconds_a_step() or 0.0,
    )


def _diagnostics(values: Sequence[float | None], samples: int) -> Diagnostics:
    """`values` are |mean|^2 raw and masked, mean |g|^2 raw and masked, gsnr."""
    raw_of_mean, masked_of_mean, raw, masked, gsnr = (nan if x is None else x for x in values)
    spreads = quality.spread(raw_of_mean, raw, samples), quality.spread(masked_of_mean, masked, samples)
    return Diagnostics(*spreads, _finite(gsnr))


def _finite(x: float) -> float | None:
    return x if isfinite(x) else None
