"""MaskPlan: one mask for many gradients of fixed shapes, say those of one DDP bucket, step after step."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmscale.masking import inhibition, lateral
from gmscale.masking.mask import GradientMask, Kept

if TYPE_CHECKING:
    from gmscale.masking.triton_kernels import FusedMask

Generators = Sequence[torch.Generator | None]


class MaskPlan:
    """What a mask does to a list of gradients, in one go or stage by stage; every stage equals GradientMask's.

    The stages, `lateral_maps`, `keep_maps` and `apply_`, speak of flat buffers that hold the maps of all
    gradients one after another; a gradient that passes through has an empty map. The plan owns the buffers that it
    returns: the next call of the same stage overwrites them. Gradients have the shapes, dtype and device of
    those that the plan was made for.
    """

    def __init__(self, mask: GradientMask, gradients: Sequence[Tensor]) -> None:
        self.mask = mask
        self.map_shapes = tuple(
            (0, 0) if mask.passes(g.shape) else lateral.map_shape(g.shape, mask.block) for g in gradients
        )
        """(rows, columns) of the lateral map of each gradient."""
        self._sizes = [prod(shape) for shape in self.map_shapes]
        self._buffers: dict[str, Tensor] = {}
        self._fused = _fused(mask, [g for g, size in zip(gradients, self._sizes, strict=True) if size])

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return the maps [rows, columns] in a flat buffer, one a gradient."""
        return [part.view(shape) for part, shape in zip(flat.split(self._sizes), self.map_shapes, strict=True)]

    def lateral_maps(self, gradients: Sequence[Tensor], residuals: Sequence[Tensor | None] | None = None) -> Tensor:
        """Return the lateral maps of the gradients, flat, float32 (float64 if a gradient is).

        Residuals are first added to the gradients, in place and in the same pass over memory.
        """
        flat = self._buffer("s", gradients)
        for g, residual, s in zip(gradients, _or_none(residuals, gradients), self.views(flat), strict=True):
            if s.numel():
                lateral.lateral_map(g, self.mask.norm, self.mask.block, residual=residual, out=s)
        return flat

    def keep_maps(self, flat_s: Tensor, generators: Generators | None = None) -> Tensor:
        """Return the keep maps of flat lateral maps; `generators` (one a gradient) drive the random operator."""
        flat_m = self._buffers.get("m")
        if flat_m is None:
            flat_m = self._buffers["m"] = torch.empty_like(flat_s)
        maps = self.views(flat_s)
        for s, m, generator in zip(maps, self.views(flat_m), _or_none(generators, maps), strict=True):
            if s.numel():
                m.copy_(self.mask.keep_map(s, generator))
        return flat_m

    @torch.no_grad()
    def apply_(
        self,
        gradients: Sequence[Tensor],
        flat_m: Tensor,
        *,
        strength: float,
        flat_s: Tensor | None = None,
        residuals: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Mask the gradients in place by their keep maps.

        With residuals, which the gradients hold already (`lateral_maps` added them), they are split into sent and
        held. Then `flat_s`, the lateral maps that `flat_m` was made of, says which gradients are finite: the
        others travel as they came (law 4).
        """
        assert flat_s is not None or residuals is None
        maps_s = _or_none(None, gradients) if flat_s is None else self.views(flat_s)
        rows = zip(gradients, maps_s, self.views(flat_m), _or_none(residuals, gradients), strict=True)
        for g, s, m, residual in rows:
            if m.numel():
                finite = True if s is None or residual is None else inhibition.is_finite(inhibition.extremes(s)[1])
                self.mask.apply_map_(g, m, strength=strength, residual=residual, finite=finite)

    @torch.no_grad()
    def mask_(
        self,
        gradients: Sequence[Tensor],
        *,
        strength: float,
        residuals: Sequence[Tensor | None] | None = None,
        generators: Generators | None = None,
        observe: bool = False,
    ) -> list[Kept | None]:
        """Mask the gradients in place as GradientMask.apply_ does each; return what was kept if `observe`.

        On CPU one gradient after another, so that it is still in the cache when its keep map is applied. On CUDA
        the fused kernels serve (`triton_kernels`); licnn, random, rescale, and an installation without Triton
        take the eager path, many launches a gradient.
        """
        residuals, generators = _or_none(residuals, gradients), _or_none(generators, gradients)
        if self._fused is not None and strength > 0 and not (observe and self.mask.norm != "l2"):
            masked = [i for i, size in enumerate(self._sizes) if size]
            of_masked = [gradients[i] for i in masked], [residuals[i] for i in masked]
            if self._fused.fits(*of_masked):
                flat_s, flat_m = self._fused.mask_(*of_masked, strength)
                return self._kept(gradients, flat_s, flat_m) if observe else [None] * len(gradients)
        return [
            self.mask.apply_(g, strength=strength, residual=residual, generator=generator, observe=observe)
            for g, residual, generator in zip(gradients, residuals, generators, strict=True)
        ]

    def _kept(self, gradients: Sequence[Tensor], flat_s: Tensor, flat_m: Tensor) -> list[Kept | None]:
        maps = zip(gradients, self.views(flat_s), self.views(flat_m), strict=True)
        return [self.mask.kept(g, s, m) if s.numel() else None for g, s, m in maps]

    def _buffer(self, name: str, gradients: Sequence[Tensor]) -> Tensor:
        if name not in self._buffers:
            double = any(g.dtype == torch.float64 for g in gradients)
            dtype = torch.float64 if double else torch.float32
            self._buffers[name] = torch.empty(sum(self._sizes), dtype=dtype, device=gradients[0].device)
        return self._buffers[name]


def _or_none(values: Sequence[Any] | None, like: Sequence[Any]) -> Sequence[Any]:
    return [None] * len(like) if values is None else values


def _fused(mask: GradientMask, gradients: Sequence[Tensor]) -> "FusedMask | None":
    if not gradients or gradients[0].device.type != "cuda":
        return None
    try:
        from gmscale.masking.triton_kernels import FusedMask
    except ImportError:  # the eager path serves
        return None
    return FusedMask(mask, gradients) if FusedMask.supports(mask, gradients) else None
