"""What a mask does to gradients that are at hand: the numbers of one parameter, and what they say together.

The formulas are those of masking/quality.py and of the probe of training runs (sites/probe.py).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gmscale.masking import GradientMask, quality
from gmscale.masking.lateral import lateral_map
from gmscale.sites.attachment import seeded
from gmscale.statistics import paired_difference, summary

STRENGTH = 1.0
"""In full, as kept shares are: operators and runs compare, whatever their strengths and schedules."""
NUMBERS = 10
"""How many `judged` returns: cosines and shares, squared norms, and gsnr."""
_SHARES, _SQUARES = 5, 9  # where each of these ends


def judged(of_ranks: Sequence[Tensor], following: Tensor, mask: GradientMask, key: tuple[object, ...]) -> Tensor:
    """Return what `mask` does to one parameter's gradients, one a rank, judged by a later one of any length.

    float64 [10]: alignment, dQ, dQ of a random mask, kept entries, kept energy (as `sites.probe.Quality`, but at
    full strength); squared norm of the mean, raw and masked; mean squared norm, raw and masked; gsnr. What is drawn
    follows from `key`.
    """
    own = [lateral_map(g, mask.norm, mask.block) for g in of_ranks]
    agreed = mask.agreement == "consensus"
    maps = [torch.stack(own).mean(0)] * len(own) if agreed else own
    kept: list[Tensor] = []
    masked: list[Tensor] = []
    control: list[Tensor] = []
    for rank, g in enumerate(of_ranks):
        draw = (*key, 0 if agreed else rank)
        m = mask.keep_map(maps[rank], seeded(g.device, "mask", *draw))
        order = torch.randperm(m.numel(), generator=seeded(g.device, "control", *draw), device=g.device)
        kept.append(torch.stack(mask.kept(g, own[rank], m)))
        for sent, keep in ((masked, m), (control, m.flatten()[order].view(m.shape))):
            sent.append(g.clone())
            mask.apply_map_(sent[-1], keep, strength=STRENGTH, residual=None, finite=True)
    raw, by_mask, by_control = (torch.stack(list(gradients)).double() for gradients in (of_ranks, masked, control))
    mean, mean_masked = raw.mean(0), by_mask.mean(0)
    squares = [x.square().sum() for x in (mean, mean_masked)]
    squares += [x.square().sum() / len(x) for x in (raw, by_mask)]
    return torch.cat(
        (
            quality.alignment_gains(mean, (mean_masked, by_control.mean(0)), following),
            torch.stack(kept).mean(0).double(),
            torch.stack((*squares, quality.gsnr(mean, raw.var(0)))),
        )
    )


def summarized(table: Tensor, entries: Mapping[str, int], ranks: int) -> dict[str, dict[str, Any]]:
    """Return `combined` and `layers` from the numbers [pairs, layers, 10] of `judged`; `entries` of each layer.

    Combined are the layers whose gradients were finite, their shares by their entries, which are fixed: a mask
    cannot weight its own sum. Ratios are of means over pairs, not means of ratios, which may have a pole.
    """
    means = table.mean(0)
    layers = {name: _described(row, ranks) for name, row in zip(entries, means.tolist(), strict=True)}
    finite = table[..., :_SQUARES].isfinite().all(2).all(0)
    weights = torch.tensor(list(entries.values()), dtype=torch.float64)[finite]
    by_pair = (table[:, finite, :_SHARES] * weights[:, None]).sum(1) / weights.sum()
    gsnr = quality.combine({name: layer["gsnr"] for name, layer in layers.items()}, entries)
    squares = means[finite, _SHARES:_SQUARES].sum(0)
    combined = _described([*by_pair.mean(0).tolist(), *squares.tolist(), math.nan if gsnr is None else gsnr], ranks)
    gains, controls = by_pair[:, 1].tolist(), by_pair[:, 2].tolist()
    gain, over_control = (paired_difference(gains, others) for others in ([0.0] * len(gains), controls))
    combined |= {
        "gain_std": summary(gains).std,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "over_control": over_control.mean,
        "over_control_low": over_control.low,
        "over_control_high": over_control.high,
    }
    return {"combined": combined, "layers": layers}


def _described(numbers: Sequence[float], ranks: int) -> dict[str, Any]:
    """Return the numbers of `judged` by name, squared norms as the diagnostics that they are for."""
    alignment, gain, control_gain, entries, energy, of_mean, masked_of_mean, of_ranks, masked_of_ranks, gsnr = (
        numbers
    )
    raw = quality.spread(of_mean, of_ranks, ranks)
    masked = quality.spread(masked_of_mean, masked_of_ranks, ranks)
    return {
        "alignment": alignment,
        "gain": gain,
        "control_gain": control_gain,
        "kept_entries": entries,
        "kept_energy": energy,
        "snr": raw.snr,
        "snr_masked": masked.snr,
        "noise_scale": raw.noise_scale,
        "noise_scale_masked": masked.noise_scale,
        "gsnr": gsnr,
    }
