"""GradientMask: the settings of the method and what they do to one gradient tensor."""

import warnings
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from gmscale.errors import UsageError, check_choice, check_keys, check_range
from gmscale.masking import inhibition, lateral
from gmscale.masking.apply import damp_, send_and_hold_
from gmscale.masking.lateral import Norm
from gmscale.masking.schedule import Ramp, strength_at

Operator = Literal["pool", "log", "dog", "licnn", "random"]
Inhibition = Literal["pool", "log", "dog", "licnn"]
Gate = Literal["hard", "soft"]
Agreement = Literal["local", "consensus"]

# The settings that only some operators read; setting one for another operator warns.
_READ_BY = {
    "gate": {"pool"},
    "kappa": {"pool"},
    "sigma": {"log", "dog"},
    "ratio": {"dog"},
    "kernel_size": {"log", "dog", "licnn"},
    "licnn_a": {"licnn"},
    "licnn_b": {"licnn"},
    "paper_compat": {"log"},
    "random_like": {"random"},
}


class Kept(NamedTuple):
    """What the keep map m keeps of one gradient, at full strength: 0-d tensors on the gradient's device."""

    entries: Tensor
    """Share of the gradient's entries that m keeps: the mean of m over entries."""
    energy: Tensor
    """Share of the gradient's squared L2 norm that m * g keeps."""


@dataclass(frozen=True, kw_only=True)
class GradientMask:
    """Settings of the gradient mask (METHOD.md) and its action on one gradient tensor.

    g' = g * (1 - strength * (1 - m)), where the keep map m in [0, 1] comes from lateral inhibition on the
    lateral map of g. Raises UsageError (a ValueError) for a value out of range or an unknown keyword.
    """

    operator: Operator = "pool"
    """Inhibition: pool (order-free), log, dog, licnn (neighbourhoods), random (control of equal density)."""
    agreement: Agreement = "local"
    """local: each rank masks by its own gradient; consensus (site ddp): all by the mean of their lateral maps."""
    strength: float | None = None
    """How far inhibited units are damped: 0 is the identity, 1 removes them; unset means 0.5, with consensus 1."""
    gate: Gate = "hard"
    """pool only: hard keeps units above kappa times the mean; soft is divisive normalisation."""
    kappa: float | None = None
    """pool only: threshold relative to the mean of the peers; unset means 1.0 (hard) or 0.5 (soft)."""
    sigma: float | None = None
    """log and dog: width of the centre in units of the map; unset means 1.0 (11 with paper_compat)."""
    ratio: float = 1.6
    """dog: width of the surround relative to sigma."""
    kernel_size: int | None = None
    """log, dog: odd size of the kernel, unset covers 3 sigma; licnn: size of the zone, unset means 7."""
    licnn_a: float = 0.1
    """licnn: weight of the zone's mean."""
    licnn_b: float = 0.9
    """licnn: weight of the differences to stronger neighbours."""
    random_like: Inhibition = "pool"
    """random: the operator whose keep map is shuffled, so that both keep equally many units."""
    norm: Norm = "l2"
    """Norm of a unit's gradient entries: l2, l1 or max."""
    block: int = 16
    """Inputs in a unit of a linear layer or 1x1 convolution; 1 makes every weight a unit."""
    mask_1d: bool = False
    """Mask biases and normalisation parameters too; by default they pass through."""
    rescale: bool = False
    """Give the masked gradient the norm of the unmasked one; excludes error_feedback."""
    error_feedback: bool = True
    """Add what was held back to the next step's gradient; needs one gradient-sized buffer a rank."""
    paper_compat: bool = False
    """log only: the authors' 5x5 kernel exactly. It keeps everything from sigma 5 on, and warns."""
    start: float = 0.0
    """Share of training before which the mask is off."""
    end: float = 1.0
    """Share of training from which the mask is off again."""
    warmup: float = 0.0
    """Share of training over which the strength rises after start."""
    cooldown: float = 0.0
    """Share of training over which the strength falls before end."""
    ramp: Ramp = "linear"
    """Shape of warmup and cooldown: linear or cosine."""
    include: tuple[str, ...] = ()
    """Patterns (fnmatch) of the parameter names to mask; empty means all convolution and linear weights."""
    exclude: tuple[str, ...] = ()
    """Patterns (fnmatch) of the parameter names to leave alone."""
    seed: int = 0
    """Seed of the random operator."""

    def __new__(cls, **settings: Any) -> Self:
        # Python's own TypeError for a misspelt keyword does not say which one was meant.
        check_keys(settings, [f.name for f in fields(cls)], cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        choices = {"operator": Operator, "gate": Gate, "random_like": Inhibition, "norm": Norm, "ramp": Ramp}
        choices["agreement"] = Agreement
        for name, literal in choices.items():
            check_choice(getattr(self, name), get_args(literal), f"mask.{name}")
        if self.strength is not None:
            check_range(self.strength, "mask.strength", 0, 1)
        for name in ("start", "end", "warmup", "cooldown"):
            check_range(getattr(self, name), f"mask.{name}", 0, 1)
        if self.kappa is not None:
            check_range(self.kappa, "mask.kappa", 0, open_low=True)
        if self.sigma is not None:
            check_range(self.sigma, "mask.sigma", 0.1, 100)
        check_range(self.ratio, "mask.ratio", 1.01, 10)
        check_range(self.block, "mask.block", 1, whole=True)
        check_range(self.seed, "mask.seed", 0, whole=True)
        check_range(self.licnn_a, "mask.licnn_a", 0)
        check_range(self.licnn_b, "mask.licnn_b", 0, open_low=self.licnn_a == 0)
        for name in ("mask_1d", "rescale", "error_feedback", "paper_compat"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"mask.{name} is {getattr(self, name)!r}; expected true or false")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
                raise UsageError(f"mask.{name} is {patterns!r}; expected a list of patterns such as ('layer4.*',)")
            object.__setattr__(self, name, tuple(patterns))
        self._check_kernel()
        if self.start + self.warmup + self.cooldown > self.end:
            raise UsageError(
                f"mask.start + warmup + cooldown is {self.start + self.warmup + self.cooldown:g}, "
                f"later than mask.end {self.end:g}"
            )
        if self.rescale and self.error_feedback:
            raise UsageError(
                "mask.rescale and mask.error_feedback exclude each other (a rescaled gradient plus what was "
                "held back is no longer the gradient); set mask.error_feedback to false"
            )
        self._warn_of_ignored_settings()

    def _check_kernel(self) -> None:
        if self.kernel_size is not None:
            check_range(self.kernel_size, "mask.kernel_size", 3, whole=True)
            if self.kernel_size % 2 == 0:
                raise UsageError(f"mask.kernel_size is {self.kernel_size}; expected an odd number")
        if self.paper_compat and self._inhibition == "log":
            if self.kernel_size not in (None, 5):
                raise UsageError(f"mask.kernel_size is {self.kernel_size}; the authors' kernel is 5x5")
            warnings.warn(
                "paper_compat: the authors' 5x5 kernel is not zero-mean, and from sigma 5 on it has no "
                "negative lobe: as a mask it then keeps everything",
                stacklevel=4,
            )
        self.kernel()  # a kernel without a negative lobe is refused here, not in the first backward pass

    def _warn_of_ignored_settings(self) -> None:
        if self.agreement == "consensus" and self.peak_strength < 1:
            warnings.warn(
                f"consensus at strength {self.peak_strength:g} saves no bytes: damped units still travel. Leave "
                f"mask.strength unset (1, what is held back is sent later) to send only what is kept",
                stacklevel=4,
            )
        for field in fields(GradientMask):
            readers = _READ_BY.get(field.name)
            is_set = getattr(self, field.name) != field.default
            if readers and is_set and not readers & {self.operator, self._inhibition}:
                warnings.warn(
                    f"mask.{field.name} has no effect with operator {self.operator!r} "
                    f"(it is read by {', '.join(sorted(readers))})",
                    stacklevel=4,
                )

    @property
    def peak_strength(self) -> float:
        """The strength where the schedule has it in full."""
        if self.strength is not None:
            return self.strength
        # Consensus saves bytes only where nothing of an inhibited unit travels; error feedback holds it back.
        return 1.0 if self.agreement == "consensus" else 0.5

    @property
    def is_scheduled(self) -> bool:
        """Whether the strength changes over training."""
        return (self.start, self.end, self.warmup, self.cooldown) != (0.0, 1.0, 0.0, 0.0)

    @property
    def needs_time(self) -> bool:
        """Whether the mask depends on the step, which the caller then has to pass in."""
        return self.is_scheduled or self.operator == "random"

    def strength_at(self, step: int, total_steps: int) -> float:
        """Return the scheduled strength for `step` of `total_steps`."""
        return strength_at(
            step / total_steps, self.peak_strength, self.start, self.end, self.warmup, self.cooldown, self.ramp
        )

    def keep_map(self, s: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the keep map m in [0, 1] of a lateral map s >= 0 [rows, cols]; same shape and dtype.

        A map without contrast (constant, one entry, non-finite) inhibits nothing: m = 1. `generator`
        drives the random operator and lives on the device of s. Maps may be stacked: s [..., rows, cols].
        """
        return self._keep_map(s, generator)[0]

    def _keep_map(self, s: Tensor, generator: torch.Generator | None) -> tuple[Tensor, bool | Tensor]:
        """Return (the keep map, whether s is finite); the latter a bool for one map on CPU, else [..., 1, 1]."""
        lowest, highest = inhibition.extremes(s)
        finite, contrast = inhibition.is_finite(highest), inhibition.has_contrast(lowest, highest)
        if contrast is False:
            return torch.ones_like(s), finite
        m = self._inhibit(s, highest)
        if self.operator == "random":
            m = _shuffled(m, generator)
        return (m if contrast is True else torch.where(contrast, m, 1.0)), finite

    def apply(
        self, gradient: Tensor, *, strength: float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the masked copy of a gradient of any shape, without error feedback.

        `strength` defaults to the mask's own. Every entry is multiplied by a factor in [1 - strength, 1],
        so NaN and inf stay visible (laws 3 and 4).
        """
        strength = self.peak_strength if strength is None else strength
        check_range(strength, "strength", 0, 1)
        masked = gradient.clone()
        self.apply_(masked, strength=strength, generator=generator)
        return masked

    @torch.no_grad()
    def apply_(
        self,
        gradient: Tensor,
        *,
        strength: float,
        residual: Tensor | None = None,
        generator: torch.Generator | None = None,
        observe: bool = False,
    ) -> Kept | None:
        """Mask a gradient in place; return what was kept if `observe`.

        With a `residual` (shape and dtype of the gradient) the mask acts on gradient + residual, and what it
        holds back replaces the residual: sent + held equals that sum exactly (law 10). A gradient with NaN or
        inf (or beyond 1e18, whose squares overflow) is left as it is up to rounding, the residual untouched
        (law 4).
        """
        if self.passes(gradient.shape) or (strength == 0 and residual is None):
            return None
        s = lateral.lateral_map(gradient, self.norm, self.block, residual=residual)
        if strength > 0:
            m, finite = self._keep_map(s, generator)
        else:
            m, finite = torch.ones_like(s), inhibition.is_finite(inhibition.extremes(s)[1])
        kept = self.kept(gradient, s, m) if observe else None
        self.apply_map_(gradient, m, strength=strength, residual=residual, finite=finite)
        return kept

    def passes(self, shape: tuple[int, ...]) -> bool:
        """Whether a gradient of this shape has no lateral map, or none that this mask makes."""
        return len(shape) == 0 or prod(shape) == 0 or (len(shape) == 1 and not self.mask_1d)

    def apply_map_(
        self, gradient: Tensor, m: Tensor, *, strength: float, residual: Tensor | None, finite: bool | Tensor
    ) -> None:
        """Mask a gradient in place by its keep map; with a residual it holds gradient + residual.

        `finite` says whether the lateral map was: with a residual, a non-finite gradient travels as it came.
        """
        if residual is not None:
            send_and_hold_(gradient, residual, (1 - m).mul_(strength), self.block, strength, self.is_hard, finite)
        else:
            damp_(gradient, torch.rsub(1 - m, 1, alpha=strength), self.block, self.rescale)

    def kept(self, gradient: Tensor, s: Tensor, m: Tensor) -> Kept:
        """Return what the keep map m keeps of a gradient, not yet masked, and its lateral map s."""
        size, last = lateral.unit_entries(gradient, self.block)
        entries = size * m.sum() - (size - last) * m[:, -1].sum()
        if self.norm != "l2":
            s = lateral.lateral_map(gradient, "l2", self.block)
        energy = torch.linalg.vector_norm(m * s) / torch.linalg.vector_norm(s)
        # A zero gradient has no energy to lose.
        return Kept(entries / gradient.numel(), torch.nan_to_num(energy.square(), nan=1.0))

    @property
    def is_hard(self) -> bool:
        """Whether keep maps hold zeros and ones only."""
        return not (self._inhibition == "pool" and self.gate == "soft")

    @property
    def effective_kappa(self) -> float:
        """kappa, or its default."""
        return self.kappa or (1.0 if self.is_hard else 0.5)

    @property
    def _inhibition(self) -> Inhibition:
        return self.random_like if self.operator == "random" else self.operator

    def _inhibit(self, s: Tensor, highest: inhibition.Extreme) -> Tensor:
        operator = self._inhibition
        if operator == "pool":
            if not self.is_hard:
                return inhibition.pool_soft(s, self.effective_kappa, highest)
            return inhibition.pool_hard(s, self.effective_kappa, highest)
        if operator == "licnn":
            response = inhibition.licnn_response(s, self.kernel_size or 7, self.licnn_a, self.licnn_b)
        else:
            kernel = self.kernel()
            assert kernel is not None
            response = inhibition.centre_surround(s, kernel)
        return inhibition.hard_gate(response, highest)

    def kernel(self) -> Tensor | None:
        """Return the kernel [k, k] (float64, CPU) of log and dog, as the operator itself or as `random_like`."""
        if self._inhibition == "log" and self.paper_compat:
            return inhibition.paper_kernel(self.sigma or 11.0)
        if self._inhibition == "log":
            return inhibition.log_kernel(self.sigma or 1.0, self.kernel_size)
        if self._inhibition == "dog":
            return inhibition.dog_kernel(self.sigma or 1.0, self.ratio, self.kernel_size)
        return None


def _shuffled(m: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return each map [rows, cols] of m with its entries in random order."""
    maps = m.flatten(-2).reshape(-1, m.shape[-2] * m.shape[-1])
    if len(maps) == 1:
        order = torch.randperm(maps.shape[1], generator=generator, device=m.device)[None]
    else:
        order = torch.rand(maps.shape, generator=generator, device=m.device).argsort(1)
    return maps.gather(1, order).view(m.shape)
