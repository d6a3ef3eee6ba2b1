"""The method: settings, lateral maps, inhibition, schedule. Knows neither models nor processes."""

from gmscale.masking.mask import GradientMask, Kept

__all__ = ["GradientMask", "Kept"]
