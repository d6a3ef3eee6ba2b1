"""A keep map, applied in place: damp the inhibited units, or hold back what is damped (error feedback)."""

import torch
from torch import Tensor

from gmscale.masking.units import chunks, parts_of


def damp_(gradient: Tensor, factor: Tensor, block: int, rescale: bool = False) -> None:
    """Multiply every unit of the gradient by its entry of `factor` (a contiguous map).

    With `rescale` the gradient is then given its old norm back.
    """
    parts = parts_of(gradient.shape, gradient.stride(), block)
    if parts is None:  # strides that do not allow a view of the units
        plain = gradient.contiguous()
        damp_(plain, factor, block, rescale)
        gradient.copy_(plain)
        return
    before = torch.linalg.vector_norm(gradient, dtype=factor.dtype) if rescale else None
    factor_as_gradient = factor.to(gradient.dtype)
    for part in parts:
        part.of(gradient).mul_(part.of_map(factor_as_gradient))
    if before is not None:
        ratio = before / torch.linalg.vector_norm(gradient, dtype=factor.dtype)
        usable = torch.isfinite(ratio) & (ratio > 0)
        gradient.mul_(torch.where(usable, ratio, 1.0).to(gradient.dtype))


def send_and_hold_(
    gradient: Tensor,
    residual: Tensor,
    held_factor: Tensor,
    block: int,
    strength: float,
    hard: bool,
    finite: bool | Tensor,
) -> None:
    """Split gradient, which holds gradient + residual, into what is sent (gradient) and held (residual).

    sent + held equals their sum exactly. `held_factor`, a contiguous map, is the share of each unit that is held.
    Unless `finite`, the residual is taken back out of the gradient and keeps its value (law 4).
    """
    if finite is False:
        gradient.sub_(residual)
        return
    parts = parts_of(gradient.shape, gradient.stride(), block)
    if parts is None or residual.stride() != gradient.stride():
        plain, plain_residual = gradient.contiguous(), residual.contiguous()
        send_and_hold_(plain, plain_residual, held_factor, block, strength, hard, finite)
        gradient.copy_(plain)
        residual.copy_(plain_residual)
        return
    held_factor = held_factor.to(gradient.dtype)
    for part in parts:
        for factor, g, r in chunks(part, held_factor, gradient, residual):
            _split(g, r, factor, strength, hard, finite)


def _split(g: Tensor, r: Tensor, held_factor: Tensor, strength: float, hard: bool, finite: bool | Tensor) -> None:
    """Split g into sent (g) and held (r).

    A difference of two floats within a factor of two of each other has no rounding (Sterbenz), so of the two
    parts the larger is the one to multiply out.
    """
    held = torch.empty_like(r) if isinstance(finite, Tensor) else r
    if hard and strength >= 0.5:  # everything or at least half of an entry is held, or nothing
        torch.mul(g, held_factor, out=held)
    elif strength <= 0.5:  # at least half of every entry is sent
        torch.mul(g, 1 - held_factor, out=held)
        torch.sub(g, held, out=held)
    else:
        sent_first = g - g * (1 - held_factor)
        held.copy_(torch.where(held_factor <= 0.5, sent_first, g * held_factor))
    if isinstance(finite, Tensor):  # without a branch: reading `finite` would make the host wait for the device
        r.copy_(torch.where(finite, held, r))
    g.sub_(r)
