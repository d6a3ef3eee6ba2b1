"""One corruption of a batch: a pure function of pixels, sample and seed."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gmscale.corruption_error import EXTRA, FAMILIES, SEVERITIES
from gmscale.errors import check_choice, check_range
from gmscale.evaluation.corruptions import blur, digital, noise, weather
from gmscale.evaluation.corruptions.filters import Draw
from gmscale.evaluation.draws import uniform

_TRANSFORMS: dict[str, Callable[[Tensor, int, Draw], Tensor]] = {
    name: getattr(module, name)
    for module in (noise, blur, weather, digital)
    for name in (*FAMILIES, *EXTRA)
    if hasattr(module, name)
}
_KEY = 1000  # first of the families' keys: attacks count their restarts from 0


def corrupt(pixels: Tensor, family: str, severity: int, indices: Tensor, seed: int) -> Tensor:
    """Return `pixels` [N, C, H, W] in [0, 1], C 1 or 3, corrupted, as new ones on the same device.

    Values are rounded to 8 bits, as stored images are. What is drawn depends on seed, family and the sample's
    number in `indices`, int64 [N]; severities share it. Raises UsageError for an unknown family or severity, and
    for saturate without colour.

    SOURCE: Hendrycks and Dietterich 2019 (arXiv 1903.12261); README.md says where we differ.
    """
    check_choice(family, (*FAMILIES, *EXTRA), "family")
    check_range(severity, "severity", 1, len(SEVERITIES), whole=True)
    return _corrupted(pixels, family, severity, _draw(indices.to(pixels.device), family, seed))


def severities(pixels: Tensor, family: str, indices: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield what `corrupt` returns for each severity, drawing once."""
    draw = _draw(indices.to(pixels.device), family, seed)
    for severity in SEVERITIES:
        yield _corrupted(pixels, family, severity, draw)


@torch.no_grad()
def _corrupted(pixels: Tensor, family: str, severity: int, draw: Draw) -> Tensor:
    corrupted = _TRANSFORMS[family](pixels.float(), severity, draw)
    return (corrupted.clamp(0, 1) * 255).round() / 255


def _draw(indices: Tensor, family: str, seed: int) -> Draw:
    """Return what draws for a family; drawing as many numbers again costs nothing."""
    key = (seed, _KEY + (*FAMILIES, *EXTRA).index(family))
    drawn: dict[int, Tensor] = {}

    def draw(count: int) -> Tensor:
        if count not in drawn:
            drawn[count] = uniform(indices, count, key)
        return drawn[count]

    return draw
